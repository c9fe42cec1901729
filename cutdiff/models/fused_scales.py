"""Self-attention whose low frequencies are those of attention within windows, and whose high ones those of the whole.

Source: scale fusion of FreeScale (Qiu et al. 2024, arXiv 2412.09626).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from cutdiff_kernels.checks import check_cover
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.models.inside import replaced
from cutdiff.models.layers import Attention

Attend = Callable[[Tensor], Tensor]
"""Self-attention of tokens (B, L, C) -> (B, L, C)."""


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of a feature map, which may reach past it. ValueError where one leaves a pixel to none."""

    origins: Tensor
    """(B, V, 2) of (top, left), int64, on the CPU: images have windows of their own."""
    size: Size
    map_size: Size
    margin: Size = field(init=False)
    """The pixels by which windows reach past the map, above and below it, and at its sides."""
    corners: Tensor = field(init=False, repr=False)
    """The origins, counted from the corner of the margin."""

    def __post_init__(self) -> None:
        check_cover(self.origins, self.size, self.map_size)
        past = torch.tensor([a - b for a, b in zip(self.size, self.map_size, strict=True)], device="cpu")
        down, right = torch.maximum(-self.origins, self.origins + past).amax(dim=(0, 1)).clamp(min=0).tolist()
        object.__setattr__(self, "margin", (down, right))
        object.__setattr__(self, "corners", self.origins + torch.tensor([down, right], device="cpu"))


@dataclass(frozen=True)
class Fusion:
    """The way in which one layer's attention is fused."""

    windows: Windows
    corners: Tensor
    """The corners of the windows on the device of the map."""
    grid: Size
    """The whole map is attended to in interleaved parts on this grid, or at once where that is (1, 1)."""
    taps: Tensor
    """The low pass along height and width: an odd number of taps, float32, with sum 1."""
    channel_taps: Tensor
    """The low pass along the channels; a single 1 leaves them alone."""


@contextmanager
def fused_scales(layers: Iterable[tuple[Attention, Fusion]], images: Tensor) -> Iterator[None]:
    """Fuse each layer's self-attention inside the block; `images` (B,) are those of the network's rows."""
    with ExitStack() as changes:
        for attention, fusion in layers:
            changes.enter_context(replaced(attention, forward=partial(attend_fused, attention, fusion, images)))
        yield


def attend_fused(attention: Attention, fusion: Fusion, images: Tensor, tokens: Tensor) -> Tensor:
    """low(attention within windows) + high(attention to the whole) of tokens (B, h·w, C), whose `images` are (B,)."""

    def attend(part: Tensor) -> Tensor:
        return Attention.forward(attention, part)

    x = tokens.unflatten(1, fusion.windows.map_size)  # (B, h, w, C)
    whole = attend_in_parts(attend, fusion.grid, x)
    local = attend_in_windows(attend, fusion.windows, fusion.corners[images], x)
    fused = whole + blurred(local - whole, fusion.taps, fusion.channel_taps)
    return fused.to(tokens.dtype).flatten(1, 2)


def on_map(part: Size, canvas: Size, map_size: Size) -> Size:
    """The size, at least one pixel, that a part of a canvas has on a feature map of the whole."""
    height, width = (max(1, a * c // b) for a, b, c in zip(part, canvas, map_size, strict=True))
    return height, width


def attend_in_parts(attend: Attend, grid: Size, x: Tensor) -> Tensor:
    """Attend within each of the interleaved parts x[:, i::s_h, j::s_w] of a map (B, h, w, C)."""
    out = torch.empty_like(x)
    for i in range(min(grid[0], x.shape[1])):
        for j in range(min(grid[1], x.shape[2])):
            part = x[:, i :: grid[0], j :: grid[1]]
            out[:, i :: grid[0], j :: grid[1]] = attend(part.flatten(1, 2)).view(part.shape)
    return out


def attend_in_windows(attend: Attend, windows: Windows, corners: Tensor, x: Tensor) -> Tensor:
    """Attend within each window of a map (B, h, w, C), and take the mean where windows overlap, float32.

    `corners` (B, V, 2) are those of each item. Pixels past the map are zeros, to which windows attend as well. As many
    windows go through at once as have the pixels of the map, so that memory does not grow with their number.
    """
    (height, width), (down, right) = windows.map_size, windows.margin
    padded = F.pad(x, (0, 0, right, right, down, down))
    total = torch.zeros_like(padded, dtype=torch.float32)
    count = torch.zeros_like(total[..., :1])
    item = torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = (
        start[..., None] + torch.arange(side, device=x.device)  # (B, V, h) and (B, V, w)
        for start, side in zip(corners.unbind(2), windows.size, strict=True)
    )
    at_once = max(1, height * width // (windows.size[0] * windows.size[1]))
    for some_rows, some_columns in zip(rows.split(at_once, dim=1), columns.split(at_once, dim=1), strict=True):
        shown = padded[item[..., None], some_rows[..., None], some_columns[:, :, None]]  # (B, v, h, w, C)
        values = attend(shown.flatten(2, 3).flatten(0, 1)).view(shown.shape)
        for i in range(values.shape[1]):  # each window by itself: a sum has one order
            place = item, some_rows[:, i, :, None], some_columns[:, i, None]
            total[place] += values[:, i]
            count[place] += 1
    return (total / count)[:, down : down + height, right : right + width]


def blurred(x: Tensor, taps: Tensor, channel_taps: Tensor) -> Tensor:
    """Filter a map (B, h, w, C), float32, along height and width, and along the channels; zeros outside."""
    batch, height, width, channels = x.shape
    radius = len(taps) // 2
    x = F.conv2d(x.reshape(batch, 1, height, -1), taps[None, None, :, None], padding=(radius, 0))
    kernel = torch.outer(taps, channel_taps)[None, None]
    x = F.conv2d(x.view(-1, 1, width, channels), kernel, padding=(radius, len(channel_taps) // 2))
    return x.view(batch, height, width, channels)
