"""Triton kernels between the canvas and the interleaved patches: permute ∘ cut, and relocate ∘ permute⁻¹.

Both work on one tile of (positions, patches). The permutation of a tile is a one-hot matrix for each position, in
registers, drawn there or read from an index; the gather multiplies with it, the scatter with its transpose. Values
travel through it as bits, so that every copy is exact. The references of the same names in `reference.py` say what is
computed. The kernels trust an explicit index: `operators.Patches` and the references check that it is a permutation,
and a check here would wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutdiff_kernels.checks import check_canvas, check_copies, check_flag, check_items, check_patches
from cutdiff_kernels.launch import ROUNDING, output, store_flag
from cutdiff_kernels.permutations import Permutation, SeededPermutation, check_permutation, seed_bits

NONE, SEEDED, INDEX = 0, 1, 2
"""The sources that a permutation comes from."""
MAX_PATCHES = 64
TILE = 512
"""The number of values of a tile, positions times patches."""


@triton.jit
def seeded_keys(seed, step, channel, position, NUM_PATCHES: tl.constexpr, PADDED: tl.constexpr):
    """Draw keys (BLOCK, PADDED), int64, no two alike at a position; those of the padding are above all others."""
    group = tl.arange(0, PADDED // 4)
    w0, w1, w2, w3 = tl.philox(seed, position[:, None], channel, step, group[None, :])  # (BLOCK, PADDED / 4) each
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(position.shape[0], PADDED)  # word k of group g at 4g + k
    patch = tl.arange(0, PADDED)[None, :]
    return tl.where(patch < NUM_PATCHES, words.to(tl.int64), 1 << 32) * PADDED + patch


@triton.jit
def one_hot(
    permutation, step, image, channel, position, inside, index_strides, width,
    NUM_PATCHES: tl.constexpr, PADDED: tl.constexpr, SOURCE: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK, PADDED, PADDED), true where patch m goes to place n at a position."""
    place = tl.arange(0, PADDED)
    drawn = channel if PER_CHANNEL else channel * 0
    if SOURCE == 1:
        keys = seeded_keys(tl.load(permutation + image), step, drawn, position, NUM_PATCHES, PADDED)
        rank = tl.sum((keys[:, None, :] < keys[:, :, None]).to(tl.int32), axis=2)
        return rank[:, :, None] == place[None, None, :]
    stride_b, stride_n, stride_c, stride_y, stride_x = index_strides
    offset = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    base = permutation + image.to(tl.int64) * stride_b + drawn.to(tl.int64) * stride_c
    mask = inside[:, None] & (place[None, :] < NUM_PATCHES)
    index = tl.load(base + place.to(tl.int64)[None, :] * stride_n + offset[:, None], mask=mask, other=-1).to(tl.int32)
    return index[:, None, :] == place[None, :, None]


