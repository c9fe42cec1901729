"""The cost of FP8 in quality, on a CPU: `python tests/bench_fp8.py`.

The embedded model draws the same captions and seeds in float32, in bfloat16, and in bfloat16 with FP8 by the reference
arithmetic, from which a GPU's differs by rounding. The script prints the distance of the final latents from those of
the run that each is compared with (norm of the difference over norm), and the PSNR of the pictures in dB: medians over
the pictures, with the least and the most. The cost of bfloat16 itself stands beside it for scale. It does not measure
speed.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import cutdiff
from cutdiff.evaluation import score
from cutdiff.evaluation.metrics import psnr
from cutdiff.models.fp8 import quantize_transformers
from cutdiff.pipeline import Result
from cutdiff.scenes import world
from cutdiff.settings import Settings
from cutdiff.specs import METHODS

RUNS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "FP8": torch.bfloat16}
COMPARED = (("bfloat16", "float32"), ("FP8", "bfloat16"), ("FP8", "float32"))


def draw(run: str, captions: list[str], settings: Settings) -> Result:
    model = cutdiff.load(dtype=RUNS[run])
    if run == "FP8":
        quantize_transformers(model.unet)
    return cutdiff.generate(model, captions, settings)


def spread(values: Tensor, digits: int) -> str:
    return f"{values.median():.{digits}f} [{values.min():.{digits}f} – {values.max():.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare FP8 with bfloat16, and bfloat16 with float32.")
    parser.add_argument("--num", type=int, default=8, metavar="N", help="captions (8)")
    parser.add_argument("--method", choices=METHODS, default="cutdiffusion", help="cutdiffusion")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="side of the pictures (256)")
    args = parser.parse_args()
    settings = Settings(num_steps=10, guidance_scale=4.0, method=args.method, height=args.size, width=args.size)
    captions = world.captions(score.scenes(args.num).choices)
    results = {}
    for run in RUNS:
        began = time.perf_counter()
        results[run] = draw(run, captions, settings)
        print(f"{run}: drawn in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{args.num} captions, {args.method}, {args.size}², 10 steps, guidance 4, torch {torch.__version__}")
    for one, other in COMPARED:
        ours, theirs = results[one], results[other]
        errors = (ours.latents - theirs.latents).flatten(1).norm(dim=1) / theirs.latents.flatten(1).norm(dim=1)
        decibels = psnr(ours.images, theirs.images)
        print(f"{one} against {other}: latents {spread(errors, 3)}, pictures {spread(decibels, 1)} dB")


if __name__ == "__main__":
    main()
