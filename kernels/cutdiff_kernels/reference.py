"""Plain-torch references of the operators between the canvas and the network, and of two inside of it. Every faster
path is compared with these.

What they compute is float32, or float64 where float64 is given; inside of the network, the network's dtype.
Patches of a canvas are ordered image first: item b·N + n of a patch batch is patch n of image b. Views likewise. Where
the network wants a guidance pair, the two copies of an item stand side by side, the negative one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


class Seeded(NamedTuple):
    """A permutation that is drawn by counter where it is used."""

    seeds: Tensor
    """(B,) int64: the bits of each image's 64-bit seed."""
    step: int
    per_channel: bool
    """Whether every channel of a pixel is drawn by itself, or all move together."""


Permutation = Tensor | Seeded | None
"""An explicit index int64, (N, C or 1, h, w) for all images or (B, N, C or 1, h, w); drawn by counter; or none.

permuted[n] = patches[index[n]] at each position.
"""


def gather_patches(
    canvas: Tensor,
    grid: tuple[int, int],
    permutation: Permutation = None,
    *,
    c_in: float = 1.0,
    dtype: torch.dtype | None = None,
    copies: int = 1,
) -> Tensor:
    """permute ∘ cut, as the network reads it: canvas (B, C, s_h·h, s_w·w) -> (B·N·copies, C, h, w).

    Values are multiplied with `c_in` in float32 and cast to `dtype` (the canvas's if None).
    """
    num_patches, shape = grid[0] * grid[1], (canvas.shape[1], *check_patches((canvas.shape[2], canvas.shape[3]), grid))
    check_permutation(permutation, num_patches, len(canvas), shape)
    patches = permute(cut(canvas, grid), as_index(permutation, num_patches, shape))
    return _to_network(patches, c_in, dtype or canvas.dtype, copies)


def scatter_patches(
    values: Tensor,
    grid: tuple[int, int],
    permutation: Permutation = None,
    *,
    copies: int = 1,
    guidance_scale: float = 1.0,
    canvas: Tensor | None = None,
    c_skip: float = 0.0,
    c_out: float = 1.0,
) -> Tensor:
    """relocate ∘ permute⁻¹ of what the network says: values (B·N·copies, C, h, w) -> (B, C, s_h·h, s_w·w), float32.

    Of two copies, negative + guidance_scale · (positive − negative) is taken. With a `canvas` the result is
    c_skip · canvas + c_out · values, which turns a prediction into `denoised` (Karras et al. 2022, eq. 7).
    """
    items, channels, h, w = values.shape
    num_patches, shape = grid[0] * grid[1], (channels, h, w)
    check_permutation(permutation, num_patches, check_items(items, num_patches * copies), shape)
    combined = _combine(values, copies, guidance_scale)
    patches = permute_back(combined, as_index(permutation, num_patches, shape))
    return _on_canvas(relocate(patches, grid), canvas, c_skip, c_out)


def gather_views(
    canvas: Tensor,
    origins: Tensor,
    window: tuple[int, int],
    *,
    c_in: float = 1.0,
    dtype: torch.dtype | None = None,
    copies: int = 1,
) -> Tensor:
    """`views` as the network reads them: canvas (B, C, H, W), origins (B, V, 2) -> (B·V·copies, C, *window).

    Values are multiplied with `c_in` in float32 and cast to `dtype` (the canvas's if None).
    """
    check_origins(origins, len(canvas))
    return _to_network(views(canvas, origins, window), c_in, dtype or canvas.dtype, copies)


def average_views(
    values: Tensor,
    origins: Tensor,
    size: tuple[int, int],
    *,
    weights: Tensor | None = None,
    copies: int = 1,
    guidance_scale: float = 1.0,
    canvas: Tensor | None = None,
    c_skip: float = 0.0,
    c_out: float = 1.0,
    covered: bool = False,
) -> Tensor:
    """`average` of what the network says: (B·V·copies, C, h, w), origins (B, V, 2) -> canvas (B, C, *size), float32.

    Guidance and `canvas` as in `scatter_patches`; `covered` as in `average`.
    """
    check_views(origins, (values.shape[2], values.shape[3]), size, len(values), copies, weights, covered)
    mean = average(_combine(values, copies, guidance_scale), origins, size, weights, covered=True)
    return _on_canvas(mean, canvas, c_skip, c_out)


def cut(canvas: Tensor, grid: tuple[int, int]) -> Tensor:
    """Canvas (B, C, s_h·h, s_w·w) -> interleaved patches (B·N, C, h, w), patch (i, j) being canvas[i::s_h, j::s_w]."""
    s_h, s_w = grid
    return rearrange(canvas, "b c (h i) (w j) -> (b i j) c h w", i=s_h, j=s_w)


