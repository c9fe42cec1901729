"""Solvers: pure steps in sigma space, from x = x0 + sigma·noise to the same at a smaller sigma.

A solver that is passed in has `start(schedule, noise)`, which returns the function that takes the steps, with whatever
memory that needs. It is started anew for every phase and every stage with sigmas of its own. It never sees a patch or a
view: the estimate of x0 that it is given is that of the whole canvas, so a multistep solver has one history, and noise
is drawn on the canvas. A solver that wants a second estimate in a step (Heun's) has a generator function there: it
yields the state and the sigma of that estimate, is sent it, and returns the state after the step.

Sources: Song et al. 2020 (2010.02502), Karras et al. 2022 (2206.00364), Lu et al. 2022 (2211.01095), Zhao et al. 2023
(2302.04867), Luo et al. 2023 (2310.04378). Those without a paper, `DPMppSDE` and the midpoint of `DPMpp2MSDE`, are
k-diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cutdiff.options import Options, Share
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.schedules import Schedule, ddim_model_schedule, lcm_model_schedule
from cutdiff.specs import name_of

INFINITE = 4000.0
"""Sigmas from here on stand for that of a zero terminal SNR, which is infinite."""
Noise = Callable[..., Tensor]
"""(shape, step) -> standard normal noise (B, C, H, W) on the canvas; (shape, step, 1) -> a second one of that step."""
Estimating = Generator[tuple[Tensor, float], Tensor, Tensor]
"""A step that yields (x, sigma) for each further estimate of x0, is sent that estimate, and returns the next x."""
TakeStep = Callable[[Tensor, Tensor, int], Tensor | Estimating]
"""(x (B, C, H, W) at sigmas[i], the estimate of x0, i) -> x at sigmas[i + 1], or a generator that returns it."""


class Solver(Protocol):
    """A solver as it is passed in. Where it has `model_schedule(model_noise, num_steps)`, that makes the model's own
    schedule for it; else that is the published Euler scheduler's. Where it has `check_schedule(schedule)`, that raises
    ValueError for a run's schedule that it cannot go through."""

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


class SecondOrder(Options):
    """A solver of second order or more, whose step to sigma 0 is Euler's, as in k-diffusion and diffusers."""

    def check_schedule(self, schedule: Schedule) -> None:
        """ValueError where the only step is that to sigma 0."""
        if schedule.num_steps < 2:
            raise ValueError(
                f"num_steps=1 leaves {name_of('solver', self)} the step to sigma 0 alone, which is Euler's: "
                "give num_steps=2 or more, or solver=euler"
            )


@dataclass(frozen=True)
class Heun(SecondOrder):
    """Euler's step, and then the mean of the slopes at both of its ends (Karras et al. 2022, algorithm 1): slopes over
    sigma, or in flows over their time, as the published FlowMatchHeunDiscreteScheduler has them."""

    def check_schedule(self, schedule: Schedule) -> None:
        """ValueError too where the first step is one from an infinite sigma: its slopes over sigma would count the
        difference of both estimates more than the noise that is left."""
        super().check_schedule(schedule)
        first, second = map(schedule.noise.time, schedule.sigmas[:2])
        if first >= INFINITE and first > 2 * second**2:
            raise ValueError(
                f"solver=heun cannot step from sigma {first:g}, which stands for the infinite one of a zero terminal "
                f"SNR, to {second:.4g}: choose solver=dpmpp_2m or unipc, schedule=karras, or more steps"
            )

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Estimating:
            sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
            ahead = euler_step(x, denoised, sigma, target)
            if target == 0:
                return ahead
            # The slopes are (x - denoised) / sigma, which is the same at `ahead`, and (ahead - there) / target. In the
            # state and the time of a flow their mean is this same line, with times in the weight.
            there = yield ahead, target
            weight = schedule.noise.time(sigma) / (2 * schedule.noise.time(target))
            return euler_step(x, torch.lerp(denoised, there, weight), sigma, target)

        return step


