"""Splits of a canvas: what adds up, what passes, and the wavelets beside PyWavelets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve1d, gaussian_filter
from tiny import relative_error
from torch import Tensor

from cutdiff.sampling.split import (
    LOW_PASSES,
    Bands,
    Butterworth,
    DownUp,
    Gaussian,
    Split,
    Wavelet,
    mirrored,
    sharpened,
)

SPLITS: dict[str, Split] = {
    "down_up": DownUp(),
    "down_up by 2.5": DownUp(factor=2.5, down="bilinear"),
    "down_up to a size": DownUp(size=(3, 2)),
    "gaussian": Gaussian(),
    "gaussian of 3×3": Gaussian(sigma=2.0, radius=1),
    "butterworth": Butterworth(),
    "db4": Wavelet("db4"),
    "sym4": Wavelet("sym4"),
}
WAVELETS = [Wavelet("db4"), Wavelet("sym4")]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
sides = st.integers(1, 23)
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def canvases(draw: st.DrawFn) -> Tensor:
    """Canvases of up to three images, of any size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(sides), draw(sides))
    return torch.randn(shape, generator=generator, dtype=draw(dtypes))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[ours.dtype])


# ---- All splits


@pytest.mark.parametrize("name", SPLITS)
@given(x=canvases(), scale=st.floats(-3, 3))
def test_a_low_band_is_linear_and_each_image_and_channel_has_its_own(name: str, x: Tensor, scale: float) -> None:
    split = SPLITS[name]
    low, other = split.low(x), x.flip(0, 2) + 1
    assert (low.shape, low.dtype) == (x.shape, x.dtype)
    close(split.low(scale * x + other), scale * low + split.low(other))
    for image in range(len(x)):
        for channel in range(x.shape[1]):
            part = slice(image, image + 1), slice(channel, channel + 1)
            close(split.low(x[part]), low[part])


@pytest.mark.parametrize("name", SPLITS)
@given(x=canvases(), value=st.floats(-5, 5))
def test_a_constant_is_all_low(name: str, x: Tensor, value: float) -> None:
    constant = torch.full_like(x, value)
    close(SPLITS[name].low(constant), constant)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_a_checkerboard_is_all_high_and_a_slow_wave_all_low(name: str, size: tuple[int, int]) -> None:
    split = SPLITS[name]
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    checkerboard = (1 - 2 * ((rows + columns) % 2)).double()[None, None]
    wave = torch.cos(2 * torch.pi * (rows + 0.5).double() / size[0])[None, None]
    if name != "down_up by 2.5":  # which does not smooth
        assert split.low(checkerboard).norm() < 0.25 * checkerboard.norm(), "away from borders nothing is left"
    if name != "down_up to a size":  # of three rows, which hold no wave
        assert relative_error(split.low(wave), wave) < 0.07


@given(x=canvases())
@pytest.mark.parametrize("name", SPLITS)
def test_the_low_band_of_another_picture_takes_the_place_of_the_own(name: str, x: Tensor) -> None:
    split, other = SPLITS[name], x.flip(3) - 2
    close(x + split.low(other - x), (x - split.low(x)) + split.low(other))


# ---- Each


@given(x=canvases(), factor=st.floats(1, 30))
def test_down_up_shrinks_to_a_rounded_size(x: Tensor, factor: float) -> None:
    height, width = x.shape[2:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    close(DownUp(factor=factor).low(x), DownUp(size=small).low(x))
    close(DownUp(factor=1).low(x), x)
    close(DownUp(size=(height, 10**9)).low(x), x)


@given(x=canvases())
def test_area_and_bilinear_are_one_at_a_factor_of_2(x: Tensor) -> None:
    even = x.repeat_interleave(2, 2).roll(1, 2).repeat_interleave(2, 3)
    close(DownUp(down="bilinear").low(even), DownUp().low(even))


def test_bilinear_takes_no_more_than_two_pixels_of_an_axis() -> None:
    """As FreCaS has it: at a factor of 3 it picks the middle one, where the area takes all."""
    x = torch.tensor([0.0, 3, 0, 0, 3, 0])[None, None, None].expand(1, 1, 6, 6)
    assert DownUp(3, down="bilinear").low(x).eq(3).all()
    assert DownUp(3).low(x).eq(1).all()


@given(x=canvases(), sigma=st.floats(0.2, 4), radius=st.integers(1, 30) | st.none())
def test_the_gaussian_is_scipys(x: Tensor, sigma: float, radius: int | None) -> None:
    radius = math.ceil(4 * sigma) if radius is None else radius
    ours = Gaussian(sigma=sigma, radius=radius).low(x.double())
    theirs = gaussian_filter(x.double().numpy(), sigma, axes=(2, 3), mode="mirror", radius=radius)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-12)
    default = Gaussian(sigma=sigma).low(x)
    close(default, Gaussian(sigma=sigma, radius=math.ceil(4 * sigma)).low(x))


