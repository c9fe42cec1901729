"""Train the embedded model's U-Net and text encoders on the latents of rendered scenes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cutdiff.models.config import UNetConfig
from cutdiff.models.layers import channels_last
from cutdiff.models.text import TextEncoders
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import NoiseConfig, alphas_cumprod
from cutdiff.scenes import world
from cutdiff.scenes.render import Crop, render
from cutdiff.scenes.world import Scenes
from cutdiff.training.fit import Plan, fit

NATIVE_PIXELS = 128
CONFIG = UNetConfig(
    channels=(64, 128, 192),
    layers_per_block=1,
    transformer_layers=(0, 1, 1),
    mid_transformer_layers=1,
    num_heads=(2, 4, 6),
    context_dim=128,
    pooled_dim=64,
    size_embedding_dim=32,
    norm_groups=8,
    native_size=16,
)
WHOLE_SCENES, SMALLEST_CROP = 0.5, 0.2
"""Half of the pictures show a whole scene, and the others a crop down to a fifth of its side, so that views of a
picture five times the native size are still in distribution."""
DROPPED_CLAUSE = 0.1
"""The probability that a caption leaves out its ridge, its ground or its time, drawn for each of them."""
DROPPED_CAPTION = 0.1
"""The share of pictures without a caption, for guidance: half of them have zeros for text, half an empty prompt."""
MIN_SNR = 5.0
"""The largest signal-to-noise ratio that counts in the loss's weights (Hang et al. 2023, arXiv 2303.09556)."""


@dataclass(frozen=True)
class Latents:
    """Encoded scenes: the posterior of each picture, the choices that its caption can name, its size conditioning."""

    mean: Tensor
    std: Tensor
    choices: Tensor
    """(N, 5) indices of colour, subject, ridge, ground and time."""
    size_ids: Tensor
    """(N, 6) in pixels: original size, corner of the crop, target size."""


def encode_scenes(
    vae: VAE, count: int, folder: Path, device: torch.device, *, whole: float = WHOLE_SCENES, part: int = 64
) -> Latents:
    """Render and encode `count` pictures, or read back those that this very VAE encoded before.

    A share `whole` of them shows whole scenes, the others crops.
    """
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters())
    path = folder / f"latents-{count}-{whole}-{hashlib.sha256(weights).hexdigest()[:12]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw_scenes(count, device, whole=whole, part=part)
        parts = [_encode(vae, *each) for each in tqdm(drawn, desc="latents", total=math.ceil(count / part))]
        torch.save([torch.cat(tensors) for tensors in zip(*parts, strict=True)], path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return Latents(*torch.load(path, map_location=device, weights_only=True))


def draw_scenes(
    count: int, device: torch.device, *, whole: float = WHOLE_SCENES, part: int = 64
) -> Iterator[tuple[Scenes, Crop]]:
    """The scenes and crops whose pictures `encode_scenes` encodes, `part` at once."""
    generator = torch.Generator(device).manual_seed(2)
    for _ in range(0, count, part):
        scenes = world.sample(part, generator)
        yield scenes, Crop.sample(part, generator, min_side=SMALLEST_CROP, whole=whole)


def train_unet(
    unet: UNet,
    text: TextEncoders,
    latents: Latents,
    folder: Path,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    bfloat16: bool,
) -> None:
    """Train the U-Net and the text encoders in place to predict the noise (epsilon), weighted by min-SNR-5."""
    channels_last(unet)
    alphas = torch.tensor(alphas_cumprod(NoiseConfig()), dtype=torch.float32, device=device)
    null = torch.full((5,), -1, device=device)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        index = torch.randint(len(latents.mean), (batch,), generator=generator, device=device)
        normal = torch.randn(2, batch, *latents.mean.shape[1:], generator=generator, device=device)
        clean = latents.mean[index].float() + latents.std[index].float() * normal[0]
        dropped = rand(batch) < DROPPED_CAPTION
        choices = torch.where(dropped[:, None], null, latents.choices[index])
        zeroed = (dropped & (rand(batch) < 0.5)).float()[:, None]
        captions = captions_of(choices, rand(batch, 3) >= DROPPED_CLAUSE)

        t = stratified(rand(batch), len(alphas))
        alpha = alphas[t][:, None, None, None]
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * normal[1]
        (tokens,) = text.tokenize(captions)  # all fit one chunk
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = text.encode_tokens(*(part.ids for part in tokens))
            context, pooled = states.context * (1 - zeroed[:, :, None]), states.pooled * (1 - zeroed)
            noised = noised.contiguous(memory_format=torch.channels_last)
            predicted = unet(noised, t, context, pooled, latents.size_ids[index])
        return losses(predicted, normal[1], alphas[t])

    both = nn.ModuleDict({"unet": unet, "text": text.encoders[0], "text_2": text.encoders[1]})
    fit("unet", both, loss, Plan(steps, learning_rate=1e-3, muon_learning_rate=0.01, warmup=100), folder, device)


class Batch(NamedTuple):
    """The draws of a training step beside the U-Net's: some of all pictures, noise, and captions."""

    numbers: Tensor
    """The numbers of the B pictures."""
    clean: Tensor
    """Their latents (B, C, h, w), drawn from the posterior."""
    noise: Tensor
    captions: list[str]
    """A tenth of them empty, and clauses left out of the others."""

    @staticmethod
    def draw(latents: Latents, size: int, generator: torch.Generator) -> Batch:
        """Draw a batch of `size` on the generator's device."""
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=generator.device)  # noqa: E731
        index = torch.randint(len(latents.mean), (size,), generator=generator, device=generator.device)
        shape = (2, size, *latents.mean.shape[1:])
        spread, noise = torch.randn(shape, generator=generator, device=generator.device)
        clean = latents.mean[index].float() + latents.std[index].float() * spread
        null = torch.full((5,), -1, device=generator.device)
        choices = torch.where((rand(size) < DROPPED_CAPTION)[:, None], null, latents.choices[index])
        return Batch(index, clean, noise, captions_of(choices, rand(size, 3) >= DROPPED_CLAUSE))


def stratified(draws: Tensor, count: int) -> Tensor:
    """One of `count` timesteps from each of as many equal strata as there are draws in [0, 1), (B,) int64."""
    strata = (torch.arange(len(draws), device=draws.device) + draws) / len(draws)
    return (strata * count).long().clamp(max=count - 1)


def losses(predicted: Tensor, noise: Tensor, alphas: Tensor) -> dict[str, Tensor]:
    """The error of predicted noise (B, C, h, w), weighted by min-SNR-5 and plain; `alphas` (B,) are the shares ᾱ."""
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    snr = alphas / (1 - alphas)
    return {"loss": (error * snr.clamp(max=MIN_SNR) / snr).mean(), "mse": error.detach().mean()}


def captions_of(choices: Tensor, keep: Tensor) -> list[str]:
    """The captions of (N, 5) choices, empty where these are -1."""
    texts = world.captions(choices.clamp(min=0), keep)
    return ["" if row[0] < 0 else text for row, text in zip(choices.tolist(), texts, strict=True)]


@torch.no_grad()
def _encode(vae: VAE, scenes: Scenes, crop: Crop) -> tuple[Tensor, ...]:
    images = render(scenes, NATIVE_PIXELS, crop).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(images)
    original = NATIVE_PIXELS / crop.side
    target = torch.full_like(original, NATIVE_PIXELS)
    size_ids = torch.stack([original, original, crop.top * original, crop.left * original, target, target], dim=1)
    return posterior.mean.half(), posterior.std.half(), scenes.choices, size_ids
