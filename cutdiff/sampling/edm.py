"""EDM models: trained on a continuous range of sigmas, with neither betas nor timesteps.

Conventions follow the published EDMEulerScheduler, so that a run here can be compared with its step by step.
Source: Karras et al. 2022 (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cutdiff.sampling.preconditioning import Coefficients, velocity
from cutdiff.sampling.schedule import NoiseConfig, Schedule
from cutdiff.settings import PREDICTION_TYPES

SIGMA_SCHEDULES = ("karras", "exponential")
MAX_STEPS = 1000
"""As many as models with timesteps have of them."""
LEAST, MOST = 1e-6, 1e6
"""Between which all sigmas lie, with room for every model that there is."""


@dataclass(frozen=True)
class EDMConfig:
    """Which sigmas the model was trained on, and what its network says; the defaults are the paper's."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    """Standard deviation of the latents without noise."""
    sigma_schedule: str = "karras"
    """Even steps of sigma^(1/rho) (the paper's equation 5), or "exponential": of sigma's logarithm."""
    rho: float = 7.0
    prediction_type: str = "epsilon"
    """As the published schedulers call it: "epsilon" is the paper's F, "v_prediction" its negative."""

    def __post_init__(self) -> None:
        for name, known in (("sigma_schedule", SIGMA_SCHEDULES), ("prediction_type", PREDICTION_TYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        for name, least in (("sigma_min", LEAST), ("sigma_max", LEAST), ("sigma_data", LEAST), ("rho", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value <= MOST:
                raise ValueError(f"{name}={value!r} must be a number from {least:g} to {MOST:g}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")

    def described(self) -> dict[str, Any]:
        """As records have it."""
        fields = asdict(self)
        return {"prediction_type": fields.pop("prediction_type"), "edm": fields}

    def coefficients(self, sigma: float) -> Coefficients:
        """How the network's output becomes an estimate of x0 (the paper's table 1, last column)."""
        c = velocity(sigma, self.sigma_data)
        return c if self.prediction_type == "v_prediction" else c._replace(c_out=-c.c_out)

    def timestep(self, sigma: float) -> float:
        """What the network is told: the paper's c_noise."""
        return math.log(max(sigma, LEAST)) / 4

    def fraction(self, timestep: float) -> float:
        """Where a timestep stands in the schedule: 1 at sigma_max, 0 at sigma_min."""
        low, high, at = map(self._warped, (self.sigma_min, self.sigma_max, math.exp(4 * timestep)))
        return (at - low) / (high - low)

    def sigmas(self, num_steps: int) -> list[float]:
        """From sigma_max down to sigma_min; one step takes sigma_max."""
        even = np.linspace(self._warped(self.sigma_max), self._warped(self.sigma_min), num_steps)
        sigmas = even**self.rho if self.sigma_schedule == "karras" else np.exp(even)
        return sigmas.tolist()

    def _warped(self, sigma: float) -> float:
        """What the schedule takes even steps of."""
        return sigma ** (1 / self.rho) if self.sigma_schedule == "karras" else math.log(sigma)


AnyNoise = NoiseConfig | EDMConfig
"""How any model was trained."""


def edm_schedule(config: EDMConfig, num_steps: int) -> Schedule:
    """Sigmas, and what the network is told, as the published EDMEulerScheduler picks them."""
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps={num_steps} must be between 1 and {MAX_STEPS}")
    sigmas = config.sigmas(num_steps)
    timesteps = tuple(config.timestep(sigma) for sigma in sigmas)
    # As there, noise is scaled as if a picture lay beneath it.
    return Schedule(timesteps, (*sigmas, 0.0), (*sigmas[1:], 0.0), math.hypot(config.sigma_max, 1), config)
