"""Score pictures of scenes against the truth: every number of the testbed, each with its 95% interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
"""Seeds of the scenes whose captions are drawn, and of other scenes, which give the floor of distances to the truth."""
SHARES = ("bodies not one", "subjects not one", "one of each", "right subject", "right caption")
"""Names of the scores that are shares of the pictures."""
ROUNDS = 1000
"""Number of resamples for every interval."""
PART = 16
"""Number of pictures that are floating-point numbers at once, to bound memory."""


@dataclass(frozen=True)
class Score:
    """A number and its 95% bootstrap interval over pictures; None where it has none."""

    value: float
    low: float | None
    high: float | None
    values: list[float] | None = None
    """The numbers of the single pictures, to six digits, where `value` is their mean; None where it is not a mean."""


@dataclass(frozen=True)
class Facts:
    """Measurements of a set of N pictures that are compared with those of another set."""

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
    """Render scenes as pictures (N, 3, size, size), uint8."""
    parts = [render(drawn[slice(i, i + PART)], size) for i in range(0, len(drawn), PART)]
    return torch.cat([to_bytes(part / 2 + 0.5) for part in parts])


def to_bytes(images: Tensor) -> Tensor:
    """Round pictures in [0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def gather_facts(images: Tensor, network: FeatureNet, native: int) -> Facts:
    """Measure pictures (N, 3, H, W), uint8; `native` is the side in pixels that the model was trained at."""
    return Facts(
        torch.cat([whole_features(network, part) for part in _parts(images)]),
        torch.cat([crop_features(network, part) for part in _parts(images)]),
        torch.cat([detail_energy(part, native) for part in _parts(images)]),
    )


def score(
    images: Tensor,
    choices: Tensor,
    facts: Facts,
    truth: Facts,
    native_images: Tensor | None,
    *,
    native: int,
    borders: Sequence[int],
) -> dict[str, Score]:
    """All scores of pictures (N, 3, H, W), uint8, drawn for the captions of `choices` (N, 5).

    native_images: the same captions and seeds at native size, uint8; without them there is no agreement.
    borders: the rows and columns of pixels at which views begin or end, where seams are looked for.

    `SHARES` are shares of the pictures, the other scores are as in `metrics`. A score that is a mean over pictures also
    has their single values; those of the detail are in units of the truth's mean.
    """
    answers = _answers(images, choices, native)
    scores = {name: mean_score(column) for name, column in zip(SHARES, answers.unbind(1), strict=True)}
    sets = {"whole": (facts.whole[:, None], truth.whole[:, None]), "crops": (facts.crops, truth.crops)}
    for name, (ours, theirs) in sets.items():
        scores[f"Fréchet {name}"] = _scored(_frechet, (ours, theirs), centered=True)
        chosen = torch.arange(len(ours)), torch.arange(len(theirs))
        scores[f"kernel {name}"] = _scored(resampled_kernel_distance(ours, theirs), chosen, centered=True)
    if borders:
        scores["seams"] = mean_score(torch.cat([seams(part, borders, borders) for part in _parts(images)]))
    if truth.detail.mean() > 0:
        ratio = lambda ours, theirs: (ours.mean() / theirs.mean()).item()  # noqa: E731
        scores["detail"] = replace(
            _scored(ratio, (facts.detail, truth.detail)), values=_listed(facts.detail / truth.detail.mean())
        )
    if native_images is not None:
        pairs = zip(_parts(images), _parts(native_images), strict=True)
        scores["agreement"] = mean_score(torch.cat([agreement(*pair) for pair in pairs]))
    return scores


def mean_score(values: Tensor) -> Score:
    """Score the mean of one value for each picture, (N,)."""
    mean = _scored(lambda v: v.mean().item(), (values.double(),))
    return replace(mean, values=_listed(values))


def _answers(images: Tensor, choices: Tensor, native: int) -> Tensor:
    """Tell which of `SHARES` each picture counts for: (N, 5), 0 or 1."""
    answers = []
    for part, wanted in zip(_parts(images), choices.split(PART), strict=True):
        reading = read(part, native)
        body, subject = reading.bodies == 1, reading.subjects == 1
        columns = (~body, ~subject, body & subject, reading.matches(wanted), reading.caption_right(wanted))
        answers.append(torch.stack(columns, dim=1))
    return torch.cat(answers).double()


def _parts(images: Tensor) -> Iterator[Tensor]:
    """Split pictures (N, 3, H, W), uint8, into a few at a time, in [0, 1]."""
    return (part.float() / 255 for part in images.split(PART))


def _frechet(ours: Tensor, truth: Tensor) -> float:
    """The Fréchet distance between the crops of pictures, (N, K, d) and (M, K, d)."""
    return frechet_distance(ours.flatten(0, 1), truth.flatten(0, 1))


def _scored(statistic: Callable[..., float], sets: tuple[Tensor, ...], centered: bool = False) -> Score:
    low, high = bootstrap(sets, statistic, seed=0, rounds=ROUNDS, centered=centered)
    return Score(statistic(*sets), low, high)


def _listed(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
