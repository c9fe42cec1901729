"""Positions of transformers past the size that they were trained at: other frequencies on an axis that is too long.

Each has the angles of training on an axis that is no longer than native. An axis of s·L tokens, for L in training, is
treated by itself. Pair i of n turns by ω_i = θ^(−i/n) from token to token; RoPE turns d = 2n features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.models.positions import THETA, AsTrained
from cutdiff.options import Between, Count


@dataclass(frozen=True)
class Interpolation(AsTrained):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): all tokens lie within the trained length, ω / s."""

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        return turns * (native / length)


@dataclass(frozen=True)
class NTK(AsTrained):
    """NTK-aware change of the base (bloc97 2023, described in arXiv 2309.00071, section 3.1): the slowest pair is
    interpolated, the fastest one stays, and those between share it, ω_i · s^(−i/(n − 1)).

    I-Max (Du et al. 2024, arXiv 2410.07536) multiplies the base by 10 at s = 4, `factor=10,proportional=True`. Its code
    (github.com/PRIS-CV/I-Max) turns no pair more slowly than interpolation does, as it is here; HiFlow's (2504.06232)
    takes the same factor without that bound.
    """

    factor: Annotated[float, Between(1)] | None = None
    """The factor of the base; None: s^(d/(d − 2))."""

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        s, n = length / native, len(turns)
        if self.factor is None:
            return stretched(turns, s)
        share = torch.arange(n, dtype=turns.dtype, device=turns.device) / n
        return torch.maximum(turns * self.factor**-share, turns / s)


@dataclass(frozen=True)
class YaRN(AsTrained):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): pairs that turn round often in the trained length stay, those that do
    not once are interpolated, and between them there is a ramp; scores are multiplied by (0.1·ln s + 1)².

    As in the published code, the ramp runs over the numbers of the pairs, to whole ones, where the paper has it run
    over their rotations. Where the axes differ, the factor of the scores is the product of those of both.
    """

    fast: Annotated[float, Between(1e-6)] = 32.0
    """The rotations in the trained length from which on a pair stays, the paper's β."""
    slow: Annotated[float, Between(1e-6)] = 1.0
    """The rotations up to which a pair is interpolated, the paper's α."""
    temperature: bool = True
    """Multiply the scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slow > self.fast:
            raise ValueError(f"slow={self.slow:g} must be at most fast={self.fast:g}: change one, or leave one out")

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        one = torch.ones_like(time)
        return torch.lerp(turns, turns * (native / length), ramp(turns, native, self.fast * one, self.slow * one))

    def sharpness(self, size: Size, native: int, text: int) -> float:
        own = tempered(size, native) if self.temperature else 1.0
        return own * super().sharpness(size, native, text)


@dataclass(frozen=True)
class DyPE(AsTrained):
    """DyPE (Issachar et al. 2025, arXiv 2510.20766): as the noise falls, positions go back to those of training.

    κ = strength · t^power: interpolation is by s^κ, NTK by s^(κ·i/(n − 1)), and the rotations between which YaRN ramps
    are multiplied by κ. The latter is here as in the published code (github.com/guyyariv/DyPE), which the paper does
    not tell of: between interpolated pairs and those that stay lie pairs as of NTK, with ramps at 1.25 … 0.75 and at
    16 … 2 rotations. The code multiplies the features of both axes by 0.1·ln s + 1; here all scores are, as of YaRN.
    Near t = 0 the code's ramps run backwards and interpolate all pairs; here all stay.
    """

    of: Literal["yarn", "ntk", "interpolation"] = "yarn"
    """The positions that depend on time."""
    strength: Annotated[float, Between(0, 100)] | None = None
    """The paper's λs, the most of the change; None: 1 for YaRN, and 2 for the others."""
    power: Annotated[float, Between(0, 100)] = 2.0
    """The paper's λt: the higher, the sooner positions go back."""

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        strength = (1.0 if self.of == "yarn" else 2.0) if self.strength is None else self.strength
        s, kappa = length / native, strength * time**self.power
        if self.of == "interpolation":
            return turns / s**kappa
        if self.of == "ntk":
            return stretched(turns, s**kappa)
        coarse = torch.lerp(stretched(turns, s), turns / s, ramp(turns, native, 1.25 * kappa, 0.75 * kappa))
        return torch.lerp(turns, coarse, ramp(turns, native, 16 * kappa, 2 * kappa))

    def sharpness(self, size: Size, native: int, text: int) -> float:
        own = tempered(size, native) if self.of == "yarn" else 1.0
        return own * super().sharpness(size, native, text)


@dataclass(frozen=True)
class UltraImage(AsTrained):
    """UltraImage (Zhao et al. 2025, arXiv 2512.04504): the pair whose period is nearest to the trained length, which
    makes things repeat, is slowed until the whole axis lies within one period; all others stay.

    The paper slows further pairs by a loop over repetitions that a person sees in pictures: two for Qwen-Image, one for
    FLUX.1. As in the published code, the axis then takes 0.85 of a period, where the paper has it take all. That the
    paper's ninth pair is FLUX.1's follows from 2048 px as the trained length: `reach=2`. The focus of attention is 1.0
    (in the code 1.1) to 1.3 by the entropy of each head in a first step; here it is one for all heads and steps.
    """

    count: Count = 1
    """The number of pairs that are slowed, the nearest first."""
    reach: Annotated[float, Between(1e-3)] = 1.0
    """The length of the longest axis in training, in native ones."""
    period: Annotated[float, Between(1e-3, 1)] = 0.85
    """The share of a period that the axis takes."""
    focus: Annotated[float, Between(1e-3, 1000)] = 1.1
    """The factor of the scores, the paper's λ, where an axis is too long."""

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        trained = self.reach * native
        if length <= trained:
            return turns
        nearest = (2 * math.pi / turns - trained).abs().argsort(stable=True)[: self.count]
        slowed = turns.clone()
        slowed[nearest] = turns[nearest].clamp(max=2 * math.pi * self.period / length)
        return slowed

    def sharpness(self, size: Size, native: int, text: int) -> float:
        own = self.focus if max(size) > self.reach * native else 1.0
        return own * super().sharpness(size, native, text)


def stretched(turns: Tensor, factor: float | Tensor) -> Tensor:
    """The frequencies (n,) over factor^(i/(n − 1)): the fastest stays, and the slowest is divided by the factor."""
    share = torch.linspace(0, 1, len(turns), dtype=turns.dtype, device=turns.device)
    return turns / factor**share


def ramp(turns: Tensor, native: int, fast: Tensor, slow: Tensor) -> Tensor:
    """The share (n,) of a change that pairs get by their rotations in the trained length: 0 for at least `fast`, 1 for
    at most `slow`, and between them even by their numbers, those of the ends being rounded outwards."""
    n = len(turns)

    def number(rotations: Tensor) -> Tensor:
        return n * torch.log(native / (2 * math.pi * rotations)) / math.log(THETA)

    first, last = number(fast).floor().clamp(0, n), number(slow).ceil().clamp(0, n)
    pairs = torch.arange(n, dtype=turns.dtype, device=turns.device)
    return ((pairs - first) / (last - first).clamp(min=1e-3)).clamp(0, 1)


def tempered(size: Size, native: int) -> float:
    """YaRN's factor of the scores: the product of 0.1·ln s + 1 of both axes."""
    return math.prod(0.1 * math.log(max(1.0, side / native)) + 1 for side in size)
