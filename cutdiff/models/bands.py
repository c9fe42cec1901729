"""A convolutional network over a picture of any size, computed in bands of rows: the result is that of the whole.

`in_bands(network, x)` calls the network's own `forward` on a `Banded` picture, which each torch function turns into
another one: a convolution asks its input for a halo of rows, a group norm passes over all of its input once for the
statistics. There are no tiles that could leave seams, and there is no second description of the network.

Memory: in an SDXL decoder at 4096² in 16 bits, the 256 channels that enter the last level would take 8.6 GB at full
size, and 128 channels take 4.3 GB. A picture whose statistics are taken is kept if it is small (`kept_bytes`) and
computed anew in each pass if it is not: the upsampled input and the first convolution of each block are. A sum is
always kept, in the place of its left term if that was kept. So at most 128 channels of the full size and 256 of half
the size live at once, 192 values for each pixel or 6.4 GB, and a few bands: 7.1 GB with the weights.

Ranks share the bands of every pass, and each gets the rows of a kept picture that the others computed: the pictures
are those of one process, to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.parallel.ranks import ALONE, Ranks

KEPT_BYTES = 2 << 30
CPU_BAND_BYTES = 4 << 20  # a core's cache holds a few of these, and malloc reuses them without new pages
GPU_BAND_BYTES = 64 << 20  # enough pixels to keep a GPU busy

Rows = Callable[[int, int], Tensor]
"""(top, bottom) -> the rows of a picture from `top` up to and without `bottom`: (B, C, bottom - top, W)."""


@dataclass(frozen=True)
class Limits:
    """The memory that bands may take, and the processes that share them."""

    band_bytes: int
    """The size of a band, which has at least one row however large that is."""
    kept_bytes: int = KEPT_BYTES
    """The size of the largest picture that is kept after its statistics were taken."""
    ranks: Ranks = ALONE
    """The processes that share the bands."""

    @staticmethod
    def on(device: torch.device, ranks: Ranks = ALONE) -> Limits:
        """Bands that are large enough to keep the device busy."""
        return Limits(CPU_BAND_BYTES if device.type == "cpu" else GPU_BAND_BYTES, ranks=ranks)


@torch.no_grad()
def in_bands(network: Callable[[Tensor], Tensor], x: Tensor, limits: Limits | None = None) -> Tensor:
    """`network(x)`, to rounding, for pictures x (B, C, H, W); without gradients.

    The network may call the `FUNCTIONS` below and add pictures, if the sum is the last to read its left term. Raises
    NotImplementedError where it calls another function of torch. A `Banded` has no other operators and methods.
    """
    picture = Banded(x.shape, x.dtype, x.device, limits or Limits.on(x.device), _rows_of(x))
    return cast(Banded, network(cast(Tensor, picture))).whole().contiguous()


class Banded:
    """A picture (B, C, H, W) whose rows are computed whenever they are asked for, until it is kept."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, limits: Limits, rows: Rows
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.limits = limits
        self.rows = rows
        self.widest = self.num_bytes  # the size of the largest picture that its rows are computed from
        self.kept: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Banded:
        if function not in FUNCTIONS:
            raise NotImplementedError(f"{function.__name__} cannot run in bands: add it to FUNCTIONS in {__name__}")
        return FUNCTIONS[function](*args, **(kwargs or {}))

    def __add__(self, other: Banded | Tensor) -> Banded:
        """The sum, which is kept. It takes the place of a kept left term, which nothing can read afterwards."""
        other_rows = _rows_of(other) if isinstance(other, Tensor) else other.rows
        total = self.into(lambda top, bottom: self.rows(top, bottom) + other_rows(top, bottom))
        if isinstance(other, Banded):
            total.widest = max(total.widest, other.widest)
        if self.kept is None:
            total.whole()
        else:
            total.keep(_overwritten(self, total))
        return total

    def flatten(self, start_dim: int) -> Tensor:
        return self.whole().flatten(start_dim)

    def into(self, rows: Rows, channels: int | None = None, size: Sequence[int] | None = None) -> Banded:
        """The picture that `rows` makes of this one, with the same channels and size unless others are given."""
        shape = (self.shape[0], channels or self.shape[1], *(size or self.shape[2:]))
        picture = Banded(shape, self.dtype, self.device, self.limits, rows)
        picture.widest = max(picture.widest, self.widest)
        return picture

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def edges(self) -> list[int]:
        """The first row of each band, from top to bottom, and the height."""
        height = self.shape[2]
        step = max(1, self.limits.band_bytes * height // self.widest)
        return [*range(0, height, step), height]

    def bands(self) -> Iterator[tuple[int, int]]:
        """For each band of this rank, its first row and the row after its last."""
        edges, ranks = self.edges(), self.limits.ranks
        first, end = ranks.starts(len(edges) - 1)[ranks.rank : ranks.rank + 2]
        return pairwise(edges[first : end + 1])

    def scan(self) -> Iterator[Tensor]:
        """The bands of this rank, one after the other. A picture that is small enough is kept on the way."""
        if self.kept is None and self.num_bytes <= self.limits.kept_bytes:
            return self._keeping()
        return (self.rows(top, bottom) for top, bottom in self.bands())

    def fill(self, whole: Tensor) -> None:
        """Write the bands of the other ranks into `whole`, which has this rank's."""
        edges = self.edges()
        starts = [edges[start] for start in self.limits.ranks.starts(len(edges) - 1)]
        self.limits.ranks.gather(whole.permute(0, 2, 3, 1), starts, dim=1)  # as it lies in memory

    def whole(self) -> Tensor:
        """The picture as a tensor; it is kept from now on."""
        if self.kept is None:
            deque(self._keeping(), maxlen=0)
        return cast(Tensor, self.kept)

    def keep(self, whole: Tensor) -> None:
        """Take all rows from `whole` from now on, and forget the pictures that they were computed from."""
        self.kept, self.rows = whole, _rows_of(whole)
        self.widest = self.num_bytes

    def _keeping(self) -> Iterator[Tensor]:
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        for top, bottom in self.bands():
            band = self.rows(top, bottom)
            whole[:, :, top:bottom] = band
            yield band
        self.fill(whole)
        self.keep(whole)


def _rows_of(x: Tensor) -> Rows:
    """The rows of a tensor in channels_last, where a band of one picture is contiguous."""
    return lambda top, bottom: x[:, :, top:bottom].contiguous(memory_format=torch.channels_last)


def _overwritten(x: Banded, total: Banded) -> Tensor:
    """Write `total`, which is computed from the kept picture x, over x, and return that tensor.

    A band is written only when later bands can read no row above its end.
    """
    tensor, read = cast(Tensor, x.kept), x.rows
    topmost = 0  # the first row of x that the last band has read

    def watched(top: int, bottom: int) -> Tensor:
        nonlocal topmost
        topmost = min(topmost, top)
        return read(top, bottom)

    def overwritten(top: int, bottom: int) -> Tensor:
        raise RuntimeError("a sum took the place of its left term, which is read after it: swap its terms")

    x.kept, x.rows = None, watched
    waiting: deque[tuple[int, int, Tensor]] = deque()
    for top, bottom in total.bands():
        topmost = top
        waiting.append((top, bottom, total.rows(top, bottom)))
        while waiting[0][1] <= topmost:
            first, last, band = waiting.popleft()
            tensor[:, :, first:last] = band
    for top, bottom, band in waiting:
        tensor[:, :, top:bottom] = band
    total.fill(tensor)
    x.rows = overwritten
    return tensor


def _with_zeros(x: Banded, top: int, bottom: int, left: int = 0, right: int = 0) -> Tensor:
    """Rows of x, zeros for those that lie outside of it, and columns of zeros beside them."""
    first = min(max(top, 0), x.shape[2] - 1)
    last = max(min(bottom, x.shape[2]), first + 1)
    sides = (left, right, first - top, bottom - last)  # a negative number crops
    band = x.rows(first, last)
    return F.pad(band, sides) if any(sides) else band


def _conv2d(
    x: Banded,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Banded:
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    size = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(x.shape[2:], padding, reach, stride, strict=True)]

    def rows(top: int, bottom: int) -> Tensor:
        first, last = (row * stride[0] - padding[0] for row in (top, bottom - 1))
        band = _with_zeros(x, first, last + reach[0])
        return F.conv2d(band, weight, bias, stride, (0, padding[1]), dilation, groups)

    return x.into(rows, weight.shape[0], size)


def _conv_transpose2d(x: Banded, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Banded:
    if tuple(weight.shape[2:]) != (4, 4) or (stride, padding) != (2, 1):
        parameters = f"kernel={tuple(weight.shape[2:])}, stride={stride}, padding={padding}"
        raise NotImplementedError(
            f"a transposed convolution with {parameters} cannot run in bands: doubling by 4×4 can"
        )

    def rows(top: int, bottom: int) -> Tensor:
        first, last = max((top - 1) // 2, 0), min(bottom // 2 + 1, x.shape[2])
        band = F.conv_transpose2d(x.rows(first, last), weight, bias, stride, padding)
        return band[:, :, top - 2 * first : bottom - 2 * first]

    return x.into(rows, weight.shape[1], [2 * n for n in x.shape[2:]])


def _group_norm(x: Banded, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Banded:
    """Group norm: float32 statistics of each channel in each band are merged into those of each group."""
    dtype, ranks = torch.promote_types(x.dtype, torch.float32), x.limits.ranks
    counts = [x.shape[3] * (bottom - top) for top, bottom in pairwise(x.edges())]
    starts = ranks.starts(len(counts))
    # The mean and the sum of squares (B, C) of each band.
    statistics = torch.empty(len(counts), 2, *x.shape[:2], dtype=dtype, device=x.device)
    for band, part in zip(x.scan(), statistics[starts[ranks.rank] :], strict=False):  # the parts go on for later ranks
        torch.mean(band, (2, 3), dtype=dtype, out=part[0])
        torch.sum((band - part[0, :, :, None, None]).square_(), (2, 3), out=part[1])
    ranks.gather(statistics, starts)
    mean, square = statistics.unflatten(3, (num_groups, -1)).unbind(1)  # (bands, B, G, C/G)
    count = torch.tensor(counts, dtype=dtype, device="cpu").to(mean.device)[:, None, None, None]
    total = sum(counts) * mean.shape[3]
    center = (count * mean).sum((0, 3), keepdim=True) / total  # (1, B, G, 1)
    variance = (square + count * (mean - center).square()).sum((0, 3), keepdim=True) / total
    scale = weight.view(num_groups, -1) * (variance + eps).rsqrt()  # (1, B, G, C/G)
    shift = bias.view(num_groups, -1) - center * scale
    scale, shift = (part.view(*x.shape[:2], 1, 1) for part in (scale, shift))
    return x.into(lambda top, bottom: torch.addcmul(shift, x.rows(top, bottom), scale).to(x.dtype))


def _silu(x: Banded, inplace: bool) -> Banded:
    return x.into(lambda top, bottom: F.silu(x.rows(top, bottom)))


def _pad(x: Banded, pad: tuple[int, int, int, int], mode: str, value: float | None) -> Banded:
    if mode != "constant" or value:
        raise NotImplementedError(f"padding with mode={mode!r}, value={value} cannot run in bands: only zeros can")
    left, right, above, below = pad
    size = (above + x.shape[2] + below, left + x.shape[3] + right)
    return x.into(lambda top, bottom: _with_zeros(x, top - above, bottom - above, left, right), size=size)


FUNCTIONS: dict[Callable[..., Any], Callable[..., Banded]] = {
    F.conv2d: _conv2d,
    F.conv_transpose2d: _conv_transpose2d,
    F.group_norm: _group_norm,
    F.silu: _silu,
    F.pad: _pad,
}
