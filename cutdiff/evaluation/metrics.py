"""Distances between sets of pictures, and measures of a large picture's seams, its detail and its native twin.

All are pure functions of tensors. Values of single pictures are (N,), so that `bootstrap` can give every mean its
interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS_AT_ONCE = 2**22
"""Number of the kernel's values that are in memory at once, to bound it."""
SEAM_CAP = 0.05
"""The step between neighbouring pixels, in [0, 1], above which a steeper one counts no more: the outlines of objects
are few and steep, and a seam, which is faint and long, must not drown in them."""


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features (N, d) and (M, d), in float64.

    |μx − μy|² + tr(Σx + Σy − 2 (Σx^½ Σy Σx^½)^½), with unbiased covariances (Dowson & Landau 1982; FID: Heusel et al.
    2017, arXiv 1706.08500). It grows as the sets shrink: compare it with its value for two true sets of this size.
    """
    x, y = _features(x, y)
    root = _square_root(torch.cov(x.T).reshape(x.shape[1], -1))
    covariance = torch.cov(y.T).reshape(x.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = x.var(0).sum() + y.var(0).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross).item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features (N, d) and (M, d), in float64.

    It is unbiased, so that it averages to 0 between sets of one distribution and is often below 0:
    mean_{i≠j} k(xi, xj) + mean_{i≠j} k(yi, yj) − 2 mean_{ij} k(xi, yj), with k(a, b) = (a·b / d + 1)³
    (KID: Bińkowski et al. 2018, arXiv 1801.01401).
    """
    x, y = _features(x, y)
    return resampled_kernel_distance(x[:, None], y[:, None])(torch.arange(len(x)), torch.arange(len(y)))


def resampled_kernel_distance(x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], float]:
    """`kernel_distance` between the crops of chosen pictures, given features of all of them, (N, K, d) and (M, K, d).

    The function that is returned takes the indices of pictures of either set, 1-D and with repetition. It is made for
    resampling: kernels are summed over the crops of each pair of pictures once, not in every round.
    """
    x, y = x.double(), y.double()
    within = [(_sums_over_crops(s, s), _kernel_with_itself(s).sum(1)) for s in (x, y)]
    between, crops = _sums_over_crops(x, y), x.shape[1]

    def distance(*chosen: Tensor) -> float:
        total = 0.0
        for index, (sums, itself) in zip(chosen, within, strict=True):
            count = len(index) * crops
            total += (sums[index][:, index].sum() - itself[index].sum()) / (count * (count - 1))
        pairs = len(chosen[0]) * len(chosen[1]) * crops**2
        return float(total - 2 * between[chosen[0]][:, chosen[1]].sum() / pairs)

    return distance


