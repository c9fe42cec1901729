"""From betas to the sigmas and timesteps of a run.

State is kept in sigma space, x = x0 + sigma·noise ("variance exploding"). The usual VP state is x / sqrt(1 + sigma²).
Conventions follow the published schedulers, so that a run here can be compared with theirs step by step.
Sources: Ho et al. 2020 (2006.11239), Karras et al. 2022 (2206.00364), Lin et al. 2023 (2305.08891).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cutdiff.sampling.preconditioning import Coefficients, epsilon, velocity
from cutdiff.settings import PREDICTION_TYPES, SPACINGS

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

EULER_TERMINAL_ALPHA = 2.0**-24
"""Zero terminal SNR has an infinite sigma; Euler takes this alpha instead (sigma 4096), as the published one does."""
DDIM_TERMINAL_ALPHA = 2.0**-44
"""DDIM's own formula has no singularity there; with this alpha (sigma 4·10⁶) sigma space agrees to float32 rounding."""
KARRAS_RHO = 7.0
MAX_TIMESTEPS = 100_000
"""Of training; all models have 1000."""


@dataclass(frozen=True)
class NoiseConfig:
    """How the model was trained and how its sampler picks timesteps; the defaults are SDXL-base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    use_karras_sigmas: bool = False
    """Karras spacing of the sigmas; the Euler solver only."""
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = False
    """Whether DDIM's last step goes to sigma 0; if not, to the sigma of timestep 0."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("beta_schedule", self.beta_schedule, BETA_SCHEDULES),
            ("prediction_type", self.prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", self.timestep_spacing, SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1:
                raise ValueError(f"{name}={value!r} must lie between 0 and 1")
        for name, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_TIMESTEPS:
                raise ValueError(f"{name}={value!r} must be a whole number from {least} to {MAX_TIMESTEPS}")
        if self.steps_offset >= self.num_train_timesteps:
            raise ValueError(f"steps_offset={self.steps_offset} must be below the {self.num_train_timesteps} timesteps")

    def described(self) -> dict[str, Any]:
        """As records have it."""
        return {
            "prediction_type": self.prediction_type,
            "zero_terminal_snr": self.rescale_betas_zero_snr,
            "timestep_spacing": self.timestep_spacing,
        }

    def coefficients(self, sigma: float) -> Coefficients:
        """How the network's output becomes an estimate of x0."""
        return epsilon(sigma) if self.prediction_type == "epsilon" else velocity(sigma)


class Timesteps(Protocol):
    """What a network is told of noise."""

    def timestep(self, sigma: float) -> float:
        """Of any sigma that the model was trained on."""
        ...

    def fraction(self, timestep: float) -> float:
        """From 0 where a timestep is the cleanest to 1 where it is the noisiest."""
        ...


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
    """What standard normal noise is multiplied by to begin."""
    noise: Timesteps

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def timestep(self, sigma: float) -> float:
        """What the network is told at a sigma: the timestep of that step, or, between steps, that of the training."""
        if sigma in self.sigmas[:-1]:
            return self.timesteps[self.sigmas.index(sigma)]
        return self.noise.timestep(sigma)

    def fraction(self, sigma: float) -> float:
        """Where a sigma stands in the noise of the training, from 0, the cleanest, to 1."""
        return self.noise.fraction(self.timestep(sigma))

    def rescale(self, step: int) -> float:
        """The factor that reads the VP state of targets[step] as that of sigmas[step + 1]; 1 where they are equal."""
        reached, read = self.targets[step], self.sigmas[step + 1]
        return 1.0 if reached == read else math.sqrt((1 + read**2) / (1 + reached**2))


@dataclass(frozen=True)
class NoiseTable:
    """The sigma of every training timestep, ascending, and the way back."""

    sigmas: tuple[float, ...]

    def sigma(self, timestep: float) -> float:
        """Linear between the whole timesteps, constant beyond the ends."""
        return float(np.interp(timestep, np.arange(len(self.sigmas)), self.sigmas))

    def timestep(self, sigma: float) -> float:
        """The timestep of a sigma, linear in its logarithm between the whole ones."""
        if sigma in self.sigmas:
            return float(self.sigmas.index(sigma))
        return float(np.interp(math.log(max(sigma, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas))))

    def fraction(self, timestep: float) -> float:
        """The share of the timesteps that are cleaner."""
        return timestep / len(self.sigmas)


def alphas_cumprod(config: NoiseConfig) -> np.ndarray:
    """The share of signal in the VP state's variance at each training timestep: (N,) float64, descending."""
    n = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, n)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, n) ** 2
    else:
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    alphas = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:  # Lin et al. 2023, algorithm 1: shift sqrt(alpha) to end at 0, keep its start
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def euler_schedule(config: NoiseConfig, num_steps: int) -> Schedule:
    """Sigmas and timesteps as the published EulerDiscreteScheduler picks them."""
    table = _table(config, EULER_TERMINAL_ALPHA)
    timesteps = _spaced_timesteps(config, num_steps)
    sigmas = [table.sigma(t) for t in timesteps]
    if config.use_karras_sigmas:
        ramp = np.linspace(0, 1, num_steps)
        high, low = sigmas[0] ** (1 / KARRAS_RHO), sigmas[-1] ** (1 / KARRAS_RHO)
        ends = sigmas[0], sigmas[-1]
        sigmas = [float(s) for s in (high + ramp * (low - high)) ** KARRAS_RHO]
        sigmas[0], sigmas[-1] = ends  # exact: where the terminal sigma is capped, others can lie beside it
        timesteps = [table.timestep(s) for s in sigmas]
    # With "leading" the first sigma is not the largest one, so the noise is scaled as if a picture lay beneath it.
    init_scale = math.hypot(sigmas[0], 1) if config.timestep_spacing == "leading" else max(sigmas)
    return _schedule(timesteps, sigmas, [*sigmas[1:], 0.0], init_scale, table)


def ddim_schedule(config: NoiseConfig, num_steps: int) -> Schedule:
    """Sigmas and timesteps as the published DDIMScheduler picks them: every step goes down N // num_steps timesteps."""
    table = _table(config, DDIM_TERMINAL_ALPHA)
    timesteps = [float(np.round(t)) for t in _spaced_timesteps(config, num_steps)]
    sigmas = [table.sigma(t) for t in timesteps]
    stride = config.num_train_timesteps // num_steps
    last = 0.0 if config.set_alpha_to_one else table.sigmas[0]
    targets = [table.sigma(t - stride) if t >= stride else last for t in timesteps]
    return _schedule(timesteps, sigmas, targets, math.hypot(sigmas[0], 1), table)


def _schedule(
    timesteps: list[float], sigmas: list[float], targets: list[float], init_scale: float, table: NoiseTable
) -> Schedule:
    return Schedule(tuple(timesteps), (*sigmas, 0.0), tuple(targets), init_scale, table)


def _table(config: NoiseConfig, terminal_alpha: float) -> NoiseTable:
    alphas = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = terminal_alpha
    return NoiseTable(tuple(np.sqrt((1 - alphas) / alphas).tolist()))


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
