"""The geometry between the canvas and the network: grids, patches, permutations, views, averages.

`Patches` and `Views` are what a run uses: each carries a canvas to the network and what the network says back, in one
kernel each way, and scatter ∘ gather is the identity. The operators that they are made of stand below them by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Protocol, TypedDict, Unpack

import torch
import torch.nn.functional as F
from cutdiff_kernels import reference
from torch import Tensor

from cutdiff.settings import BACKENDS

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


Permutation = Tensor | SeededPermutation | None
"""Explicit, int64 (N, C or 1, h, w), which serves all images, or (B, N, C or 1, h, w); drawn by counter; or none.

permuted[n] = patches[index[n]] at each position.
"""


class ToNetwork(TypedDict, total=False):
    """How a gather writes for the network: c_in · x in `dtype`, each item `copies` times (2 for a guidance pair)."""

    c_in: float
    dtype: torch.dtype
    copies: int


class FromNetwork(TypedDict, total=False):
    """How a scatter reads what the network says: F = negative + guidance_scale · (positive − negative) of two copies.

    With a `canvas` x the result is c_skip · x + c_out · F, coefficients as in Karras et al. 2022, equation 7.
    """

    copies: int
    guidance_scale: float
    canvas: Tensor
    c_skip: float
    c_out: float


class Operator(Protocol):
    """A way from the canvas to the network and back, both linear; `scatter` of what `gather` gave is the canvas.

    Where that does not hold, compose `gather`, a denoiser and `scatter` by hand: `Denoiser.through` relies on it.
    """

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        """Canvas (B, C, H, W) -> the network's input (items·copies, C, h, w), images first, copies side by side."""
        ...

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        """What the network says (items·copies, C, h, w) -> canvas (B, C, H, W), float32."""
        ...


@dataclass(frozen=True)
class Patches:
    """permute ∘ cut, and relocate ∘ permute⁻¹: N interleaved patches that exchange pixels, (B·N·copies, C, h, w).

    ValueError where the grid does not divide the canvas (see `pad_to_grid`) or the permutation does not fit.
    """

    grid: tuple[int, int]
    permutation: Permutation = None

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        kernels = _kernels("patches", backend, canvas)
        return kernels.gather_patches(canvas, self.grid, _for_kernels(self.permutation, canvas.device), **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        kernels = _kernels("patches", backend, values)
        return kernels.scatter_patches(values, self.grid, _for_kernels(self.permutation, values.device), **how)


@dataclass(frozen=True)
class Views:
    """Overlapping windows, (B·V·copies, C, *window), and their mean where they overlap; zeros outside the canvas.

    ValueError where no view covers a pixel.
    """

    origins: Tensor
    """(B, V, 2) of (top, left); given on the CPU, where nothing waits to hear whether they cover the canvas."""
    window: tuple[int, int]
    size: tuple[int, int]
    """Of the canvas."""
    weights: Tensor | None = None
    """(h, w), positive: how much each pixel of a view counts; all the same if None. Given on the CPU too."""
    device: torch.device | str = "cpu"
    """Where the canvas is, and the origins go."""

    def __post_init__(self) -> None:
        reference.check_cover(self.origins, self.window, self.size)
        object.__setattr__(self, "origins", upload(self.origins, self.device))
        if self.weights is not None:
            if not bool((self.weights > 0).all()):
                raise ValueError(
                    "weights of a view must all be positive: one that is zero can leave a pixel without any"
                )
            object.__setattr__(self, "weights", upload(self.weights, self.device))

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        return _kernels("views", backend, canvas).gather_views(canvas, self.origins, self.window, **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        kernels = _kernels("views", backend, values)
        return kernels.average_views(values, self.origins, self.size, weights=self.weights, covered=True, **how)


def check_backend(backend: str, device: torch.device) -> None:
    """ValueError where `backend` cannot run on `device`."""
    if _is_reference(backend, device):
        return
    try:
        launch = import_module("cutdiff_kernels.launch")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend={backend!r} needs {error.name} on {device.type}: install it, or take 'reference'"
        ) from None
    launch.check_device(device)


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """The same values on `device`, contiguous; the host does not wait for a copy to a GPU."""
    values = values.contiguous()
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _kernels(name: str, backend: str, values: Tensor) -> ModuleType:
    """The module whose operators run: the references, or the Triton kernels, which raise where they cannot."""
    return reference if _is_reference(backend, values.device) else import_module(f"cutdiff_kernels.{name}")


def _is_reference(backend: str, device: torch.device) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    return backend == "reference" or (backend == "auto" and device.type != "cuda")


def _for_kernels(permutation: Permutation, device: torch.device) -> reference.Permutation:
    if not isinstance(permutation, SeededPermutation):
        return permutation if permutation is None else permutation.to(device)
    if permutation.grain == "none":
        return None
    return reference.Seeded(_seed_bits(permutation.seeds, device), permutation.step, permutation.grain == "channel")


@lru_cache(maxsize=16)
def _seed_bits(seeds: tuple[int, ...], device: torch.device) -> Tensor:
    """(B,) int64 on the device, made once for a run."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=device)


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
    reference.check_patches((canvas.shape[2], canvas.shape[3]), grid)
    return reference.cut(canvas, grid)


def relocate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B·N, C, h, w) -> canvas (B, C, s_h·h, s_w·w): pixel relocation, the inverse of `cut`."""
    return reference.relocate(patches, grid)


def permute(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """Pixel interaction: exchange values between the N patches of each image; (B·N, C, h, w) -> the same shape."""
    return reference.permute(patches, _index(patches, permutation, num_patches))


def permute_back(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """The inverse of `permute` under the same permutation."""
    return reference.permute_back(patches, _index(patches, permutation, num_patches))


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


def _index(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor | None:
    items, channels, h, w = patches.shape
    given = _for_kernels(permutation, patches.device)
    reference.check_permutation(given, num_patches, items // num_patches, (channels, h, w))
    return reference.as_index(given, num_patches, (channels, h, w))
