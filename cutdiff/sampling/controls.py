"""ControlNets beside the network: their hints, which go the way to the network that the canvas goes.

A hint is a picture of the whole canvas in pixels. The f×f pixels of a latent are folded into channels, so that an
operator gathers them as it gathers latents: what a view shows of the canvas, its hint shows of the picture. A canvas of
another size than the picture's, on the way to it, has the resized hint.

An interleaved patch is a whole picture of native size, and its hint is the whole hint at that size, however patches are
permuted. Cut and permuted as the latents are, a line would be broken: blocks of f×f pixels that lie side by side in a
patch do not in the canvas. In the world of scenes that does about as well (12 pictures of CutDiffusion at 2×2 have 0.91
of the subject and 0.73 of the ridge in common with the true render, with whole hints 0.91 and 0.75, and with hints
that are cut pixel by pixel 0.92 and 0.75).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.models.controlnet import ControlNet
from cutdiff.sampling.operators import Operator, Patches
from cutdiff.sampling.resize import resize


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, its hint, and when and how strongly it counts."""

    network: ControlNet
    hint: Tensor
    """(B or 1, 3, H, W) in [0, 1], on the network's device, the whole picture in pixels."""
    scale: float = 1.0
    """The factor of the residuals."""
    is_on: Callable[[float], bool] = lambda sigma: True
    """Tells for a sigma whether it counts there; where it does not, the network is not evaluated."""
    compiled: Callable[..., list[Tensor]] | None = None
    """The compiled forward pass that takes the place of the network's."""
    sizes: dict[Size, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The hint at each size that it was asked for, in the dtype of the network."""

    def at(self, size: Size) -> Tensor:
        """The hint of a canvas of `size` latents, (B or 1, 3, f·H, f·W), smoothed where it is made smaller."""
        if size not in self.sizes:
            factor = self.network.control.factor
            pixels = resize(self.hint.float(), (size[0] * factor, size[1] * factor), "bilinear")
            self.sizes[size] = pixels.to(self.network.conv_in.weight.dtype)
        return self.sizes[size]

    def gathered(self, operator: Operator, canvas: Tensor, backend: str) -> Hint:
        """The hints of the items that an operator makes of a canvas (B, C, H, W)."""
        height, width = canvas.shape[2:]
        if isinstance(operator, Patches):
            rows, columns = operator.grid
            own = self.at((height // rows, width // columns)).expand(len(canvas), -1, -1, -1)
            return Hint(self, own.repeat_interleave(rows * columns, dim=0))
        factor = self.network.control.factor
        own = self.at((height, width)).expand(len(canvas), -1, -1, -1)
        blocks = operator.gather(F.pixel_unshuffle(own.float(), factor), backend, dtype=own.dtype)
        return Hint(self, F.pixel_shuffle(blocks, factor))


@dataclass(frozen=True)
class Hint:
    """A control's hints for some items or rows, which are indexed as these are."""

    control: Control
    values: Tensor
    """(n, 3, f·h, f·w)."""

    def __getitem__(self, part: slice | Tensor) -> Hint:
        return Hint(self.control, self.values[part])

    def __len__(self) -> int:
        return len(self.values)

    def residuals(self, *read: object) -> list[Tensor]:
        """The control's residuals for what the U-Net reads."""
        control = self.control
        return [control.scale * each for each in (control.compiled or control.network)(*read, self.values)]


def residuals(hints: Sequence[Hint], read: Sequence[object]) -> list[Tensor]:
    """The sums of the residuals of all hints for what the U-Net reads; none where there are no hints."""
    maps = zip(*(hint.residuals(*read) for hint in hints), strict=True)
    return [torch.stack([*each]).sum(0) for each in maps]
