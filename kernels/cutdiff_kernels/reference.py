"""Plain-torch references of the operators between the canvas and the network. Every faster path is compared with these.

Patches of a canvas are ordered image first: item b·N + n of a patch batch is patch n of image b. Views likewise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def cut(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Canvas (B, C, s_h·h, s_w·w) -> interleaved patches (B·N, C, h, w), patch (i, j) being canvas[i::s_h, j::s_w]."""
    s_h, s_w = grid
    return rearrange(canvas, "b c (h i) (w j) -> (b i j) c h w", i=s_h, j=s_w)


def relocate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B·N, C, h, w) -> canvas (B, C, s_h·h, s_w·w): the inverse of `cut`."""
    s_h, s_w = grid
    return rearrange(patches, "(b i j) c h w -> b c (h i) (w j)", i=s_h, j=s_w)


def permute(patches: Tensor, index: Tensor) -> Tensor:
    """Exchange values between the patches of an image, at each position by its own permutation.

    patches (B·N, C, h, w) · index (B or 1, N, C or 1, h, w) int64 -> permuted[n] = patches[index[n]] at each position.
    """
    stacked = patches.unflatten(0, (-1, index.shape[1]))  # (B, N, C, h, w)
    return stacked.gather(1, index.expand(stacked.shape)).flatten(0, 1)


def invert(index: Tensor) -> Tensor:
    """The index (B, N, C, h, w) of the inverse permutation at each position."""
    source = torch.arange(index.shape[1], device=index.device).view(1, -1, 1, 1, 1).expand(index.shape)
    return torch.empty_like(index).scatter_(1, index, source)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): four counter words -> four random words, all int64 holding 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words wraps around in int64, but its 64 bits are right: mask what the shift's sign smears.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & WORD, (p1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & WORD, high0 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def permutation_index(
    seed: int, step: int, num_patches: int, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a permutation of the N patches at each position, by counter: (N, C, h, w) int64 for `shape` = (C, h, w).

    At each position every patch gets a random 32-bit key; the rank of its key is the patch's destination (ties, one
    in 2³², go by number). Key of the generator: the 64-bit seed. Counter: (position, channel, step, patch // 4), and
    the word patch % 4 of the four is taken. Channels C = 1 draw for all channels of a pixel together.
    """
    channels, height, width = shape
    position = torch.arange(height * width, device=device).view(1, 1, -1)
    channel = torch.arange(channels, device=device).view(1, -1, 1)
    group = torch.arange((num_patches + 3) // 4, device=device).view(-1, 1, 1)
    position, channel, group = torch.broadcast_tensors(position, channel, group)
    words = philox((position, channel, torch.full_like(position, step), group), (seed & WORD, (seed >> 32) & WORD))
    keys = torch.stack(words, dim=1).flatten(0, 1)[:num_patches]  # (N, C, h·w), patch 4·group + word
    return keys.argsort(dim=0, stable=True).unflatten(2, (height, width))


def views(canvas: Tensor, origins: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut overlapping windows: canvas (B, C, H, W), origins (B, V, 2) -> (B·V, C, window_h, window_w).

    An origin (top, left) may lie outside the canvas; what a view reads there is zero.
    """
    margin = _margin(origins, window, canvas.shape[2:])
    top, bottom, left, right = margin
    padded = F.pad(canvas, (left, right, top, bottom))
    cuts = [
        padded[b, :, y + top : y + top + window[0], x + left : x + left + window[1]]
        for b, image_origins in enumerate(origins.tolist())
        for y, x in image_origins
    ]
    return torch.stack(cuts)


def average(values: Tensor, origins: Tensor, size: tuple[int, int], weights: Tensor | None = None) -> Tensor:
    """Average what the views say of each pixel: (B·V, C, h, w), origins (B, V, 2) -> canvas (B, C, H, W).

    `weights` (h, w), positive, uniform if left out, tell how much each pixel of a view counts. What lies outside
    the canvas is dropped. Views are added in their order. ValueError where no view covers a pixel.
    """
    batch, num_views = origins.shape[:2]
    window = (values.shape[2], values.shape[3])
    top, bottom, left, right = _margin(origins, window, size)
    weight = values.new_ones(window) if weights is None else weights.to(values)
    total = values.new_zeros(batch, values.shape[1], size[0] + top + bottom, size[1] + left + right)
    share = values.new_zeros(batch, 1, *total.shape[2:])
    weighted = values * weight
    for b, image_origins in enumerate(origins.tolist()):
        for v, (y, x) in enumerate(image_origins):
            window_at = (slice(y + top, y + top + window[0]), slice(x + left, x + left + window[1]))
            total[b, :, *window_at] += weighted[b * num_views + v]
            share[b, :, *window_at] += weight
    inside = (slice(None), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    if not bool((share[inside] > 0).all()):
        raise ValueError(f"views of {window} at these origins leave pixels of the {size} canvas uncovered")
    return total[inside] / share[inside]


def _margin(origins: Tensor, window: tuple[int, int], size: torch.Size | tuple[int, ...]) -> tuple[int, int, int, int]:
    """How far views reach past the canvas: top, bottom, left, right."""
    low, high = origins.flatten(0, 1).amin(0).tolist(), origins.flatten(0, 1).amax(0).tolist()
    return (
        max(0, -low[0]),
        max(0, high[0] + window[0] - size[0]),
        max(0, -low[1]),
        max(0, high[1] + window[1] - size[1]),
    )
