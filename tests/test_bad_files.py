"""Bad input: files that are no models. The command line says so in one line, within bounds."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged import DEEP, HTML, LFS, entry, file, pickled, two, written
from refusal import CommandLine

from cutdiff.checkpoint.header import MAX_HEADER

AGAIN = "download it again"
PIPE = "is a device, a pipe or a socket: only regular files are read, so copy it to one"
NONE = "does not exist: pass a diffusers folder"
PICKLED = "pickled checkpoint, which could run code as it is opened, so it is not: convert it to safetensors"
METADATA = "where a string belongs"


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def unreadable(path: Path) -> None:
    """Make a file without permission; for root, who can read it all the same, a link to itself."""
    path.write_bytes(file({}, b""))
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        path.symlink_to(path)
        if not path.exists():
            pytest.skip("there is no file that root cannot read")


FILES: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "missing": (lambda _: None, NONE),
    "missing behind a link": (dangling, NONE),
    "a folder with no model": (folder, "is no diffusers model: it has no model_index.json: pass a folder that has one"),
    "empty": (b"", f"is empty: {AGAIN}"),
    "< 8 bytes": (b"\1\2\3\4\5", f"or cut off after 5 of the 8 bytes of its length: {AGAIN}"),
    "header length 2^63": (struct.pack("<Q", 2**63) + b"{}", f"{2**63} bytes of header are more than {MAX_HEADER}"),
    "101 MB header": (struct.pack("<Q", 101_000_000) + b"{}", f"101000000 bytes of header are more than {MAX_HEADER}"),
    "header past the end": (
        struct.pack("<Q", 99) + b"{}",
        f"is truncated: it has 10 bytes where its header alone takes 107: {AGAIN}",
    ),
    "header of 128 bytes past the end": (struct.pack("<Q", 128) + b'{"a"', "is truncated: it has 12 bytes"),
    "nothing after the length of the header": (struct.pack("<Q", 128), "has 8 bytes where its header alone takes 136"),
    "header that is a list": (file(b"[1, 2]"), f"its header does not begin with {{: {AGAIN}"),
    "truncated": (file({"a": entry()})[:-3], f"is truncated: it has 74 of 77 bytes: {AGAIN}"),
    "truncated before its data": (file({"a": entry()}, b""), "is truncated: it has 69 of 77 bytes"),
    "trailing bytes": (
        file({"a": entry()}, bytes(11)),
        f"goes on for 3 bytes after its last tensor, at byte 77: {AGAIN}",
    ),
    "trailing bytes without a tensor": (file({}), "goes on for 8 bytes after its last tensor, at byte 10"),
    "overlapping offsets": (two((0, 8), (4, 12)), f"has tensors that overlap, 'a' and 'b': {AGAIN}"),
    "overlapping offsets, both the same": (two((0, 8), (0, 8)), "has tensors that overlap"),
    "reversed offsets": (
        file({"a": entry(data_offsets=[8, 0])}),
        f"gives 'a' the data_offsets (8, 0), which are no begin and end: {AGAIN}",
    ),
    "negative offsets": (file({"a": entry(data_offsets=[-8, 0])}), "stands '-8, 0]}}' where an integer from 0"),
    "offsets beyond every file": (file({"a": entry(data_offsets=[10**18, 10**18 + 8])}), "has a hole of"),
    "a hole": (two((0, 8), (9, 17)), f"has a hole of 1 bytes before 'b': {AGAIN}"),
    "a hole at the start": (two((16, 24), (8, 16)), "has a hole of 8 bytes before 'b'"),
    "shape x dtype != bytes": (
        file({"a": entry(shape=[2, 3])}),
        f"gives 'a' 8 bytes where F32 (2, 3) takes 24: {AGAIN}",
    ),
    "shape overflow": (
        file({"a": entry(shape=[2**32, 2**32])}),
        f"the shape (4294967296, 4294967296), which takes 2⁶³ bytes or more: {AGAIN}",
    ),
    "shape overflow around zero": (file({"a": entry(shape=[0, 2**62, 4], data_offsets=[0, 0])}, b""), "2⁶³ bytes or"),
    "unknown dtype": (file({"a": entry(dtype="F4")}), "'F4', which is not read: convert it to F16, BF16 or F32"),
    "non-string metadata": (file({"__metadata__": {"steps": 20}}, b""), f"stands '20}}}}' {METADATA}: {AGAIN}"),
    "non-string metadata, an object": (file({"__metadata__": {"k": {}}}, b""), f"stands '{{}}}}}}' {METADATA}"),
    "non-string metadata, a list": (file({"__metadata__": ["k"]}, b""), "stands '[\"k\"]}' where { belongs"),
    "non-UTF-8": (
        file(b'{"caf\xe9":{}}'),
        f"has a broken header: at byte 9 stands '\"caf\ufffd\":{{}}}}' where UTF-8 belongs: {AGAIN}",
    ),
    "non-UTF-8 but UTF-16": (file("{}".encode("utf-16-le")), "stands '\\x00}\\x00' where a string"),
    "JSON nested 10,000 deep": (file(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "gives 'a' the field 'a'"),
    "JSON nested 10,000 deep, a shape": (written('"shape":' + "[" * DEEP), "where an integer from 0"),
    "JSON nested 10,000 deep, metadata": (file(b'{"__metadata__":' + b'{"k":' * DEEP), METADATA),
    "duplicate keys": (file(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), f"names 'a' twice: {AGAIN}"),
    "duplicate keys, one escaped": (file(b'{"a":%s,"\\u0061":{}}' % json.dumps(entry()).encode()), "names 'a' twice"),
    "duplicate keys of an entry": (written('"shape":[2],"shape":[2],"data_offsets":[0,8]'), "names 'shape' twice"),
    "duplicate keys of metadata": (file(b'{"__metadata__":{"k":"1","k":"2"}}', b""), "names 'k' twice"),
    "git-LFS pointer": (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "HTML page": (HTML, "is a web page or XML, often an error or a login page: download the file itself"),
    "HTML page after a mark": (b"\xef\xbb\xbf\r\n" + HTML, "is a web page or XML"),
    "XML page": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or XML"),
    "JSON page": (
        b'{"error":"Repository not found"}',
        "is JSON text, an index or a server's error message perhaps: pass the model's folder, or",
    ),
    "JSON page, a list": (b"[1, 2, 3, 4]", "is JSON text"),
    "zip": (pickled({"a": 1}, zipped=True), f"is a zip archive, most likely a {PICKLED}"),
    "pickle": (pickle.dumps({"a": 1}, 2), f"is a {PICKLED}"),
    "pickle of protocol 4": (pickle.dumps({"a": 1}, 4), f"is a {PICKLED}"),
    "pickle of old torch": (pickled([1], zipped=True, _use_new_zipfile_serialization=False), f"is a {PICKLED}"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, made for llama.cpp and its kin: take the model's safeten"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 or NumPy file: take the model's safetensors instead"),
    "gzip": (gzip.compress(bytes(99)), "is a compressed archive: unpack it"),
    "zeros": (bytes(4096), f"begins with zeros, as a download that never finished: {AGAIN}"),
    "zeros for the length": (bytes(8) + b"x" * 64, "begins with zeros"),
    "nonsense": (
        b"\1nonsens" * 9,
        f"is no safetensors file: {struct.unpack('<Q', bytes([1]) + b'nonsens')[0]} bytes of header",
    ),
    "pickle of protocol 0": (pickle.dumps({"a": 1}, 0), f"is a {PICKLED}"),
    "pickle of protocol 1": (pickle.dumps({"a": 1}, 1), f"is a {PICKLED}"),
    "tar": (
        b"pickle".ljust(257, b"\0") + b"ustar\00000" + bytes(999),
        f"is a tar archive, most likely an old {PICKLED}",
    ),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is a picture: download the model itself"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(64), "is a picture: download the model itself"),
    "ONNX": (b"\x08\x08\x12\x07pytorch" + bytes(64), "is an ONNX file: take the model's safetensors instead"),
    "UTF-16 page": (HTML.decode().encode("utf-16"), "is UTF-16 text, a web page perhaps: download the file itself"),
    **{
        f"answer: {answer.partition(' ')[0]}": (
            answer.encode(),
            f"is no safetensors file but text ({answer.strip()!r}), a server's answer perhaps: download",
        )
        for answer in (
            "Entry not found",
            "404: Not Found",
            "Unauthorized\n",
            "Invalid username or password.",
            "Access to model someone/xl is restricted. You must be authenticated to access it.",
        )
    },
    "unreadable": (unreadable, "cannot be read ("),
    "a pipe": (os.mkfifo, PIPE),
    "a device": (device, PIPE),
    "a socket": (bound, PIPE),
}
"""Files in a model's place: their bytes or the function that makes them, and the message after the path."""


