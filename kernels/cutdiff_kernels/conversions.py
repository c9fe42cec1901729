"""Conversions between items and the network's rows: scale, cast, copies, guidance, and the skip of the canvas.

Everything is computed in float32, or in float64 where that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from cutdiff_kernels.checks import check_canvas, check_copies, check_items


class ToNetwork(TypedDict, total=False):
    """The options of a gather, which writes `copies` of each item (2 for a guidance pair): c_in · x in `dtype`."""

    c_in: float
    dtype: torch.dtype | None
    copies: int


class FromNetwork(TypedDict, total=False):
    """The options of a scatter, which takes F = negative + guidance_scale · (positive − negative) of two copies.

    With a `canvas` x the result is c_skip · x + c_out · F, coefficients as in Karras et al. 2022, equation 7.
    """

    copies: int
    guidance_scale: float
    canvas: Tensor | None
    c_skip: float
    c_out: float


def to_network(items: Tensor, *, c_in: float = 1.0, dtype: torch.dtype | None = None, copies: int = 1) -> Tensor:
    """Scale, cast and copy items for the network: (N, C, h, w) -> (N·copies, C, h, w), copies side by side.

    Values are multiplied by `c_in` in float32 and cast to `dtype`, that of the items if None.
    """
    return (wide(items) * c_in).to(dtype or items.dtype).repeat_interleave(copies, dim=0)


def from_network(values: Tensor, *, copies: int = 1, guidance_scale: float = 1.0) -> Tensor:
    """Join the copies that the network has answered: (N·copies, C, h, w) -> (N, C, h, w), at least float32.

    Two copies, the negative one first, give negative + guidance_scale · (positive − negative). ValueError for other
    numbers of copies, or where they do not divide the values.
    """
    check_copies(copies)
    if copies == 1:
        return wide(values)
    check_items(len(values), copies)
    negative, positive = wide(values).unflatten(0, (-1, 2)).unbind(1)
    return negative + guidance_scale * (positive - negative)


def on_canvas(values: Tensor, canvas: Tensor | None = None, c_skip: float = 0.0, c_out: float = 1.0) -> Tensor:
    """Lay a result on a canvas of its shape (B, C, H, W): c_skip · canvas + c_out · values, at least float32.

    Without a canvas the values come back as they are. ValueError where the shapes differ.
    """
    check_canvas(canvas, values.shape)
    return wide(values) if canvas is None else c_skip * wide(canvas) + c_out * wide(values)


def carry_back(
    values: Tensor,
    undo: Callable[[Tensor], Tensor],
    *,
    copies: int = 1,
    guidance_scale: float = 1.0,
    canvas: Tensor | None = None,
    c_skip: float = 0.0,
    c_out: float = 1.0,
) -> Tensor:
    """Apply `from_network`, then `undo` from items (N, C, h, w) to a canvas (B, C, H, W), then `on_canvas`."""
    items = from_network(values, copies=copies, guidance_scale=guidance_scale)
    return on_canvas(undo(items), canvas, c_skip, c_out)


def wide(values: Tensor) -> Tensor:
    """Cast values to float32 if they have fewer bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
