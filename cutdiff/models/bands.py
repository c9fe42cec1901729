"""A convolutional network over a picture of any size: band by band of rows, with the result of the whole at once.

`in_bands(network, x)` calls the network's own `forward` on a `Banded` picture, which torch functions turn into another:
a convolution asks its input for a halo of rows, a group norm passes over all of its input once for the statistics.
There are no tiles that could leave seams, and there is no second description of the network.

Memory: of an SDXL decoder at 4096² in 16 bits, the 256 channels that enter the last level would take 8.6 GB at full
size, and 128 channels take 4.3 GB. A picture whose statistics are taken is kept where it is small (`kept_bytes`) and
computed anew in each pass where it is not: here the upsampled input and the first convolution of each block. A sum is
always kept, in the place of its left term where that was kept. So at most 128 channels of the full and 256 of half the
size live at once, 192 values for each pixel or 6.4 GB, and a few bands: 7.1 GB with the weights.

Ranks share the bands of every pass, and each gets the rows that the others computed of a picture that is kept: the
pictures are those of one process, to the bit.
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
CPU_BAND_BYTES = 4 << 20  # what a core's cache holds some of, and malloc gives again without new pages from the system
GPU_BAND_BYTES = 64 << 20  # enough pixels to fill it

Rows = Callable[[int, int], Tensor]
"""(top, bottom) -> these rows of a picture, without the last: (B, C, bottom - top, W)."""


@dataclass(frozen=True)
class Limits:
    """How much is held at once, and by whom."""

    band_bytes: int
    """Of a band; it has at least one row."""
    kept_bytes: int = KEPT_BYTES
    """Of the largest picture that is kept after its statistics were taken."""
    ranks: Ranks = ALONE
    """The processes that share the bands."""

    @staticmethod
    def on(device: torch.device, ranks: Ranks = ALONE) -> Limits:
        """What keeps a device busy."""
        return Limits(CPU_BAND_BYTES if device.type == "cpu" else GPU_BAND_BYTES, ranks=ranks)


@torch.no_grad()
def in_bands(network: Callable[[Tensor], Tensor], x: Tensor, limits: Limits | None = None) -> Tensor:
    """`network(x)`, to rounding, for pictures x (B, C, H, W); without gradients.

    The network may use the `FUNCTIONS` below, and sums that are the last to read their left term. Raises
    NotImplementedError where it calls another function of torch; other operators and methods a `Banded` has not.
    """
    picture = Banded(x.shape, x.dtype, x.device, limits or Limits.on(x.device), _rows_of(x))
    return cast(Banded, network(cast(Tensor, picture))).whole().contiguous()


class Banded:
    """A picture (B, C, H, W) whose rows are computed when they are asked for, each time anew until it is kept."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, limits: Limits, rows: Rows
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.limits = limits
        self.rows = rows
        self.widest = self.num_bytes  # of the pictures that its rows are computed from
        self.kept: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Banded:
        if function not in FUNCTIONS:
            raise NotImplementedError(f"{function.__name__} cannot run in bands: add it to FUNCTIONS in {__name__}")
        return FUNCTIONS[function](*args, **(kwargs or {}))

    def __add__(self, other: Banded | Tensor) -> Banded:
        """Kept, in the place of the left term where that was kept: nothing can read it afterwards."""
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
        """What `rows` makes of this picture; its channels and its size are the same where they are not given."""
        shape = (self.shape[0], channels or self.shape[1], *(size or self.shape[2:]))
        made = Banded(shape, self.dtype, self.device, self.limits, rows)
        made.widest = max(made.widest, self.widest)
        return made

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def edges(self) -> list[int]:
        """The first row of each band, from top to bottom, and the height."""
        height = self.shape[2]
        step = max(1, self.limits.band_bytes * height // self.widest)
        return [*range(0, height, step), height]

    def bands(self) -> Iterator[tuple[int, int]]:
        """The first row of each band that is this rank's, and the row after its last."""
        edges, ranks = self.edges(), self.limits.ranks
        first, end = ranks.starts(len(edges) - 1)[ranks.rank : ranks.rank + 2]
        return pairwise(edges[first : end + 1])

    def scan(self) -> Iterator[Tensor]:
        """This rank's bands. A picture that is small enough is kept on the way."""
        if self.kept is None and self.num_bytes <= self.limits.kept_bytes:
            return self._keeping()
        return (self.rows(top, bottom) for top, bottom in self.bands())

    def fill(self, whole: Tensor) -> None:
        """Fill in the bands of other ranks."""
        edges = self.edges()
        starts = [edges[start] for start in self.limits.ranks.starts(len(edges) - 1)]
        self.limits.ranks.gather(whole.permute(0, 2, 3, 1), starts, dim=1)  # as it lies in memory

    def whole(self) -> Tensor:
        """The picture as a tensor, which is kept."""
        if self.kept is None:
            deque(self._keeping(), maxlen=0)
        return cast(Tensor, self.kept)

    def keep(self, whole: Tensor) -> None:
        """Read `whole` from now on, and let go of what this was computed from."""
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
    """In channels_last, where a band of one picture is contiguous."""
    return lambda top, bottom: x[:, :, top:bottom].contiguous(memory_format=torch.channels_last)


def _overwritten(x: Banded, total: Banded) -> Tensor:
    """Write `total`, which is made of the kept x, over x, and give that tensor.

    A band waits until the rows that later ones may read lie below it.
    """
    tensor, read = cast(Tensor, x.kept), x.rows
    topmost = 0  # of the rows that were read for the last band

    def watched(top: int, bottom: int) -> Tensor:
        nonlocal topmost
        topmost = min(topmost, top)
        return read(top, bottom)

    def gone(top: int, bottom: int) -> Tensor:
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
    x.rows = gone
    return tensor


def _with_zeros(x: Banded, top: int, bottom: int, left: int = 0, right: int = 0) -> Tensor:
    """Rows of x with zeros for those that lie outside of it, and columns of zeros beside them."""
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
        told = f"kernel={tuple(weight.shape[2:])}, stride={stride}, padding={padding}"
        raise NotImplementedError(f"a transposed convolution with {told} cannot run in bands: doubling by 4×4 can")

    def rows(top: int, bottom: int) -> Tensor:
        first, last = max((top - 1) // 2, 0), min(bottom // 2 + 1, x.shape[2])
        band = F.conv_transpose2d(x.rows(first, last), weight, bias, stride, padding)
        return band[:, :, top - 2 * first : bottom - 2 * first]

    return x.into(rows, weight.shape[1], [2 * n for n in x.shape[2:]])


def _group_norm(x: Banded, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Banded:
    """Statistics in float32 at least, of each channel in each band, from which those of a group follow."""
    dtype, ranks = torch.promote_types(x.dtype, torch.float32), x.limits.ranks
    counts = [x.shape[3] * (bottom - top) for top, bottom in pairwise(x.edges())]
    starts = ranks.starts(len(counts))
    found = torch.empty(len(counts), 2, *x.shape[:2], dtype=dtype, device=x.device)  # mean and sum of squares (B, C)
    for band, part in zip(x.scan(), found[starts[ranks.rank] :], strict=False):  # the scan goes to its end
        torch.mean(band, (2, 3), dtype=dtype, out=part[0])
        torch.sum((band - part[0, :, :, None, None]).square_(), (2, 3), out=part[1])
    ranks.gather(found, starts)
    mean, square = found.unflatten(3, (num_groups, -1)).unbind(1)  # (bands, B, G, C/G)
    count = torch.tensor(counts).to(mean)[:, None, None, None]
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
