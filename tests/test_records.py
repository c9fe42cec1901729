"""Records tell which files made a picture, and not where they lie; records of earlier versions are still understood."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_fingerprint import described
from test_lora import random_change
from tiny import put_in_cache

import cutdiff
from cutdiff.checkpoint.model import Model, sha256
from cutdiff.output.parameters import parameters_text
from cutdiff.sample import main

QUICK = ["--method", "direct", "--steps", "1", "--width", "64", "--height", "64"]


def texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys and values."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


@pytest.fixture
def lora(tiny_model: Model, tmp_path: Path) -> Path:
    name = "mid_block.resnets.0.conv1"
    weight = tiny_model.unet.get_parameter(f"{name}.weight")
    factors = random_change("LoCon with a core", tuple(weight.shape), 2, torch.Generator().manual_seed(0))
    path = tmp_path / "somebody" / "style.safetensors"
    path.parent.mkdir()
    save_file({f"lora_unet_{name.replace('.', '_')}.{part}": 0.1 * value for part, value in factors.items()}, path)
    return path


@pytest.mark.parametrize("place", ["folder", "relative", "link", "cache", "vae folder", "vae file"])
def test_no_record_says_where_files_lie(
    place: str, quick_folder: Path, lora: Path, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: str | Path = Path(shutil.copytree(quick_folder, tmp_path / "somebody" / "my-model-1.0"))
    name, options, vae = "my-model-1.0", {}, "vae/diffusion_pytorch_model.safetensors"
    match place:
        case "relative":
            monkeypatch.chdir(model)
            model = "."
        case "link":
            (tmp_path / "another-2.0").symlink_to(model)
            model, name = tmp_path / "another-2.0", "another-2.0"
        case "cache":
            put_in_cache(empty_cache, "somebody/some-model", model)
            model = name = "somebody/some-model"
        case "vae folder":
            options = {"vae": tmp_path / "vae-1.5"}
            shutil.copytree(quick_folder / "vae", tmp_path / "vae-1.5")
            vae = "vae=vae-1.5/diffusion_pytorch_model.safetensors"
        case "vae file":
            options = {"vae": tmp_path / "vae-1.5.safetensors"}
            shutil.copy(quick_folder / vae, tmp_path / "vae-1.5.safetensors")
            vae = "vae=vae-1.5.safetensors"
    record = described(cutdiff.load(model, loras=[(lora, 0.5)], **options))
    assert record["model"]["source"] == name
    assert record["model"]["loras"] == [{"path": "style.safetensors", "scale": 0.5, "sha256": sha256(lora)}]
    assert record["model"]["sha256"][vae] == sha256(quick_folder / "vae" / "diffusion_pytorch_model.safetensors")
    for text in texts(record):
        assert not os.path.isabs(text), text
        assert "somebody" not in text.replace("somebody/some-model", "")
        assert tmp_path.name not in text
    assert f'Model: {name}, Loras: "style: 0.5", ' in parameters_text(record)


def test_the_embedded_model_has_its_name(model: Model) -> None:
    assert described(model)["model"]["source"] == "weights/scenes"


def test_old_records_are_understood(
    quick_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have absolute paths, that of a VAE in the fingerprint too, and no digest of the pixels."""
    shutil.copytree(quick_folder / "vae", tmp_path / "other vae")
    run = ["--model", str(quick_folder), *QUICK, "--num-images", "2", "--out", str(tmp_path / "out")]
    run += ["--vae", str(tmp_path / "other vae"), "--lora", str(lora)]
    assert main(run) == 0
    for path in (tmp_path / "out").glob("*.json"):
        record = json.loads(path.read_text())
        del record["pixels_sha256"]
        hashes = record["model"]["sha256"]
        hashes[str(tmp_path / "other vae" / "diffusion_pytorch_model.safetensors")] = hashes.pop(
            "vae=other vae/diffusion_pytorch_model.safetensors"
        )
        record["model"] |= {"source": str(quick_folder), "sha256": hashes}
        record["model"]["loras"][0]["path"] = str(lora)
        record["fingerprint"] = hashlib.sha256(path.name.encode()).hexdigest()
        path.write_text(json.dumps(record))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(run) == 0
    assert capsys.readouterr().err == "cutdiff: 2 of 2 pictures are finished already\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    damaged = min(before)
    damaged = damaged.with_suffix(".png")
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(run) == 0, "it is drawn again, and its record is new"
    assert capsys.readouterr().err == "cutdiff: 1 of 2 pictures are finished already\n"
    assert "pixels_sha256" in json.loads(damaged.with_suffix(".json").read_text())
    assert main([*run, "--steps", "2"]) == 2
    assert "was drawn with --steps 1 (now 2): pass --overwrite" in capsys.readouterr().err


def test_old_records_know_the_shape_of_the_embedded_model(model: Model) -> None:
    """A set that was begun before configurations had more fields goes on; another value of these is another shape."""
    digest = described(model)["model"]["configuration"]
    assert digest == "04c4a6708db1a3d7b6727d2d3182e86fc1b708930f4925376c204bbc2bca5252"
    unet = copy(model.unet)
    unet.config = replace(model.unet.config, guidance_dim=8)
    assert described(replace(model, unet=unet))["model"]["configuration"] != digest
