"""The README beside the features: it says how they were trained, and how far apart they put true and spoilt sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.evaluation.features import DIM, PIXELS, FeatureNet, blur, crop_features, load_features, whole_features
from cutdiff.evaluation.metrics import frechet_distance, kernel_distance
from cutdiff.files import json_lines
from cutdiff.scenes import world
from cutdiff.scenes.render import render

SET_SIZE, SET_PAIRS = 200, 10
"""The number of pictures in a set where nothing else is asked for, and the number of pairs of true sets."""
LARGE = 2 * PIXELS

CARD = """# The features

A convolutional network of {parameters:.2f} M parameters that turns a picture of {pixels} px into {dim} features, stored
in float16. It was trained on true renders of the scenes world, whole scenes and crops down to a fifth of a scene's
side, half of them blurred, to name colour, subject, ridge, ground and time, to tell whether subject and sky body are
visible, to place them, and to tell scale and blur. The features are its last hidden layer, each scaled to mean 0 and
deviation 1 on whole true renders. It is licensed as the code is, under Apache-2.0.

It was made by `python -m cutdiff.training.features`: {step} steps of {batch} pictures in {seconds} s on {threads} CPU
thread(s), including whatever else the machine did. On {size} whole scenes that it never saw it is right about the
{accuracy}.

## How far apart true sets are

A distance means something only where it is above what lies between two sets of true renders: this floor depends on
the size of the sets. Here are its mean, least and most over {pairs} pairs of disjoint sets of {size} pictures, and what
the first pair's distance becomes when its second set is spoilt. A large picture gives two numbers: whole, averaged
down to {pixels} px, and as crops of {pixels} px.

| | Fréchet distance | kernel distance |
|---|---|---|
{distances}

## SHA-256

```
{digest}  model.safetensors
```
"""


def write_card(folder: Path, log: Path, *, batch: int, size: int) -> None:
    """Measure the weights in `folder` on sets of `size` pictures and write `folder`/README.md."""
    network = load_features(folder)
    entry = json_lines(log)[-1]
    text = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        pixels=PIXELS,
        dim=DIM,
        step=entry["step"],
        seconds=entry["seconds"],
        batch=batch,
        threads=torch.get_num_threads(),
        size=size,
        accuracy=_accuracy(network, size),
        pairs=SET_PAIRS,
        distances="\n".join(_distances(network, size)),
        digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _accuracy(network: FeatureNet, size: int) -> str:
    scenes = world.sample(size, torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = network.answers(render(scenes, PIXELS) / 2 + 0.5)[: scenes.choices.shape[1]]
    guesses = torch.stack([guess.argmax(1) for guess in logits], dim=1)
    rates = (guesses == scenes.choices).float().mean(0).tolist()
    names = ("colour", "subject", "ridge", "ground", "time")
    return ", ".join(f"{name} of {rate:.1%}" for name, rate in zip(names, rates, strict=True))


def _distances(network: FeatureNet, size: int) -> list[str]:
    """The rows of the table of distances."""

    def whole(images: Tensor) -> Tensor:
        return whole_features(network, images)

    def crops(images: Tensor) -> Tensor:
        return crop_features(network, images).flatten(0, 1)

    return [
        *_rows(f"{PIXELS} px, whole", whole, size, PIXELS, {"blurred": _blurred, "halves exchanged": _exchanged}),
        *_rows(f"{LARGE} px, crops", crops, size, LARGE, {"enlarged": _enlarged, "shrunk and repeated": _repeated}),
    ]


def _rows(
    name: str,
    features: Callable[[Tensor], Tensor],
    size: int,
    pixels: int,
    spoilers: dict[str, Callable[[Tensor], Tensor]],
) -> list[str]:
    sets = [features(_truth(size, pixels, seed)) for seed in range(3, 3 + 2 * SET_PAIRS)]
    rows = [_row(f"{name}: truth", list(zip(sets[::2], sets[1::2], strict=True)))]
    second = _truth(size, pixels, 4)
    for what, spoil in spoilers.items():
        rows.append(_row(f"{name}: {what}", [(sets[0], features(spoil(second)))]))
    return rows


def _row(name: str, pairs: list[tuple[Tensor, Tensor]]) -> str:
    cells = []
    for distance in (frechet_distance, kernel_distance):
        values = torch.tensor([distance(*pair) for pair in pairs])
        spread = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
        cells.append(f"{values.mean():.3f}{spread}")
    return f"| {name} | {cells[0]} | {cells[1]} |"


def _truth(size: int, pixels: int, seed: int) -> Tensor:
    scenes = world.sample(size, torch.Generator().manual_seed(seed))
    parts = [render(scenes[index], pixels) for index in torch.arange(size).split(25)]
    return torch.cat(parts) / 2 + 0.5


def _blurred(images: Tensor) -> Tensor:
    return blur(images, 4)


def _enlarged(images: Tensor) -> Tensor:
    return blur(images, 2)


def _exchanged(images: Tensor) -> Tensor:
    return images.roll(images.shape[3] // 2, dims=3)


def _repeated(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2).repeat(1, 1, 2, 2)
