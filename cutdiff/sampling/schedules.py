"""Schedules: which sigmas a run of n steps visits, and what the network is told there.

A schedule that is passed in gives the sigmas, `sigmas(model_noise, num_steps)`; `make_schedule` makes all the numbers
of a run of them. The model's own is that of the published scheduler of the solver, so that a run here can be compared
with one there step by step.

Sources: those of `spreads`; Sabour et al. 2024 (2404.14507) for Align Your Steps; Lin et al.
2023 (2305.08891), section 3.3, for steps that begin at the last timestep.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch

from cutdiff.options import Between, Options
from cutdiff.sampling.edm import AnyNoise, Continuous, EDMConfig
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import EULER_TERMINAL_ALPHA, NoiseConfig, NoiseTable, Timesteps, noise_table
from cutdiff.sampling.spreads import BETA_SHAPE, KARRAS_RHO, SPREADS, beta_sigmas, exponential_sigmas, karras_sigmas
from cutdiff.specs import name_of

DDIM_TERMINAL_ALPHA = 2.0**-44
"""DDIM's own formula has no singularity there; with this alpha (sigma 4·10⁶) sigma space agrees to float32 rounding."""
MAX_STEPS = 1000
"""The most steps on a model without whole timesteps: as many as others have of them."""

ALIGNED = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""The sigmas of ten steps, and the last one that was trained on, by which Align Your Steps is published."""
DISTILLED_STEPS = 50
"""The steps of the solver that consistency models were distilled from, as the published LCMScheduler has it."""


@dataclass(frozen=True)
class Schedule:
    """The numbers of one run of n steps. Step i evaluates the network at sigmas[i] and goes to targets[i].

    `sigmas` has n + 1 entries, descending, the last one 0. `targets[i]` is sigmas[i + 1], but for DDIM on a spacing
    that its fixed stride of timesteps does not fit: it then steps to a sigma beside the one that the next step reads.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    targets: tuple[float, ...]
    init_scale: float
    """The factor that makes the first state of standard normal noise."""
    noise: Timesteps

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all numbers of the run."""
        numbers = (self.timesteps, self.sigmas, self.targets, self.init_scale)
        return hashlib.sha256(repr(numbers).encode()).hexdigest()

    def timestep(self, sigma: float) -> float:
        """The timestep that tells the network of a sigma: the step's own, or, between steps, that of the training."""
        if sigma in self.sigmas[:-1]:
            return self.timesteps[self.sigmas.index(sigma)]
        return self.noise.timestep(sigma)

    def fraction(self, sigma: float) -> float:
        """The place of a sigma in the noise of the training, from 0, the cleanest, to 1."""
        return self.noise.fraction(self.timestep(sigma))

    def rescale(self, step: int) -> float:
        """The factor that reads the VP state of targets[step] as that of sigmas[step + 1]; 1 where they are equal."""
        reached, read = self.targets[step], self.sigmas[step + 1]
        return 1.0 if reached == read else math.sqrt((1 + read**2) / (1 + reached**2))

    def part(self, high: float, low: float, count: int) -> Schedule:
        """A run of `count` steps from the sigma `high` to `low` and then 0, within the ends of this one and as dense.

        A model's own schedule, whose timesteps are equally far apart, is extended to all of the training's, and goes by
        whole ones: from that at or above `high`, rounded down. Targets are then a fixed number of timesteps down, as
        those of a published DDIMScheduler that is given such timesteps.
        """
        noise, gaps, to = self.noise, np.diff(self.timesteps), 0.0 if low > 0 else self.targets[-1]
        if not isinstance(noise, NoiseTable) or (len(gaps) > 1 and np.ptp(gaps) > 1):
            high, low = min(high, self.sigmas[0]), max(low, self.sigmas[-2])
            own, places = -np.log([*map(noise.time, self.sigmas[:-1])]), np.arange(self.num_steps)
            first, last = np.interp([-math.log(noise.time(high)), -math.log(noise.time(low))], own, places)
            steps = np.linspace(first, last, count)
            between = map(noise.of_time, np.exp(-np.interp(steps[1:], places, own)).tolist())
            return self.visiting([high, *between, 0.0])
        start, end, total = math.ceil(noise.timestep(high)), round(noise.timestep(low)), len(noise.sigmas)
        timesteps, stride = torch.linspace(start, end, count, dtype=torch.float32, device="cpu").tolist(), 0
        if count <= start - end + 1:
            timesteps = [int(t) for t in timesteps]  # rounded down from float32, as there
            stride = total // int(total / (start - end) * (count - 1)) if count > 1 else 0
        sigmas = [*map(noise.sigma, timesteps), 0.0]
        targets = [noise.sigma(t - stride) if t >= stride else self.targets[-1] for t in timesteps[:-1]]
        return self.visiting(sigmas, (*(targets if stride else sigmas[1:-1]), to))

    def visiting(self, sigmas: Sequence[float], targets: tuple[float, ...] | None = None) -> Schedule:
        """A schedule on the same model that visits other sigmas, the last one its end."""
        schedule = _visiting([*sigmas], self.noise, self.init_scale)
        return schedule if targets is None else replace(schedule, targets=targets)


