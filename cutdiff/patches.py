"""The geometry between the canvas and the network: grids, patches, permutations, views, averages.

Every operator dispatches to `cutdiff_kernels`, whose plain-torch references run on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cutdiff_kernels import reference
from torch import Tensor

GRAINS = ("channel", "pixel", "none")


@dataclass(frozen=True)
class SeededPermutation:
    """A permutation that is drawn by counter where it is used: no index tensor needs to travel.

    Grain "channel" draws for every channel of a pixel by itself, as the published code does; "pixel" moves all channels
    of a pixel together, as the text of the paper says; "none" leaves everything where it is.
    """

    seeds: tuple[int, ...]
    step: int
    grain: str

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise ValueError(f"interaction {self.grain!r} is not one of {', '.join(GRAINS)}")

    def index(self, num_patches: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """The index (B, N, C or 1, h, w) for patches of `shape` (C, h, w)."""
        if self.grain == "none":
            identity = torch.arange(num_patches, device=device).view(1, -1, 1, 1, 1)
            return identity.expand(1, num_patches, 1, *shape[1:])
        drawn = (shape[0] if self.grain == "channel" else 1, *shape[1:])
        indices = [reference.permutation_index(s, self.step, num_patches, drawn, device) for s in self.seeds]
        return torch.stack(indices)


Permutation = Tensor | SeededPermutation
"""Either explicit, int64 (N, C or 1, h, w), which serves all images, or (B, N, C or 1, h, w); or drawn by counter.

permuted[n] = patches[index[n]] at each position.
"""


def grid_for(size: tuple[int, int], native: int) -> tuple[int, int]:
    """How many patches it takes on each axis so that none is larger than the native size."""
    return math.ceil(size[0] / native), math.ceil(size[1] / native)


def pad_to_grid(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Extend the canvas (B, C, H, W) at the bottom and the right by reflection, to multiples of the grid."""
    bottom, right = (-canvas.shape[2] % grid[0], -canvas.shape[3] % grid[1])
    return F.pad(canvas, (0, right, 0, bottom), mode="reflect") if bottom or right else canvas


def cut(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Canvas (B, C, s_h·h, s_w·w) -> interleaved patches (B·N, C, h, w), images first, patches in row-major order.

    ValueError where the grid does not divide the canvas: see `pad_to_grid`.
    """
    if canvas.shape[2] % grid[0] or canvas.shape[3] % grid[1]:
        raise ValueError(f"a grid of {grid} does not divide a canvas of {tuple(canvas.shape[2:])}: pad it first")
    return reference.cut(canvas, grid)


def relocate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B·N, C, h, w) -> canvas (B, C, s_h·h, s_w·w): pixel relocation, the inverse of `cut`."""
    return reference.relocate(patches, grid)


def permute(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """Pixel interaction: exchange values between the N patches of each image; (B·N, C, h, w) -> the same shape."""
    return reference.permute(patches, _index(patches, permutation, num_patches))


def permute_back(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """The inverse of `permute` under the same permutation."""
    return reference.permute(patches, reference.invert(_index(patches, permutation, num_patches)))


def view_grid(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Origins (V, 2) of windows that cover the canvas at `stride`, row-major, the last ones clamped to the border."""
    rows, columns = (_axis_origins(*axis) for axis in zip(size, window, stride, strict=True))
    return torch.cartesian_prod(rows, columns).view(-1, 2)


def views(canvas: Tensor, origins: Tensor, window: tuple[int, int]) -> Tensor:
    """Canvas (B, C, H, W) -> views (B·V, C, *window), images first; outside the canvas a view reads zeros."""
    return reference.views(canvas, _for_images(origins, len(canvas)), window)


def average(values: Tensor, origins: Tensor, size: tuple[int, int], weights: Tensor | None = None) -> Tensor:
    """Views (B·V, C, h, w) -> canvas (B, C, *size): the mean, or the mean under `weights` (h, w), of covering views.

    ValueError where no view covers a pixel.
    """
    num_images = len(values) // origins.shape[-2]
    return reference.average(values, _for_images(origins, num_images), size, weights)


def _axis_origins(size: int, window: int, stride: int) -> Tensor:
    if not 1 <= stride <= window <= size:
        raise ValueError(f"views need 1 ≤ stride ≤ window ≤ size, got stride={stride}, window={window}, size={size}")
    count = math.ceil((size - window) / stride) + 1
    return (torch.arange(count) * stride).clamp(max=size - window)


def _for_images(origins: Tensor, num_images: int) -> Tensor:
    return origins.expand(num_images, *origins.shape[-2:])


def _index(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    shape = (patches.shape[1], patches.shape[2], patches.shape[3])
    if isinstance(permutation, SeededPermutation):
        return permutation.index(num_patches, shape, patches.device)
    index = permutation.to(patches.device)
    index = index[None] if index.ndim == 4 else index
    if (
        index.dtype != torch.int64
        or index.shape[1] != num_patches
        or index.shape[2] not in (1, shape[0])
        or index.shape[3:] != shape[1:]
    ):
        raise ValueError(
            f"a permutation {tuple(index.shape)} of {index.dtype} does not fit {num_patches} patches of shape {shape}: "
            "pass int64 (N, C or 1, h, w), or one for each image"
        )
    return index
