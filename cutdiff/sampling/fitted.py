"""A given picture, fitted to canvases of any size and one shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from cutdiff.models.config import Size
from cutdiff.sampling.resize import resize
from cutdiff.settings import Fit


@dataclass(frozen=True)
class Fitted:
    """`fitted(size)` is the picture on a canvas of a size in latents: images (B, 3, H, W), float32 in [0, 1]."""

    pixels: Tensor
    """The picture (B, 3, h, w), float32 in [0, 1], cropped to the canvas's shape where it is to "cover" it."""
    fit: Fit
    factor: int
    """The pixels of an image for one latent, on each axis."""

    @staticmethod
    def to(size: Size, pixels: Tensor, fit: Fit, factor: int) -> Fitted:
        """The picture (B, 3, h, w) for canvases of the shape of `size`, its middle where it is cropped."""
        if fit == "cover":
            for axis, (side, other) in ((2, size), (3, size[::-1])):
                here, across = pixels.shape[axis], pixels.shape[5 - axis]
                length = max(1, round(across * side / other))
                if length < here:
                    pixels = pixels.narrow(axis, (here - length) // 2, length)
        return Fitted(pixels, fit, factor)

    def own_size(self, size: Size) -> Size:
        """The size in latents, of the shape of the canvas `size`, at which the picture has as many pixels as it has."""
        scale = max(here / (side * self.factor) for here, side in zip(self.pixels.shape[2:], size, strict=True))
        height, width = (max(1, round(side * scale)) for side in size)
        return height, width

    def __call__(self, size: Size) -> Tensor:
        height, width = (side * self.factor for side in size)
        if self.fit != "contain":
            return resize(self.pixels, (height, width)).clamp(0, 1)
        scale = min(height / self.pixels.shape[2], width / self.pixels.shape[3])
        inner = [max(1, round(side * scale)) for side in self.pixels.shape[2:]]
        image = resize(self.pixels, (min(inner[0], height), min(inner[1], width))).clamp(0, 1)
        down, right = height - image.shape[2], width - image.shape[3]
        return pad(image, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
