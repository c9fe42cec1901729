"""The metrics against closed forms, and their direction when a picture gets better or worse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from renders import random_pictures
from torch import Tensor

from cutdiff.evaluation.metrics import (
    agreement,
    bootstrap,
    detail,
    detail_energy,
    frechet_distance,
    kernel_distance,
    psnr,
    resampled_kernel_distance,
    seams,
)

seeds = st.integers(0, 2**32)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(n: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """A sample (n, d) whose mean is exactly `mean` and whose unbiased covariance is exactly root · rootᵀ."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white @ root.T + mean


@given(seeds, st.integers(2, 40), st.integers(1, 8))
def test_a_set_is_at_no_frechet_distance_from_itself(seed: int, n: int, d: int) -> None:
    x = normal(n, d, seed=seed)
    assert abs(frechet_distance(x, x)) < 1e-6


@given(seeds, st.integers(2, 6))
def test_frechet_distance_of_gaussians_on_common_axes(seed: int, d: int) -> None:
    """It is |μ₁ − μ₂|² + Σ (σ₁ − σ₂)² where the covariances commute, on any axes."""
    axes = torch.linalg.qr(normal(d, d, seed=seed)).Q
    means, deviations = normal(2, d, seed=seed + 1), normal(2, d, seed=seed + 2).abs() + 0.1
    x, y = (exact(30, means[i], axes @ torch.diag(deviations[i]) @ axes.T, seed + 3 + i) for i in (0, 1))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 4))
def test_kernel_distance_is_its_definition(seed: int, n: int, m: int, d: int) -> None:
    x, y = normal(n, d, seed=seed), normal(m, d, seed=seed + 1)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-9, abs=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """For small sets of one distribution it is 0 on average, to four standard errors, and often negative."""
    values = torch.tensor(
        [kernel_distance(normal(6, 3, seed=2 * i), normal(9, 3, seed=2 * i + 1)) for i in range(2000)]
    )
    assert abs(values.mean()) < 4 * values.std() / 2000**0.5
    assert 0.3 < (values < 0).float().mean() < 0.7


def test_distances_see_a_shift_and_refuse_what_is_no_pair_of_sets() -> None:
    x, y = normal(100, 4, seed=0), normal(100, 4, seed=1)
    for distance in (frechet_distance, kernel_distance):
        assert distance(x, y + 1) > distance(x, y + 0.5) > distance(x, y)
        for wrong in (y[:, :3], y[:1], y[0]):
            with pytest.raises(ValueError, match="two sets"):
                distance(x, wrong)


def test_bootstrap_covers_a_mean() -> None:
    """95% intervals of the mean of 60 normal numbers hold the true mean in 88% to 99% of 200 trials."""
    intervals = [bootstrap(normal(60, seed=i), torch.mean, seed=i, rounds=200) for i in range(200)]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 176 <= covered <= 198


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_centered_bootstrap_covers_a_distance(distance: Callable[[Tensor, Tensor], float]) -> None:
    """For sets of 100, the centered interval holds the mean over fresh pairs of sets; the plain one lies above it."""
    pairs = [(normal(100, 16, seed=2 * i), normal(100, 16, seed=2 * i + 1) + 0.2) for i in range(200)]
    expected = sum(distance(*pair) for pair in pairs) / len(pairs)
    for centered in (True, False):
        intervals = [bootstrap(pair, distance, seed=0, rounds=100, centered=centered) for pair in pairs[:40]]
        covered = sum(low <= expected <= high for low, high in intervals)
        assert covered >= 36 if centered else covered < 20


def test_bootstrap_repeats_itself_and_resamples_each_set() -> None:
    x, y = normal(20, seed=0), normal(30, 2, seed=1)
    lengths: list[tuple[int, ...]] = []

    def difference(a: Tensor, b: Tensor) -> Tensor:
        lengths.append((len(a), *b.shape))
        return a.mean() - b.mean()

    assert bootstrap((x, y), difference, seed=5, rounds=50) == bootstrap((x, y), difference, seed=5, rounds=50)
    assert set(lengths) == {(20, 30, 2)}


def test_true_pictures_have_no_seams() -> None:
    assert seams(random_pictures(100, 256, seed=1), [64, 128, 192], [64, 128, 192]).mean() == pytest.approx(1, abs=0.2)


@given(st.integers(1, 63), st.integers(1, 63), st.floats(0.03, 0.3), seeds)
def test_seams_rise_where_parts_do_not_meet(row: int, column: int, step: float, seed: int) -> None:
    images = random_pictures(2, 64, seed=seed) * 0.5
    pasted = images.clone()
    pasted[:, :, row:] += step
    pasted[:, :, :, column:] += step
    assert (seams(pasted, [row], [column]) > seams(images, [row], [column])).all()
    assert (seams(pasted, [row], []) > 2).all()


def test_borders_must_lie_inside() -> None:
    images = torch.rand(1, 3, 32, 48)
    assert seams(images, [], [47]).shape == (1,)
    for rows, columns in (([32], []), ([0], []), ([], [48])):
        with pytest.raises(ValueError, match="must lie inside"):
            seams(images, rows, columns)
    with pytest.raises(ValueError, match="no borders"):
        seams(images, [], [])


def test_detail_is_that_of_the_truth_and_an_enlarged_picture_has_little() -> None:
    truth, more = random_pictures(40, 256, seed=2), random_pictures(40, 256, seed=3)
    assert detail(truth, truth) == 1
    assert detail(more, truth) == pytest.approx(1, abs=0.2)
    enlarged = F.interpolate(random_pictures(40, 128, seed=2), scale_factor=2, mode="bicubic", antialias=True).clamp(
        0, 1
    )
    assert detail(enlarged, truth) < 0.3
    assert detail(truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)), truth) > 1


@given(st.integers(1, 62))
def test_detail_begins_at_the_native_limit(half_periods: int) -> None:
    """The pictures are cosines of so many half periods across 64 px, of which a picture of 32 px holds up to 32."""
    x = (torch.arange(64) + 0.5) / 64
    wave = torch.cos(torch.pi * half_periods * x).expand(1, 3, 64, 64)
    expected = 0.5 if half_periods > 32 else 0.0
    assert detail_energy(wave, native=32).item() == pytest.approx(expected, abs=1e-5)
    assert detail_energy(wave.mT, native=32).item() == pytest.approx(expected, abs=1e-5)


def test_agreement_is_high_for_the_same_scene_and_low_for_another() -> None:
    native = random_pictures(20, 128, seed=4)
    large = random_pictures(20, 256, seed=4)
    same = agreement(large, native)
    assert (same > 30).all()
    assert (agreement(large.roll(1, 0), native) < same - 10).all()
    assert torch.equal(agreement(native, native / 2), psnr(native, native / 2))


@given(st.floats(0.01, 0.5))
def test_psnr_of_an_even_error(error: float) -> None:
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + error, truth).tolist() == pytest.approx(
        [-20 * torch.tensor(error).log10().item()] * 2, abs=1e-4
    )


@given(seeds, st.integers(2, 5), st.integers(2, 5), st.integers(1, 3))
def test_resampled_kernel_distance_is_that_of_the_resampled_crops(seed: int, n: int, m: int, crops: int) -> None:
    x, y = normal(n, crops, 4, seed=seed), normal(m, crops, 4, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    i, j = (torch.randint(count, (count,), generator=generator) for count in (n, m))
    expected = kernel_distance(x[i].flatten(0, 1), y[j].flatten(0, 1))
    assert resampled_kernel_distance(x, y)(i, j) == pytest.approx(expected, rel=1e-9, abs=1e-9)
