"""Train the embedded model's VAE on crops of rendered scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cutdiff.models.config import VAEConfig
from cutdiff.models.layers import channels_last
from cutdiff.models.vae import VAE
from cutdiff.scenes import world
from cutdiff.scenes.render import Crop, render
from cutdiff.scenes.world import Scenes
from cutdiff.training.fit import Plan, fit

CONFIG = VAEConfig(channels=(32, 32, 64, 96), layers_per_block=1, norm_groups=4, scaling_factor=1.0, force_upcast=False)
CROP_PIXELS = 64
KL_WEIGHT = 1e-5
"""The weight of the divergence per latent number: enough to keep latents near unit scale, too little to blur."""


def train_vae(folder: Path, *, steps: int, batch: int, device: torch.device, bfloat16: bool) -> VAE:
    """Train a VAE, measure the scale of its latents on true scenes, and make that its scaling factor."""
    torch.manual_seed(0)  # initial weights; every other draw comes from the generator of its step
    vae = VAE(CONFIG).to(device)
    channels_last(vae)
    # The latents start with little noise: with unit noise, the decoder would learn to ignore them first.
    assert isinstance(vae.quant_conv, nn.Conv2d)
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias.data[CONFIG.latent_channels :] = -6.0

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        scenes = world.sample(batch, generator)
        images = render(scenes, CROP_PIXELS, sample_crops(scenes, generator)).contiguous(
            memory_format=torch.channels_last
        )
        shape = (batch, CONFIG.latent_channels, CROP_PIXELS // CONFIG.factor, CROP_PIXELS // CONFIG.factor)
        noise = torch.randn(shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            decoded, kl = _autoencode(vae, images, noise)
        return _loss_terms(decoded.float(), images, kl.float().mean() / noise[0].numel())

    fit("vae", vae, loss, Plan(steps, learning_rate=2e-3, muon_learning_rate=0.02, ema_decay=0.995), folder, device)
    return with_measured_scale(vae, device)


def sample_crops(scenes: Scenes, generator: torch.Generator) -> Crop:
    """Draw the crops that a 64 px window shows of pictures of 128 px (half of them) to 640 px, often at an object."""
    n, device = len(scenes), generator.device
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
    side = torch.where(rand(n) < 0.5, 0.5, 0.5 * 0.2 ** rand(n))
    balloon = scenes.subject == world.SUBJECTS.index("balloon")
    subject = torch.stack([scenes.subject_x, torch.where(balloon, scenes.balloon_y, scenes.horizon)])
    body = torch.stack([scenes.body_x, scenes.body_y])
    pick = rand(n)
    center = torch.where(pick < 0.45, subject + 0.15 * (rand(2, n) - 0.5), torch.where(pick < 0.6, body, rand(2, n)))
    left, top = (center - side / 2).clamp(min=0).minimum(1 - side)
    return Crop(left, top, side)


def with_measured_scale(vae: VAE, device: torch.device) -> VAE:
    """Copy the network with the scaling factor that gives the latents of whole scenes and crops unit deviation."""
    generator = torch.Generator(device).manual_seed(1)
    scenes = world.sample(256, generator)
    images = render(scenes, 128, Crop.sample(256, generator, min_side=0.2, whole=0.5))
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).sample(generator) for part in images.split(32)])
    scaled = VAE(replace(vae.config, scaling_factor=round(1 / latents.std().item(), 5)))
    scaled.load_state_dict(vae.state_dict())
    channels_last(scaled)
    return scaled.to(device).eval()


def _autoencode(vae: VAE, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(images)
    return vae.decode(posterior.mean + posterior.std * noise), posterior.kl()


def _loss_terms(decoded: Tensor, images: Tensor, kl: Tensor) -> dict[str, Tensor]:
    error = decoded - images
    absolute, squared = error.abs().mean(), error.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = absolute + 2 * squared + 0.5 * gradient + KL_WEIGHT * kl
    psnr = -10 * torch.log10(squared.detach() / 4)
    return {"loss": loss, "l1": absolute.detach(), "gradient": gradient.detach(), "kl": kl.detach(), "psnr": psnr}
