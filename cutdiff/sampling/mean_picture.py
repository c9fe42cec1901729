"""The picture of native size inside a canvas: the mean of its patches, which the network denoises in one evaluation.

Upsample guidance (Hwang et al. 2024, arXiv 2404.01709) is built on it. The mean of n pixels of x = x0 + σ·noise has the
mean of x0 and noise of σ / √n: a state of the native size, at a smaller sigma, which need not lie on the run's
schedule. Below the smallest sigma of the training a model with timesteps is told timestep 0, an EDM model the sigma
itself; the sigma that removes the noise is σ / √n always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.operators import pad_to_grid
from cutdiff.sampling.resize import Resampling, resize
from cutdiff.sampling.stages import CanvasDenoiser

Weight = Callable[[float, int], float]
"""(sigma, step) -> how much a guide counts."""


@dataclass(frozen=True)
class MeanPicture:
    """The mean of the patches that a canvas (B, C, H, W) is cut into, (B, C, h, w), and the way back to the canvas.

    A canvas that the grid does not divide is padded by reflection for the mean, and cropped on the way back. On a grid
    of 1×1 the picture is the canvas.
    """

    denoiser: Denoiser
    grid: Size
    """The pixels of the canvas for one of the picture, on each axis."""
    upsampling: Resampling = "nearest"
    conditioning_size: Size | None = None
    """The size in latents that the network is told; None: that of the picture, a whole one."""

    def pool(self, canvas: Tensor) -> Tensor:
        """The picture of a canvas."""
        padded = pad_to_grid(canvas, self.grid)
        return resize(padded, (padded.shape[2] // self.grid[0], padded.shape[3] // self.grid[1]), "area")

    def up(self, picture: Tensor, size: Size) -> Tensor:
        """The picture as a canvas of `size`."""
        padded = (picture.shape[2] * self.grid[0], picture.shape[3] * self.grid[1])
        return resize(picture, padded, self.upsampling)[:, :, : size[0], : size[1]]

    def denoise(self, canvas: Tensor, sigma: float, step: int) -> Tensor:
        """D(pool(x); σ / √n), of the picture's size. The prompt is guided where the step is, at the run's sigma."""
        height, width = (side / cells for side, cells in zip(canvas.shape[2:], self.grid, strict=True))
        return replace(self.denoiser, guidance_sigma=sigma)(
            self.pool(canvas),
            sigma / math.sqrt(math.prod(self.grid)),
            step,
            original_size=self.conditioning_size,
            target_size=self.conditioning_size,
            span=(height, width),
        )

    def __call__(self, canvas: Tensor, sigma: float, step: int) -> Tensor:
        """up(D(pool(x); σ / √n)): the canvas denoiser that draws what the picture can hold."""
        return self.up(self.denoise(canvas, sigma, step), (canvas.shape[2], canvas.shape[3]))

    def guiding(self, denoise: CanvasDenoiser, weight: Weight) -> CanvasDenoiser:
        """x0 + w·up(D(pool(x); σ / √n) − pool(x0)) for the x0 of `denoise`: at w = 1 the mean of x0 becomes D's.

        On a grid of 1×1, where there is nothing smaller to guide by, it is `denoise` itself.
        """
        if self.grid == (1, 1):
            return denoise

        def guided(canvas: Tensor, sigma: float, step: int) -> Tensor:
            x0 = denoise(canvas, sigma, step)
            difference = self.denoise(canvas, sigma, step) - self.pool(x0)
            return x0 + weight(sigma, step) * self.up(difference, (canvas.shape[2], canvas.shape[3]))

        return guided