@triton.jit
def tile_of(planes, channels, positions, NUM_PATCHES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's image and channel, its positions (BLOCK,) and which of them exist, its patches (PADDED,), and
    the mask (BLOCK, PADDED)."""
    plane, position = tl.program_id(0) % planes, tl.program_id(0) // planes * BLOCK + tl.arange(0, BLOCK)
    image, channel = plane // channels, plane % channels
    patch = tl.arange(0, PADDED)
    inside = position < positions
    return image, channel, position, inside, patch, inside[:, None] & (patch < NUM_PATCHES)[None, :]


@triton.jit
def places_of(position, patch, width, GRID_W: tl.constexpr, NUM_PATCHES: tl.constexpr):
    """Return the rows and columns (BLOCK, PADDED) that positions (BLOCK,) of patches (PADDED,) have on the canvas."""
    rows = (position // width)[:, None] * (NUM_PATCHES // GRID_W) + (patch // GRID_W)[None, :]
    return rows, (position % width)[:, None] * GRID_W + (patch % GRID_W)[None, :]


@triton.jit(do_not_specialize=["step"])
def gather_kernel(
    canvas, out, permutation, step, c_in, strides, index_strides, planes, channels, width, positions,
    GRID_W: tl.constexpr, NUM_PATCHES: tl.constexpr, PADDED: tl.constexpr, SOURCE: tl.constexpr,
    PER_CHANNEL: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """canvas (B, C, s_h·h, s_w·w), any strides -> out (B·N·COPIES, C, h, w), contiguous."""
    image, channel, position, inside, patch, mask = tile_of(planes, channels, positions, NUM_PATCHES, PADDED, BLOCK)
    rows, columns = places_of(position, patch, width, GRID_W, NUM_PATCHES)
    stride_b, stride_c, stride_y, stride_x = strides
    source = canvas + image.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    source += rows.to(tl.int64) * stride_y + columns.to(tl.int64) * stride_x
    values = (tl.load(source, mask=mask, other=0.0).to(tl.float32) * c_in).to(out.dtype.element_ty)  # (BLOCK, PADDED)

    if SOURCE != 0:
        size: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
        bits = values.to(tl.int32 if size == 32 else tl.int16, bitcast=True)
        chosen = one_hot(
            permutation, step, image, channel, position, inside, index_strides, width,
            NUM_PATCHES, PADDED, SOURCE, PER_CHANNEL,
        )  # fmt: skip
        moved = tl.sum(tl.where(chosen, bits.to(tl.int32)[:, :, None], 0), axis=1)
        values = moved.to(bits.dtype).to(out.dtype.element_ty, bitcast=True)

    for copy in tl.static_range(COPIES):
        item = (image.to(tl.int64) * NUM_PATCHES + patch) * COPIES + copy
        tl.store(out + (item[None, :] * channels + channel) * positions + position[:, None], values, mask=mask)


@triton.jit(do_not_specialize=["step", "flag"])
def scatter_kernel(
    values, out, permutation, canvas, flag, step, guidance_scale, c_skip, c_out,
    strides, canvas_strides, index_strides, planes, channels, width, positions,
    GRID_W: tl.constexpr, NUM_PATCHES: tl.constexpr, PADDED: tl.constexpr, SOURCE: tl.constexpr,
    PER_CHANNEL: tl.constexpr, COPIES: tl.constexpr, HAS_CANVAS: tl.constexpr, HAS_FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """values (B·N·COPIES, C, h, w), any strides -> out (B, C, s_h·h, s_w·w), contiguous, float32."""
    image, channel, position, inside, patch, mask = tile_of(planes, channels, positions, NUM_PATCHES, PADDED, BLOCK)
    stride_n, stride_c, stride_y, stride_x = strides
    item = (image.to(tl.int64) * NUM_PATCHES + patch) * COPIES
    offset = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    source = values + item[None, :] * stride_n + channel.to(tl.int64) * stride_c + offset[:, None]
    combined = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # (BLOCK, PADDED)
    if COPIES == 2:
        positive = tl.load(source + stride_n, mask=mask, other=0.0).to(tl.float32)
        combined = combined + guidance_scale * (positive - combined)

    if SOURCE != 0:
        chosen = one_hot(
            permutation, step, image, channel, position, inside, index_strides, width,
            NUM_PATCHES, PADDED, SOURCE, PER_CHANNEL,
        )  # fmt: skip
        bits = combined.to(tl.int32, bitcast=True)
        combined = tl.sum(tl.where(chosen, bits[:, None, :], 0), axis=2).to(tl.float32, bitcast=True)

    rows, columns = places_of(position, patch, width, GRID_W, NUM_PATCHES)
    if HAS_CANVAS:
        stride_b, stride_c, stride_y, stride_x = canvas_strides
        base = canvas + image.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
        base += rows.to(tl.int64) * stride_y + columns.to(tl.int64) * stride_x
        combined = c_skip * tl.load(base, mask=mask, other=0.0).to(tl.float32) + c_out * combined
    first = (image.to(tl.int64) * channels + channel) * positions * NUM_PATCHES
    tl.store(out + first + rows * (width * GRID_W) + columns, combined, mask=mask)
    if HAS_FLAG:
        store_flag(flag, combined)


def gather_patches(
    canvas: Tensor,
    grid: tuple[int, int],
    permutation: Permutation = None,
    *,
    c_in: float = 1.0,
    dtype: torch.dtype | None = None,
    copies: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.gather_patches` in one launch. `out`, contiguous, is written and returned if given.

    An explicit index is trusted to be a permutation: `operators.Patches` checks it when it is made.
    """
    batch, channels, height, width = canvas.shape
    h, w = check_patches((height, width), grid)
    num_patches = grid[0] * grid[1]
    check_permutation(permutation, num_patches, batch, (channels, h, w))
    shape = (batch * num_patches * copies, channels, h, w)
    out = output(out, shape, dtype or canvas.dtype, canvas)
    launch, chosen = _plan(batch, channels, h * w, grid, permutation)
    source, step, index_strides = _arguments(permutation, out)
    with torch.cuda.device_of(canvas):
        gather_kernel[launch](
            canvas, out, source, step, float(c_in), canvas.stride(), index_strides,
            batch * channels, channels, w, h * w,
            **chosen, COPIES=copies,
        )  # fmt: skip
    return out


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
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    """`reference.scatter_patches` in one launch. `out`, contiguous float32, is written and returned if given.

    An explicit index is trusted as in `gather_patches`. `flag` is that of `launch.store_flag`.
    """
    check_copies(copies)
    check_flag(flag)
    items, channels, h, w = values.shape
    num_patches = grid[0] * grid[1]
    batch = check_items(items, num_patches * copies)
    check_permutation(permutation, num_patches, batch, (channels, h, w))
    out = output(out, (batch, channels, grid[0] * h, grid[1] * w), torch.float32, values)
    check_canvas(canvas, out.shape)
    base = out if canvas is None else canvas
    launch, chosen = _plan(batch, channels, h * w, grid, permutation)
    source, step, index_strides = _arguments(permutation, out)
    with torch.cuda.device_of(values):
        scatter_kernel[launch](
            values, out, source, base, out if flag is None else flag, step,
            float(guidance_scale), float(c_skip), float(c_out),
            values.stride(), base.stride(), index_strides, batch * channels, channels, w, h * w,
            **chosen, COPIES=copies, HAS_CANVAS=canvas is not None, HAS_FLAG=flag is not None,
        )  # fmt: skip
    return out


def padded(grid: tuple[int, int]) -> int:
    """Return the number of patches, rounded up to a power of two; ValueError where it is too large."""
    num_patches = grid[0] * grid[1]
    if num_patches > MAX_PATCHES:
        raise ValueError(f"a grid of {grid} has {num_patches} patches, the Triton kernels take up to {MAX_PATCHES}")
    return max(4, triton.next_power_of_2(num_patches))


def constants(positions: int, grid: tuple[int, int], source: int, per_channel: bool) -> dict[str, int | bool]:
    """Return the compile-time constants that both kernels share."""
    return {
        "GRID_W": grid[1],
        "NUM_PATCHES": grid[0] * grid[1],
        "PADDED": padded(grid),
        "SOURCE": source,
        "PER_CHANNEL": per_channel,
        "BLOCK": min(TILE // padded(grid), triton.next_power_of_2(positions)),
    }


def options(padded: int) -> dict[str, int | bool]:
    """Return launch options whose threads hold a tile's one-hot matrices, TILE·PADDED entries, in registers."""
    return ROUNDING | {"num_warps": min(16, max(4, padded // 2))}


def _plan(
    batch: int, channels: int, positions: int, grid: tuple[int, int], permutation: Permutation
) -> tuple[tuple[int], dict[str, int | bool]]:
    """Return the launch grid, in which planes go through a tile side by side, and the compile-time options."""
    source, per_channel = NONE, False
    if isinstance(permutation, SeededPermutation):
        source, per_channel = (NONE if permutation.grain == "none" else SEEDED), permutation.grain == "channel"
    elif permutation is not None:
        source, per_channel = INDEX, permutation.shape[-3] > 1
    chosen = constants(positions, grid, source, per_channel)
    return (batch * channels * triton.cdiv(positions, chosen["BLOCK"]),), chosen | options(chosen["PADDED"])


def _arguments(permutation: Permutation, unused: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    """Return the kernels' permutation pointer, step and index strides, with `unused` and zeros for what is not read."""
    if permutation is None:
        return unused, 0, (0,) * 5
    if isinstance(permutation, SeededPermutation):
        return seed_bits(permutation.seeds, unused.device), permutation.step, (0,) * 5
    index = permutation if permutation.ndim == 5 else permutation[None]
    strides = index.stride() if len(index) > 1 else (0, *index.stride()[1:])
    return index, 0, strides
