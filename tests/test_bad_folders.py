"""Bad input: folders that are no models. The command line says so in one line; nothing outside is opened or run."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import DEEP, HTML, LFS, OPENED, entry, file, pickled
from fuzz_read import SHARDS, make_shards, valid_file
from refusal import CommandLine

import cutdiff
from cutdiff.checkpoint.header import read_header
from cutdiff.checkpoint.locate import EMBEDDED, embedded
from cutdiff.checkpoint.read import MAX_TEXT
from cutdiff.sample import main

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = f"{UNET}.index.json"
QUICK = ("--steps", "1", "--width", "64", "--height", "64")
PLAIN = "which is no plain file name: a shard lies beside its index, so download both again"


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


def nothing(_: Path) -> None:
    pass


def without(*shards: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for shard in shards:
            (folder / shard).unlink()

    return damage


def key_twice(folder: Path) -> None:
    header, data = valid_file("bc", {})
    (folder / SHARDS[1]).write_bytes(file(header, data))


INDEXES: dict[str, tuple[dict[str, str], Callable[[Path], None], str]] = {
    "../ in an index": ({"a": "../outside.safetensors"}, nothing, f"puts 'a' in '../outside.safetensors', {PLAIN}"),
    "absolute path in an index": ({"a": "/tmp/outside.safetensors"}, nothing, PLAIN),
    "C:\\ in an index": ({"a": "C:\\outside.safetensors"}, nothing, PLAIN),
    ".bin shard": (
        {"a": "model.bin"},
        nothing,
        "'model.bin', which is no safetensors file, so it is not opened: conve",
    ),
    "missing shard": (
        {},
        without(SHARDS[1]),
        "names 2 shards, of which 1 are missing: 'b.safetensors': download them",
    ),
    "missing shards, all listed": (
        {},
        without(*SHARDS),
        "names 2 shards, of which 2 are missing: 'a.safetensors', 'b.safetensors': download them",
    ),
    "key absent from its shard": (
        {"d": SHARDS[0]},
        nothing,
        "1 keys are absent from their shard: 'd' from 'a.safetensors': download it again",
    ),
    "key in two shards": (
        {},
        key_twice,
        "'b' is in two shards, 'a.safetensors' and 'b.safetensors': download them again",
    ),
}
"""Indexes: where they put keys, the damage to their shards, and the message; many more are in test_read.py."""


@pytest.mark.parametrize("name", INDEXES)
def test_index(name: str, linked: Path, command_line: CommandLine) -> None:
    places, damage, expected = INDEXES[name]
    (linked / UNET).unlink()
    make_shards(linked / "unet")
    damage(linked / "unet")
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], **places}}
    (linked / INDEX).write_text(json.dumps(index))
    line = command_line.refuses(["--model", linked], 1, expected)
    assert line.startswith(str(linked / INDEX))


def test_index_without_metadata_is_accepted(linked: Path, tmp_path: Path) -> None:
    (linked / UNET).rename(linked / "unet" / "shard.safetensors")
    keys = read_header(linked / "unet" / "shard.safetensors").tensors
    (linked / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "shard.safetensors")}))
    assert main(["--model", str(linked), *QUICK, "--out", str(tmp_path)]) == 0
    assert len([*tmp_path.glob("*.png")]) == 1


def written(part: str, **fields: Any) -> bytes:
    """The configuration of a part of the embedded model, with these fields changed."""
    return json.dumps({**json.loads((embedded(EMBEDDED) / part / "config.json").read_text()), **fields}).encode()


FOLDERS: dict[str, tuple[str, bytes | None, str]] = {
    "pointer": (UNET, LFS, f"{UNET} is a Git LFS pointer"),
    "truncated": (UNET, file({"conv_in.bias": entry()})[:-1], f"{UNET} is truncated: it has 87 of 88 bytes"),
    "no index": ("model_index.json", None, "is no diffusers model: it has no model_index.json"),
    "no configuration": ("unet/config.json", None, "unet/config.json is missing, so the model is incomplete: download"),
    "no U-Net": (UNET, None, "unet holds no diffusion_pytorch_model.safetensors, the model is incomplete: download it"),
    "no encoder": ("text_encoder_2/model.safetensors", None, "text_encoder_2 holds no model.safetensors"),
    "no vocabulary": ("tokenizer/vocab.json", None, "tokenizer holds no tokenizer"),
    "no schedule": ("scheduler/scheduler_config.json", None, "scheduler_config.json is missing"),
    "pointer for a configuration": ("vae/config.json", LFS, "vae/config.json is a Git LFS pointer"),
    "broken configuration": ("vae/config.json", b"{", "vae/config.json is not JSON"),
    "list for a configuration": ("vae/config.json", b"[]", "vae/config.json holds a list where a JSON object belongs"),
    "deep configuration": ("unet/config.json", b'{"a":' * DEEP, "unet/config.json nests more than 64 levels"),
    **{
        f"1000 {field} in {name}": (
            f"{name}/config.json",
            written(name, **{field: 1000}),
            f"the configuration of {name} asks for more than {2 * num} tensors, and its file has {num}: take the conf",
        )
        for name, field, num in (
            ("unet", "layers_per_block", 330),
            ("unet", "transformer_layers_per_block", 330),
            ("vae", "layers_per_block", 184),
            ("text_encoder", "num_hidden_layers", 52),
            ("text_encoder_2", "num_hidden_layers", 53),
        )
    },
    "key twice in a configuration": ("unet/config.json", b'{"a":1,"a":2}', "(the key 'a' stands twice)"),
    "pointer for a vocabulary": ("tokenizer/vocab.json", LFS, "tokenizer/vocab.json is a Git LFS pointer"),
    "deep tokenizer": ("tokenizer_2/tokenizer_config.json", b"[" * DEEP, "tokenizer_config.json nests more than 64"),
    "page for merges": ("tokenizer/merges.txt", HTML, "tokenizer/merges.txt is a web page"),
    "endless merges": ("tokenizer/merges.txt", bytes(MAX_TEXT + 1), f"merges.txt has {MAX_TEXT + 1} bytes, more than"),
}
"""A part of a model's folder, its wrong contents (None where it is missing), and the message."""


