"""The README that stands beside the embedded weights: how they were trained, and their hashes."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from cutdiff.checkpoint import load

CARD = """# The embedded model

A model of SDXL's architecture, small enough to live in the repository: native size {native} latents ({pixels} px),
U-Net {unet:.1f} M parameters, VAE {vae:.1f} M, two text encoders of {text:.2f} M each, stored in float16. It knows one
world, the scenes that `cutdiff/scenes` renders, and was trained on nothing else. Apache-2.0, as the code.

Made by `python -m cutdiff.scenes.train`, which can be stopped and goes on where it was:

- VAE: {vae_log[step]} steps of {vae_batch} crops of 64 px in {vae_log[seconds]} s; PSNR on training crops at the end
  {vae_log[psnr]:.1f} dB
- U-Net and text encoders: {unet_log[step]} steps of {unet_batch} pictures of {pixels} px in {unet_log[seconds]} s; loss
  at the end {unet_log[loss]:.4f} (min-SNR weights), {unet_log[mse]:.4f} (plain)

on {hardware}, torch {torch}, arithmetic in {dtype}; the seconds include whatever else the machine did.

Pictures are whole scenes or crops that show down to a fifth of a scene's side, told to the network as SDXL is told:
original size, crop corner, target size. A tenth of the captions is dropped.

## Loss curves

{curves}

## SHA-256

```
{hashes}
```
"""


def write_card(folder: Path, logs: Path, *, device: torch.device, dtype: str, vae_batch: int, unet_batch: int) -> None:
    """Write `folder`/README.md from the finished model in `folder` and the training logs in `logs`."""
    model = load(folder)
    vae_log, unet_log = _read(logs / "vae.jsonl"), _read(logs / "unet.jsonl")
    text = CARD.format(
        native=model.native_size,
        pixels=model.native_size * model.factor,
        unet=_millions(model.unet),
        vae=_millions(model.vae),
        text=_millions(model.text.text_encoder),
        vae_batch=vae_batch,
        unet_batch=unet_batch,
        vae_log=vae_log[-1],
        unet_log=unet_log[-1],
        hardware=_hardware(device),
        torch=torch.__version__,
        dtype=dtype,
        curves=_curve("VAE", vae_log, "psnr") + "\n\n" + _curve("U-Net", unet_log, "loss"),
        hashes="\n".join(f"{digest}  {name}" for name, digest in sorted(model.hashes.items())),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _curve(name: str, log: list[dict[str, float]], key: str) -> str:
    """A table of about a dozen points of a curve."""
    points = log[:: max(1, len(log) // 12)]
    points = points if points[-1] is log[-1] else [*points, log[-1]]
    rows = [
        f"| {name}: step | " + " | ".join(str(p["step"]) for p in points) + " |",
        "|---" * (len(points) + 1) + "|",
        f"| {key} | " + " | ".join(f"{p[key]:.4g}" for p in points) + " |",
    ]
    return "\n".join(rows)


def _millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {capability})"
