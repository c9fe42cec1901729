"""A VAE from elsewhere in the place of a model's own, and the command line's account of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VAE_TINY, as_convolution, put_in_cache, random_model
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.configs import vae_to_diffusers
from cutdiff.checkpoint.families import SD15, VAE_PREFIX
from cutdiff.checkpoint.keys import vae_keys
from cutdiff.checkpoint.model import sha256
from cutdiff.models.config import VAEConfig
from cutdiff.models.vae import VAE
from cutdiff.sample import main

OTHER = replace(VAE_TINY, scaling_factor=0.5, force_upcast=False, layers_per_block=2)
LAYOUTS = ("folder", "model folder", "original file", "diffusers file", "checkpoint")


@pytest.fixture(scope="module")
def vae() -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return VAE(OTHER)


def original(vae: VAE) -> dict[str, Tensor]:
    state = vae.state_dict()
    return {name: as_convolution(name, state[key]).contiguous() for name, key in vae_keys(vae).items()}


def write(vae: VAE, layout: str, place: Path) -> tuple[Path, Path]:
    """Write a VAE; returns the path to pass as --vae, and the file that holds its weights."""
    if layout.endswith("folder"):
        folder = place / "vae" if layout == "model folder" else place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vae_to_diffusers(vae.config, sample_size=64)))
        save_file(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        return place, folder / "diffusion_pytorch_model.safetensors"
    file = place / "vae.safetensors"
    tensors = vae.state_dict() if layout == "diffusers file" else original(vae)
    if layout == "checkpoint":
        tensors = {VAE_PREFIX + key: tensor for key, tensor in tensors.items()} | {
            "model.diffusion_model.x": torch.ones(1)
        }
    save_file(tensors, file)
    return file, file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_takes_the_place_of_the_models_own(vae: VAE, folder: Path, tmp_path: Path, layout: str) -> None:
    path, file = write(vae, layout, tmp_path)
    model, own = cutdiff.load(folder, vae=path), cutdiff.load(folder)
    says = layout.endswith("folder")  # a file says neither
    told = (OTHER.scaling_factor, False) if says else (VAE_TINY.scaling_factor, VAE_TINY.force_upcast)
    assert (model.vae.config.scaling_factor, model.vae.config.force_upcast) == told
    assert model.vae.config.layers_per_block == OTHER.layers_per_block
    for key, tensor in vae.state_dict().items():
        assert torch.equal(model.vae.state_dict()[key], tensor), key
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), own.unet.parameters(), strict=True))
    assert model.hashes[f"vae={Path(path.name) / file.relative_to(path)}"] == sha256(file)
    assert not any(name.startswith("vae/") for name in model.hashes)


def test_the_models_own_may_then_be_missing(
    vae: VAE, folder: Path, copy: Path, empty_cache: Path, tmp_path: Path
) -> None:
    path, _ = write(vae, "original file", tmp_path)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert cutdiff.load(copy, vae=path).vae.config.layers_per_block == OTHER.layers_per_block

    put_in_cache(empty_cache, "openai/clip-vit-large-patch14", folder / "tokenizer")
    tensors = {k: v for k, v in random_model(SD15).original().items() if not k.startswith(VAE_PREFIX)}
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare.safetensors: an SD 1.5 model without a VAE: pass one as --vae"):
        cutdiff.load(tmp_path / "bare.safetensors")
    model = cutdiff.load(tmp_path / "bare.safetensors", vae=path)
    assert model.vae.config == replace(OTHER, scaling_factor=0.18215, force_upcast=False)


def test_a_file_without_one(folder: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors is no VAE: "):
        cutdiff.load(folder, vae=tmp_path / "lora.safetensors")


def test_a_broken_one_is_the_file_that_is_named(vae: VAE, folder: Path, tmp_path: Path) -> None:
    path, _ = write(vae, "original file", tmp_path)
    tensors = load_file(path)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=rf"^{path}: vae: the weights do not fit .* 1 missing: decoder\.conv_out\.bias"
    ):
        cutdiff.load(folder, vae=path)


def test_one_that_does_not_fit_the_network(folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        path, _ = write(VAE(VAEConfig(channels=(32, 64), layers_per_block=1, latent_channels=8)), "folder", tmp_path)
    with pytest.raises(ValueError, match="of the VAE's latents differ, 4 and 8"):
        cutdiff.load(folder, vae=path)


def test_the_command_line_tells_who_decided(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--steps", "1", "--width", "64", "--height", "64", "--method", "direct", "--out", str(tmp_path)]
    assert main(["red", "--model", str(folder), "--prediction-type", "epsilon", "-v", *quick]) == 0
    told = capsys.readouterr().err
    assert "prediction_type=epsilon, decided by: option" in told
    assert "zero_terminal_snr=True, decided by: scheduler" in told
    assert "network evaluations" in told
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    decided_by = {"prediction_type": "option", "zero_terminal_snr": "scheduler", "timestep_spacing": "scheduler"}
    assert record["model"]["decided_by"] == decided_by
