"""Self-attention within large windows of a feature map, shifted by its own amount for each image of a batch.

Source: MSW-MSA of HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), section 3.2.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.models.inside import replaced
from cutdiff.models.layers import Attention
from cutdiff.models.unet import Context, Transformer, TransformerBlock


def transform_in_windows(
    transformer: Transformer, windows: Size, quarters: Tensor, x: Tensor, context: Context
) -> Tensor:
    """Apply a transformer to x (B, C, h, w) with its self-attentions confined to so many `windows` on each axis."""
    with ExitStack() as changes:
        for block in transformer.transformer_blocks:
            attention = cast(TransformerBlock, block).attn1
            forward = partial(attend_in_windows, attention, (x.shape[2], x.shape[3]), windows, quarters)
            changes.enter_context(replaced(attention, forward=forward))
        return Transformer.forward(transformer, x, context)


def attend_in_windows(attention: Attention, size: Size, windows: Size, quarters: Tensor, tokens: Tensor) -> Tensor:
    """Attend among the tokens (B, h·w, C) of each window, on a torus shifted by `quarters` (B,) of a window."""
    height, width = size
    shift = [quarters * (math.ceil(side / count) // 4) for side, count in zip(size, windows, strict=True)]
    rolled = _rolled(tokens.unflatten(1, size), *shift)  # (B, h, w, C)
    rows = [
        torch.cat([_attend(attention, x) for x in row.tensor_split(min(windows[1], width), dim=2)], dim=2)
        for row in rolled.tensor_split(min(windows[0], height), dim=1)
    ]
    return _rolled(torch.cat(rows, dim=1), -shift[0], -shift[1]).flatten(1, 2)


def _attend(attention: Attention, window: Tensor) -> Tensor:
    return Attention.forward(attention, window.flatten(1, 2)).unflatten(1, window.shape[1:3])


def _rolled(x: Tensor, up: Tensor, left: Tensor) -> Tensor:
    """Roll each item of x (B, h, w, C) up and left by its own shifts (B,)."""
    item, row, column = (torch.arange(length, device=x.device) for length in x.shape[:3])
    row, column = (row + up[:, None]) % x.shape[1], (column + left[:, None]) % x.shape[2]  # (B, h), (B, w)
    return x[item[:, None, None], row[:, :, None], column[:, None, :]]
