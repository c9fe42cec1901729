"""The grids that patches and views of a canvas stand on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_for(size: tuple[int, int], native: int) -> tuple[int, int]:
    """Return how many patches each axis is cut into so that none is larger than the native size."""
    return math.ceil(size[0] / native), math.ceil(size[1] / native)


def pad_to_grid(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Extend the canvas (B, C, H, W) at the bottom and the right by reflection, to multiples of the grid."""
    bottom, right = (-canvas.shape[2] % grid[0], -canvas.shape[3] % grid[1])
    return F.pad(canvas, (0, right, 0, bottom), mode="reflect") if bottom or right else canvas


def view_grid(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Return origins (V, 2) of windows that cover the canvas at `stride`, row by row, the last ones at the border.

    ValueError unless 1 ≤ stride ≤ window ≤ size on both axes.
    """
    rows, columns = (_axis_origins(*axis) for axis in zip(size, window, stride, strict=True))
    return torch.cartesian_prod(rows, columns).view(-1, 2)


def _axis_origins(size: int, window: int, stride: int) -> Tensor:
    if not 1 <= stride <= window <= size:
        raise ValueError(f"views need 1 ≤ stride ≤ window ≤ size, got stride={stride}, window={window}, size={size}")
    count = math.ceil((size - window) / stride) + 1
    return (torch.arange(count, device="cpu") * stride).clamp(max=size - window)
