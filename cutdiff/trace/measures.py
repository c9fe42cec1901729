"""The numbers of a step that the curves of a trace show."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

CURVES = {
    "state_std": "the standard deviation of the canvas",
    "denoised_std": "the standard deviation of the estimate of x0",
    "bands": "the power of the estimate of x0 in each of `BANDS`",
    "disagreement": "the mean distance of what patches or views predict alone, relative to the estimate's deviation",
    "guidance": "the mean size of what guidance adds to an item's estimate, relative as well",
    "not_finite": "the values of the canvas and of the estimate that are NaN or infinite",
}
BANDS = (1 / 16, 1 / 8, 1 / 4, 1.0)
"""The upper ends of the bands of frequencies, in cycles per latent; the first begins above 0."""


def rms(x: Tensor) -> Tensor:
    """The root mean square of each item of (N, …)."""
    return x.flatten(1).square().mean(dim=1).sqrt()


def bands(canvas: Tensor) -> list[float]:
    """The power of a canvas (C, H, W) in each of `BANDS`: the sum of |F|² there, for each value of the canvas."""
    height, width = canvas.shape[1:]
    power = torch.fft.fft2(canvas, norm="ortho").abs().square().sum(dim=0)
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = (rows[:, None].square() + columns.square()).sqrt()
    inside = [(radius > low) & (radius <= high) for low, high in pairwise((0.0, *BANDS))]
    return [float(power[mask].sum()) / canvas.numel() for mask in inside]
