"""Measure the order of the solvers: `python notebooks/order.py direct cutdiffusion …`, or no names for all variants.

The error of a run of n steps is that of its last latents, against a run of Heun's solver of 500 steps (1,000 network
evaluations), as a share of the latter's root mean square. All runs of a picture begin with the same noise. Their
schedules are points of one curve, Karras's between the training's largest and smallest sigma, and stages are divided at
points of it that all of them visit, so that nothing but the number of steps differs.

The result of each variant goes to results/order/<variant>.json; a variant that has one is left alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from studies import RESULTS
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.evaluation.score import scenes
from cutdiff.evaluation.testbed import environment
from cutdiff.models.config import Size
from cutdiff.output.images import save_json
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import EULER_TERMINAL_ALPHA, NoiseConfig, noise_table
from cutdiff.sampling.operators import Permutation
from cutdiff.sampling.spreads import karras_sigmas
from cutdiff.scenes.world import captions

ORDERS = RESULTS / "order"
INTERVALS = (4, 8, 12, 20, 32, 52, 100)
"""The parts that the curve of sigmas is divided into. A run takes one step more, from the smallest sigma to 0."""
QUIET = ("euler", "dpmpp_2m", "unipc", "heun", "dpmpp_sde,eta=0")
"""The solvers that add no noise. DDIM and both of Euler's are one on sigmas that are given, as are both of dpmpp_2m."""
NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde")
"""The solvers that add noise: all approach the same stochastic equation. Consistency sampling has no limit."""
REFERENCE = {"heun": QUIET, "dpmpp_sde": NOISY}
"""The solver of the run that others are compared with."""
REFERENCE_INTERVALS = 500
STILL = ", still"
"""The end of the name of a variant whose permutations and origins of views are the same in all steps."""
VARIANTS = ("direct", "multidiffusion", *(m + s for m in ("cutdiffusion", "magnify") for s in ("", STILL)))
"""The methods that are measured, those that draw at every step also with draws that do not change."""
SWITCH = {"cutdiffusion": 0.5, "magnify": 0.25}
"""The share of the intervals at which the details begin: a quarter for magnify, which divides all of `INTERVALS`."""


@dataclass(frozen=True)
class OnePath(Draws):
    """Draws whose noise is that of one path over sigma, a Brownian motion, whatever the number of steps, so that the
    errors of solvers that add noise can be told from the noise."""

    sigmas: tuple[float, ...] = ()
    """The sigmas of the run."""
    halved: bool = False
    """Divide the noise of a step at the middle of log sigma, as dpmpp_sde does."""

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        if step is None or not self.sigmas:
            return super().noise(shape, step)
        phase, i = divmod(step, len(self.sigmas) - 1)
        high, low = self.sigmas[i : i + 2]
        return self.between(shape, phase, high, math.sqrt(high * low) if self.halved else low)

    def second_noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        phase, i = divmod(step, len(self.sigmas) - 1)
        high, low = self.sigmas[i : i + 2]
        return self.between(shape, phase, math.sqrt(high * low), low)

    def between(self, shape: tuple[int, ...], phase: int, high: float, low: float) -> Tensor:
        """The increment of the path of a phase between two sigmas, of variance 1."""
        points, path = path_of(self.seeds, shape, phase)
        ends = (path[int(np.abs(points - sigma).argmin())] for sigma in (high, low))
        return (next(ends) - next(ends)) / math.sqrt(high - low)


@cache
def path_of(seeds: tuple[int, ...], shape: tuple[int, ...], phase: int) -> tuple[np.ndarray, Tensor]:
    """All sigmas that runs visit, falling, and a path over them for each seed: (sigmas, B, C, H, W), float32."""
    runs = [sigmas_of(n) for n in (*INTERVALS, REFERENCE_INTERVALS)]
    visited = {sigma for run in runs for sigma in run}
    middles = {math.sqrt(a * b) for run in runs for a, b in pairwise(run)}
    points = np.array(sorted(visited | middles, reverse=True))
    gaps = torch.from_numpy(np.sqrt(-np.diff(points))).float().reshape(-1, 1, 1, 1)
    paths = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 * seed + phase)
        steps = gaps * torch.randn(len(gaps), *shape[1:], generator=generator)
        paths.append(-torch.cat([torch.zeros(1, *shape[1:]), steps.cumsum(0)]))
    return points, torch.stack(paths, 1)


