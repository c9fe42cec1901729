"""Score pictures of scenes against the truth: every number of the testbed, each with its 95% interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cutdiff.evaluation.features import FeatureNet, crop_features, whole_features
from cutdiff.evaluation.metrics import (
    agreement,
    bootstrap,
    detail_energy,
    frechet_distance,
    resampled_kernel_distance,
    seams,
)
from cutdiff.scenes import world
from cutdiff.scenes.read import read
from cutdiff.scenes.render import render
from cutdiff.scenes.world import Scenes

CAPTION_SEED, FLOOR_SEED = 1000, 2000
"""Of the scenes whose captions are drawn, and of others with which the truth is compared for its floor."""
ROUNDS = 1000
"""Resamples for every interval."""
PART = 16
"""Pictures that are held as floating-point numbers at once."""


@dataclass(frozen=True)
class Score:
    """A number and its 95% bootstrap interval over pictures; None where it has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Facts:
    """What is measured of a set of N pictures before it is compared with another."""

    whole: Tensor
    """(N, 32) features of whole pictures."""
    crops: Tensor
    """(N, K, 32) features of native-size crops."""
    detail: Tensor
    """(N,) spectral energy above the native Nyquist limit."""


def scenes(num: int, seed: int = CAPTION_SEED) -> Scenes:
    """The first `num` scenes of a fixed list: longer lists begin with shorter ones."""
    many = world.sample(4096, torch.Generator().manual_seed(seed))
    if not 2 <= num <= len(many):
        raise ValueError(f"num={num} must be 2, for distances between sets, to {len(many)}, the captions there are")
    return many[slice(0, num)]


def true_renders(drawn: Scenes, size: int) -> Tensor:
    """(N, 3, size, size) uint8."""
    parts = [render(drawn[slice(i, i + PART)], size) for i in range(0, len(drawn), PART)]
    return torch.cat([to_bytes(part / 2 + 0.5) for part in parts])


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def gather_facts(images: Tensor, network: FeatureNet, native: int) -> Facts:
    """Measure pictures (N, 3, H, W), uint8."""
    parts = [part.float() / 255 for part in images.split(PART)]
    return Facts(
        torch.cat([whole_features(network, part) for part in parts]),
        torch.cat([crop_features(network, part) for part in parts]),
        torch.cat([detail_energy(part, native) for part in parts]),
    )


def score(
    images: Tensor,
    choices: Tensor,
    facts: Facts,
    truth: Facts,
    native_images: Tensor | None,
    *,
    native: int,
    border: int,
) -> dict[str, Score]:
    """All scores of pictures (N, 3, H, W), uint8, drawn for the captions of `choices` (N, 5).

    `native_images`: the same captions and seeds at native size, uint8. `border`: distance in pixels between the borders
    of views, at which seams are looked for. Shares are of pictures, distances as in `metrics`, agreement in dB.
    """
    parts = images.split(PART)
    readings = [read(part.float() / 255, native) for part in parts]
    answers = torch.cat(
        [
            torch.stack(
                [
                    r.bodies != 1,
                    r.subjects != 1,
                    (r.bodies == 1) & (r.subjects == 1),
                    r.matches(c),
                    r.caption_right(c),
                ],
                dim=1,
            )
            for r, c in zip(readings, choices.split(PART), strict=True)
        ]
    ).double()
    names = ("bodies not one", "subjects not one", "one of each", "right subject", "right caption")
    scores = {name: mean_score(column) for name, column in zip(names, answers.unbind(1), strict=True)}

    for name, ours, theirs in (
        ("whole", facts.whole[:, None], truth.whole[:, None]),
        ("crops", facts.crops, truth.crops),
    ):
        scores[f"Fréchet {name}"] = _scored(_frechet, (ours, theirs), centered=True)
        chosen = torch.arange(len(ours)), torch.arange(len(theirs))
        scores[f"kernel {name}"] = _scored(resampled_kernel_distance(ours, theirs), chosen, centered=True)

    lines = [list(range(border, side, border)) for side in images.shape[2:]]
    if any(lines):
        scores["seams"] = mean_score(torch.cat([seams(part.float() / 255, *lines) for part in parts]))
    if truth.detail.mean() > 0:
        ratio = lambda ours, theirs: (ours.mean() / theirs.mean()).item()  # noqa: E731
        scores["detail"] = _scored(ratio, (facts.detail, truth.detail))
    if native_images is not None:
        pairs = zip(parts, native_images.split(PART), strict=True)
        scores["agreement"] = mean_score(torch.cat([agreement(a.float() / 255, b.float() / 255) for a, b in pairs]))
    return scores


def mean_score(values: Tensor) -> Score:
    """The mean of one value for each picture, (N,)."""
    return _scored(lambda v: v.mean().item(), (values.double(),))


def _frechet(ours: Tensor, truth: Tensor) -> float:
    """Between the crops of pictures, (N, K, d) and (M, K, d)."""
    return frechet_distance(ours.flatten(0, 1), truth.flatten(0, 1))


def _scored(statistic: Callable[..., float], sets: tuple[Tensor, ...], centered: bool = False) -> Score:
    low, high = bootstrap(sets, statistic, seed=0, rounds=ROUNDS, centered=centered)
    return Score(statistic(*sets), low, high)
