"""EDM models: trained on a continuous range of sigmas, with neither betas nor timesteps.

Conventions follow the published EDMEulerScheduler, so that a run here can be compared with its step by step.
Source: Karras et al. 2022 (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import LEAST, MOST, NoiseConfig
from cutdiff.sampling.preconditioning import Coefficients, velocity
from cutdiff.settings import PREDICTION_TYPES

SIGMA_SCHEDULES = ("karras", "exponential")


@dataclass(frozen=True)
class EDMConfig:
    """The sigmas that a model was trained on, and what its network predicts; the defaults are the paper's."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    """Standard deviation of the latents without noise."""
    sigma_schedule: str = "karras"
    """Even steps of sigma^(1/rho) (the paper's equation 5), or "exponential": of sigma's logarithm."""
    rho: float = 7.0
    prediction_type: str = "epsilon"
    """The published schedulers' name: "epsilon" is the paper's F, "v_prediction" its negative."""

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
        """The entries of a record."""
        fields = asdict(self)
        return {"prediction_type": fields.pop("prediction_type"), "edm": fields}

    def coefficients(self, sigma: float) -> Coefficients:
        """The numbers that turn the network's output into an estimate of x0 (the paper's table 1, last column)."""
        c = velocity(sigma, self.sigma_data)
        return c if self.prediction_type == "v_prediction" else c._replace(c_out=-c.c_out)

    def timestep(self, sigma: float) -> float:
        """The number that tells the network of a sigma: the paper's c_noise."""
        return math.log(max(sigma, LEAST)) / 4

    def sigma(self, timestep: float) -> float:
        """The sigma that a number tells the network of."""
        return math.exp(4 * timestep)

    def fraction(self, timestep: float) -> float:
        """The place of a timestep in the schedule: 1 at sigma_max, 0 at sigma_min."""
        low, high, middle = map(self._warped, (self.sigma_min, self.sigma_max, self.sigma(timestep)))
        return (middle - low) / (high - low)

    def sigmas(self, num_steps: int) -> list[float]:
        """The sigmas from sigma_max down to sigma_min; a single step takes sigma_max."""
        even = np.linspace(self._warped(self.sigma_max), self._warped(self.sigma_min), num_steps)
        return self._unwarped(even).tolist()

    def timestep_at(self, fraction: float) -> float:
        """The number of the sigma at such a place in the schedule."""
        low, high = self._warped(self.sigma_min), self._warped(self.sigma_max)
        return self.timestep(float(self._unwarped(np.float64(low + fraction * (high - low)))))

    def ends(self, num_steps: int) -> tuple[float, float]:
        """The first sigma of a run and its last one above 0, whatever its number of steps."""
        return self.sigma_max, self.sigma_min

    def init_scale(self, sigma: float) -> float:
        """The factor of the noise that a run begins with at a sigma: as if a picture lay beneath it."""
        return math.hypot(sigma, 1)

    def time(self, sigma: float) -> float:
        """Sigma itself."""
        return sigma

    def of_time(self, time: float) -> float:
        """The sigma that is the time."""
        return time

    def _warped(self, sigma: float) -> float:
        """The function of sigma that the schedule takes even steps of."""
        return sigma ** (1 / self.rho) if self.sigma_schedule == "karras" else math.log(sigma)

    def _unwarped(self, even: Any) -> Any:
        """The inverse of `_warped`, of numpy's numbers."""
        return even**self.rho if self.sigma_schedule == "karras" else np.exp(even)


Continuous = EDMConfig | FlowConfig
"""The noise of a model that was trained on all sigmas of a range, which have one schedule for all solvers."""
AnyNoise = NoiseConfig | Continuous
"""The noise that a model of any kind was trained on."""