def bootstrap(
    values: Tensor | Sequence[Tensor],
    statistic: Callable[..., float | Tensor],
    seed: int,
    *,
    rounds: int = 1000,
    centered: bool = False,
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic: from its 2.5% to its 97.5% quantile over resampled pictures.

    values: one (N, ...) tensor or several, such as the features of two sets; each is resampled along its first
        dimension, with replacement and by itself, and all are passed to `statistic`.
    centered: move the interval so that the mean over the resamples falls on the value itself. Distances between sets
        need this: pictures that are drawn twice raise every resampled distance, by more than its spread.

    Source: Efron & Tibshirani 1993, chapters 10 (bias) and 13 (percentiles).
    """
    sets = [values] if isinstance(values, Tensor) else list(values)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(rounds):
        indices = (torch.randint(len(s), (len(s),), generator=generator) for s in sets)
        drawn.append(float(statistic(*(s[index.to(s.device)] for s, index in zip(sets, indices, strict=True)))))
    results = torch.tensor(drawn, dtype=torch.float64)
    if centered:
        results += float(statistic(*sets)) - results.mean()
    low, high = results.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def seams(images: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The gradient energy across given border lines over that across all other lines: (N, 3, H, W) -> (N,).

    It is about 1 where nothing shows at the borders. A border at row r lies between the pixel rows r − 1 and r, and
    likewise for columns. The energy of a line is the mean over its pixels of min(g², SEAM_CAP²), where g² is the
    squared step across the line averaged over the channels; rows are compared with rows and columns with columns, each
    in proportion to its borders. Raises ValueError for a border outside the picture, and where there is no border.
    """
    on, elsewhere = images.new_zeros(len(images)), images.new_zeros(len(images))
    for axis, positions in ((2, rows), (3, columns)):
        if any(not 0 < position < images.shape[axis] for position in positions):
            raise ValueError(f"borders {list(positions)} must lie inside a picture of {images.shape[axis]} px")
        steps = images.diff(dim=axis).square().mean(1).clamp(max=SEAM_CAP**2)  # (N, H - 1, W) or (N, H, W - 1)
        lines = steps.mean(2 if axis == 2 else 1)
        border = torch.zeros(lines.shape[1], dtype=torch.bool, device=images.device)
        border[[position - 1 for position in positions]] = True
        on += lines[:, border].sum(1)
        elsewhere += border.sum() * lines[:, ~border].mean(1)
    if not rows and not columns:
        raise ValueError("no borders: pass the rows or columns at which views or patches meet")
    return on / elsewhere


def detail_energy(images: Tensor, native: int = 128) -> Tensor:
    """The spectral energy that a picture of `native` pixels on the shorter side cannot hold: (N, 3, H, W) -> (N,).

    It is the mean over channels and pixels of |F|² at all frequencies above `native`'s Nyquist limit on either axis,
    which is native / (2 · min(H, W)) cycles a pixel. F is the spectrum of the picture continued by its mirror images
    (as in the cosine transform), because opposite borders do not meet, and their jump would pass for detail.
    """
    height, width = images.shape[2:]
    limit = native / (2 * min(height, width))
    above = (torch.fft.fftfreq(2 * height).abs()[:, None] > limit) | (torch.fft.fftfreq(2 * width).abs() > limit)
    energies = [_mirrored_spectrum(part)[:, above.to(images.device)].sum(1) for part in images.split(8)]
    return torch.cat(energies) / (4 * height * width)


def detail(images: Tensor, truth: Tensor, native: int = 128) -> float:
    """The detail of a set of pictures as a share of the truth's: mean `detail_energy` over that of true renders.

    It is 1 for the truth, near 0 for enlarged native pictures, and above 1 for noise or invented texture. The sets are
    (N, 3, H, W) and (M, 3, H, W), and need not be paired.
    """
    return (detail_energy(images, native).mean() / detail_energy(truth, native).mean()).item()


def agreement(images: Tensor, native_images: Tensor) -> Tensor:
    """The agreement of large pictures with their native twins: PSNR in dB after averaging down, (N,).

    The pictures (N, 3, H, W) and (N, 3, h, w) have the same prompts and seeds. They are compared in pixels, not in
    features: features are free to ignore where things stand, and pixels need no network.
    """
    height, width = native_images.shape[2:]
    return psnr(F.adaptive_avg_pool2d(images, (height, width)), native_images)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each picture in dB: two (N, 3, H, W) in [0, 1] -> (N,)."""
    return -10 * torch.log10((images - truth).square().mean((1, 2, 3)))


def _features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features of {tuple(x.shape)} and {tuple(y.shape)}: pass two sets (N, d) of the same d, each of at least 2"
        )
    return x.double(), y.double()


def _mirrored_spectrum(images: Tensor) -> Tensor:
    """The mean |F|² over the channels of pictures continued by their mirror images: (N, 3, H, W) -> (N, 2H, 2W)."""
    wide = torch.cat([images, images.flip(3)], dim=3)
    return torch.fft.fft2(torch.cat([wide, wide.flip(2)], dim=2), norm="ortho").abs().square().mean(1)


def _sums_over_crops(x: Tensor, y: Tensor) -> Tensor:
    """The kernels of (N, K, d) with (M, K, d), summed over all pairs of crops of each pair of pictures: (N, M)."""
    flat = y.flatten(0, 1)
    parts = x.split(max(1, KERNELS_AT_ONCE // (len(flat) * x.shape[1])))
    kernels = (_cubed(part.flatten(0, 1) @ flat.T, x.shape[2]) for part in parts)  # (n·K, M·K)
    sums = [kernel.unflatten(1, y.shape[:2]).sum(2).unflatten(0, (-1, x.shape[1])).sum(1) for kernel in kernels]
    return torch.cat(sums)


def _kernel_with_itself(x: Tensor) -> Tensor:
    """The kernel of each crop with itself: (N, K, d) -> (N, K)."""
    return _cubed(x.square().sum(2), x.shape[2])


def _cubed(products: Tensor, dim: int) -> Tensor:
    """The polynomial kernel, given the products a·b."""
    raised = products / dim + 1
    return raised * raised * raised


def _square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semidefinite matrix (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