def relocate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B·N, C, h, w) -> canvas (B, C, s_h·h, s_w·w): the inverse of `cut`."""
    s_h, s_w = grid
    return rearrange(patches, "(b i j) c h w -> b c (h i) (w j)", i=s_h, j=s_w)


def permute(patches: Tensor, index: Tensor | None) -> Tensor:
    """Exchange values between the patches of an image, at each position by its own permutation.

    patches (B·N, C, h, w) · index (B or 1, N, C or 1, h, w) int64 -> permuted[n] = patches[index[n]] at each position.
    """
    if index is None:
        return patches
    stacked = patches.unflatten(0, (-1, index.shape[1]))  # (B, N, C, h, w)
    return stacked.gather(1, index.expand(stacked.shape)).flatten(0, 1)


def permute_back(patches: Tensor, index: Tensor | None) -> Tensor:
    """The inverse of `permute` with the same index."""
    return permute(patches, None if index is None else invert(index))


def invert(index: Tensor) -> Tensor:
    """The index (B, N, C, h, w) of the inverse permutation at each position."""
    source = torch.arange(index.shape[1], device=index.device).view(1, -1, 1, 1, 1).expand(index.shape)
    return torch.empty_like(index).scatter_(1, index, source)


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four counter words of one shape -> four random words, int64 of 32 bits.

    The two words of the key broadcast against the counter's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words wraps around in int64, but its 64 bits are right: mask what the shift's sign smears.
        # The low words c1 and c3 keep what lies above them until it is masked away with the next.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD), p1
        c2, c3 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD), p0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def as_index(permutation: Permutation, num_patches: int, shape: tuple[int, int, int]) -> Tensor | None:
    """The index (B or 1, N, C or 1, h, w) of a permutation of patches of `shape` (C, h, w), or None."""
    if isinstance(permutation, Seeded):
        return permutation_index(permutation, num_patches, shape)
    return permutation[None] if permutation is not None and permutation.ndim == 4 else permutation


def permutation_index(permutation: Seeded, num_patches: int, shape: tuple[int, int, int]) -> Tensor:
    """Draw a permutation of the N patches at each position, by counter: (B, N, C or 1, h, w) for `shape` (C, h, w).

    At each position every patch gets a random 32-bit key; the rank of its key is the patch's destination (ties, one
    in 2³², go by number). Key of the generator: the image's 64-bit seed. Counter: (position, channel, step,
    patch // 4), and the word patch % 4 of the four is taken. One for all channels counts as channel 0.
    """
    channels, height, width = shape
    seeds = permutation.seeds.view(-1, 1, 1, 1)
    *counter, _ = torch.broadcast_tensors(
        torch.arange(height * width, device=seeds.device),
        torch.arange(channels if permutation.per_channel else 1, device=seeds.device).view(-1, 1),
        torch.tensor(permutation.step, device=seeds.device),
        torch.arange((num_patches + 3) // 4, device=seeds.device).view(-1, 1, 1),
        seeds,
    )
    words = torch.stack(philox(counter, (seeds & WORD, (seeds >> 32) & WORD)), dim=2)  # (B, N / 4, 4, C, h·w)
    keys = words.flatten(1, 2)[:, :num_patches].mul_(num_patches)
    keys += torch.arange(num_patches, device=seeds.device).view(-1, 1, 1)  # now no two are alike
    rank = torch.zeros_like(keys, dtype=torch.int16)
    for other in keys.unbind(1):
        rank += other[:, None] < keys
    return invert(rank.long().unflatten(3, (height, width)))


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


def average(
    values: Tensor, origins: Tensor, size: tuple[int, int], weights: Tensor | None = None, *, covered: bool = False
) -> Tensor:
    """Average what the views say of each pixel: (B·V, C, h, w), origins (B, V, 2) -> canvas (B, C, H, W).

    `weights` (h, w), positive, uniform if left out, tell how much each pixel of a view counts. What lies outside
    the canvas is dropped. Views are added in their order. ValueError where no view covers a pixel; where origins lie
    on the device, asking waits for it, and a caller who asked before says so with `covered`.
    """
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
            window_at = (slice(y + top, y + top + window[0]), slice(x + left, x + left + window[1]))
            total[b, :, *window_at] += weighted[b * num_views + v]
            share[b, :, *window_at] += weight
    inside = (slice(None), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    return total[inside] / share[inside]


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = False) -> Tensor:
    """Normalise groups of neighbouring channels (Wu and He 2018, arXiv 1803.08494), then x·sigmoid(x) where `silu`.

    x (B, C, H, W), weight and bias (C,) -> the shape of x.
    """
    check_group_norm(x, num_groups, weight, bias)
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer gated by the GELU of another (Shazeer 2020, arXiv 2002.05202), whose weights are the last half.

    x (..., K), weight (2N, K), bias (2N,) -> (..., N).
    """
    check_geglu(x, weight, bias)
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def check_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    """ValueError where groups or parameters do not fit the channels."""
    if x.ndim != 4 or x.shape[1] % num_groups or not weight.shape == bias.shape == x.shape[1:2]:
        raise ValueError(
            f"{num_groups} groups, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit an input of "
            f"{tuple(x.shape)}: pass (B, C, H, W) and two of (C,)"
        )


