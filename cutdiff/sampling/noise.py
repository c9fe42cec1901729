"""The noise that a model with betas was trained on, and the timesteps that tell its network of a sigma.

State is kept in sigma space, x = x0 + sigma·noise ("variance exploding"). The usual VP state is x / sqrt(1 + sigma²).
Sources: Ho et al. 2020 (2006.11239), Lin et al. 2023 (2305.08891).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cutdiff.sampling.preconditioning import Coefficients, epsilon, velocity
from cutdiff.settings import PREDICTION_TYPES, SPACINGS

EULER_TERMINAL_ALPHA = 2.0**-24
"""Zero terminal SNR has an infinite sigma; Euler takes this alpha instead (sigma 4096), as the published one does."""
SPREAD_BY = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""The fields that say by which rule sigmas lie between the first and the last."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

LEAST, MOST = 1e-6, 1e6
"""The bounds of all sigmas, with room for every model that there is."""
MAX_TIMESTEPS = 100_000
"""The most timesteps that a model may have been trained with; all have 1000."""


@dataclass(frozen=True)
class NoiseConfig:
    """The noise of the training, and the timesteps that the model's sampler picks; the defaults are SDXL-base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    use_karras_sigmas: bool = False
    """The model's own schedule has the sigmas of Karras et al. 2022, except with DDIM."""
    use_exponential_sigmas: bool = False
    """Likewise, even steps of log sigma."""
    use_beta_sigmas: bool = False
    """Likewise, the quantiles of a beta distribution (Lee et al. 2024)."""
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = False
    """DDIM's last step goes to sigma 0; otherwise to the sigma of timestep 0."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("beta_schedule", self.beta_schedule, BETA_SCHEDULES),
            ("prediction_type", self.prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", self.timestep_spacing, SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        check_spread(self)
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
        sigmas = noise_table(self, EULER_TERMINAL_ALPHA).sigmas
        if not all(LEAST <= sigma <= MOST for sigma in sigmas):
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} over {self.num_train_timesteps} timesteps "
                f"give sigmas from {sigmas[0]:g} to {sigmas[-1]:g}, beyond {LEAST:g} … {MOST:g}: take the model's own"
            )

    def described(self) -> dict[str, Any]:
        """The entries of a record."""
        return {
            "prediction_type": self.prediction_type,
            "zero_terminal_snr": self.rescale_betas_zero_snr,
            "timestep_spacing": self.timestep_spacing,
        }

    def sigma(self, timestep: float) -> float:
        """The sigma of a timestep of the training, linear between whole ones."""
        return noise_table(self, EULER_TERMINAL_ALPHA).sigma(timestep)

    def coefficients(self, sigma: float) -> Coefficients:
        """The numbers that turn the network's output into an estimate of x0."""
        return epsilon(sigma) if self.prediction_type == "epsilon" else velocity(sigma)


def check_spread(config: object) -> None:
    """ValueError where the fields of a model's noise ask for several rules between the first and the last sigma."""
    if len(asked := [name for name in SPREAD_BY if getattr(config, name)]) > 1:
        raise ValueError(f"{' and '.join(asked)} are True, and sigmas are spread by one rule: keep one")


class Timesteps(Protocol):
    """A model's way of telling its network how much noise there is."""

    def timestep(self, sigma: float) -> float:
        """The timestep of any sigma that the model was trained on."""
        ...

    def sigma(self, timestep: float) -> float:
        """The sigma of a timestep."""
        ...

    def fraction(self, timestep: float) -> float:
        """The place of a timestep between the cleanest, 0, and the noisiest, 1."""
        ...

    def timestep_at(self, fraction: float) -> float:
        """The timestep at such a place."""
        ...

    def time(self, sigma: float) -> float:
        """The variable in which the published solvers take straight steps, and spread them: sigma itself, but in flows
        their time."""
        ...

    def of_time(self, time: float) -> float:
        """The sigma of such a one."""
        ...


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

    def timestep_at(self, fraction: float) -> float:
        """The timestep of which such a share is cleaner, at most the last one."""
        return min(fraction * len(self.sigmas), len(self.sigmas) - 1.0)

    def time(self, sigma: float) -> float:
        """Sigma itself."""
        return sigma

    def of_time(self, time: float) -> float:
        """The sigma that is the time."""
        return time


@np.errstate(all="ignore")  # what is not finite is refused
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


@np.errstate(all="ignore")
def noise_table(config: NoiseConfig, terminal_alpha: float) -> NoiseTable:
    """The sigmas of a model's timesteps; `terminal_alpha` stands for the last alpha where that is zero."""
    alphas = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = terminal_alpha
    return NoiseTable(tuple(np.sqrt((1 - alphas) / alphas).tolist()))
