"""The cards beside the embedded weights, which say how these were trained and what their hashes are."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from cutdiff.checkpoint import load
from cutdiff.checkpoint.header import read_header
from cutdiff.checkpoint.locate import name_of
from cutdiff.checkpoint.model import Model, sha256
from cutdiff.files import json_lines, json_of
from cutdiff.scenes.vocabulary import PART

HISTORY = "training.json"
PREFERRED = {"guidance_scale": 4.0}
"""The options of a run that the finished model says it prefers: the scale at which all was measured."""
CARD = """# The embedded model

A model of SDXL's architecture, small enough to live in the repository: native size {native} latents ({pixels} px),
U-Net {unet:.1f} M parameters, VAE {vae:.1f} M, two text encoders of {text:.2f} M each, stored in float16. It knows one
world, the scenes that `cutdiff/scenes` renders, and was trained on nothing else. It is licensed as the code is, under
Apache-2.0.

It was made by `python -m cutdiff.training`, which continues where it was stopped, and with `--init` from a finished
model:

{phases}

The seconds include whatever else the machine did. The loss is weighted by min-SNR-5; the PSNR is that of the training
crops.

Each picture is a whole scene or a crop that shows down to a fifth of a scene's side; half of them are crops where the
list does not say otherwise. The network is given the original size, the crop's corner and the target size, as SDXL is.
A tenth of the captions is dropped.

## Curves

{curves}

## SHA-256

```
{hashes}
```
"""

LORA_CARD = """# A LoRA of the embedded model for few steps without guidance

`{name}` changes all linear layers and convolutions of the U-Net, by rank {rank}, in float16. With it the model draws in
1 to 8 steps of `--solver lcm` at `--guidance-scale 1`:

```
python -m cutdiff.sample --lora {shown} --solver lcm --steps 4 --guidance-scale 1
```

It was made by `python -m cutdiff.training.consistency`, by consistency distillation (Luo et al. 2023, arXiv 2310.04378
and 2311.05556) of the same U-Net at guidance {guidance_scale:g}, on a grid of {grid} steps. It has seen nothing but the
scenes that `cutdiff/scenes` renders, and is licensed as the code is, under Apache-2.0.

{phases}

The seconds include whatever else the machine did, but not the encoding of the pictures.

{curve}

## SHA-256

```
{hashes}
```
"""


CONTROL_CARD = """# A ControlNet of the embedded model for the edges of a scene

`{name}` has {millions:.1f} M parameters, in float16 and with the keys of diffusers; `{config}` is the config.json
with which diffusers builds it. Its hint is a picture of white lines on black, the edges of all that a scene shows, as
`cutdiff.scenes.render.outlines` draws them:

```
python -m cutdiff.sample "a red house" --control {shown} --control-image edges.png
```

It was made by `python -m cutdiff.training.controlnet` (Zhang et al. 2023, arXiv 2302.05543): a copy of the U-Net's way
down without attention at the coarsest level and in the middle, trained with the U-Net as it is. It has seen nothing but
the scenes that `cutdiff/scenes` renders, with lines of half a pixel to three, and is licensed as the code is, under
Apache-2.0.

{phases}

The seconds include whatever else the machine did, but not the encoding of the pictures.

{curve}

## SHA-256

```
{hashes}
```
"""

FLOW_CARD = """# The embedded rectified-flow transformer

A model of FLUX.1's architecture, small enough to live in the repository: native size {native} latents ({pixels} px),
transformer {transformer:.1f} M parameters, the VAE of the other embedded model ({vae:.1f} M), a CLIP text encoder of
{clip:.2f} M and a T5 encoder of {t5:.2f} M, stored in float16. It knows one world, the scenes that `cutdiff/scenes`
renders, and was trained on nothing else. It is licensed as the code is, under Apache-2.0. diffusers' FluxPipeline reads
the folder, too.

It was made by `python -m cutdiff.training.flow`:

{phases}

The seconds include whatever else the machine did, but not the encoding of the pictures. The loss is the squared error
of the predicted velocity.

The network is told neither size nor crop. So pictures that show a part of a scene, down to a fifth of its side, have
captions that begin with "{part}". A tenth of the captions is dropped, for guidance with a negative prompt.

