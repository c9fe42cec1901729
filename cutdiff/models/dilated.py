"""Convolutions whose taps stand further apart for the time of a step: re-dilation.

Source: ScaleCrafter (He et al. 2023, arXiv 2310.07702), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.inside import replaced


@contextmanager
def dilated(factors: Iterable[tuple[nn.Module, float]]) -> Iterator[None]:
    """Spread modules by a factor each: those that are 3×3 convolutions, by more than 1."""
    with ExitStack() as changes:
        for module, factor in factors:
            if factor > 1 and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                changes.enter_context(replaced(module, forward=partial(dilated_conv, module, factor)))
        yield


def dilated_conv(conv: nn.Conv2d, factor: float, x: Tensor) -> Tensor:
    """`conv` with its 3×3 taps `factor` times as far apart; x (B, C, h, w) -> the shape that `conv` gives.

    A fractional factor is rounded up, on an input stretched by as much; the output is shrunk back.
    """
    dilation = math.ceil(factor)
    sides = x.shape[2:]
    stretched = [round(side * dilation / factor) for side in sides]
    own = [math.ceil(side / stride) for side, stride in zip(sides, conv.stride, strict=True)]
    return _resized(F.conv2d(_resized(x, stretched), conv.weight, conv.bias, conv.stride, dilation, dilation), own)


def _resized(x: Tensor, size: list[int]) -> Tensor:
    return x if list(x.shape[2:]) == size else F.interpolate(x, size=size, mode="bilinear")