def sigmas_of(intervals: int) -> tuple[float, ...]:
    """The sigmas of a run: points of Karras's curve between the training's ends, and 0."""
    high, low = (noise_table(NoiseConfig(), EULER_TERMINAL_ALPHA).sigma(t) for t in (999, 0))
    return (*karras_sigmas(high, low, intervals + 1), 0.0)


class StillDraws(OnePath):
    """Draws whose permutations and origins are the same in all steps as well."""

    def permutation(self, step: int, grid: Size, shape: tuple[int, ...], grain: str) -> Permutation:
        return super().permutation(0, grid, shape, grain)

    def view_origins(self, step: int, size: Size, window: Size, stride: Size, jitter: Size) -> Tensor:
        return super().view_origins(0, size, window, stride, jitter)


def run(model: Model, variant: str, solver: str, intervals: int, args: argparse.Namespace) -> Tensor:
    """The last latents (B, C, H, W) of all pictures of a variant, float64."""
    method, options, draws = variant.removesuffix(STILL), {}, StillDraws if variant.endswith(STILL) else OnePath
    sigmas = sigmas_of(intervals)
    if method in SWITCH:
        options["structure_fraction"] = SWITCH[method] * intervals / (intervals + 1)
    x = torch.empty(0)
    for step in cutdiff.denoise(
        model,
        captions(scenes(args.num).choices),
        draws=draws(tuple(range(args.num)), sigmas=sigmas, halved=solver == "dpmpp_sde"),
        method=method,
        schedule=sigmas,
        num_steps=intervals + 1,
        solver=solver,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        **options,
    ):
        x = step.latents
    return x.double()


def measure(model: Model, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """The relative errors of all solvers: by solver and intervals, one for each picture."""
    errors: dict[str, dict[str, list[float]]] = {}
    for best, solvers in REFERENCE.items():
        if solvers == NOISY and variant.endswith(STILL):
            continue
        reference = run(model, variant, best, REFERENCE_INTERVALS, args)
        for solver in solvers:
            errors[solver] = {}
            for n in INTERVALS:
                difference = (run(model, variant, solver, n, args) - reference).flatten(1).norm(dim=1)
                errors[solver][str(n)] = (difference / reference.flatten(1).norm(dim=1)).tolist()
                print(variant, solver, n, *(f"{error:.2e}" for error in errors[solver][str(n)]), flush=True)
    return {**vars(args), "variants": [variant], "errors": errors, **environment(model)}


def slopes(errors: Mapping[str, list[float]], first: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """The order of a solver, from its errors by intervals: minus the slope of their logarithms over that of the number
    of steps, and its 95% interval by resampling pictures. `first` leaves out the smallest numbers."""
    steps = np.log([int(n) + 1 for n in errors][first:])
    values = np.log([*errors.values()][first:])  # (numbers of steps, pictures)
    weights = (steps - steps.mean()) / ((steps - steps.mean()) ** 2).sum()
    by_picture = -(weights @ values)
    chosen = np.random.default_rng(0).integers(len(by_picture), size=(draws, len(by_picture)))
    low, high = np.percentile(by_picture[chosen].mean(1), (2.5, 97.5))
    return float(by_picture.mean()), float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the order of the solvers.")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {'; '.join(VARIANTS)} (all)")
    parser.add_argument("--num", type=int, default=6, metavar="N", help="number of pictures (%(default)s)")
    parser.add_argument("--height", type=int, default=128, help="in pixels (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="in pixels (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, metavar="S", help="(%(default)s, which is off)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"{unknown[0]!r} is not one of {'; '.join(VARIANTS)}")
    model = cutdiff.load(dtype=torch.float32)
    for variant in args.variants or VARIANTS:
        path = ORDERS / f"{variant}.json"
        if path.exists():
            print(f"{path.name} is there", flush=True)
            continue
        ORDERS.mkdir(parents=True, exist_ok=True)
        save_json(path, measure(model, variant, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
