"""A picture of which a mask redraws a part: held outside of the mask at every step, or shown to an inpainting model.

A mask is a denoiser: outside of it the estimate of x0 is the picture's latents, and the state so stands at the picture
with the noise of its sigma. What is decoded is laid onto the picture with a feathered mask, since a VAE gives no
picture back to the bit.

Inpainting models (Rombach et al. 2022, arXiv 2112.10752, section 4.5) see a mask and the picture's latents without what
lies under the mask, grey there. They are not held: they were trained to repeat what they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.sampling.denoiser import Span
from cutdiff.sampling.resize import resize

GREY = 0.5


@dataclass(frozen=True)
class MaskedPicture:
    """A picture and the part of it that is redrawn, on canvases of any size."""

    picture: Tensor
    """(B or 1, 3, H, W), float32 in [0, 1], of the finished picture's size."""
    mask: Tensor
    """(B or 1, 1, H, W), float32: 1 where it is redrawn, 0 elsewhere."""
    encode: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) -> latents (B, C, h, w), as of a `Run`."""
    factor: int
    """The pixels of an image for one latent, on each axis."""
    _kept: dict[tuple[Size, Span | None], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def placed(
        cls,
        picture: Tensor,
        mask: Tensor | None,
        place: tuple[int, int],
        size: Size,
        encode: Callable[[Tensor], Tensor],
        factor: int,
    ) -> MaskedPicture:
        """A picture (B or 1, 3, h, w) at a place (right, down) in pixels on a canvas of `size` latents, beside which
        all is redrawn; its border goes on there, for the VAE and for a run that begins with it. `mask` is
        (B or 1, 1, h, w)."""
        (right, down), (height, width) = place, picture.shape[2:]
        around = (right, size[1] * factor - width - right, down, size[0] * factor - height - down)
        mask = torch.zeros_like(picture[:, :1]) if mask is None else mask
        return cls(F.pad(picture, around, mode="replicate"), F.pad(mask, around, value=1.0), encode, factor)

    @classmethod
    def all_redrawn(cls, size: Size, encode: Callable[[Tensor], Tensor], factor: int) -> MaskedPicture:
        """The one that an inpainting model is shown where it draws from the text alone, on a canvas of `size`."""
        mask = torch.ones(1, 1, size[0] * factor, size[1] * factor, device="cpu")
        return cls((GREY * mask).expand(-1, 3, -1, -1), mask, encode, factor)

    def on_canvas(self, size: Size) -> tuple[Tensor, Tensor]:
        """The part that is redrawn, (B or 1, 1, *size), bool, True for every latent of which any pixel is; and the
        latents of the picture, (B or 1, C, *size)."""
        if (size, None) not in self._kept:
            picture = self.encode(self._resized(self.picture, size))
            self._kept[size, None] = F.adaptive_max_pool2d(self.mask, size).to(picture.device) > 0, picture
        return self._kept[size, None]

    def beside(self, size: Size, span: Span) -> tuple[Tensor, Tensor]:
        """The channels that an inpainting model is shown, as `Denoiser.beside`: of each latent's pixels the
        mask has the first."""
        if (size, span) not in self._kept:
            picture, mask = (_padded(part, size, span) for part in (self.picture, self.mask))
            mask = F.adaptive_max_pool2d(mask, (size[0] * self.factor, size[1] * self.factor))
            picture = torch.where(mask > 0, GREY, self._resized(picture, size))
            self._kept[size, span] = resize(mask, size, "nearest"), self.encode(picture)
        return self._kept[size, span]

    def laid_onto(self, images: Tensor, feather: int) -> Tensor:
        """Images (B, 3, H, W) as they are where the mask is 1, and the picture itself, to the bit, at all pixels that
        are `feather` pixels and more away from it, in any direction; between them one fades into the other."""
        weight = feathered(self.mask, feather).to(images)
        picture = self.picture.to(images)
        return torch.where(weight > 0, torch.lerp(picture, images, weight), picture)

    def _resized(self, picture: Tensor, size: Size) -> Tensor:
        """The picture in the pixels of a canvas."""
        return resize(picture, (size[0] * self.factor, size[1] * self.factor))


def is_white(images: Tensor) -> Tensor:
    """1 for the pixels of images (B, 3, H, W) that are nearer to white than to black, and 0 elsewhere: (B, 1, H, W)."""
    return (images.mean(dim=1, keepdim=True) >= 0.5).float()


def _padded(pixels: Tensor, size: Size, span: Span) -> Tensor:
    """Pixels (B, C, H, W) of what spans a part of a canvas of `size`, extended by reflection to all of it."""
    bottom, right = (
        round(side * whole / part) - side for side, whole, part in zip(pixels.shape[2:], size, span, strict=True)
    )
    return F.pad(pixels, (0, right, 0, bottom), mode="reflect") if bottom or right else pixels


def feathered(mask: Tensor, width: int) -> Tensor:
    """Weights (B, 1, H, W): 1 where the mask is, falling evenly with the distance to it, and 0 from `width` pixels away
    on, in any direction."""
    if width < 2:
        return mask
    in_column = _steps_to(mask, width).square()
    beside = F.pad(in_column, (width, width), value=width**2)
    squared = in_column
    for right in range(1 - width, width):
        squared = torch.minimum(squared, beside.narrow(3, width + right, mask.shape[3]) + right**2)
    return (1 - squared.sqrt() / width).clamp(0, 1)


def _steps_to(mask: Tensor, most: int) -> Tensor:
    """The distance of each pixel to the nearest one of a mask (B, 1, H, W), 0 and 1, in its column; at most `most`."""
    rows = torch.arange(mask.shape[2], device=mask.device, dtype=torch.float32)[:, None]
    above, below = (torch.where(mask > 0, rows, far) for far in (-most, mask.shape[2] + most))
    above, below = above.cummax(2).values, below.flip(2).cummin(2).values.flip(2)
    return torch.minimum(rows - above, below - rows).clamp(max=most)