@given(
    size=st.tuples(st.integers(2, 23), st.integers(2, 23)),
    order=st.integers(1, 6),
    cutoff=st.floats(0.05, 1.5),
    data=st.data(),
)
def test_butterworth_scales_each_wave_by_its_formula(
    size: tuple[int, int], order: int, cutoff: float, data: st.DataObject
) -> None:
    u, v = (data.draw(st.integers(0, side // 2)) for side in size)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    phase = 2 * torch.pi * (u * rows[:, None] / size[0] + v * columns / size[1])
    wave = torch.cos(phase + data.draw(st.floats(0, 6)))[None, None]
    d = math.hypot(2 * u / size[0], 2 * v / size[1])
    kept = 1 / (1 + (d / cutoff) ** (2 * order))
    close(Butterworth(order=order, cutoff=cutoff).low(wave), kept * wave)


def test_butterworth_keeps_half_at_its_cutoff() -> None:
    wave = torch.cos(2 * torch.pi * torch.arange(20, dtype=torch.float64) / 10).expand(1, 1, 20, 20)
    close(Butterworth(order=4, cutoff=0.2).low(wave), wave / 2)


# ---- Wavelets


@pytest.mark.parametrize("wavelet", WAVELETS)
@given(x=canvases())
def test_bands_are_those_of_pywavelets_and_their_inverse_is_exact(wavelet: Wavelet, x: Tensor) -> None:
    bands = wavelet.bands(x)
    approximation, details = pywt.dwt2(x.double().numpy(), wavelet.name, mode="symmetric")
    for band, theirs in zip(bands, (approximation, *details), strict=True):
        torch.testing.assert_close(band.double(), torch.from_numpy(theirs), rtol=0, atol=TOLERANCE[x.dtype] + 1e-10)
    size = (x.shape[2], x.shape[3])
    close(wavelet.join(bands, size), x)
    nothing = torch.zeros_like(bands.ll)
    close(wavelet.join(Bands(bands.ll, nothing, nothing, nothing), size), wavelet.low(x))
    close(wavelet.join(bands._replace(ll=nothing), size), x - wavelet.low(x))


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal_with_four_vanishing_moments(wavelet: Wavelet) -> None:
    low = torch.tensor(LOW_PASSES[wavelet.name], dtype=torch.float64)
    assert low.sum().item() == pytest.approx(math.sqrt(2), abs=1e-15)
    for shift in range(4):
        product = (low[2 * shift :] * low[: 8 - 2 * shift]).sum().item()
        assert product == pytest.approx(float(shift == 0), abs=1e-15)
    high = low.flip(0) * torch.tensor([1, -1] * 4)
    for power in range(4):
        assert (high * torch.arange(8.0, dtype=torch.float64) ** power).sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_a_cubic_has_no_details_but_at_the_borders(wavelet: Wavelet) -> None:
    line = (torch.linspace(-1, 1, 40, dtype=torch.float64)) ** 3
    bands = wavelet.bands(line.outer(line)[None, None])
    for band in bands[1:]:
        inner = band[..., 4:-4, 4:-4]
        assert inner.abs().max() < 1e-13
        assert band.abs().max() > 1e-4


def test_lh_holds_horizontal_edges_and_hl_vertical_ones() -> None:
    stripes = torch.tensor([1.0, -1]).repeat(16)[:, None].expand(1, 1, 32, 32)
    rows, columns = (Wavelet().bands(x) for x in (stripes, stripes.mT))
    for band, other in ((rows.lh, rows.hl), (columns.hl, columns.lh)):
        assert band.norm() > 10
        assert other.norm() < 1e-4


@given(height=sides, width=sides)
def test_bands_of_another_size_are_an_error(height: int, width: int) -> None:
    wavelet = Wavelet()
    bands = wavelet.bands(torch.zeros(1, 1, height, width))
    with pytest.raises(ValueError, match=r"are none of a canvas of .*: each must have \("):
        wavelet.join(bands, (height + 2, width))
    with pytest.raises(ValueError, match="are none of a canvas of"):
        wavelet.join(bands._replace(hh=bands.hh[..., 1:]), (height, width))


# ---- Their parts


@given(n=st.integers(1, 9), before=st.integers(0, 30), after=st.integers(0, 30), repeats_edge=st.booleans())
def test_mirrored_rows_are_numpys(n: int, before: int, after: int, repeats_edge: bool) -> None:
    rows = torch.arange(1, n + 1).double()
    padded = np.pad(rows.numpy(), (before, after), "symmetric" if repeats_edge else "reflect")
    ours = mirrored(rows[None, None, :, None], before, after, repeats_edge=repeats_edge)
    assert torch.equal(ours[0, 0, :, 0], torch.from_numpy(padded))


@given(x=canvases(), amount=st.floats(0, 3))
def test_sharpening_takes_the_blur_away_as_often_as_it_adds_the_picture(x: Tensor, amount: float) -> None:
    split = Gaussian(sigma=0.7, radius=1)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 0.7**2))
    blurred = x.double().numpy()
    for axis in (2, 3):
        blurred = convolve1d(blurred, taps / taps.sum(), axis, mode="mirror")
    expected = (1 + amount) * x.double() - amount * torch.from_numpy(blurred)
    torch.testing.assert_close(sharpened(x, amount, split).double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(sharpened(x, 0, split), x)


@pytest.mark.parametrize(
    ("thing", "options", "message"),
    [
        (DownUp(), {"factor": 0.5}, "factor=0.5 must be a finite number at least 1"),
        (DownUp(), {"size": (0, 4)}, "size=0, 4 must be"),
        (DownUp(), {"down": "nearest"}, "down='nearest' is not one of area, bilinear"),
        (Gaussian(), {"sigma": 0}, "sigma=0 must be a finite number in 0.01 … 1000"),
        (Gaussian(), {"radius": 0}, "radius=0 must be a whole number in 1 … 4000 or None"),
        (Butterworth(), {"order": 0}, "order=0 must be a whole number at least 1"),
        (Butterworth(), {"cutoff": 0}, "cutoff=0 must be a finite number at least"),
        (Wavelet(), {"name": "haar"}, "name='haar' is not one of db4, sym4"),
    ],
)
def test_an_option_that_cannot_be_is_an_error(thing: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(thing, **options)