def put(name: str, path: Path) -> str:
    """Make the file that the table names at `path`; returns the message about it."""
    content, expected = FILES[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return expected


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, tmp_path: Path, command_line: CommandLine) -> None:
    path = tmp_path / "model.safetensors"
    expected = put(name, path)
    line = command_line.refuses(["--model", path], 2 if expected is NONE else 1, expected)
    assert line.startswith(f"{path} ")
    assert len(line) < 600
    assert re.search(r"(: |, so )(download|run|convert|take|unpack|pass|check|copy) [^:]+$", line), "it says what to do"


@pytest.mark.parametrize("name", ["zip", "truncated"])
def test_file_as_a_user_passes_it(name: str, tmp_path: Path, command_line: CommandLine) -> None:
    path = tmp_path / "model.ckpt"
    command_line.refuses(["--model", path], 1, f"{path} {put(name, path)}", apart=True)


@pytest.mark.parametrize("option", ["--vae", "--lora"])
@pytest.mark.parametrize("name", ["truncated", "HTML page", "zip"])
def test_file_of_another_option(option: str, name: str, tmp_path: Path, command_line: CommandLine) -> None:
    path = tmp_path / "part.safetensors"
    command_line.refuses([option, path], 1, f"{path} {put(name, path)}")


def test_missing_with_an_endless_name(command_line: CommandLine) -> None:
    command_line.refuses(["--model", "x" * 5000], 2, NONE)


@pytest.mark.parametrize("option", ["vae", "config"])
@pytest.mark.parametrize("place", ["nowhere", "someone/nothing"])
@pytest.mark.usefixtures("empty_cache")
def test_missing_for_another_option(
    option: str,
    place: str,
    single_file: Path,
    tmp_path: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command_line.refuses(["--model", single_file, f"--{option}", place], 2, f"--{option} {place} ")