class SigmaSchedule(Protocol):
    """A schedule as it is passed in."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        """num_steps + 1 sigmas for a model with this noise, falling, the last one 0. `model_noise.sigma(timestep)` is
        the sigma of a timestep."""
        ...


@dataclass(frozen=True)
class ModelSchedule(Options):
    """The sigmas that the model's configuration asks for, as the published scheduler of the solver picks them."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        """The sigmas of the published Euler scheduler. A solver with a `model_schedule` of its own is asked instead."""
        return model_schedule(model_noise, num_steps).sigmas


@dataclass(frozen=True)
class Karras(Options):
    """Even steps of sigma^(1/rho) between the model's own first and last sigma (Karras et al. 2022, equation 5); in
    flows, of their time to that power."""

    rho: Annotated[float, Between(1, 1000)] = KARRAS_RHO
    """The larger, the more of the steps are at small sigmas."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        return _spread(model_noise, num_steps, partial(karras_sigmas, rho=self.rho))


@dataclass(frozen=True)
class Exponential(Options):
    """Even steps of sigma's logarithm between the model's own first and last sigma; in flows, of their time's."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        return _spread(model_noise, num_steps, exponential_sigmas)


@dataclass(frozen=True)
class Beta(Options):
    """Quantiles of a beta distribution, at even steps, between the model's own ends (Lee et al. 2024, 2407.12173); in
    flows, those of their time."""

    alpha: Annotated[float, Between(1e-3, 1e3)] = BETA_SHAPE
    """The distribution's first shape: below 1, many steps are near the first sigma."""
    beta: Annotated[float, Between(1e-3, 1e3)] = BETA_SHAPE
    """The distribution's second shape: below 1, many steps are near the last sigma."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        return _spread(model_noise, num_steps, partial(beta_sigmas, alpha=self.alpha, beta=self.beta))


@dataclass(frozen=True)
class SGMUniform(Options):
    """Even steps of the timestep from the training's last one, so that one more would be its first: `sgm_uniform` of
    ComfyUI and A1111. Timesteps are not rounded, and log sigma is linear between whole ones.

    It differs from `trailing` by less than two timesteps. On EDM models its steps are even ones of log sigma, and in
    flows it is `trailing`.
    """

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        if isinstance(model_noise, EDMConfig):
            low, high = np.log([model_noise.sigma_min, model_noise.sigma_max])
            return [*np.exp(np.linspace(high, low, num_steps + 1)[:-1]).tolist(), 0.0]
        if isinstance(model_noise, FlowConfig):
            return Trailing().sigmas(model_noise, num_steps)
        logs = np.log(noise_table(model_noise, EULER_TERMINAL_ALPHA).sigmas)
        timesteps = np.linspace(len(logs) - 1, 0, num_steps + 1)[:-1]
        return [*np.exp(np.interp(timesteps, np.arange(len(logs)), logs)).tolist(), 0.0]


@dataclass(frozen=True)
class Trailing(Options):
    """Even whole timesteps of which the first is the training's last (Lin et al. 2023): diffusers' spacing "trailing",
    on a model whose own is another. In flows, even times from 1 on before their shift, as FLUX.1 has them."""

    def spaced(self, model_noise: AnyNoise) -> NoiseConfig | FlowConfig:
        """The model's noise with this spacing. ValueError where it has no timesteps."""
        if isinstance(model_noise, EDMConfig):
            raise ValueError("schedule=trailing goes by timesteps, which an EDM model has not: choose sgm_uniform")
        return replace(model_noise, timestep_spacing="trailing", **dict.fromkeys(SPREADS, False))

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        return model_schedule(self.spaced(model_noise), num_steps).sigmas