def check_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """ValueError where the shapes or dtypes of a gated linear layer do not go together."""
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and bias.shape == weight.shape[:1]
    if not fits or len(weight) % 2 or not x.dtype == weight.dtype == bias.dtype:
        told = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (x, weight, bias))
        raise ValueError(f"{told} are no gated linear layer: pass x (..., K), weight (2N, K), bias (2N,) of one dtype")


def check_patches(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The size (h, w) of a patch of a canvas of `size`; ValueError where the grid does not divide it."""
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(f"a grid of {grid} does not divide a canvas of {size}: pad it first")
    return size[0] // grid[0], size[1] // grid[1]


def check_items(items: int, each: int) -> int:
    """How many images `items` make at `each` of them for an image; ValueError where it is no whole number."""
    if items % each:
        raise ValueError(f"{items} items are no whole number of images of {each} each")
    return items // each


def check_permutation(permutation: Permutation, num_patches: int, batch: int, shape: tuple[int, int, int]) -> None:
    """ValueError where a permutation does not fit patches of `shape` (C, h, w)."""
    if isinstance(permutation, Seeded):
        if permutation.seeds.shape != (batch,) or permutation.seeds.dtype != torch.int64:
            raise ValueError(
                f"seeds {tuple(permutation.seeds.shape)} of {permutation.seeds.dtype} do not fit {batch} images: "
                f"pass int64 ({batch},)"
            )
    elif permutation is not None and not (
        permutation.dtype == torch.int64
        and permutation.ndim in (4, 5)
        and permutation.shape[:-4] in ((), (1,), (batch,))
        and permutation.shape[-4] == num_patches
        and permutation.shape[-3] in (1, shape[0])
        and permutation.shape[-2:] == shape[1:]
    ):
        raise ValueError(
            f"a permutation {tuple(permutation.shape)} of {permutation.dtype} does not fit {num_patches} patches of "
            f"shape {shape}: pass int64 (N, C or 1, h, w), or one for each image"
        )


def check_views(
    origins: Tensor,
    window: tuple[int, int],
    size: tuple[int, int],
    items: int,
    copies: int,
    weights: Tensor | None,
    covered: bool,
) -> None:
    """ValueError where origins, items or weights do not fit, or, unless that is known, a pixel is not covered."""
    check_origins(origins, len(origins))
    if items != origins.shape[0] * origins.shape[1] * copies:
        raise ValueError(f"{items} items in {copies} copies do not fit origins (B, V, 2) of {tuple(origins.shape)}")
    if weights is not None and weights.shape != window:
        raise ValueError(f"weights of {tuple(weights.shape)} do not fit views of {window}")
    if not covered:
        check_cover(origins, window, size)


def check_origins(origins: Tensor, batch: int) -> None:
    """ValueError where origins are not (B, V, 2) int64 for `batch` images."""
    if origins.ndim != 3 or origins.shape[0] != batch or origins.shape[2] != 2 or origins.dtype != torch.int64:
        raise ValueError(
            f"origins {tuple(origins.shape)} of {origins.dtype} do not fit {batch} images: pass int64 ({batch}, V, 2)"
        )


def check_canvas(canvas: Tensor | None, shape: Sequence[int]) -> None:
    """ValueError where a canvas does not have the shape of what is laid on it."""
    if canvas is not None and canvas.shape != shape:
        raise ValueError(f"a canvas of {tuple(canvas.shape)} does not fit a result of {tuple(shape)}")


def check_cover(origins: Tensor, window: tuple[int, int], size: tuple[int, int]) -> None:
    """ValueError where views of `window` at origins (B, V, 2) leave a pixel of the canvas uncovered."""
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


def _to_network(items: Tensor, c_in: float, dtype: torch.dtype, copies: int) -> Tensor:
    return (_wide(items) * c_in).to(dtype).repeat_interleave(copies, dim=0)


def _combine(values: Tensor, copies: int, guidance_scale: float) -> Tensor:
    """Undo the pair: (items·copies, C, h, w) -> (items, C, h, w), at least float32."""
    if copies == 1:
        return _wide(values)
    negative, positive = _wide(values).unflatten(0, (-1, 2)).unbind(1)
    return negative + guidance_scale * (positive - negative)


def _on_canvas(values: Tensor, canvas: Tensor | None, c_skip: float, c_out: float) -> Tensor:
    check_canvas(canvas, values.shape)
    return values if canvas is None else c_skip * _wide(canvas) + c_out * values


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _margin(origins: Tensor, window: tuple[int, int], size: torch.Size | tuple[int, ...]) -> tuple[int, int, int, int]:
    """How far views reach past the canvas: top, bottom, left, right."""
    low, high = origins.flatten(0, 1).amin(0).tolist(), origins.flatten(0, 1).amax(0).tolist()
    return (
        max(0, -low[0]),
        max(0, high[0] + window[0] - size[0]),
        max(0, -low[1]),
        max(0, high[1] + window[1] - size[1]),
    )