{curves}

## SHA-256

```
{hashes}
```
"""


def phase(name: str, quantity: str, log: Path, *, data: str, device: torch.device, dtype: str) -> dict[str, Any]:
    """Describe a finished phase of training from its log: its data, its cost, and `quantity` over its steps."""
    lines = json_lines(log)
    if not lines:
        raise ValueError(f"{log} is empty, so it tells nothing of a training: start it again with another --work")
    points = lines[:: max(1, len(lines) // 12)]
    points = points if points[-1] is lines[-1] else [*points, lines[-1]]
    return {
        "name": name,
        "data": data,
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "hardware": _hardware(device),
        "torch": torch.__version__,
        "dtype": dtype,
        "quantity": quantity,
        "curve": [[line["step"], line[quantity]] for line in points],
    }


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The phases that made the model in `folder`."""
    return json_of(folder / HISTORY)


def write_card(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write README.md and the history of its phases beside the finished model in `folder`."""
    model = load(folder)
    _write_card(folder, model, history, CARD, unet=_millions(model.unet), text=_millions(model.text.text_encoder))


def write_flow_card(folder: Path, made: dict[str, Any]) -> None:
    """Write README.md and the history beside the finished transformer in `folder`."""
    model = load(folder)
    clip, t5 = map(_millions, model.text.encoders)
    transformer = _millions(model.unet)
    _write_card(folder, model, [made], FLOW_CARD, transformer=transformer, clip=clip, t5=t5, part=PART)


def _write_card(folder: Path, model: Model, history: list[dict[str, Any]], card: str, **facts: Any) -> None:
    text = card.format(
        native=model.native_size,
        pixels=model.native_size * model.factor,
        vae=_millions(model.vae),
        phases="\n".join(map(_line, history)),
        curves="\n\n".join(_curve(p) for p in history),
        hashes="\n".join(f"{digest}  {name}" for name, digest in sorted(model.hashes.items())),
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / HISTORY).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")


def write_lora_card(
    path: Path, model: Model, made: dict[str, Any], *, rank: int, guidance_scale: float, grid: int
) -> None:
    """Write the card of the LoRA `path` of a model's U-Net beside it, with the ending .md."""
    _write_beside(path, model, made, LORA_CARD, rank=rank, guidance_scale=guidance_scale, grid=grid)


def write_control_card(path: Path, model: Model, made: dict[str, Any]) -> None:
    """Write the card of the ControlNet `path` of a model's U-Net beside it, with the ending .md."""
    millions = sum(math.prod(entry.shape) for entry in read_header(path).tensors.values()) / 1e6
    _write_beside(path, model, made, CONTROL_CARD, millions=millions, config=path.with_suffix(".json").name)


def _write_beside(path: Path, model: Model, made: dict[str, Any], card: str, **facts: Any) -> None:
    """Write a card of `facts` and of the training `made` beside the file `path`, which belongs to a model's U-Net."""
    unet = {name: digest for name, digest in model.hashes.items() if name.startswith("unet/")}
    hashes = {path.name: sha256(path), **{f"{name_of(model.source)}/{name}": digest for name, digest in unet.items()}}
    text = card.format(
        name=path.name,
        shown=path,
        phases=_line(made),
        curve=_curve(made),
        hashes="\n".join(f"{digest}  {name}" for name, digest in hashes.items()),
        **facts,
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _line(phase: dict[str, Any]) -> str:
    return (
        f"- {phase['name']}: {phase['steps']} steps of {phase['data']} in {phase['seconds']} s, on {phase['hardware']}"
        f", torch {phase['torch']}, arithmetic in {phase['dtype']}; {phase['quantity']} at the end "
        f"{phase['curve'][-1][1]:.4g}"
    )


def _curve(phase: dict[str, Any]) -> str:
    steps, values = zip(*phase["curve"], strict=True)
    rows = [
        f"| {phase['name']}: step | " + " | ".join(str(step) for step in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
        f"| {phase['quantity']} | " + " | ".join(f"{value:.4g}" for value in values) + " |",
    ]
    return "\n".join(rows)


def _millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({platform.machine()}, {capability})"
