"""Splits of a canvas into a low and a high band that add up to it.

Any object with `low(x)` is a split; the high band is x − low(x), so that both add up to x to rounding. All that ship
are linear and treat every image and channel by itself. So the low band of x is replaced by that of another picture in
`x + split.low(other - x)`, for the wavelet too, whose LL alone is then exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.options import Between, Count, Options
from cutdiff.sampling.operators import upload
from cutdiff.sampling.resize import resize


@runtime_checkable
class Split(Protocol):
    """A split as it is passed in, linear in x."""

    def low(self, x: Tensor) -> Tensor:
        """A canvas (B, C, H, W), float32 or float64, of any size -> its low band, the same shape and dtype."""
        ...


@dataclass(frozen=True)
class DownUp(Options):
    """Down and up again: all that a smaller canvas can hold (FreCaS, Zhang et al. 2024, arXiv 2410.18410; ScaleDiff,
    2510.25818, with a factor of 8)."""

    factor: Annotated[float, Between(1)] = 2.0
    """The factor by which both axes shrink, to at least one pixel."""
    size: tuple[Count, Count] | None = None
    """The size (h, w) that they shrink to, in the place of `factor`, as that of the stage before; a shorter axis stays
    as it is."""
    down: Literal["area", "bilinear"] = "area"
    """The way down: "area", or "bilinear" without smoothing, as FreCaS's code has it; at a factor of 2 they are one."""

    def low(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        small = self.size or (max(1, round(height / self.factor)), max(1, round(width / self.factor)))
        small = (min(small[0], height), min(small[1], width))
        return resize(resize(x, small, self.down, antialias=False), (height, width), "bilinear", antialias=False)


@dataclass(frozen=True)
class Gaussian(Options):
    """The blur by a Gaussian, which FreeScale (Qiu et al. 2024, arXiv 2412.09626) splits attention by."""

    sigma: Annotated[float, Between(0.01, 1000)] = 1.0
    """The standard deviation in pixels of the canvas."""
    radius: Annotated[int, Between(1, 4000)] | None = None
    """The pixels on either side after which it is cut off; None: four deviations."""

    def low(self, x: Tensor) -> Tensor:
        radius = math.ceil(4 * self.sigma) if self.radius is None else self.radius
        taps = gaussian_taps(self.sigma, radius, x).view(1, 1, -1, 1)
        for _ in range(2):  # along rows and along columns
            lines = mirrored(x, radius, radius, repeats_edge=False).flatten(0, 1)[:, None]
            x = F.conv2d(lines, taps).view_as(x).mT
        return x.contiguous()


@dataclass(frozen=True)
class Butterworth(Options):
    """The Butterworth filter 1 / (1 + (d / cutoff)^(2·order)) in the frequency domain.

    d is the distance from frequency 0, in which the highest frequency of each axis has length 1, as in FreeInit (Wu et
    al. 2023, arXiv 2312.07537). The defaults are those of HiFlow (2504.06232). The canvas counts as periodic, so what
    stands at one border reaches over the opposite one.
    """

    order: Count = 4
    """The steepness of the way from pass to stop."""
    cutoff: Annotated[float, Between(1e-6)] = 0.2
    """The distance at which half is left, as a share of the highest frequency."""

    def low(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = 2 * torch.fft.fftfreq(height, dtype=x.dtype, device=x.device)[:, None]
        columns = 2 * torch.fft.rfftfreq(width, dtype=x.dtype, device=x.device)
        kept = 1 / (1 + ((rows**2 + columns**2) / self.cutoff**2) ** self.order)
        return torch.fft.irfft2(torch.fft.rfft2(x) * kept, s=(height, width))


TAPS = 8
LOW_PASSES = {
    "db4": (
        0.2303778133088965,
        0.7148465705529157,
        0.6308807679298589,
        -0.027983769416859854,
        -0.18703481171909308,
        0.030841381835560764,
        0.0328830116668852,
        -0.010597401785069032,
    ),
    "sym4": (
        0.032223100604051468,
        -0.012603967262031304,
        -0.099219543576633533,
        0.29785779560530605,
        0.80373875180513208,
        0.49761866763277499,
        -0.029635527646002492,
        -0.075765714789502213,
    ),
}
"""The taps of the low passes, as synthesis reads them, with sum √2.

They are the factors of Daubechies' polynomial (Ten Lectures on Wavelets, 1992, sections 6.1 and 8.1.1): (1 + z)⁴ times
those zeros of 1 + 4y + 10y² + 20y³, where y = (2 − z − 1/z)/4, that are chosen one of each pair z, 1/z. For db4 the
real zero and the two complex ones lie on one side of the unit circle, for sym4 on different sides. Computed with fifty
digits; PyWavelets' sym4 differs by 1e-12.
"""


class Bands(NamedTuple):
    """The bands of one level of a wavelet, (B, C, ⌊(H + 7)/2⌋, ⌊(W + 7)/2⌋) each."""

    ll: Tensor
    """Low in both directions."""
    lh: Tensor
    """High from row to row: horizontal edges."""
    hl: Tensor
    """High from column to column: vertical edges."""
    hh: Tensor


@dataclass(frozen=True)
class Wavelet(Options):
    """One level of an orthogonal wavelet of Daubechies, eight taps and four vanishing moments, borders mirrored.

    DiffuseHigh (Kim et al. 2024, arXiv 2406.18459) takes db4, HiWave (Vontobel et al. 2025, 2506.20452) sym4. The
    border is half-sample symmetric, PyWavelets' mode "symmetric", and the bands are those of its `dwt2`. The inverse
    gives the canvas back at any size, odd ones too.
    """

    name: Literal["db4", "sym4"] = "sym4"
    """The wavelet: "db4", whose energy comes first, or "sym4", the most symmetric one."""

    def low(self, x: Tensor) -> Tensor:
        ll = self.bands(x).ll
        nothing = torch.zeros_like(ll)
        return self.join(Bands(ll, nothing, nothing, nothing), (x.shape[2], x.shape[3]))

    def bands(self, x: Tensor) -> Bands:
        """The canvas (B, C, H, W) -> its four bands."""
        low, high = (half.mT for half in self._apart(x))
        (ll, hl), (lh, hh) = self._apart(low), self._apart(high)
        return Bands(ll.mT, lh.mT, hl.mT, hh.mT)

    def join(self, bands: Bands, size: Size) -> Tensor:
        """The inverse of `bands`: four of them -> the canvas (B, C, *size). ValueError where one has another size."""
        expected = ((size[0] + TAPS - 1) // 2, (size[1] + TAPS - 1) // 2)
        if {tuple(band.shape[2:]) for band in bands} != {expected}:
            shapes = ", ".join(str(tuple(band.shape[2:])) for band in bands)
            raise ValueError(f"bands of {shapes} are none of a canvas of {tuple(size)}: each must have {expected}")
        ll, lh, hl, hh = (band.mT for band in bands)
        low, high = self._together(ll, hl, size[1]), self._together(lh, hh, size[1])
        return self._together(low.mT, high.mT, size[0])

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The low and the high half from row to row: (B, C, n, W) -> two of (B, C, ⌊(n + 7)/2⌋, W)."""
        lines = mirrored(x, TAPS - 2, TAPS - 2 + x.shape[2] % 2, repeats_edge=True)
        halves = F.conv2d(lines.flatten(0, 1)[:, None], self._filters(x), stride=(2, 1))
        low, high = halves.unflatten(0, x.shape[:2]).unbind(2)
        return low, high

    def _together(self, low: Tensor, high: Tensor, n: int) -> Tensor:
        """The inverse of `_apart`: (B, C, n, W)."""
        halves = torch.stack([low, high], dim=2).flatten(0, 1)
        lines = F.conv_transpose2d(halves, self._filters(low), stride=(2, 1))
        return lines[:, 0, TAPS - 2 : TAPS - 2 + n].unflatten(0, low.shape[:2])

    def _filters(self, like: Tensor) -> Tensor:
        """The low and the high pass, (2, 1, TAPS, 1); the high one is the low one from its end, with signs by turns."""
        low = LOW_PASSES[self.name]
        high = [(-1) ** i * tap for i, tap in enumerate(reversed(low))]
        return upload(torch.tensor([low, high], dtype=like.dtype, device="cpu")[:, None, :, None], like.device)


def sharpened(images: Tensor, amount: float, split: Split) -> Tensor:
    """(1 + amount) · images − amount · low band, (B, C, H, W): DiffuseHigh's sharpening, with an amount of 1 and the
    split `Gaussian(sigma, radius=1)`, where its code draws sigma from 0.1 … 2 for each picture."""
    return images + amount * (images - split.low(images))


def gaussian_taps(width: float, radius: int, like: Tensor) -> Tensor:
    """A Gaussian of deviation `width` at −radius … radius, with sum 1: (2·radius + 1,), on the device of `like` and of
    its dtype."""
    offsets = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    taps = torch.exp(-(offsets**2) / (2 * width**2))
    return taps / taps.sum()


def mirrored(x: Tensor, before: int, after: int, *, repeats_edge: bool) -> Tensor:
    """x (B, C, n, W) with rows before and after it, as many as wanted, that go back and forth over it.

    The first row and the last come twice in a row where the edge is repeated: half-sample symmetry, the other being
    whole-sample symmetry.
    """
    n = x.shape[2]
    period = max(2 * n - 2 + 2 * repeats_edge, 1)
    place = torch.arange(-before, n + after, device=x.device) % period
    return x.index_select(2, torch.minimum(place, period - repeats_edge - place))
