"""Draw the picture of the README: one prompt and four seeds, at native size and by four methods at twice that size."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cutdiff
from cutdiff.output.images import to_pil

PROMPT = "a red house with mountains over a meadow at sunset"
SEEDS = 4
METHODS = ("direct", "multidiffusion", "cutdiffusion", "magnify")
GAP = 6
PICTURE = Path(__file__).with_name("methods.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="PNG", help="(%(default)s)")
    out = parser.parse_args().out
    model = cutdiff.load()
    options = {"guidance_scale": 7.5, "num_steps": 50}
    native = cutdiff.generate(model, [PROMPT] * SEEDS, method="direct", height=128, width=128, **options).images
    rows = [F.interpolate(native, scale_factor=2, mode="nearest")]
    for method in METHODS:
        drawn = cutdiff.generate(model, [PROMPT] * SEEDS, method=method, height=256, width=256, **options)
        rows.append(drawn.images)
    to_pil(tile(torch.stack(rows))).save(out, optimize=True)


def tile(images: Tensor) -> Tensor:
    """Images (rows, columns, 3, H, W) -> one picture (3, H', W') with white gaps between them."""
    padded = F.pad(images, (0, GAP, 0, GAP), value=1.0)
    return padded.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-GAP, :-GAP]


if __name__ == "__main__":
    main()
