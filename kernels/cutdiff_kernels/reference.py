"""Plain-torch references of the operators between the canvas and the network, which every faster path is compared with.

They compute in float32, or in float64 where that is given. Patches of a canvas are ordered image first: item b·N + n of
a patch batch is patch n of image b. Views are ordered likewise. Where the network wants a guidance pair, the two copies
of an item stand side by side, the negative one first.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cutdiff_kernels.checks import check_items, check_origins, check_patches, check_views
from cutdiff_kernels.conversions import FromNetwork, ToNetwork, carry_back, to_network
from cutdiff_kernels.permutations import Permutation, as_index, check_index, check_permutation, invert


def gather_patches(
    canvas: Tensor, grid: tuple[int, int], permutation: Permutation = None, **how: Unpack[ToNetwork]
) -> Tensor:
    """permute ∘ cut, as the network reads it: canvas (B, C, s_h·h, s_w·w) -> (B·N·copies, C, h, w).

    Scale, cast and copies are those of `to_network`. ValueError where an explicit index is no permutation.
    """
    return to_network(permute(cut(canvas, grid), permutation, grid[0] * grid[1]), **how)


def scatter_patches(
    values: Tensor, grid: tuple[int, int], permutation: Permutation = None, **how: Unpack[FromNetwork]
) -> Tensor:
    """relocate ∘ permute⁻¹ of the network's output: (B·N·copies, C, h, w) -> (B, C, s_h·h, s_w·w), float32.

    Guidance and canvas are those of `carry_back`. ValueError where an explicit index is no permutation.
    """
    num_patches = grid[0] * grid[1]
    return carry_back(values, lambda items: relocate(permute_back(items, permutation, num_patches), grid), **how)


def gather_views(canvas: Tensor, origins: Tensor, window: tuple[int, int], **how: Unpack[ToNetwork]) -> Tensor:
    """`views` as the network reads them: canvas (B, C, H, W), origins (B, V, 2) -> (B·V·copies, C, *window).

    Scale, cast and copies are those of `to_network`.
    """
    check_origins(origins, len(canvas))
    return to_network(views(canvas, origins, window), **how)


def average_views(
    values: Tensor,
    origins: Tensor,
    size: tuple[int, int],
    *,
    weights: Tensor | None = None,
    covered: bool = False,
    **how: Unpack[FromNetwork],
) -> Tensor:
    """`average` of the network's output: (B·V·copies, C, h, w), origins (B, V, 2) -> canvas (B, C, *size), float32.

    Guidance and canvas are those of `carry_back`, and `covered` is that of `average`.
    """
    window = (values.shape[2], values.shape[3])
    check_views(origins, window, size, len(values), how.get("copies", 1), weights, covered)
    return carry_back(values, lambda items: average(items, origins, size, weights, covered=True), **how)


def cut(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut a canvas (B, C, s_h·h, s_w·w) into interleaved patches (B·N, C, h, w), images first, patches row by row.

    Patch (i, j) is canvas[:, :, i::s_h, j::s_w]. ValueError where the grid does not divide the canvas: see
    `pad_to_grid`.
    """
    check_patches((canvas.shape[2], canvas.shape[3]), grid)
    return rearrange(canvas, "b c (h i) (w j) -> (b i j) c h w", i=grid[0], j=grid[1])


def relocate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel relocation, the inverse of `cut`: patches (B·N, C, h, w) -> canvas (B, C, s_h·h, s_w·w)."""
    return rearrange(patches, "(b i j) c h w -> b c (h i) (w j)", i=grid[0], j=grid[1])


def permute(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """Pixel interaction: exchange values between the N patches of each image, (B·N, C, h, w) -> the same shape.

    permuted[n] = patches[index[n]] at each position. ValueError where the permutation does not fit, or where an
    explicit index is no permutation, which is read on the host.
    """
    return _exchange(patches, _index(patches, permutation, num_patches))


def permute_back(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor:
    """Undo `permute` with the same permutation, which must fit as it must there."""
    index = _index(patches, permutation, num_patches)
    return _exchange(patches, None if index is None else invert(index))


def views(canvas: Tensor, origins: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut overlapping windows: canvas (B, C, H, W) -> (B·V, C, *window), images first.

    Origins of (top, left) are (V, 2) for all images or (B, V, 2). One may lie outside the canvas, where a view reads
    zeros.
    """
    origins = _for_images(origins, len(canvas))
    top, bottom, left, right = _margin(origins, window, canvas.shape[2:])
    padded = F.pad(canvas, (left, right, top, bottom))
    cuts = [
        padded[b, :, y + top : y + top + window[0], x + left : x + left + window[1]]
        for b, image_origins in enumerate(origins.tolist())
        for y, x in image_origins
    ]
    return torch.stack(cuts)


def average(
    values: Tensor, origins: Tensor, size: tuple[int, int], weights: Tensor | None = None, *, covered: bool = False
) -> Tensor:
    """Average views that cover a pixel: (B·V, C, h, w), origins (V, 2) or (B, V, 2) -> canvas (B, C, *size).

    `weights` (h, w), positive, are how much each pixel of a view counts; None counts them alike. What lies outside the
    canvas is dropped. Views are added in their order. ValueError where no view covers a pixel, unless the caller has
    checked and says so by `covered`: for origins on a GPU the host waits for the check.
    """
    origins = _for_images(origins, len(values) // origins.shape[-2])
    batch, num_views = origins.shape[:2]
    window = (values.shape[2], values.shape[3])
    check_views(origins, window, size, len(values), 1, weights, covered)
    top, bottom, left, right = _margin(origins, window, size)
    weight = values.new_ones(window) if weights is None else weights.to(values)
    total = values.new_zeros(batch, values.shape[1], size[0] + top + bottom, size[1] + left + right)
    share = values.new_zeros(batch, 1, *total.shape[2:])
    weighted = values * weight
    for b, image_origins in enumerate(origins.tolist()):
        for v, (y, x) in enumerate(image_origins):
            place = (slice(y + top, y + top + window[0]), slice(x + left, x + left + window[1]))
            total[b, :, *place] += weighted[b * num_views + v]
            share[b, :, *place] += weight
    inside = (slice(None), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    return total[inside] / share[inside]


def _index(patches: Tensor, permutation: Permutation, num_patches: int) -> Tensor | None:
    """Check a permutation and return its index (B or 1, N, C or 1, h, w)."""
    items, channels, h, w = patches.shape
    check_permutation(permutation, num_patches, check_items(items, num_patches), (channels, h, w))
    if isinstance(permutation, Tensor):
        check_index(permutation, num_patches)
    return as_index(permutation, num_patches, (channels, h, w), patches.device)


def _exchange(patches: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return patches
    stacked = patches.unflatten(0, (-1, index.shape[1]))  # (B, N, C, h, w)
    return stacked.gather(1, index.expand(stacked.shape)).flatten(0, 1)


def _for_images(origins: Tensor, num_images: int) -> Tensor:
    return origins.expand(num_images, *origins.shape[-2:])


def _margin(origins: Tensor, window: tuple[int, int], size: torch.Size | tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return how far views reach past the canvas: top, bottom, left, right."""
    low, high = origins.flatten(0, 1).amin(0).tolist(), origins.flatten(0, 1).amax(0).tolist()
    return (
        max(0, -low[0]),
        max(0, high[0] + window[0] - size[0]),
        max(0, -low[1]),
        max(0, high[1] + window[1] - size[1]),
    )
