"""The reader: files, indexes and folders that are not as they should be, and the messages about them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import DEEP, HTML, LFS, OPENED, entry, file, two, written
from fuzz_read import INDEX, SHARDS, STEM, make_shards, valid_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cutdiff.checkpoint.build import assign
from cutdiff.checkpoint.header import DTYPES, MAX_NAME, Entry, read_header
from cutdiff.checkpoint.read import MAX_TEXT, find_weights, read_json, read_tensors

AGAIN = "download it again"


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


HEADERS = {
    "one-offset": (file({"a": entry(data_offsets=[8])}), f"the data_offsets (8,), which are no begin and end: {AGAIN}"),
    # Shapes and types.
    "scalar": (file({"a": entry(shape=[])}), "gives 'a' 8 bytes where F32 () takes 4"),
    "65-dimensions": (
        file({"a": entry(shape=[1] * 65)}),
        f"more than 64 numbers, the most dimensions of a tensor: {AGAIN}",
    ),
    "a-million-dimensions": (file({"a": entry(shape=[1] * 10**6)}), "more than 64 numbers"),
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
    "half-a-surrogate": (file(b'{"\\ud800":{}}'), "where UTF-8 belongs"),
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
"""Headers with one flaw, and the messages after the path; flaws of whole files are in test_bad_files.py."""


class TestHeader:
    @pytest.mark.parametrize("name", HEADERS)
    def test_one_line(self, name: str, tmp_path: Path) -> None:
        content, expected = HEADERS[name]
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        for read in (read_header, read_tensors):
            with pytest.raises(ValueError, match=re.escape(expected)) as raised:
                read(path)
            message = str(raised.value)
            assert message.startswith(f"{path} ")
            assert message.isprintable()
            assert len(message) < 600
            assert re.search(r": (download|convert) [^:]+$", message), "it says what to do"

    def test_safetensors_itself_refuses_no_file_that_is_accepted_here(self, tmp_path: Path) -> None:
        """Files at the borders of the format are accepted."""
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


class TestSpecialFiles:
    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is a folder where a file belongs: name a file inside it"):
            read_tensors(tmp_path)

    def test_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for read in (read_tensors, read_json):
            with pytest.raises(ValueError, match="is a device, a pipe or a socket: only regular files are read"):
                read(tmp_path / "pipe")

    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
        for name in ("nowhere.safetensors", "dangling.safetensors"):
            for read in (read_header, read_tensors):
                with pytest.raises(FileNotFoundError, match="does not exist: check the path"):
                    read(tmp_path / name)

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
        with torch.device("meta"):
            network = nn.Linear(2, 2)
        assign(network, tensors, name="file", device=torch.device("cpu"), dtype=torch.float32)
        assert torch.equal(network.weight, torch.ones(2, 2))


def resident() -> int:
    """The number of this process's bytes that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Compare tensors as bytes, because not every dtype compares."""
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
    "drive-relative": (weight_map(a="C:outside.safetensors"), nothing, PLAIN),
    "backslash": (weight_map(a="..\\outside.safetensors"), nothing, PLAIN),
    "nul": (
        weight_map(a="a.safetensors\0.safetensors"),
        nothing,
        f"puts 'a' in 'a.safetensors\\x00.safetensors', {PLAIN}",
    ),
    "sub-folder": (weight_map(a="sub/a.safetensors"), nothing, PLAIN),
    "dots": (weight_map(a=".."), nothing, "puts 'a' in '..', which is no safetensors file"),
    "number": (weight_map(a=1), nothing, f"puts 'a' in 1, {PLAIN}"),
    "list": (weight_map(a=["a.safetensors"]), nothing, f"puts 'a' in ['a.safetensors'], {PLAIN}"),
    "half-a-surrogate": (weight_map(a="\ud800.safetensors"), nothing, "missing: '\\ud800.safetensors'"),
    "endless-name": (weight_map(a=f"{'x' * 5000}.safetensors"), nothing, "of which 1 are missing: 'xxxx"),
    "key-in-another-shard": (weight_map(b=SHARDS[1]), nothing, "absent from their shard: 'b' from 'b.safetensors'"),
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

    @pytest.mark.parametrize(("most", "message"), [(2, "lists 3 keys, more than 2"), (4, None)])
    def test_number_of_keys_is_bounded(
        self, most: int, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cutdiff.checkpoint.read.MAX_MEMBERS", most)
        make_shards(tmp_path)
        places = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        if message is None:
            assert find_weights(tmp_path, STEM) == [tmp_path / shard for shard in SHARDS]
            return
        with pytest.raises(ValueError, match=message):
            find_weights(tmp_path, STEM)

    def test_number_of_keys_in_all_shards_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cutdiff.checkpoint.read.MAX_MEMBERS", 2)
        make_shards(tmp_path)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "c": SHARDS[1]}}))
        with pytest.raises(ValueError, match="names shards of more than 2 tensors, so it is no model's: remove it"):
            find_weights(tmp_path, STEM)

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


def test_fuzzing() -> None:
    """This is a short run of `python tests/fuzz_read.py`, in a process whose memory it can limit."""
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