@dataclass(frozen=True)
class DPMpp2M(SecondOrder):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): of second order, by the estimate of the step before.

    Its first step, and the one to sigma 0, are of first order, as in k-diffusion and diffusers.
    """

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        return DPMpp2MSDE(eta=0.0).start(schedule, noise)


@dataclass(frozen=True)
class DPMpp2MSDE(SecondOrder):
    """DPM-Solver++(2M) of the stochastic equation, which adds fresh noise in every step; with the midpoint of
    k-diffusion's `sample_dpmpp_2m_sde` and of diffusers' "sde-dpmsolver++"."""

    eta: Share = 1.0
    """The share of the fresh noise: 0 none, which is DPM-Solver++(2M), 1 as much as diffusers adds."""

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        before: list[Estimate] = []

        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
            estimate = extrapolated(before, denoised, schedule, i)
            before[:] = [Estimate(i, denoised)]
            kept = (target / sigma) ** self.eta  # of the noise, by its deviation
            x = torch.lerp(estimate, x, target / sigma * kept)
            up = target * math.sqrt(max(0.0, 1 - kept**2))
            return x if up == 0 else x + up * noise(tuple(x.shape), i).to(x)

        return step


@dataclass(frozen=True)
class DPMppSDE(SecondOrder):
    """k-diffusion's `sample_dpmpp_sde`: ancestral steps to the middle of log sigma, and past it from the start by the
    estimate there. Their noise is one path, whose increments are independent: that of the whole step is made of that of
    its first part and of that of its rest."""

    eta: Share = 1.0
    """The share of the fresh noise: 0 none, which is DPM-Solver++(2S), 1 as much as DDPM."""

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Estimating:
            sigma, target, shape = schedule.sigmas[i], schedule.sigmas[i + 1], tuple(x.shape)
            if target == 0:
                return denoised
            middle = math.sqrt(sigma * target)
            share = (sigma - middle) / (sigma - target)
            first = whole = x.new_zeros(())
            if self.eta:
                first = noise(shape, i).to(x)
                whole = math.sqrt(share) * first + math.sqrt(1 - share) * noise(shape, i, 1).to(x)
            there = yield noisy_step(x, denoised, sigma, middle, self.eta, lambda *_: first, i), middle
            return noisy_step(x, there, sigma, target, self.eta, lambda *_: whole, i)

        return step


@dataclass(frozen=True)
class LCM(Options):
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): every step goes to the estimate of x0 and adds
    fresh noise. For models that were distilled for it, in 1 to 8 steps.

    The published scheduler mixes a share of x into the estimate, at most 7·10⁻⁶ at the timesteps that it picks, which
    is left out here, as in k-diffusion.
    """

    @staticmethod
    def model_schedule(model_noise: AnyNoise, num_steps: int) -> Schedule:
        """Sigmas at the published LCMScheduler's timesteps, which are picked among those of the distillation."""
        return lcm_model_schedule(model_noise, num_steps)

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            target = schedule.sigmas[i + 1]
            return denoised if target == 0 else denoised + target * noise(tuple(x.shape), i).to(x)

        return step


@dataclass(frozen=True)
class UniPC(SecondOrder):
    """UniPC-2 with B₂(h), predicting x0 (Zhao et al. 2023, algorithms 5 to 8): the steps of DPM-Solver++(2M), each of
    which the estimate after it corrects, to third order. As in diffusers, no estimate is taken anew of a corrected
    state.

    The correction is added to the state, so that whatever a method did to it between two steps stays.
    """

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        before: list[Estimate] = []

        def step(x: Tensor, denoised: Tensor, i: int) -> Tensor:
            sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
            if before and before[-1].step == i - 1:
                x = x + unipc_correction(before, denoised, schedule, i - 1)
            estimate = extrapolated(before, denoised, schedule, i)
            before[:] = [*before[-1:], Estimate(i, denoised)]
            return euler_step(x, estimate, sigma, target)

        return step


class Estimate(NamedTuple):
    """An estimate of x0 that a multistep solver keeps."""

    step: int
    denoised: Tensor


def extrapolated(before: list[Estimate], denoised: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The estimate of x0 half a step ahead, on the line through that of the step before and `denoised` over
    λ = −log sigma; `denoised` itself where there is none before, or the step goes to sigma 0."""
    sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
    if not before or before[-1].step != i - 1 or target == 0:
        return denoised
    last, now = math.log(schedule.sigmas[i - 1] / sigma), math.log(sigma / target)
    return torch.lerp(before[-1].denoised, denoised, 1 + now / (2 * last))


def unipc_correction(before: list[Estimate], after: Tensor, schedule: Schedule, i: int) -> Tensor:
    """The correction of the state after step i by the estimate `after` it (Zhao et al. 2023, algorithms 5 and 7); the
    last of the estimates `before` is that of step i."""
    now, sigma, target = before[-1].denoised, schedule.sigmas[i], schedule.sigmas[i + 1]
    share = 1 - target / sigma
    if len(before) < 2 or before[0].step != i - 1:
        return share / 2 * (after - now)
    step = math.log(target / sigma)  # -h
    ratio = math.log(sigma / schedule.sigmas[i - 1]) / -step  # r_1, below 0
    phi = [(-share / step - 1) / -share]
    phi.append(2 * (-share * phi[0] / step - 1 / 2) / -share)
    slope = (before[0].denoised - now) / ratio  # D_1 / r_1
    past = (phi[0] - phi[1]) / (1 - ratio)
    return share * ((past - 1 / 2) * slope + (phi[0] - past) * (after - now))


def finished(step: Tensor | Estimating, estimate: Callable[[Tensor, float], Tensor]) -> Tensor:
    """The state after a step, which is given every further estimate of x0 that it asks for."""
    if not isinstance(step, Generator):
        return step
    try:
        asked = next(step)
        while True:
            if not isinstance(asked, tuple) or len(asked) != 2:
                raise ValueError(f"the solver yields {type(asked).__name__} where (x, sigma) is needed")
            asked = step.send(estimate(*asked))
    except StopIteration as end:
        return end.value


def adds_noise(solver: Solver, schedule: Schedule) -> bool:
    """True for a solver that asks for noise at any step of a schedule."""
    asked: list[int] = []

    def noise(shape: tuple[int, ...], step: int, *part: int) -> Tensor:
        asked.append(step)
        return torch.zeros(shape)

    x, take = torch.zeros(1, 1, 1, 1), solver.start(schedule, noise)
    for i in range(schedule.num_steps):
        finished(take(x, x, i), lambda x, sigma: x)
    return bool(asked)


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
