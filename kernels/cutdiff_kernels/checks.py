"""Checks of what operators are given. Each raises a ValueError that names the values and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_patches(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return the size (h, w) of a patch of a canvas of `size`; ValueError where the grid does not divide it."""
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(f"a grid of {grid} does not divide a canvas of {size}: pad it first")
    return size[0] // grid[0], size[1] // grid[1]


def check_items(items: int, each: int) -> int:
    """Return how many groups of `each` the items make; ValueError where that is no whole number."""
    if items % each:
        raise ValueError(f"{items} items are no whole number of images of {each} each")
    return items // each


def check_copies(copies: int) -> None:
    """Raise ValueError where nobody knows how to join `copies` of an item."""
    if copies not in (1, 2):
        raise ValueError(f"copies={copies} cannot be joined: pass 1, or 2 for a guidance pair")


def check_views(
    origins: Tensor,
    window: tuple[int, int],
    size: tuple[int, int],
    items: int,
    copies: int,
    weights: Tensor | None,
    covered: bool,
) -> None:
    """Raise ValueError where origins, items or weights do not fit, or a pixel is uncovered.

    Cover is not checked where the caller says by `covered` that it has been: for origins on a GPU the host would wait.
    """
    check_copies(copies)
    check_origins(origins, len(origins))
    if items != origins.shape[0] * origins.shape[1] * copies:
        raise ValueError(f"{items} items in {copies} copies do not fit origins (B, V, 2) of {tuple(origins.shape)}")
    if weights is not None and weights.shape != window:
        raise ValueError(f"weights of {tuple(weights.shape)} do not fit views of {window}")
    if not covered:
        check_cover(origins, window, size)


def check_origins(origins: Tensor, batch: int) -> None:
    """Raise ValueError where origins are not (B, V, 2) int64 for `batch` images."""
    if origins.ndim != 3 or origins.shape[0] != batch or origins.shape[2] != 2 or origins.dtype != torch.int64:
        raise ValueError(
            f"origins {tuple(origins.shape)} of {origins.dtype} do not fit {batch} images: pass int64 ({batch}, V, 2)"
        )


def check_canvas(canvas: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError where a canvas does not have the shape of the result that is laid on it."""
    if canvas is not None and canvas.shape != shape:
        raise ValueError(f"a canvas of {tuple(canvas.shape)} does not fit a result of {tuple(shape)}")


def check_flag(flag: Tensor | None) -> None:
    """Raise ValueError where a flag is not one int32. Triton refuses one in memory that its device cannot reach."""
    if flag is not None and (flag.dtype != torch.int32 or flag.numel() != 1):
        raise ValueError(f"a flag is {tuple(flag.shape)} of {flag.dtype}: pass one int32, on the device or pinned")


def check_cover(origins: Tensor, window: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise ValueError where views of `window` at origins (B, V, 2) leave a pixel of the canvas uncovered."""
    # Each view adds 1 from its first row and column on and takes it back from its ends on: the sums count what covers.
    ends = [
        torch.stack([low, low + window[axis]], dim=2).clamp(0, size[axis])  # (B, V, 2)
        for axis, low in enumerate(origins.unbind(2))
    ]
    corners = ends[0][:, :, :, None] * (size[1] + 1) + ends[1][:, :, None, :]  # (B, V, 2, 2)
    signs = torch.tensor([[1, -1], [-1, 1]], dtype=torch.int32, device=origins.device).expand(corners.shape)
    steps = torch.zeros(len(origins), (size[0] + 1) * (size[1] + 1), dtype=torch.int32, device=origins.device)
    steps = steps.scatter_add_(1, corners.flatten(1), signs.flatten(1)).unflatten(1, (size[0] + 1, size[1] + 1))
    covering = steps[:, :-1].cumsum(1, dtype=torch.int32)[:, :, :-1].cumsum(2, dtype=torch.int32)  # (B, H, W)
    if not bool((covering > 0).all()):
        raise ValueError(f"views of {window} at these origins leave pixels of the {size} canvas uncovered")
