"""Triton kernels between the canvas and overlapping views: a gather with a frame of zeros, and the average back.

Both work on tiles of rows and columns, so that reads and writes run along rows. The average asks of every pixel which
views cover it and adds them in their order: no atomics, the same bits in every run. The references of the same names
in `reference.py` say what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutdiff_kernels.checks import check_canvas, check_flag, check_origins, check_views
from cutdiff_kernels.launch import ROUNDING, output, store_flag

TILE = 1024
"""The pixels of a tile, two to eight for each of its 128 threads."""
WIDEST = 128
"""The most columns of a tile."""


@triton.jit
def tile_of(planes, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's plane, and the first row and column of its tile: planes go through a tile side by side."""
    plane, tile = tl.program_id(0) % planes, tl.program_id(0) // planes
    tiles = tl.cdiv(size[1], COLUMNS)
    return plane, tile // tiles * ROWS, tile % tiles * COLUMNS


@triton.jit
def gather_kernel(
    canvas, out, origins, c_in, strides, planes, channels, num_views, size, window,
    COPIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """canvas (B, C, H, W), any strides · origins (B, V, 2) -> out (B·V·COPIES, C, h, w), contiguous."""
    plane, first_row, first_column = tile_of(planes, window, ROWS, COLUMNS)
    item, channel = plane // channels, plane % channels
    y = first_row + tl.arange(0, ROWS)[:, None]
    x = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (y < window[0]) & (x < window[1])

    row = tl.load(origins + 2 * item).to(tl.int32) + y
    column = tl.load(origins + 2 * item + 1).to(tl.int32) + x
    on_canvas = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    stride_b, stride_c, stride_y, stride_x = strides
    source = canvas + (item // num_views).to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    source += row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
    values = tl.load(source, mask=inside & on_canvas, other=0.0)
    values = (values.to(tl.float32) * c_in).to(out.dtype.element_ty)  # (ROWS, COLUMNS)

    for copy in tl.static_range(COPIES):
        first = ((item.to(tl.int64) * COPIES + copy) * channels + channel) * window[0] * window[1]
        tl.store(out + first + y * window[1] + x, values, mask=inside)


@triton.jit(do_not_specialize=["flag"])
def average_kernel(
    values, out, origins, weights, canvas, flag, guidance_scale, c_skip, c_out, strides, canvas_strides,
    planes, channels, size, window, NUM_VIEWS: tl.constexpr, COPIES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_CANVAS: tl.constexpr, HAS_FLAG: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """values (B·V·COPIES, C, h, w), any strides · origins (B, V, 2) -> out (B, C, H, W), contiguous, float32."""
    plane, first_row, first_column = tile_of(planes, size, ROWS, COLUMNS)
    image, channel = plane // channels, plane % channels
    y = first_row + tl.arange(0, ROWS)[:, None]
    x = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (y < size[0]) & (x < size[1])

    stride_n, stride_c, stride_y, stride_x = strides
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    share = tl.zeros((ROWS, COLUMNS), tl.float32)
    for view in range(NUM_VIEWS):
        item = image * NUM_VIEWS + view
        top = tl.load(origins + 2 * item).to(tl.int32)
        left = tl.load(origins + 2 * item + 1).to(tl.int32)
        below, right = top + window[0], left + window[1]
        if (first_row < below) & (first_row + ROWS > top) & (first_column < right) & (first_column + COLUMNS > left):
            covered = inside & (y >= top) & (y < below) & (x >= left) & (x < right)
            source = values + item.to(tl.int64) * COPIES * stride_n + channel.to(tl.int64) * stride_c
            source += (y - top).to(tl.int64) * stride_y + (x - left).to(tl.int64) * stride_x
            combined = tl.load(source, mask=covered, other=0.0).to(tl.float32)
            if COPIES == 2:
                positive = tl.load(source + stride_n, mask=covered, other=0.0).to(tl.float32)
                combined += guidance_scale * (positive - combined)
            if HAS_WEIGHTS:
                weight = tl.load(weights + (y - top) * window[1] + (x - left), mask=covered, other=0.0)
                total += combined * weight
                share += weight
            else:
                total += combined
                share += covered.to(tl.float32)

    mean = tl.div_rn(total, tl.where(inside, share, 1.0))
    if HAS_CANVAS:
        stride_b, stride_c, stride_y, stride_x = canvas_strides
        base = canvas + image.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
        base += y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        mean = c_skip * tl.load(base, mask=inside, other=0.0).to(tl.float32) + c_out * mean
    tl.store(out + plane.to(tl.int64) * size[0] * size[1] + y * size[1] + x, mean, mask=inside)
    if HAS_FLAG:
        store_flag(flag, mean)


def gather_views(
    canvas: Tensor,
    origins: Tensor,
    window: tuple[int, int],
    *,
    c_in: float = 1.0,
    dtype: torch.dtype | None = None,
    copies: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.gather_views` in one launch. `out`, contiguous, is written and returned if given."""
    batch, channels, height, width = canvas.shape
    check_origins(origins, batch)
    num_views = origins.shape[1]
    shape = (batch * num_views * copies, channels, *window)
    out = output(out, shape, dtype or canvas.dtype, canvas)
    tile, num_tiles = _tiles(window)
    with torch.cuda.device_of(canvas):
        planes = batch * num_views * channels
        gather_kernel[(planes * num_tiles,)](
            canvas, out, origins.to(canvas.device).contiguous(), float(c_in), canvas.stride(),
            planes, channels, num_views, (height, width), window, COPIES=copies, **tile, **ROUNDING,
        )  # fmt: skip
    return out


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
    out: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:
    """`reference.average_views` in one launch. `out`, contiguous float32, is written and returned if given.

    `flag` is that of `launch.store_flag`.
    """
    check_flag(flag)
    items, channels, *window = values.shape
    batch, num_views = origins.shape[:2]
    check_views(origins, (window[0], window[1]), size, items, copies, weights, covered)
    out = output(out, (batch, channels, *size), torch.float32, values)
    check_canvas(canvas, out.shape)
    base = out if canvas is None else canvas
    shares = out if weights is None else weights.to(values.device, torch.float32).contiguous()
    tile, num_tiles = _tiles(size)
    with torch.cuda.device_of(values):
        average_kernel[(batch * channels * num_tiles,)](
            values, out, origins.to(values.device).contiguous(), shares, base,
            out if flag is None else flag, float(guidance_scale), float(c_skip), float(c_out),
            values.stride(), base.stride(), batch * channels, channels, size, tuple(window),
            NUM_VIEWS=num_views, COPIES=copies, HAS_WEIGHTS=weights is not None, HAS_CANVAS=canvas is not None,
            HAS_FLAG=flag is not None, **tile, **ROUNDING,
        )  # fmt: skip
    return out


def _tiles(size: tuple[int, int]) -> tuple[dict[str, int], int]:
    """Return the shape of a tile, and how many tiles cover `size`."""
    columns = min(WIDEST, triton.next_power_of_2(size[1]))
    rows = min(TILE // columns, triton.next_power_of_2(size[0]))
    return {"ROWS": rows, "COLUMNS": columns}, triton.cdiv(size[0], rows) * triton.cdiv(size[1], columns)