@pytest.mark.parametrize("name", FOLDERS)
def test_part(name: str, linked: Path, command_line: CommandLine) -> None:
    part, content, expected = FOLDERS[name]
    (linked / part).unlink()
    if content is not None:
        (linked / part).write_bytes(content)
    command_line.refuses(["--model", linked], 1, str(linked), expected)


def test_pipe_for_a_configuration(linked: Path, command_line: CommandLine) -> None:
    (linked / "vae/config.json").unlink()
    os.mkfifo(linked / "vae" / "config.json")
    command_line.refuses(["--model", linked], 1, "vae/config.json is a device, a pipe or a socket")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer"])
def test_another_part_for_a_vae(part: str, linked: Path, command_line: CommandLine) -> None:
    line = command_line.refuses(["--vae", linked / part], 1, "is no VAE: ", "pass a VAE's folder or file, or a whole")
    assert line.startswith(str(linked / part))


def test_another_parts_weights_for_a_vae(linked: Path, command_line: CommandLine) -> None:
    command_line.refuses(["--vae", linked / UNET], 1, f"{linked / UNET} is no VAE: ", "pass a VAE's folder or file")


class TestNothingOutsideIsOpened:
    @pytest.mark.parametrize("place", ["../../outside.safetensors", "absolute"])
    def test_index(self, place: str, linked: Path, command_line: CommandLine) -> None:
        outside = linked.parent / "outside.safetensors"
        shutil.copy(linked / UNET, outside)
        (linked / UNET).unlink()
        place = str(outside) if place == "absolute" else place
        index = {"weight_map": dict.fromkeys(read_header(outside).tensors, place)}
        (linked / INDEX).write_text(json.dumps(index))
        OPENED.clear()
        command_line.refuses(["--model", linked], 1, PLAIN)
        assert linked / INDEX in OPENED
        assert outside not in [path.resolve() for path in OPENED]


class Bomb:
    """An object that runs code when it is unpickled: it makes the file that it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.path,)


class TestNothingIsRun:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        """A file that exists where code of a model has run."""
        return tmp_path / "made"

    @pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
    @pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt", "safetensors"])
    def test_pickles(self, suffix: str, zipped: bool, made: Path, linked: Path, command_line: CommandLine) -> None:
        content = pickled(Bomb(made), zipped=zipped)
        torch.load(BytesIO(content), weights_only=False) if zipped else pickle.loads(content)
        assert made.exists(), "it goes off where it is unpickled"
        made.unlink()
        path = linked.parent / f"model.{suffix}"
        path.write_bytes(content)
        command_line.refuses(["--model", path], 1, f"{path} is", "pickled checkpoint, which could run code", "convert")
        (linked / UNET).unlink()
        path.rename((linked / UNET).with_suffix(f".{suffix}"))
        expected = "pickled" if suffix in ("bin", "safetensors") else "holds no"
        command_line.refuses(["--model", linked], 1, expected)
        assert not made.exists()

    def test_custom_code_classes(
        self, made: Path, linked: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        assert main(["--model", str(linked), *QUICK, "--out", str(linked.parent)]) == 0
        edit_json(linked / "model_index.json", _class_name=["modeling", "Model"])
        command_line.refuses(["--model", linked], 1, "only StableDiffusionXLPipeline and")
        assert not made.exists()
        assert "modeling" not in sys.modules


def test_links_are_followed(linked: Path) -> None:
    assert cutdiff.load(linked).hashes == cutdiff.load().hashes
