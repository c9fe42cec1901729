"""The reader: what a file, an index or a folder can be instead of what it should be, and what is said of it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_read import INDEX, SHARDS, STEM, make_shards, packed, valid_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.build import assign
from cutdiff.checkpoint.header import DTYPES, MAX_HEADER, MAX_NAME, Entry, read_header
from cutdiff.checkpoint.locate import EMBEDDED, embedded
from cutdiff.checkpoint.read import MAX_TEXT, find_weights, read_json, read_tensors
from cutdiff.sample import main

AGAIN = "download it again"
UNET = "unet/diffusion_pytorch_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6938040682\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
DEEP = 100_000


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


OPENED: list[Path] = []
"""Every file that Python opened; an audit hook cannot be taken away again."""


@sys.addaudithook
def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        OPENED.append(Path(os.fsdecode(arguments[0])))


def entry(**fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}


def file(header: Any, data: bytes = bytes(8)) -> bytes:
    """A safetensors file with a header of any JSON, or of any bytes."""
    return packed(header if isinstance(header, bytes) else json.dumps(header).encode(), data)


def written(text: str) -> bytes:
    """A file whose one tensor has in its entry what JSON's own writer would not write."""
    return file(b'{"a":{"dtype":"F32",%s}}' % text.encode())


def torch_save(value: object, **options: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def two(first: tuple[int, int], second: tuple[int, int], size: int = 16) -> bytes:
    return file({"a": entry(data_offsets=first), "b": entry(data_offsets=second)}, bytes(size))


CONTENTS = {
    # What is no safetensors file at all.
    "lfs": (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "html": (HTML, "is a web page or XML, often an error or a login page: download the file itself"),
    "html-bom": (b"\xef\xbb\xbf\r\n" + HTML, "is a web page or XML"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or XML"),
    "json": (b'{"error":"Repository not found"}', "is JSON text, an index or a server's error message"),
    "json-list": (b"[1, 2, 3, 4]", "is JSON text"),
    "pickle": (pickle.dumps({"a": 1}, 2), "is a pickled checkpoint, which could run code"),
    "pickle-4": (pickle.dumps({"a": 1}, 4), "so it is not: convert it to safetensors"),
    "torch": (torch_save({"a": torch.ones(2)}), "is a zip archive, most likely a pickled checkpoint, which could run"),
    "torch-old": (torch_save([1], _use_new_zipfile_serialization=False), "is a pickled checkpoint"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, made for llama.cpp and its kin: take the model's safeten"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 or NumPy file: take the model's safetensors instead"),
    "gzip": (gzip.compress(bytes(99)), "is a compressed archive: unpack it"),
    "zeros": (bytes(4096), f"begins with zeros, as a download that never finished: {AGAIN}"),
    "empty": (b"", f"is empty: {AGAIN}"),
    "five-bytes": (b"\1\2\3\4\5", f"or cut off after 5 of the 8 bytes of its length: {AGAIN}"),
    "nonsense": (b"nonsense" * 9, f"is no safetensors file: {struct.unpack('<Q', b'nonsense')[0]} bytes of header"),
    "length-2**63": (struct.pack("<Q", 2**63) + b"{}", f"{2**63} bytes of header are more than 100000000: {AGAIN}"),
    "length-101-MB": (struct.pack("<Q", 101_000_000) + b"{}", f"101000000 bytes of header are more than {MAX_HEADER}"),
    "header-past-the-end": (
        struct.pack("<Q", 99) + b"{}",
        f"is truncated: it has 10 bytes where its header alone takes 107: {AGAIN}",
    ),
    "cut-inside-the-length-128": (struct.pack("<Q", 128) + b'{"a"', "is truncated: it has 12 bytes"),
    "cut-after-the-length": (struct.pack("<Q", 128), "is truncated: it has 8 bytes where its header alone takes 136"),
    "header-is-a-list": (file(b"[1, 2]"), f"its header does not begin with {{: {AGAIN}"),
    "header-is-empty": (bytes(8) + b"x" * 64, "begins with zeros"),
    # Bytes that the tensors do not account for.
    "truncated": (file({"a": entry()})[:-3], rf"is truncated: it has 74 of 77 bytes: {AGAIN}"),
    "no-data": (file({"a": entry()}, b""), "is truncated: it has 69 of 77 bytes"),
    "trailing": (file({"a": entry()}, bytes(11)), f"goes on for 3 bytes after its last tensor, at byte 77: {AGAIN}"),
    "data-without-tensors": (file({}), "goes on for 8 bytes after its last tensor, at byte 10"),
    "overlap": (two((0, 8), (4, 12)), f"has tensors that overlap, 'a' and 'b': {AGAIN}"),
    "same-place": (two((0, 8), (0, 8)), "has tensors that overlap"),
    "hole": (two((0, 8), (9, 17)), f"has a hole of 1 bytes before 'b': {AGAIN}"),
    "hole-at-the-start": (two((16, 24), (8, 16)), "has a hole of 8 bytes before 'b'"),
    "reversed": (file({"a": entry(data_offsets=[8, 0])}), "gives 'a' the data_offsets (8, 0), which are no begin"),
    "one-offset": (file({"a": entry(data_offsets=[8])}), f"the data_offsets (8,), which are no begin and end: {AGAIN}"),
    "negative": (file({"a": entry(data_offsets=[-8, 0])}), "stands '-8, 0]}}' where an integer from 0"),
    "far-end": (file({"a": entry(data_offsets=[10**18, 10**18 + 8])}), "has a hole of"),
    # Shapes and types.
    "mismatch": (file({"a": entry(shape=[2, 3])}), f"gives 'a' 8 bytes where F32 (2, 3) takes 24: {AGAIN}"),
    "scalar": (file({"a": entry(shape=[])}), "gives 'a' 8 bytes where F32 () takes 4"),
    "overflow": (
        file({"a": entry(shape=[2**32, 2**32])}),
        f"the shape (4294967296, 4294967296), which takes 2⁶³ bytes or more: {AGAIN}",
    ),
    "overflow-around-zero": (file({"a": entry(shape=[0, 2**62, 4], data_offsets=[0, 0])}, b""), "2⁶³ bytes or more"),
    "65-dimensions": (
        file({"a": entry(shape=[1] * 65)}),
        f"more than 64 numbers, the most dimensions of a tensor: {AGAIN}",
    ),
    "a-million-dimensions": (file({"a": entry(shape=[1] * 10**6)}), "more than 64 numbers"),
    "dtype-F4": (file({"a": entry(dtype="F4")}), "the dtype 'F4', which is not read: convert it to F16, BF16 or F32"),
    "dtype-of-torch": (file({"a": entry(dtype="torch.float32")}), "the dtype 'torch.float32', which is not read"),
    "dtype-number": (file({"a": entry(dtype=32)}), f'stands \'32, "shape": [2], "d\' where a string belongs: {AGAIN}'),
    "nan": (written('"shape":[NaN],"data_offsets":[0,8]'), "stands 'NaN],\"data_offsets\":' where an integer"),
    "infinity": (written('"shape":[2],"data_offsets":[0,Infinity]'), "stands 'Infinity]}}' where an integer"),
    "float": (written('"shape":[2.0],"data_offsets":[0,8]'), "stands '2.0],"),
    "exponent": (written('"shape":[2e0],"data_offsets":[0,8]'), "stands '2e0],"),
    "bool": (written('"shape":[true],"data_offsets":[0,8]'), "stands 'true],"),
    "null": (written('"shape":null,"data_offsets":[0,8]'), "stands 'null,\"data_offsets\":' where [ belongs"),
    "leading-zero": (written('"shape":[02],"data_offsets":[0,8]'), "stands '02],"),
    "integer-in-a-string": (written('"shape":["2"],"data_offsets":[0,8]'), 'stands \'"2"],'),
    "5000-digits": (written(f'"shape":[{"9" * 5000}],"data_offsets":[0,8]'), "stands '99999999999999999999' where"),
    # The header's JSON.
    "no-shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), f"gives 'a' no shape: {AGAIN}"),
    "extra-field": (
        file({"a": entry(scale=1)}),
        f"gives 'a' the field 'scale', which the format does not have: {AGAIN}",
    ),
    "entry-is-a-list": (file({"a": [1]}), "stands '[1]}' where { belongs"),
    "duplicate-tensor": (file(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), f"names 'a' twice: {AGAIN}"),
    "duplicate-by-escape": (file(b'{"a":%s,"\\u0061":{}}' % json.dumps(entry()).encode()), "names 'a' twice"),
    "duplicate-field": (written('"shape":[2],"shape":[2],"data_offsets":[0,8]'), "names 'shape' twice"),
    "duplicate-metadata": (file(b'{"__metadata__":{"k":"1","k":"2"}}', b""), "names 'k' twice"),
    "metadata-number": (file({"__metadata__": {"steps": 20}}, b""), "stands '20}}' where a string belongs"),
    "metadata-nested": (file({"__metadata__": {"k": {}}}, b""), "stands '{}}}' where a string belongs"),
    "metadata-list": (file({"__metadata__": ["k"]}, b""), "stands '[\"k\"]}' where { belongs"),
    "not-utf-8": (
        file(b'{"caf\xe9":{}}'),
        f"has a broken header: at byte 9 stands '\"caf\ufffd\":{{}}}}' where UTF-8 belongs: {AGAIN}",
    ),
    "utf-16": (file("{}".encode("utf-16-le")), "stands '\\x00}\\x00' where a string"),
    "half-a-surrogate": (file(b'{"\\ud800":{}}'), "where UTF-8 belongs"),
    "deep-entry": (file(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "gives 'a' the field 'a'"),
    "deep-shape": (written('"shape":' + "[" * DEEP), "stands '[[[[[[[[[[[[[[[[[[[[' where an integer"),
    "deep-metadata": (file(b'{"__metadata__":' + b'{"k":' * DEEP), "where a string belongs"),
    "newline-in-a-name": (file({"a\nb": entry()}), f"names a tensor 'a\\nb', with unprintable or more than {MAX_NAME}"),
    "escape-sequence-in-a-name": (file({"\x1b[2J": entry()}), "names a tensor '\\x1b[2J'"),
    "endless-name": (file({"x" * 10**6: entry()}), "names a tensor 'xxxx"),
    "unclosed": (file(b'{"a":{"dtype":"F32'), "stands '\"F32' where a string belongs"),
    "ends-early": (file(b'{"a":'), "stands '' where { belongs"),
    "bad-escape": (file(b'{"\\x":{}}'), "where a string belongs"),
    "raw-newline": (file(b'{"a\nb":{}}'), "where a string belongs"),
    "trailing-comma": (file(b'{"a":%s,}' % json.dumps(entry()).encode()), "stands '}' where a string belongs"),
    "comment": (file(b"{/**/}"), "stands '/**/}' where a string belongs"),
    "second-object": (file(b"{}{}", b""), f"stands '{{}}' where nothing but space belongs: {AGAIN}"),
}
"""What a file may hold, and what must be said of it after its path."""


class TestContents:
    @pytest.mark.parametrize("name", CONTENTS)
    def test_one_line_from_the_reader(self, name: str, tmp_path: Path) -> None:
        content, expected = CONTENTS[name]
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        for read in (read_header, read_tensors):
            with pytest.raises(ValueError, match=re.escape(expected)) as raised:
                read(path)
            message = str(raised.value)
            assert message.startswith(f"{path} ")
            assert message.isprintable()
            assert len(message) < 600
            assert re.search(r": (download|run|convert|take|unpack) [^:]+$", message), "it says what to do"

    @pytest.mark.parametrize("name", CONTENTS)
    def test_one_line_and_status_1_from_the_command_line(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content, expected = CONTENTS[name]
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        assert_refused(path, expected, tmp_path / "out", capsys)

    @pytest.mark.parametrize("name", ["torch", "truncated"])
    def test_as_a_user_calls_it(self, name: str, tmp_path: Path) -> None:
        content, expected = CONTENTS[name]
        path = tmp_path / "model.ckpt"
        path.write_bytes(content)
        command = [sys.executable, "-m", "cutdiff.sample", "--model", str(path), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"cutdiff: {path} ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
        assert list((tmp_path / "out").iterdir()) == []

    def test_safetensors_itself_refuses_no_file_that_is_accepted_here(self, tmp_path: Path) -> None:
        """What is accepted at the borders of the format."""
        accepted = {
            "nothing": file({}, b""),
            "padded": file(b"{}" + b" " * 62, b""),
            "spaced": file(b'{ "a" :\t{"shape" : [ 2 ],\r\n"data_offsets":[0, 8] , "dtype":"F32" } }'),
            "64-dimensions": file({"a": entry(shape=[1] * 63 + [2])}),
            "out-of-order": two((8, 16), (0, 8)),
            "no-elements": file({"z": entry(shape=[0, 3], data_offsets=[8, 8]), "a": entry()}),
            "escapes": file({'é\\"/': entry(), "__metadata__": {"modelspec.title": 'A "title"\n😀'}}),
            "odd-length": file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b" "),
        }
        for name, content in accepted.items():
            path = tmp_path / name
            path.write_bytes(content)
            tensors = read_tensors(path)
            with safe_open(path, framework="pt") as theirs:
                assert {*tensors} == {*theirs.keys()}, name
                assert read_header(path).metadata == (theirs.metadata() or {}), name


def assert_refused(path: Path, expected: str, out: Path, capsys: pytest.CaptureFixture[str], status: int = 1) -> None:
    """The command line refuses the model in one line, and draws nothing."""
    assert main(["--model", str(path), "--out", str(out)]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"cutdiff: {path}")
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert list(out.iterdir()) == []


class TestSpecialFiles:
    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is a folder where a file belongs: name a file inside it"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
    def test_endless_or_blocking(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "model.safetensors"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        expected = "is a device, a pipe or a socket: only regular files are read, so copy it to one"
        assert_refused(path, expected, tmp_path / "out", capsys)
        for read in (read_tensors, read_json):
            with pytest.raises(ValueError, match=expected):
                read(path)

    def test_missing_is_the_arguments_fault(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dangling = tmp_path / "dangling.safetensors"
        dangling.symlink_to(tmp_path / "nowhere")
        for path in (tmp_path / "nowhere.safetensors", dangling, tmp_path / ("x" * 5000)):
            assert_refused(path, "does not exist: pass a diffusers folder", tmp_path / "out", capsys, status=2)
        for path in (tmp_path / "nowhere.safetensors", dangling):
            for read in (read_header, read_tensors):
                with pytest.raises(FileNotFoundError, match="does not exist: check the path"):
                    read(path)

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(file({}, b""))

        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)  # no mode keeps root from reading
        with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): check its permissions"):
            read_tensors(path)


class TestTensors:
    @given(
        st.dictionaries(
            st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20).filter(lambda k: k != "__metadata__"),
            st.tuples(st.sampled_from([*DTYPES.values()]), st.lists(st.integers(0, 4), max_size=4)),
            max_size=6,
        ),
        st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4),
        st.integers(1, 8),
    )
    def test_what_safetensors_writes(
        self, kinds: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str], off: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: torch.randint(0, 2, [*shape, dtype.itemsize], generator=generator, dtype=torch.uint8)
            .view(dtype)
            .reshape(shape)
            for key, (dtype, shape) in kinds.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            save_file(tensors, path, metadata or None)  # its writer breaks a header that is empty twice over
            header, read = read_header(path), read_tensors(path)
            assert header.metadata == metadata
            assert {k: (e.dtype, [*e.shape]) for k, e in header.tensors.items()} == kinds
            assert all(same_bytes(tensor, read[key]) for key, tensor in tensors.items())
            content = path.read_bytes()
            for damaged in (content[:-off], content + bytes(off)):
                path.unlink()  # what is mapped stays whole
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=re.escape(str(path))):
                    read_tensors(path)

    @pytest.mark.parametrize("header", [dict.fromkeys("abcd", entry()), {"__metadata__": dict.fromkeys("abcd", "")}])
    def test_number_of_names_is_bounded(
        self, header: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cutdiff.checkpoint.header.MAX_MEMBERS", 3)
        (tmp_path / "file").write_bytes(file(header))
        with pytest.raises(ValueError, match=f"names more than 3 tensors or lines of metadata: {AGAIN}"):
            read_header(tmp_path / "file")

    def test_entries_and_metadata(self, tmp_path: Path) -> None:
        header, data = valid_file("ab", {"modelspec.architecture": "stable-diffusion-xl-v1-base"})
        (tmp_path / "file").write_bytes(file(header, data))
        read = read_header(tmp_path / "file")
        assert read.tensors == {"a": Entry(torch.float32, (2, 3), 0, 24), "b": Entry(torch.float16, (4,), 24, 32)}
        assert read.metadata == {"modelspec.architecture": "stable-diffusion-xl-v1-base"}

    def test_only_the_values_that_are_used_are_in_memory(self, tmp_path: Path) -> None:
        path, size = tmp_path / "sparse", 2**28
        header = file({"a": entry(dtype="U8", shape=[size], data_offsets=[0, size])}, b"")
        path.write_bytes(header)
        os.truncate(path, len(header) + size)
        before = resident()
        tensor = read_tensors(path)["a"]
        assert resident() - before < 2**24
        assert int(tensor[::4096].sum()) == 0
        assert resident() - before < 1.1 * size

    def test_eight_bit_floats_are_read_and_not_taken_for_weights(self, tmp_path: Path) -> None:
        weights = {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "bias": torch.ones(2)}
        save_file(weights, tmp_path / "file")
        tensors = read_tensors(tmp_path / "file")
        assert tensors["weight"].dtype == torch.float8_e4m3fn
        expected = "1 quantized: weight torch.float8_e4m3fn where torch.float16, bfloat16 or float32 belongs"
        with torch.device("meta"):
            network = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=expected):
            assign(network, tensors, name="file", device=torch.device("cpu"), dtype=torch.float32)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes, since not every dtype compares."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def weight_map(**places: Any) -> dict[str, Any]:
    return {"weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], **places}}


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def put(folder: Path, shard: str, names: str) -> None:
    """Write a shard that holds a tensor for each letter."""
    header, data = valid_file(names, {})
    (folder / shard).write_bytes(file(header, data))


def nothing(_: Path) -> None:
    pass


PLAIN = "which is no plain file name: a shard lies beside its index, so download both again"
INDEXES: dict[str, tuple[Any, Callable[[Path], object], str]] = {
    "parent": (weight_map(a="../outside.safetensors"), nothing, f"puts 'a' in '../outside.safetensors', {PLAIN}"),
    "absolute": (weight_map(a="/tmp/outside.safetensors"), nothing, PLAIN),
    "drive": (weight_map(a="C:\\outside.safetensors"), nothing, PLAIN),
    "drive-relative": (weight_map(a="C:outside.safetensors"), nothing, PLAIN),
    "backslash": (weight_map(a="..\\outside.safetensors"), nothing, PLAIN),
    "nul": (
        weight_map(a="a.safetensors\0.safetensors"),
        nothing,
        f"puts 'a' in 'a.safetensors\\x00.safetensors', {PLAIN}",
    ),
    "sub-folder": (weight_map(a="sub/a.safetensors"), nothing, PLAIN),
    "dots": (weight_map(a=".."), nothing, "puts 'a' in '..', which is no safetensors file"),
    "pickled": (
        weight_map(a="model.bin"),
        nothing,
        "'model.bin', which is no safetensors file, so it is not opened: convert",
    ),
    "number": (weight_map(a=1), nothing, f"puts 'a' in 1, {PLAIN}"),
    "list": (weight_map(a=["a.safetensors"]), nothing, f"puts 'a' in ['a.safetensors'], {PLAIN}"),
    "one-missing": (
        weight_map(),
        lambda folder: without(folder, SHARDS[1]),
        "names 2 shards, of which 1 are missing: 'b.safetensors': download them",
    ),
    "all-missing": (
        weight_map(),
        lambda folder: without(folder, *SHARDS),
        "names 2 shards, of which 2 are missing: 'a.safetensors', 'b.safetensors': download them",
    ),
    "half-a-surrogate": (weight_map(a="\ud800.safetensors"), nothing, "missing: '\\ud800.safetensors'"),
    "endless-name": (weight_map(a=f"{'x' * 5000}.safetensors"), nothing, "of which 1 are missing: 'xxxx"),
    "absent-key": (
        weight_map(d=SHARDS[0]),
        nothing,
        "1 keys are absent from their shard: 'd' from 'a.safetensors': download it again",
    ),
    "key-in-another-shard": (weight_map(b=SHARDS[1]), nothing, "absent from their shard: 'b' from 'b.safetensors'"),
    "key-in-two-shards": (
        weight_map(),
        lambda folder: put(folder, SHARDS[1], "bc"),
        "'b' is in two shards, 'a.safetensors' and 'b.safetensors': download them again",
    ),
    "unlisted-key": (
        weight_map(),
        lambda folder: put(folder, SHARDS[1], "cd"),
        "does not list 1 keys of its shards: 'd' in 'b.safetensors': download it again",
    ),
    "shard-is-a-pointer": (
        weight_map(),
        lambda folder: (folder / SHARDS[1]).write_bytes(LFS),
        "b.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "no-weight-map": ({"metadata": {}}, nothing, "has no weight_map, so it is no index of a sharded checkpoint"),
    "empty-weight-map": ({"weight_map": {}}, nothing, "has no weight_map"),
    "weight-map-is-a-list": ({"weight_map": ["a"]}, nothing, "has no weight_map"),
    "index-is-a-list": ([], nothing, "holds a list where a JSON object belongs: download it again"),
    "empty": (b"", nothing, "is empty: download it again"),
    "cut-off": (b'{"weight_map": {"a": ', nothing, "is not JSON as a model has it (Expecting value: line 1 column 22"),
    "pointer": (LFS, nothing, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "web-page": (HTML, nothing, "is a web page or XML"),
    "not-utf-8": (b'{"weight_map": {"caf\xe9": ""}}', nothing, "is not UTF-8 text (at byte 20): download it again"),
    "duplicate-key": (
        b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        nothing,
        "is not JSON as a model has it (the key 'a' stands twice): download it again",
    ),
    "deep": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, nothing, "nests more than 64 levels deep: download it again"),
    "deep-list": (b"[" * DEEP, nothing, "nests more than 64 levels deep: download it again"),
    "deep-name": (weight_map(a=json.loads("[" * 300 + "]" * 300)), nothing, "nests more than 64 levels deep"),
    "5000-digits": (b'{"a": %s}' % (b"9" * 5000), nothing, "is not JSON as a model has it (Exceeds the limit"),
}


class TestIndex:
    @pytest.mark.parametrize("name", INDEXES)
    def test_one_line_and_nothing_outside_is_opened(self, name: str, tmp_path: Path) -> None:
        index, damage, expected = INDEXES[name]
        folder = tmp_path / "unet"
        folder.mkdir()
        make_shards(folder)
        put(tmp_path, "outside.safetensors", "a")
        damage(folder)
        (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
        OPENED.clear()
        with pytest.raises(ValueError, match=re.escape(expected)) as raised:
            find_weights(folder, STEM)
        assert str(raised.value).startswith(str(folder))
        assert str(raised.value).isprintable()
        assert OPENED
        assert [path for path in OPENED if path.parent != folder] == []

    @pytest.mark.parametrize("metadata", [{}, {"metadata": {"total_size": 46}}])
    def test_sound(self, metadata: dict[str, Any], tmp_path: Path) -> None:
        make_shards(tmp_path)
        (tmp_path / INDEX).write_text(json.dumps({**metadata, **weight_map()}))
        assert find_weights(tmp_path, STEM) == [tmp_path / shard for shard in SHARDS]

    def test_a_gigabyte_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / INDEX).touch()
        os.truncate(tmp_path / INDEX, 2**30)
        before = resident()
        with pytest.raises(ValueError, match=f"has {2**30} bytes, more than {MAX_TEXT}, so it is no part of a model"):
            find_weights(tmp_path, STEM)
        assert resident() - before < 2**24

    def test_depth_that_a_model_may_have(self, tmp_path: Path) -> None:
        for levels, accepted in ((64, True), (65, False)):
            (tmp_path / "config.json").write_text('{"a":' * levels + "1" + "}" * levels)
            if accepted:
                assert len(read_json(tmp_path / "config.json")) == 1
            else:
                with pytest.raises(ValueError, match="nests more than 64 levels deep: download it again"):
                    read_json(tmp_path / "config.json")

    def test_infinity_in_a_configuration_is_what_diffusers_writes(self, tmp_path: Path) -> None:
        (tmp_path / "scheduler_config.json").write_text('{"lambda_min_clipped": -Infinity}')
        assert read_json(tmp_path / "scheduler_config.json") == {"lambda_min_clipped": float("-inf")}


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """The embedded model as the Hugging Face cache would keep it: a folder of links, here to damage."""
    source, folder = embedded(EMBEDDED), tmp_path / "linked"
    for path in source.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(source)).symlink_to(path)
    return folder


def replace(path: Path, content: bytes | str) -> None:
    """Put a file in the place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(path: Path, **fields: Any) -> None:
    replace(path, json.dumps({**json.loads(path.read_text()), **fields}))


FOLDERS: dict[str, tuple[str, bytes | None, str]] = {
    "pointer": (UNET, LFS, f"{UNET} is a Git LFS pointer"),
    "truncated": (UNET, file({"conv_in.bias": entry()})[:-1], f"{UNET} is truncated: it has 87 of 88 bytes"),
    "no-index": ("model_index.json", None, "is no diffusers model: it has no model_index.json"),
    "no-config": ("unet/config.json", None, "unet/config.json is missing, so the model is incomplete"),
    "no-unet": (UNET, None, "unet holds no diffusion_pytorch_model.safetensors, the model is incomplete"),
    "no-encoder": ("text_encoder_2/model.safetensors", None, "text_encoder_2 holds no model.safetensors"),
    "no-vocabulary": ("tokenizer/vocab.json", None, "tokenizer holds no tokenizer"),
    "no-schedule": ("scheduler/scheduler_config.json", None, "scheduler_config.json is missing"),
    "pointer-config": ("vae/config.json", LFS, "vae/config.json is a Git LFS pointer"),
    "broken-config": ("vae/config.json", b"{", "vae/config.json is not JSON"),
    "list-config": ("vae/config.json", b"[]", "vae/config.json holds a list where a JSON object belongs"),
    "deep-config": ("unet/config.json", b'{"a":' * DEEP, "unet/config.json nests more than 64 levels"),
    "twice-in-config": ("unet/config.json", b'{"a":1,"a":2}', "(the key 'a' stands twice)"),
    "pointer-vocabulary": ("tokenizer/vocab.json", LFS, "tokenizer/vocab.json is a Git LFS pointer"),
    "deep-tokenizer": (
        "tokenizer_2/tokenizer_config.json",
        b"[" * DEEP,
        "tokenizer_config.json nests more than 64 levels",
    ),
    "page-of-merges": ("tokenizer/merges.txt", HTML, "tokenizer/merges.txt is a web page"),
    "endless-merges": ("tokenizer/merges.txt", bytes(MAX_TEXT + 1), f"merges.txt has {MAX_TEXT + 1} bytes, more than"),
}
"""A part of a model's folder, what it holds instead (None: it is missing), and what must be said."""


class TestFolder:
    def test_links_are_followed(self, linked: Path) -> None:
        assert cutdiff.load(linked).hashes == cutdiff.load().hashes

    @pytest.mark.parametrize("name", FOLDERS)
    def test_one_line_and_status_1(self, name: str, linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
        part, content, expected = FOLDERS[name]
        without(linked, part)
        if content is not None:
            (linked / part).write_bytes(content)
        assert_refused(linked, expected, linked.parent / "out", capsys)

    def test_no_model_at_all(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").mkdir()
        assert_refused(tmp_path / "empty", "it has no model_index.json", tmp_path / "out", capsys)

    def test_pipe_for_a_configuration(self, linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
        without(linked, "vae/config.json")
        os.mkfifo(linked / "vae" / "config.json")
        assert_refused(linked, "vae/config.json is a device, a pipe or a socket", linked.parent / "out", capsys)

    def test_index_that_leads_out(self, linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
        outside = linked.parent / "outside.safetensors"
        shutil.copy(linked / UNET, outside)
        without(linked, UNET)
        index = {"weight_map": dict.fromkeys(read_header(outside).tensors, "../../outside.safetensors")}
        (linked / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        OPENED.clear()
        assert_refused(linked, PLAIN, linked.parent / "out", capsys)
        assert outside not in [path.resolve() for path in OPENED]

    @pytest.mark.parametrize("field", ["vocab", "merges", "vocab_file", "tokenizer_file", "fast_tokenizer_files"])
    def test_tokenizer_that_leads_out(self, linked: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
        outside = linked.parent / "tokenizer.1.json"
        shutil.copy(linked / "tokenizer" / "vocab.json", outside)
        edit_json(linked / "tokenizer" / "tokenizer_config.json", **{field: ["../../tokenizer.1.json", str(outside)]})
        OPENED.clear()
        expected = f"tokenizer_config.json names files, in {field}: remove these fields"
        assert_refused(linked, expected, linked.parent / "out", capsys)
        assert outside not in [path.resolve() for path in OPENED]


class Bomb:
    """What runs code when it is unpickled: it makes the file that it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.path,)


class TestNothingIsRun:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        """A file that exists where code of a model has run."""
        return tmp_path / "made"

    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt", "safetensors"])
    def test_pickles(
        self, suffix: str, zipped: bool, made: Path, linked: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = torch_save(Bomb(made)) if zipped else pickle.dumps(Bomb(made))
        torch.load(BytesIO(content), weights_only=False) if zipped else pickle.loads(content)
        assert made.exists(), "it goes off where it is unpickled"
        made.unlink()
        path = linked.parent / f"model.{suffix}"
        path.write_bytes(content)
        assert_refused(path, "pickled checkpoint, which could run code", linked.parent / "out", capsys)
        without(linked, UNET)
        path.rename((linked / UNET).with_suffix(f".{suffix}"))
        assert_refused(
            linked, "pickled" if suffix in ("bin", "safetensors") else "holds no", linked.parent / "out", capsys
        )
        assert not made.exists()

    def test_code_of_a_folder(self, made: Path, linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = f"from pathlib import Path\nPath({str(made)!r}).touch()\nclass Model: pass\n"
        for place in ("", "unet", "text_encoder", "tokenizer", "scheduler"):
            (linked / place / "modeling.py").write_text(code)
        runpy.run_path(str(linked / "modeling.py"))
        assert made.exists(), "it goes off where it is imported"
        made.unlink()
        custom = {"auto_map": {"AutoModel": "modeling.Model", "AutoTokenizer": ["modeling.Model", None]}}
        edit_json(linked / "text_encoder" / "config.json", **custom, architectures=["Model"])
        edit_json(linked / "tokenizer" / "tokenizer_config.json", **custom, tokenizer_class="modeling.Model")
        edit_json(linked / "model_index.json", unet=["modeling", "Model"], scheduler=["modeling", "Model"])
        monkeypatch.chdir(linked)  # where an import could find it
        assert cutdiff.load(linked).hashes == cutdiff.load().hashes
        edit_json(linked / "model_index.json", _class_name=["modeling", "Model"])
        with pytest.raises(ValueError, match="only StableDiffusionXLPipeline and"):
            cutdiff.load(linked)
        assert not made.exists()
        assert "modeling" not in sys.modules


def test_fuzzing() -> None:
    """A little of what `python tests/fuzz_read.py` does at length, in a process whose memory it can limit."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the kernel does not tell the memory of a process")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_read.py")), "--num", "1000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    counts = {words: int(count) for count, words in lines}
    assert sum(counts.values()) == 1000
    assert counts["read"] > 50
    assert len(counts) > 20
