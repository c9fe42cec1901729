"""Train a ControlNet of the embedded model that reads the edges of a scene: `python -m cutdiff.training.controlnet`.

The U-Net stays as it is; a smaller copy of its way down learns to predict the noise with it, shown the edges that
`scenes.render.outlines` draws. Checkpoints and the log go to --work, the network in float16 to --out, with the
config.json of diffusers and a card beside it. A training that was stopped goes on.

Source: Zhang et al. 2023 (arXiv 2302.05543).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutdiff.checkpoint.control import save_control
from cutdiff.checkpoint.model import Model
from cutdiff.cli.ending import exit_status
from cutdiff.models.config import UNetConfig
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.models.layers import channels_last
from cutdiff.models.unet import as_unet
from cutdiff.sampling.noise import alphas_cumprod
from cutdiff.scenes.render import Crop, outlines
from cutdiff.scenes.world import Scenes
from cutdiff.training.beside import begun, noise_of, parser_beside
from cutdiff.training.card import phase, write_control_card
from cutdiff.training.fit import Plan, fit
from cutdiff.training.unet import (
    NATIVE_PIXELS,
    WHOLE_SCENES,
    Batch,
    Latents,
    draw_scenes,
    losses,
    stratified,
)

HINT_WIDTHS = (16, 16, 32, 48)
LINES = (0.5, 3.0)
"""The widths of lines in pixels, drawn for each picture: thinner ones than one pixel are grey, as those that were made
smaller are."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: _run(argv), argv, failures=(ValueError, OSError, FloatingPointError))


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    model, latents = begun(args, "model", "num_scenes", "steps", "batch")
    network = train_control(
        model, latents, args.work, steps=args.steps, batch=args.batch, bfloat16=args.dtype == "bfloat16"
    )
    save_control(args.out, network)
    data = f"{args.batch} of {args.num_scenes} pictures, {WHOLE_SCENES:.0%} of them whole scenes"
    made: dict[str, Any] = phase(
        "ControlNet", "loss", args.work / "controlnet.jsonl", data=data, device=model.device, dtype=args.dtype
    )
    write_control_card(args.out, model, made)
    print(f"wrote {args.out}")


def train_control(
    model: Model, latents: Latents, folder: Path, *, steps: int, batch: int, bfloat16: bool
) -> ControlNet:
    """Train a ControlNet of the model's U-Net and return it; resumable, see `fit`."""
    device, unet = model.device, as_unet(model.unet)
    alphas = torch.tensor(alphas_cumprod(noise_of(model)), dtype=torch.float32, device=device)
    drawn = [*zip(*draw_scenes(len(latents.mean), device), strict=True)]
    scenes, crops = Scenes.joined(drawn[0]), Crop.joined(drawn[1])
    torch.manual_seed(0)  # initial weights; every other draw comes from the generator of its step
    network = ControlNet(small_config(unet.config)).to(device)
    network.copy_down(unet)
    for each in (unet, network):
        channels_last(each)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        index, clean, noise, captions = Batch.draw(latents, batch, generator)
        width = LINES[0] + (LINES[1] - LINES[0]) * rand(batch)
        hint = outlines(scenes[index], NATIVE_PIXELS, crops[index], width=width)
        t = stratified(rand(batch), len(alphas))
        alpha = alphas[t][:, None, None, None]
        noised = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        text = model.text.encode(captions)
        read = (noised, t, text.context, text.pooled, latents.size_ids[index])
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = unet(*read, network(*read, hint))
        return losses(predicted, noise, alphas[t])

    plan = Plan(
        steps,
        learning_rate=1e-3,
        muon_learning_rate=0.01,
        warmup=50,
        ema_decay=0.99,
        checkpoint_every=50,
        log_every=min(50, steps),
    )
    fit("controlnet", network, loss, plan, folder, device)
    return network


def small_config(unet: UNetConfig) -> ControlNetConfig:
    """A ControlNet that leaves out what takes most weights: attention at the coarsest level and in the middle."""
    depths = (*unet.transformer_layers[:-1], 0)
    smaller = replace(unet, transformer_layers=depths, mid_transformer_layers=0, up_transformer_layers=None)
    return ControlNetConfig(smaller, HINT_WIDTHS)


def _parser() -> argparse.ArgumentParser:
    counts = (
        ("num-scenes", 4096, "pictures to encode"),
        ("steps", 1600, "steps of the training"),
        ("batch", 16, "latents in each of them"),
    )
    return parser_beside("controlnet", __doc__, Path("weights/scenes-control.safetensors"), "network", counts)


if __name__ == "__main__":
    sys.exit(main())