@dataclass(frozen=True)
class AlignYourSteps(Options):
    """The sigmas that were optimised for a family of models (Sabour et al. 2024), in ten steps as published, in any
    other number interpolated in log sigma over all eleven numbers, of which the last is then 0, as ComfyUI does.

    A1111 interpolates to num_steps numbers and adds the 0.
    """

    table: Literal["sd15", "sdxl"] | None = None
    """The family whose table it is; None: the model's own."""

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        if not isinstance(model_noise, NoiseConfig):
            kind = "EDM models" if isinstance(model_noise, EDMConfig) else "models of flow matching"
            raise ValueError(f"schedule=align_your_steps has no table for {kind}: choose karras or sgm_uniform")
        if self.table is None:
            raise ValueError("schedule=align_your_steps needs a table: give table=sd15 or sdxl")
        logs = np.log(ALIGNED[self.table])
        places = np.linspace(0, len(logs) - 1, num_steps + 1)[:-1]
        return [*np.exp(np.interp(places, np.arange(len(logs)), logs)).tolist(), 0.0]


@dataclass(frozen=True)
class Listed(Options):
    """Sigmas that are given one by one, or in flows their times."""

    values: tuple[Annotated[float, Between(0)], ...]
    """The sigmas, or in flows times from 1 on, falling, the last one 0: one more than there are steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) < 2:
            raise ValueError(f"schedule={self.values} must hold two sigmas or more, falling, the last one 0")

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        if not isinstance(model_noise, FlowConfig):
            return self.values
        if self.values[0] > 1:
            raise ValueError(f"schedule={self.values} has times above 1, which this model's noise ends with: give less")
        return [*map(model_noise.of_time, self.values)]


def make_schedule(schedule: SigmaSchedule, solver: Any, noise: AnyNoise, num_steps: int) -> Schedule:
    """All numbers of a run. ValueError where the schedule's sigmas cannot be a run of so many steps."""
    if isinstance(schedule, ModelSchedule):
        return getattr(solver, "model_schedule", model_schedule)(noise, num_steps)
    _check_num_steps(noise, num_steps)
    if isinstance(schedule, Trailing):
        noise = schedule.spaced(noise)
    sigmas = [float(sigma) for sigma in schedule.sigmas(noise, num_steps)]
    name = name_of("schedule", schedule)
    if len(sigmas) != num_steps + 1:
        raise ValueError(
            f"schedule={name} gives {len(sigmas)} sigmas, which is no run of {num_steps} steps: "
            f"give num_steps={max(len(sigmas) - 1, 1)}, or {num_steps + 1} sigmas, the last one 0"
        )
    if sigmas[-1] != 0 or not all(math.inf > a > b for a, b in pairwise(sigmas)):
        raise ValueError(f"schedule={name} gives the sigmas {sigmas}: they must fall at every step, and end with 0")
    return _visiting(sigmas, _timesteps(noise), _init_scale(noise, sigmas))


def model_schedule(noise: AnyNoise, num_steps: int) -> Schedule:
    """The model's own sigmas, as the published EulerDiscreteScheduler, EDMEulerScheduler or
    FlowMatchEulerDiscreteScheduler picks them."""
    return euler_schedule(noise, num_steps) if isinstance(noise, NoiseConfig) else only_schedule(noise, num_steps)


def ddim_model_schedule(noise: AnyNoise, num_steps: int) -> Schedule:
    """The model's own sigmas, as the published DDIMScheduler picks them, or those that all solvers have."""
    return ddim_schedule(noise, num_steps) if isinstance(noise, NoiseConfig) else only_schedule(noise, num_steps)


def euler_schedule(config: NoiseConfig, num_steps: int) -> Schedule:
    """Sigmas and timesteps as the published EulerDiscreteScheduler picks them."""
    table = noise_table(config, EULER_TERMINAL_ALPHA)
    timesteps = _spaced_timesteps(config, num_steps)
    sigmas = [table.sigma(t) for t in timesteps]
    if spread := next((make for name, make in SPREADS.items() if getattr(config, name)), None):
        sigmas = spread(sigmas[0], sigmas[-1], num_steps)
        timesteps = [table.timestep(s) for s in sigmas]
    return Schedule(tuple(timesteps), (*sigmas, 0.0), (*sigmas[1:], 0.0), _init_scale(config, sigmas), table)


def ddim_schedule(config: NoiseConfig, num_steps: int) -> Schedule:
    """Sigmas and timesteps as the published DDIMScheduler picks them: every step goes down N // num_steps timesteps."""
    table = noise_table(config, DDIM_TERMINAL_ALPHA)
    timesteps = [float(np.round(t)) for t in _spaced_timesteps(config, num_steps)]
    sigmas = [table.sigma(t) for t in timesteps]
    stride = config.num_train_timesteps // num_steps
    last = 0.0 if config.set_alpha_to_one else table.sigmas[0]
    targets = [table.sigma(t - stride) if t >= stride else last for t in timesteps]
    return Schedule(tuple(timesteps), (*sigmas, 0.0), tuple(targets), math.hypot(sigmas[0], 1), table)


