"""Edges of pictures, as the hint of a ControlNet (Canny 1986, in OpenCV's way)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEEP = 0.4142135623730951
"""The tangent of 22.5°, the border between directions along an axis and along a diagonal."""


@torch.no_grad()
def edges(images: Tensor, spread: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> their edges, lines of one pixel, white on black, of the same shape.

    A pixel is an edge where the gradient is largest across it and exceeds (1 + spread) times the image's median, of 255
    at most, or (1 − spread) times that and it is connected with such a one.
    """
    if images.is_meta:  # a planned run has sizes only
        return torch.empty_like(images)
    values = (images.clamp(0, 1) * 255).round()
    flat, count = values.flatten(1), values[0].numel()
    ends = [flat.kthvalue(rank).values for rank in ((count + 1) // 2, count // 2 + 1)]  # `quantile` takes fewer values
    median = torch.stack(ends).mean(0)[:, None, None]
    low, high = ((1 - spread) * median).clamp(min=0).floor(), ((1 + spread) * median).clamp(max=255).floor()
    along, down = _gradient(values)
    size = along.abs() + down.abs()
    kept = _is_largest_across(size, along, down) & (size > low)
    lines = (kept & (size > high)).float()
    while True:  # what is connected with a line becomes a part of it
        wider = F.max_pool2d(lines[:, None], 3, stride=1, padding=1)[:, 0] * kept
        if torch.equal(wider, lines):
            return lines[:, None].expand(-1, 3, -1, -1)
        lines = wider


def _gradient(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's differences along rows and down columns, (B, H, W) each, of the channel in which they are largest."""
    smooth, step = values.new_tensor([1, 2, 1]), values.new_tensor([-1, 0, 1])
    kernels = torch.stack([torch.outer(smooth, step), torch.outer(step, smooth)])[:, None]
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    both = F.conv2d(padded, kernels).unflatten(0, values.shape[:2])  # (B, 3, 2, H, W)
    largest = both.abs().sum(2, keepdim=True).argmax(1, keepdim=True).expand(-1, -1, 2, -1, -1)
    along, down = both.gather(1, largest)[:, 0].unbind(1)
    return along, down


def _is_largest_across(size: Tensor, along: Tensor, down: Tensor) -> Tensor:
    """True where no neighbour in the direction of the gradient has a larger one, (B, H, W)."""
    padded = F.pad(size, (1, 1, 1, 1))
    height, width = size.shape[1:]

    def beside(row: int, column: int) -> Tensor:
        return padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    is_flat = down.abs() < STEEP * along.abs()
    is_upright = down.abs() > (STEEP + 2) * along.abs()
    is_falling = (along < 0) ^ (down < 0)
    across = torch.where(is_falling, beside(-1, 1), beside(-1, -1))
    back = torch.where(is_falling, beside(1, -1), beside(1, 1))
    first = torch.where(is_flat, beside(0, -1), torch.where(is_upright, beside(-1, 0), across))
    second = torch.where(is_flat, beside(0, 1), torch.where(is_upright, beside(1, 0), back))
    is_diagonal = ~(is_flat | is_upright)
    return (size > first) & ((size > second) | (~is_diagonal & (size >= second)))
