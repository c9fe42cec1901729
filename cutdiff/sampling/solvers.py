"""Solvers: pure steps in sigma space, and the loop that yields every step.

A step goes from x = x0 + sigma·noise to the same at a smaller sigma, given the network's estimate of x0. Both are
affine in `denoised`, so averaging estimates and stepping once equals stepping each and averaging.
Sources: Song et al. 2020 (2010.02502), Karras et al. 2022 (2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cutdiff.sampling.edm import AnyNoise, EDMConfig, edm_schedule
from cutdiff.sampling.schedule import NoiseConfig, Schedule, ddim_schedule, euler_schedule

CanvasDenoiser = Callable[[Tensor, float, int], Tensor]
"""(latents (B, C, H, W), sigma, step) -> denoised (B, C, H, W)."""
Noise = Callable[[tuple[int, ...], int], Tensor]
"""(shape, step) -> standard normal noise."""


@dataclass(frozen=True)
class Stage:
    """A run of consecutive steps that share one canvas denoiser."""

    name: str
    steps: range
    """A run that goes through the schedule of n steps more than once counts on: step i stands at sigma i % n."""
    denoise: CanvasDenoiser
    size: tuple[int, int] | None = None
    """Of its canvas, in latents; None: that of the finished picture."""
    before: CanvasDenoiser | None = None
    """What a step is taken from, given what the step before ended with; that itself where it is None."""
    end: Callable[[Tensor], Tensor] | None = None
    """What becomes of the state after the last step."""


@dataclass(frozen=True)
class Phase:
    """A stage that what came before it makes, for instance on a larger canvas."""

    steps: range
    size: tuple[int, int]
    begin: Callable[[Tensor], tuple[Tensor, Stage]]
    """What the stage before ended with (B, C, H, W) -> the state to go on from, of `size`, and the stage."""


@dataclass(frozen=True)
class Step:
    """One step of a run, after it was taken."""

    index: int
    stage: str
    sigma: float
    """The sigma at which the network was evaluated."""
    latents: Tensor
    """The canvas after the step, (B, C, H, W), float32."""
    denoised: Tensor
    """The estimate of x0 that the step was taken with, (B, C, H, W), float32."""


class NotFinite(FloatingPointError):
    """An estimate of x0 that holds NaN or infinity, and what it was made from."""

    def __init__(self, stage: Stage, latents: Tensor, sigma: float, step: int) -> None:
        super().__init__(f"step {step} ({stage.name}, sigma {sigma:.4g}) gave NaN or infinity")
        self.stage, self.latents, self.sigma, self.step = stage, latents, sigma, step


@dataclass(frozen=True)
class Solver:
    """How a run picks its sigmas and how much fresh noise a step adds (`eta`: 0 none, 1 as much as DDPM)."""

    beta_schedule: Callable[[NoiseConfig, int], Schedule]
    eta: float = 0.0

    def make_schedule(self, noise: AnyNoise, num_steps: int) -> Schedule:
        """The sigmas of a run; on an EDM model they are the same for every solver."""
        return edm_schedule(noise, num_steps) if isinstance(noise, EDMConfig) else self.beta_schedule(noise, num_steps)

    def step(self, x: Tensor, denoised: Tensor, sigma: float, target: float, noise: Tensor | None = None) -> Tensor:
        """Take x (B, C, H, W) from sigma to target; `noise` is standard normal and needed where eta > 0."""
        up = noise_scale(sigma, target, self.eta)
        if up == 0:
            return euler_step(x, denoised, sigma, target)
        if noise is None:
            raise ValueError(f"eta={self.eta} adds noise at every step: pass `noise`")
        return euler_step(x, denoised, sigma, math.sqrt(target**2 - up**2)) + up * noise


def euler_step(x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """Follow the straight line through x and denoised from sigma to target: Euler's step, and DDIM's at eta = 0."""
    return torch.lerp(denoised, x, target / sigma)


def noise_scale(sigma: float, target: float, eta: float) -> float:
    """Standard deviation of the fresh noise in a step: DDIM's equation 16, written in sigma space."""
    return eta * target * math.sqrt(max(0.0, 1 - (target / sigma) ** 2))


def make_solver(name: str, eta: float = 0.0) -> Solver:
    """Look a solver up by name: "euler" or "ddim" (the only one that takes eta)."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is not one of {', '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be between 0 and 1")
    if eta and name != "ddim":
        raise ValueError(f"eta={eta} needs the ddim solver, not {name}")
    return Solver(SOLVERS[name], eta)


SOLVERS = {"euler": euler_schedule, "ddim": ddim_schedule}


@torch.no_grad()
def solve(
    stages: Iterable[Stage | Phase],
    x: Tensor,
    schedule: Schedule,
    solver: Solver,
    noise: Noise,
) -> Iterator[Step]:
    """Run the stages one after another from x (B, C, H, W), float32, and yield every step.

    `noise` is asked only where eta > 0. Raises NotFinite where an estimate is not.
    """
    for part in stages:
        x, stage = part.begin(x) if isinstance(part, Phase) else (x, part)
        for i in stage.steps:
            at = i % schedule.num_steps
            sigma = schedule.sigmas[at]
            x = x if stage.before is None else stage.before(x, sigma, i)
            denoised = stage.denoise(x, sigma, i)
            if not denoised.isfinite().all():
                raise NotFinite(stage, x, sigma, i)
            fresh = noise(tuple(x.shape), i).to(x) if solver.eta else None
            x = solver.step(x, denoised, sigma, schedule.targets[at], fresh)
            rescale = schedule.rescale(at)
            x = x if rescale == 1 else x * rescale
            if stage.end is not None and i == stage.steps[-1]:
                x = stage.end(x)
            yield Step(i, stage.name, sigma, x, denoised)