def lcm_model_schedule(noise: AnyNoise, num_steps: int) -> Schedule:
    """The model's own sigmas, as the published LCMScheduler picks them, or those that all solvers have."""
    return lcm_schedule(noise, num_steps) if isinstance(noise, NoiseConfig) else only_schedule(noise, num_steps)


def lcm_schedule(config: NoiseConfig, num_steps: int) -> Schedule:
    """Sigmas and timesteps as the published LCMScheduler picks them, from the last of 50 even ones downwards."""
    stride = config.num_train_timesteps // DISTILLED_STEPS
    if not 1 <= num_steps <= DISTILLED_STEPS or not stride:
        raise ValueError(
            f"num_steps={num_steps} must be between 1 and the {DISTILLED_STEPS} of the {config.num_train_timesteps} "
            "timesteps that solver=lcm picks from: give another number, or another schedule"
        )
    table = noise_table(config, DDIM_TERMINAL_ALPHA)
    picked = np.floor(np.linspace(0, DISTILLED_STEPS, num_steps, endpoint=False))
    timesteps = [float((DISTILLED_STEPS - k) * stride - 1) for k in picked]
    sigmas = [*map(table.sigma, timesteps), 0.0]
    return Schedule(tuple(timesteps), tuple(sigmas), tuple(sigmas[1:]), math.hypot(sigmas[0], 1), table)


def only_schedule(config: Continuous, num_steps: int) -> Schedule:
    """The schedule of a model that has one for all solvers."""
    _check_num_steps(config, num_steps)
    # As in the published schedulers, noise is scaled for the largest sigma, also where the first one is another.
    return _visiting([*config.sigmas(num_steps), 0.0], config, config.init_scale(config.sigma_max))


def _visiting(sigmas: list[float], noise: Timesteps, init_scale: float) -> Schedule:
    timesteps = tuple(noise.timestep(sigma) for sigma in sigmas[:-1])
    return Schedule(timesteps, tuple(sigmas), tuple(sigmas[1:]), init_scale, noise)


def _init_scale(noise: AnyNoise, sigmas: list[float]) -> float:
    """The factor of the first noise; where its sigma is not the largest one, a picture is taken to lie beneath it."""
    if not isinstance(noise, NoiseConfig):
        return noise.init_scale(sigmas[0])
    return math.hypot(sigmas[0], 1) if noise.timestep_spacing == "leading" else max(sigmas)


def _spread(noise: AnyNoise, num_steps: int, rule: Callable[[float, float, int], list[float]]) -> list[float]:
    """The sigmas that a rule spreads over the model's time, between its own first and last one, and 0."""
    timesteps = _timesteps(noise)
    high, low = map(timesteps.time, _ends(noise, num_steps))
    return [*map(timesteps.of_time, rule(high, low, num_steps)), 0.0]


def _ends(noise: AnyNoise, num_steps: int) -> tuple[float, float]:
    """The first sigma of the model's own schedule and the last one above 0."""
    if not isinstance(noise, NoiseConfig):
        return noise.ends(num_steps)
    table, timesteps = noise_table(noise, EULER_TERMINAL_ALPHA), _spaced_timesteps(noise, num_steps)
    return table.sigma(timesteps[0]), table.sigma(timesteps[-1])


def _timesteps(noise: AnyNoise) -> Timesteps:
    return noise_table(noise, EULER_TERMINAL_ALPHA) if isinstance(noise, NoiseConfig) else noise


def _check_num_steps(noise: AnyNoise, num_steps: int) -> None:
    if not isinstance(noise, NoiseConfig) and not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps={num_steps} must be between 1 and {MAX_STEPS}")


def _spaced_timesteps(config: NoiseConfig, num_steps: int) -> list[float]:
    n = config.num_train_timesteps
    if not 1 <= num_steps <= n:
        raise ValueError(f"num_steps={num_steps} must be between 1 and the {n} timesteps that the model was trained on")
    if config.timestep_spacing == "linspace":
        spaced = np.linspace(0, n - 1, num_steps)[::-1]
    elif config.timestep_spacing == "leading":
        spaced = np.minimum(np.arange(num_steps)[::-1] * (n // num_steps) + config.steps_offset, n - 1)
    else:
        # numpy's arange rounds its halves as the published schedulers do; at some lengths it yields one entry too many.
        spaced = np.round(np.arange(n, 0, -n / num_steps)[:num_steps]) - 1
    return [float(t) for t in spaced]
