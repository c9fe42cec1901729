"""Positions: the angles by which a transformer turns queries and keys, at any length of an axis.

Source: Su et al. 2021 (arXiv 2104.09864), in two dimensions as FLUX.1 has it: the features of a head are divided among
the axes, and those of an axis are turned in pairs.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.options import Options

THETA = 10_000.0


class Positions(Protocol):
    """The way in which a transformer is told where the tokens of a picture lie."""

    def angles(self, length: int, native: int, dim: int, time: Tensor) -> Tensor:
        """The angles of an axis of `length` tokens, of which the network was trained on `native`: (length, dim / 2)
        in radians, float64. `time` is a scalar: the share of noise in the state, from 0 to 1."""
        ...

    def sharpness(self, size: Size, native: int, text: int) -> float:
        """The factor of the scores of attention before the softmax, on a picture of `size` tokens and beside it `text`
        tokens."""
        ...


@dataclass(frozen=True)
class AsTrained(Options):
    """Positions as the network was trained on them, continued beyond its native size.

    The base of those in `extrapolation`, which change the frequencies of an axis that is longer than native.
    """

    proportional: bool = False
    """Sharpen attention by sqrt(log_T N), for N tokens where the network was trained on T: its entropy stays what it
    was (Jin et al. 2023, arXiv 2306.08645)."""

    def angles(self, length: int, native: int, dim: int, time: Tensor) -> Tensor:
        turns = frequencies(dim, time.device)
        if length > native:
            turns = self.extrapolated(turns, length, native, time)
        return torch.arange(length, dtype=torch.float64, device=time.device)[:, None] * turns

    def extrapolated(self, turns: Tensor, length: int, native: int, time: Tensor) -> Tensor:
        """The frequencies (dim / 2,) of an axis that is longer than native; `turns` are those of training."""
        return turns

    def sharpness(self, size: Size, native: int, text: int) -> float:
        tokens = max(math.prod(size), native**2) + text
        return entropy_factor(tokens, native**2 + text) if self.proportional else 1.0


def entropy_factor(tokens: int, native_tokens: int) -> float:
    """sqrt(log_T N), 1 where N = T; a single native token has no entropy to keep and counts as two."""
    return math.sqrt(math.log(tokens, max(2, native_tokens))) if tokens != native_tokens else 1.0


def frequencies(dim: int, device: torch.device) -> Tensor:
    """The angles from one token to the next, of the pairs of `dim` features: (dim / 2,) float64, from 1 to 1/10000."""
    return THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


@dataclass(frozen=True)
class Places:
    """The knowledge that attention has of the places of its tokens; here their number alone."""

    sharpness: float
    """The factor of the scores of attention before the softmax."""

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys (B, heads, L, dim), as they are compared."""
        return x


@dataclass(frozen=True)
class Rotation(Places):
    """Places that turn queries and keys: those of a text and, behind it, a picture's tokens."""

    cos: Tensor
    """(L, dim / 2), float32; 1 for the text, whose angles are 0."""
    sin: Tensor

    @staticmethod
    def of(positions: Positions, axes: tuple[int, ...], size: Size, native: int, text: int, time: Tensor) -> Rotation:
        """The rotation for `text` tokens and a picture of `size` tokens. `axes` are the features of each axis: that of
        the text, which a picture does not use, the rows, and the columns."""
        height, width = size
        rows, columns = (positions.angles(n, native, dim, time) for n, dim in zip(size, axes[1:], strict=True))
        parts = [
            torch.zeros(height, width, axes[0] // 2, dtype=torch.float64, device=time.device),
            rows[:, None].expand(-1, width, -1),
            columns[None].expand(height, -1, -1),
        ]
        angles = torch.cat(parts, dim=2).flatten(0, 1)  # (h·w, dim / 2)
        angles = torch.cat([angles.new_zeros(text, angles.shape[1]), angles])
        return Rotation(positions.sharpness(size, native, text), angles.cos().float(), angles.sin().float())

    def turned(self, x: Tensor) -> Tensor:
        """Turn pairs of neighbouring features."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        first = (even * self.cos).sub_(odd * self.sin).to(x.dtype)  # float32 until here
        second = (even * self.sin).add_(odd * self.cos).to(x.dtype)
        return torch.stack([first, second], dim=-1).flatten(-2)


@runtime_checkable
class Positioned(Protocol):
    """A network whose positions can be changed."""

    positions: Positions


def with_positions(network: Any, positions: Positions) -> Any:
    """A copy of a network that is `Positioned`, on the same tensors and with other positions; the network itself stays
    as it is."""
    changed = copy(network)
    vars(changed)["positions"] = positions  # a module would be registered in what the copy shares
    return changed
