"""The distillation for few steps: its loss, its training, its file, and the embedded LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from renders import scenes
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sampling.noise import NoiseConfig, alphas_cumprod
from cutdiff.scenes import world
from cutdiff.scenes.read import read
from cutdiff.training import consistency
from cutdiff.training.lora import LowRank, add_lora, save_lora
from cutdiff.training.unet import encode_scenes

LORA = Path(__file__).parents[1] / "weights" / "scenes-lcm.safetensors"


def test_the_loss_is_that_of_the_paper(tmp_path: Path, quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed here on the VP state, with DDIM's step and the boundary condition as the paper has them, at every
    place of the grid."""
    model, batch = cutdiff.load(quick_folder), 50
    latents = encode_scenes(model.vae, 64, tmp_path, model.device)
    losses: list[Callable[[torch.Generator], dict[str, Tensor]]] = []
    monkeypatch.setattr(consistency, "fit", lambda _name, _module, loss, *_others: losses.append(loss))
    changes = consistency.distil(model, latents, tmp_path, rank=2, steps=1, batch=batch, bfloat16=False)
    assert all(not name.endswith("up") or not p.any() for name, p in changes.named_parameters())  # it is the teacher
    given = losses[0](torch.Generator().manual_seed(3))["loss"]

    generator = torch.Generator().manual_seed(3)
    index = torch.randint(len(latents.mean), (batch,), generator=generator)
    posterior, normal = torch.randn(2, batch, 4, 16, 16, generator=generator)
    clean = latents.mean[index] + latents.std[index] * posterior
    kept = torch.rand(batch, 3, generator=generator) >= 0.1
    text = model.text.encode(world.captions(latents.choices[index], kept))
    step = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 50).long().clamp(max=49)
    upper = 20 * step + 19
    lower = (upper - 20).clamp(min=0)
    alphas = torch.tensor(alphas_cumprod(NoiseConfig())).float()
    shares = {t: alphas[t][:, None, None, None] for t in (upper, lower)}

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        eps = scale * model.unet(x, t, text.context, text.pooled, latents.size_ids[index])
        zeros = torch.zeros_like(text.context), torch.zeros_like(text.pooled)
        eps += (1 - scale) * model.unet(x, t, *zeros, latents.size_ids[index])
        return (x - (1 - shares[t]).sqrt() * eps) / shares[t].sqrt(), eps

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        scaled = 10.0 * t[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return skip * x + out * predict(x, t)[0]

    x = shares[upper].sqrt() * clean + (1 - shares[upper]).sqrt() * normal
    x0, eps = predict(x, upper, 4.0)
    down = shares[lower].sqrt() * x0 + (1 - shares[lower]).sqrt() * eps
    error = estimate(x, upper) - estimate(down, lower)
    torch.testing.assert_close(given.detach(), ((error**2 + 1e-6).sqrt() - 1e-3).mean(), rtol=1e-5, atol=0)


def test_what_is_loaded_is_what_was_trained(tmp_path: Path, quick_folder: Path) -> None:
    unet = cutdiff.load(quick_folder).unet
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    changes = add_lora(unet, 2)
    for module in changes.values():
        assert isinstance(module, LowRank)
        assert not module.up.any(), "at first, nothing changes"
        torch.nn.init.normal_(module.up)
    save_lora(tmp_path / "lora.safetensors", changes)
    loaded = cutdiff.load(quick_folder, loras=[(tmp_path / "lora.safetensors", 1.0)]).unet
    changed = 0
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.testing.assert_close(loaded.get_parameter(f"{name}.weight"), module.weight, rtol=0, atol=5e-3)
            changed += bool((module.weight - before[f"{name}.weight"]).abs().max() > 0.1)
    assert changed == len(changes)


def test_the_embedded_lora_is_small_and_of_the_embedded_model(model: Model) -> None:
    written = LORA.read_bytes()
    assert len(written) <= 3e6
    card = LORA.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{hashlib.sha256(written).hexdigest()}  {LORA.name}" in card
    name = "unet/diffusion_pytorch_model.safetensors"
    assert f"{model.hashes[name]}  weights/scenes/{name}" in card
    cutdiff.load(loras=[(LORA, 1.0)])


@pytest.mark.parametrize(("steps", "share"), [(4, 0.9), (2, 0.75)])
def test_the_embedded_lora_draws_what_captions_name_in_few_steps(steps: int, share: float) -> None:
    """Without the LoRA, two steps do so in about half of the pictures."""
    model = cutdiff.load(loras=[(LORA, 1.0)])
    choices = scenes(48, seed=500).choices
    options: dict[str, Any] = {"method": "direct", "height": 128, "width": 128, "view_batch_size": 48}
    options |= {"solver": "lcm", "num_steps": steps, "guidance_scale": 1.0}
    images = cutdiff.generate(model, world.captions(choices), **options).images
    assert read(images).matches(choices).float().mean() >= share
