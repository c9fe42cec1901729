"""Triton kernels inside of the network: a group norm with its SiLU, and a linear layer gated by the GELU of another.

The norm reads feature maps as they lie in channels_last, where torch's norm, on a GPU, first makes a copy that lies
channel by channel. The gate is applied in the epilogue of the product, which never goes to memory. Both compute in
float32 what torch rounds in between. The references of the same names in `reference_network.py` say what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from cutdiff_kernels.launch import FUSION, architecture, multiprocessors, output
from cutdiff_kernels.reference_network import check_geglu, check_group_norm

NORM_TILE = {"ROWS": 128, "COLUMNS": 64}
"""The positions and channels of a tile; 64 channels in 16 bits are one line of the cache."""
NORM_OPTIONS = FUSION | {"num_warps": 8}
CHUNKS = 64
"""The number of tiles whose statistics are read at once."""
GROUP = 8
"""The number of row tiles that go through the same columns side by side, so that weights come from the cache."""


@triton.jit
def norm_tile(num_positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's columns (1, COLUMNS), the masks of columns and of values, and their places in (B, P, C)."""
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    known = column < channels
    return column, known, (row < num_positions) & known, (image * num_positions + row) * channels + column


@triton.jit
def norm_stats_kernel(x, stats, num_positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (B, P, C), contiguous -> stats (B, tiles, 2, C): the mean of a tile's rows, and the squares around it."""
    image, tile = tl.program_id(2), tl.program_id(1)
    column, known, inside, place = norm_tile(num_positions, channels, ROWS, COLUMNS)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(num_positions - tile * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(values, axis=0)[None, :] / count
    centred = tl.where(inside, values - mean, 0.0)
    target = stats + (image.to(tl.int64) * tl.num_programs(1) + tile) * 2 * channels + column
    tl.store(target, mean, mask=known)
    tl.store(target + channels, tl.sum(centred * centred, axis=0)[None, :], mask=known)


@triton.jit
def norm_chunk(tile, inside, num_positions, num_tiles, ROWS: tl.constexpr):
    """Return which statistics of the tiles (CHUNKS, 1) exist, and how many rows each tile has."""
    return inside & (tile < num_tiles), tl.minimum(num_positions - tile * ROWS, ROWS).to(tl.float32)


@triton.jit
def norm_fold_kernel(
    stats, weight, scaling, num_positions, channels, num_tiles, eps,
    GROUP_CHANNELS: tl.constexpr, PADDED: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """stats of one group of one image -> scaling (B, 2, C): the group's mean, and the factor of each channel."""
    image = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, PADDED)[None, :] < GROUP_CHANNELS
    channel = tl.program_id(1) * GROUP_CHANNELS + tl.arange(0, PADDED)[None, :]
    chunk = tl.arange(0, CHUNKS)[:, None]
    base = stats + image * num_tiles * 2 * channels + channel
    numbers = num_positions * (GROUP_CHANNELS * 1.0)

    total = tl.zeros((CHUNKS, PADDED), tl.float32)
    for first in range(0, num_tiles, CHUNKS):
        tile = first + chunk
        here, count = norm_chunk(tile, inside, num_positions, num_tiles, ROWS)
        total += tl.where(here, count * tl.load(base + tile * 2 * channels, mask=here, other=0.0), 0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / numbers

    square = tl.zeros((CHUNKS, PADDED), tl.float32)
    for first in range(0, num_tiles, CHUNKS):
        tile = first + chunk
        here, count = norm_chunk(tile, inside, num_positions, num_tiles, ROWS)
        source = base + tile * 2 * channels
        off = tl.load(source, mask=here, other=0.0) - mean
        square += tl.where(here, tl.load(source + channels, mask=here, other=0.0) + count * off * off, 0.0)
    variance = tl.sum(tl.sum(square, axis=1), axis=0) / numbers

    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + eps)
    target = scaling + image * 2 * channels + channel
    tl.store(target, tl.broadcast_to(mean, scale.shape), mask=inside)
    tl.store(target + channels, scale, mask=inside)


@triton.jit
def norm_apply_kernel(
    x, scaling, bias, out, num_positions, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """x (B, P, C), contiguous · scaling (B, 2, C) · bias (C,) -> out (B, P, C), contiguous."""
    image = tl.program_id(2).to(tl.int64)
    column, known, inside, place = norm_tile(num_positions, channels, ROWS, COLUMNS)
    mean = tl.load(scaling + image * 2 * channels + column, mask=known, other=0.0)
    scale = tl.load(scaling + image * 2 * channels + channels + column, mask=known, other=0.0)
    shift = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    values = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * scale + shift
    if SILU:
        values = values / (1 + tl.exp(-values))
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_at(
    tile, x, weight, bias, out, num_rows, num_out, num_in,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute one tile of `geglu_kernel`."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_out, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    first_row = (first + within % height) * BLOCK_M
    first_column = within // height * BLOCK_N
    row, column, k = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        # Past the last row and column of a descriptor there are zeros, past those of the values there are gates.
        for start in range(0, num_in, BLOCK_K):
            rows = x.load([first_row, start])
            values, gates = weight.load([first_column, start]), weight.load([num_out + first_column, start])
            value = tl.dot(rows, values.T, value, input_precision=PRECISION)
            gate = tl.dot(rows, gates.T, gate, input_precision=PRECISION)
    else:
        # Past the last row and column the first ones are read again, and their products are not written.
        from_x = x + (row % num_rows).to(tl.int64)[:, None] * num_in + k[None, :]
        from_value = weight + (column % num_out).to(tl.int64)[None, :] * num_in + k[:, None]
        from_gate = weight + (column % num_out + num_out).to(tl.int64)[None, :] * num_in + k[:, None]
        for start in range(0, num_in, BLOCK_K):
            if EVEN_K:
                rows, values, gates = tl.load(from_x), tl.load(from_value), tl.load(from_gate)
            else:
                there = k < num_in - start
                rows = tl.load(from_x, mask=there[None, :], other=0.0)
                values = tl.load(from_value, mask=there[:, None], other=0.0)
                gates = tl.load(from_gate, mask=there[:, None], other=0.0)
            value = tl.dot(rows, values, value, input_precision=PRECISION)
            gate = tl.dot(rows, gates, gate, input_precision=PRECISION)
            from_x += BLOCK_K
            from_value += BLOCK_K
            from_gate += BLOCK_K

    inside = column < num_out
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + num_out + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    gated = value * 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    target = out + row.to(tl.int64)[:, None] * num_out + column[None, :]
    tl.store(target, gated.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & inside[None, :])


@triton.jit
def geglu_kernel(
    x, weight, bias, out, num_rows, num_out, num_in,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """x (M, K) · weight (2N, K) · bias (2N,), contiguous -> out (M, N), contiguous; the last N of 2N are the gate.

    With TMA, x and weight are descriptors of blocks. A persistent program computes one tile after the other.
    """
    if PERSISTENT:
        tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_out, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            geglu_at(
                tile, x, weight, bias, out, num_rows, num_out, num_in,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, GROUP, TMA,
            )  # fmt: skip
    else:
        geglu_at(
            tl.program_id(0), x, weight, bias, out, num_rows, num_out, num_in,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, GROUP, TMA,
        )  # fmt: skip


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.group_norm` in three launches, which read x twice and write once: (B, C, H, W) -> the same shape.

    The result lies in channels_last, and x is copied to it where it lies otherwise. `out` (B, H, W, C), contiguous, is
    written if given.
    """
    check_group_norm(x, num_groups, weight, bias)
    rows = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C): no copy where x lies so
    weight, bias = weight.contiguous(), bias.contiguous()
    out = output(out, tuple(rows.shape), x.dtype, rows, weight, bias)
    batch, channels, num_positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
    num_tiles, columns = (triton.cdiv(n, b) for n, b in zip((num_positions, channels), NORM_TILE.values(), strict=True))
    stats = torch.empty(batch, num_tiles, 2, channels, dtype=torch.float32, device=x.device)
    scaling = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    group = channels // num_groups
    tiles = (columns, num_tiles, batch)  # neighbours read the same lines of memory
    with torch.cuda.device_of(x):
        norm_stats_kernel[tiles](rows, stats, num_positions, channels, **NORM_TILE, **NORM_OPTIONS)
        norm_fold_kernel[(batch, num_groups)](
            stats, weight, scaling, num_positions, channels, num_tiles, eps, GROUP_CHANNELS=group,
            PADDED=triton.next_power_of_2(group), CHUNKS=CHUNKS, ROWS=NORM_TILE["ROWS"], **FUSION,
        )  # fmt: skip
        norm_apply_kernel[tiles](
            rows, scaling, bias, out, num_positions, channels, SILU=silu, **NORM_TILE, **NORM_OPTIONS
        )
    return out.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Variant:
    """A way to compute the gated product in 16 bits on sm_90."""

    stages: int = 3
    """The number of tiles in shared memory, all but one of them on their way."""
    tma: bool = False
    """Load through tensor descriptors."""
    persistent: bool = False
    """Start one program on each multiprocessor, which computes one tile after the other."""


VARIANTS = {
    "cp.async": Variant(),
    "4 stages": Variant(stages=4),
    "persistent": Variant(persistent=True),
    "tma": Variant(tma=True),
    "tma 4 stages": Variant(tma=True, stages=4),
    "tma persistent": Variant(tma=True, persistent=True),
}


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *, variant: str = "cp.async", out: Tensor | None = None) -> Tensor:
    """`reference.geglu` in one launch: x (..., K), weight (2N, K), bias (2N,) -> (..., N).

    `variant` is one of `VARIANTS`; those with TMA take inputs whose rows are multiples of 16 bytes. `out`, contiguous,
    is written and returned if given.
    """
    check_geglu(x, weight, bias)
    num_in, num_out = weight.shape[1], weight.shape[0] // 2
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    how = VARIANTS[variant]
    if how.tma and num_in * x.itemsize % 16:
        raise ValueError(f"variant {variant!r} needs rows of a multiple of 16 bytes, and {num_in} of {x.dtype} are not")
    out = output(out, (*x.shape[:-1], num_out), x.dtype, x, weight, bias)
    num_rows = x.numel() // num_in
    with torch.cuda.device_of(x):
        constants, options = geglu_tile(x.dtype, architecture(), how.stages)
        programs = triton.cdiv(num_rows, constants["BLOCK_M"]) * triton.cdiv(num_out, constants["BLOCK_N"])
        if how.persistent:
            programs = min(programs, multiprocessors(x.device))
        rows: Any = x.contiguous().view(num_rows, num_in)
        gates: Any = weight.contiguous()
        if how.tma:
            rows = TensorDescriptor.from_tensor(rows, [constants["BLOCK_M"], constants["BLOCK_K"]])
            gates = TensorDescriptor.from_tensor(gates, [constants["BLOCK_N"], constants["BLOCK_K"]])
        geglu_kernel[(programs,)](
            rows, gates, bias.contiguous(), out, num_rows, num_out, num_in,
            EVEN_K=num_in % constants["BLOCK_K"] == 0, TMA=how.tma, PERSISTENT=how.persistent,
            **constants, **options,
        )  # fmt: skip
    return out


def geglu_tile(dtype: torch.dtype, target: GPUTarget | None, stages: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the compile-time constants and launch options of the gated product.

    Two accumulators of 128×128 in float32 take half of the registers of eight warps; Ampere's fragments would take
    more, so tiles are narrower there. The stages that are loaded ahead must fit into shared memory: 48 kB each in 16
    bits, of the 227 kB of sm_90 and the 64 kB of gfx942. Products in float32 are exact, not TF32.
    """
    hip = target is not None and target.backend == "hip"
    hopper = target is not None and not hip and int(target.arch) // 10 in (9, 10)  # with as much shared memory
    if dtype == torch.float32:
        constants: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PRECISION": "ieee"}
    else:
        columns = 128 if hopper or hip else 64
        constants = {"BLOCK_M": 128, "BLOCK_N": columns, "BLOCK_K": 64, "PRECISION": "tf32"}  # 16 bits do not read it
    return constants | {"GROUP": GROUP}, FUSION | {"num_warps": 8, "num_stages": 2 if hip else stages}
