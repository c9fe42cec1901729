"""The rules by which sigmas lie between a first and a last one.

Sources: Karras et al. 2022 (2206.00364), equation 5; the exponential one is k-diffusion's (it has no paper); Lee et al.
2024 (2407.12173) for that of a beta distribution.
"""

from __future__ import annotations

import math

import numpy as np

from cutdiff.sampling.noise import SPREAD_BY

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6


def karras_sigmas(high: float, low: float, num_steps: int, rho: float = KARRAS_RHO) -> list[float]:
    """Even steps of sigma^(1/rho) from `high` to `low`, which are exact also where they round to others."""
    ramp = np.linspace(0, 1, num_steps)
    first, last = high ** (1 / rho), low ** (1 / rho)
    sigmas = [float(s) for s in (first + ramp * (last - first)) ** rho]
    sigmas[-1], sigmas[0] = low, high
    return sigmas


def exponential_sigmas(high: float, low: float, num_steps: int) -> list[float]:
    """Even steps of log sigma from `high` to `low`."""
    return np.exp(np.linspace(math.log(high), math.log(low), num_steps)).tolist()


def beta_sigmas(
    high: float, low: float, num_steps: int, alpha: float = BETA_SHAPE, beta: float = BETA_SHAPE
) -> list[float]:
    """Quantiles of a beta distribution at even steps, from `high` to `low`."""
    from scipy.stats import beta as distribution

    shares = distribution.ppf(1 - np.linspace(0, 1, num_steps), alpha, beta)
    return (low + shares * (high - low)).tolist()


SPREADS = dict(zip(SPREAD_BY, (karras_sigmas, exponential_sigmas, beta_sigmas), strict=True))
"""The sigmas between the first and the last one, by the field of a model's noise that asks for them."""
