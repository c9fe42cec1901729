"""The attention over the text that one picture was drawn with, for a larger one to be drawn with as well.

Source: the reuse of cross-attention maps in FreCaS (Zhang et al. 2024, arXiv 2410.18410), section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.attention import blended_attention, recorded_attention
from cutdiff.models.config import Size
from cutdiff.models.inside import size_at
from cutdiff.models.unet import UNet, as_unet
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.resize import resize

Axes = Literal["planes", "tokens"]
"""The axes along which maps are resized: "planes", height and width, or "tokens", all positions as one line, which
scrambles maps whose width changes."""


@dataclass
class TextMaps:
    """M̄, the mean over the heads and layers of each level, and over the levels, for each row of a step."""

    axes: Axes
    copies: int = 0
    """The rows of each image."""
    maps: Tensor = field(default_factory=lambda: torch.empty(0))
    """(images · copies, tokens, h, w), float32, of the size of the finest level that attends to the text; empty before
    it is recorded."""
    large: dict[int, Tensor] = field(default_factory=dict)
    """The maps as the layers of the larger canvas take them, (rows, positions, tokens), by their positions."""

    @contextmanager
    def recorded(self, denoiser: Denoiser, size: Size, copies: int, num_images: int) -> Iterator[Denoiser]:
        """A denoiser for the one step inside the block, on a canvas of `size` latents, whose maps these become: those
        of the guidance pairs, and none of a third estimate."""
        with recorded_attention(as_unet(denoiser.unet), everywhere=True) as recording:
            yield replace(denoiser, shares_rows=False)  # every rank needs the maps of all rows
        sizes, means = _level_sizes(as_unet(denoiser.unet), size), recording.means(num_images * copies)
        planes = [mean.mT.unflatten(2, sizes[positions]) for positions, mean in means.items()]
        finest = sizes[max(means)]
        self.maps = torch.stack([resized(plane, finest, self.axes) for plane in planes]).mean(dim=0)
        self.copies, self.large = copies, {}

    def blended(self, denoiser: Denoiser, size: Size, copies: int, weight: float) -> Denoiser:
        """The denoiser for steps of so many `copies` on a canvas of `size` latents, always the same one, in which these
        maps have that weight in the attention over the text; itself where its negative rows have no map."""
        sizes = _level_sizes(as_unet(denoiser.unet), size)
        if copies > self.copies:
            return denoiser

        def network(call: Call) -> Tensor:
            rows = slice(call.first, call.first + len(call.inputs[0]))

            def maps(positions: int) -> Tensor:
                if positions not in self.large:
                    large = resized(self.maps, sizes[positions], self.axes).to(call.inputs[0].dtype)
                    self.large[positions] = large.flatten(2).mT.contiguous()
                each = self.large[positions].unflatten(0, (-1, self.copies))[:, -call.copies :]  # negative rows first
                return each.flatten(0, 1)[rows]

            with blended_attention(as_unet(denoiser.unet), maps, weight):
                return denoiser.evaluate(call.inputs)

        return replace(denoiser, network=network)


def resized(maps: Tensor, size: Size, axes: Axes) -> Tensor:
    """Maps (B, tokens, h, w) -> (B, tokens, *size), by linear interpolation along the `axes`."""
    if axes == "planes":
        return resize(maps, size, "bilinear")
    return F.interpolate(maps.flatten(2), math.prod(size), mode="linear").unflatten(2, size)


def _level_sizes(unet: UNet, size: Size) -> dict[int, Size]:
    """The size of each level's feature maps on a canvas of `size` latents, by the number of their positions."""
    levels = [size_at(size, level) for level in range(len(unet.config.channels))]
    return {math.prod(level): level for level in levels}
