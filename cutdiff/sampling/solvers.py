"""Solvers: pure steps in sigma space, from x = x0 + sigma·noise to the same at a smaller sigma.

A solver that is passed in has `start(schedule, noise)`, which returns the function that takes the steps, with whatever
memory that needs. It is started anew for every phase and every stage with sigmas of its own. It never sees a patch or a
view: the estimate of x0 that it is given is that of the whole canvas, so a multistep solver has one history, and noise
is drawn on the canvas. A step has one estimate: a solver that wants two (Heun's) does not fit yet.

Sources: Song et al. 2020 (2010.02502), Karras et al. 2022 (2206.00364), Lu et al. 2022 (2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cutdiff.options import Options, Share
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.schedules import Schedule, ddim_model_schedule

Noise = Callable[[tuple[int, ...], int], Tensor]
"""(shape, step) -> standard normal noise (B, C, H, W) on the canvas."""
TakeStep = Callable[[Tensor, Tensor, int], Tensor]
"""(x (B, C, H, W) at sigmas[i], the estimate of x0, i) -> x at sigmas[i + 1]."""


class Solver(Protocol):
    """A solver as it is passed in. Where it has `model_schedule(model_noise, num_steps)`, that makes the model's own
    schedule for it; else that is the published Euler scheduler's."""

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        """The function that takes the steps of `schedule` on one canvas; `noise` is asked only for what is needed.

        It writes to none of the tensors that it is given.
        """
        ...


@dataclass(frozen=True)
class Euler(Options):
    """Follow the straight line through x and its estimate of x0 (Karras et al. 2022, algorithm 1)."""

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            return euler_step(x, denoised, schedule.sigmas[i], schedule.sigmas[i + 1])

        return step


@dataclass(frozen=True)
class EulerAncestral(Options):
    """Euler's step to a smaller sigma still, and fresh noise up to the next one, as k-diffusion and diffusers have it.

    In sigma space this is DDIM with eta 1, on Euler's schedule.
    """

    eta: Share = 1.0
    """The share of the fresh noise: 0 none, which is Euler's solver, 1 as much as DDPM."""

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            return noisy_step(x, denoised, schedule.sigmas[i], schedule.sigmas[i + 1], self.eta, noise, i)

        return step


@dataclass(frozen=True)
class DDIM(Options):
    """DDIM (Song et al. 2020), which at eta 0 is Euler's step on the timesteps of the published DDIMScheduler."""

    eta: Share = 0.0
    """The share of the fresh noise: 0 none, 1 as much as DDPM."""

    @staticmethod
    def model_schedule(model_noise: AnyNoise, num_steps: int) -> Schedule:
        """Sigmas at the published DDIMScheduler's timesteps, of which it goes down a fixed number at every step."""
        return ddim_model_schedule(model_noise, num_steps)

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            x = noisy_step(x, denoised, schedule.sigmas[i], schedule.targets[i], self.eta, noise, i)
            rescale = schedule.rescale(i)
            return x if rescale == 1 else x * rescale

        return step


@dataclass(frozen=True)
class DPMpp2M(Options):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): of second order, by the estimate of the step before.

    Its first step, and the one to sigma 0, are of first order, as in k-diffusion and diffusers.
    """

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        before: list[tuple[int, Tensor]] = []  # the last step's number and its estimate

        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
            estimate = denoised
            if before and before[0][0] == i - 1 and target > 0:
                # Steps of the logarithm of the signal-to-noise ratio, λ = −log sigma.
                last, now = math.log(schedule.sigmas[i - 1] / sigma), math.log(sigma / target)
                estimate = torch.lerp(before[0][1], denoised, 1 + now / (2 * last))
            before[:] = [(i, denoised)]
            return euler_step(x, estimate, sigma, target)

        return step


def euler_step(x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """Follow the straight line through x and `denoised` from sigma to target: Euler's step, and DDIM's at eta = 0."""
    return torch.lerp(denoised, x, target / sigma)


def noisy_step(x: Tensor, denoised: Tensor, sigma: float, target: float, eta: float, noise: Noise, step: int) -> Tensor:
    """Euler's step past the target, and fresh noise back up to it, of which `eta` is the share."""
    up = noise_scale(sigma, target, eta)
    if up == 0:
        return euler_step(x, denoised, sigma, target)
    return euler_step(x, denoised, sigma, math.sqrt(target**2 - up**2)) + up * noise(tuple(x.shape), step).to(x)


def noise_scale(sigma: float, target: float, eta: float) -> float:
    """The standard deviation of the fresh noise in a step: DDIM's equation 16, written in sigma space."""
    return eta * target * math.sqrt(max(0.0, 1 - (target / sigma) ** 2))
