"""Preconditioning: c_skip·x + c_out·network(c_in·x) estimates x0, for a state x = x0 + sigma·noise.

Source: Karras et al. 2022 (arXiv 2206.00364), equation 7; their table 1 has the formulations side by side.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Coefficients(NamedTuple):
    """The three numbers around the network at one sigma."""

    c_in: float
    c_skip: float
    c_out: float


def epsilon(sigma: float) -> Coefficients:
    """The coefficients of a network that reads the VP state x / sqrt(1 + sigma²) and predicts the noise."""
    return Coefficients(1 / math.hypot(sigma, 1), 1.0, -sigma)


def velocity(sigma: float, sigma_data: float = 1.0) -> Coefficients:
    """The coefficients of a network whose input and output have unit variance for data of deviation `sigma_data`: where
    that is 1, it predicts v of the VP state (Salimans & Ho 2022, arXiv 2202.00512). EDM's own predicts the negative."""
    scale = math.hypot(sigma, sigma_data)
    return Coefficients(1 / scale, sigma_data**2 / scale**2, -sigma * sigma_data / scale)


def flow(sigma: float) -> Coefficients:
    """The coefficients of a network that reads (1 − t)·x0 + t·noise at t = sigma / (1 + sigma), and predicts the
    velocity noise − x0 (Lipman et al. 2022, arXiv 2210.02747)."""
    return Coefficients(1 / (1 + sigma), 1 / (1 + sigma), -sigma / (1 + sigma))
