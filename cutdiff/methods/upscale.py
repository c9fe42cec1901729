"""Upscale: the native picture, enlarged by interpolation or by a super-resolution network: what all others must beat.

Every step is taken at native size, so the picture has the right things in it, and nothing that only a large one could
show but what the upscaler makes up. It is decoded, enlarged in pixels and encoded again, so that a run ends on its
canvas as all others do.

With the embedded model, whose VAE is small, that way through the VAE costs a decibel: 24 renders of native size that
were encoded, decoded and enlarged by bicubic interpolation are 33.6 dB from true ones at 256 px and 32.6 dB at 512 px,
and encoded and decoded again 32.4 and 31.5 dB. What comes back is 36.1 dB (32.8 to 38.3) and 34.7 dB (30.8 to 37.7)
from what went in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Stages
from cutdiff.options import Options
from cutdiff.sampling.resize import resize
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.specs import name_of, part, resolve

Upscaler = Callable[..., Tensor]
"""(images (1, 3, h, w), float32 in [0, 1], size in pixels) -> images (1, 3, *size)."""
OVERSHOOT = 0.5
"""How far an upscaler may go past 0 and 1, where its images are clamped: bicubic interpolation goes to 0.45."""


@dataclass(frozen=True, kw_only=True)
class Upscale(Options):
    """All steps on the native picture, which is then enlarged."""

    takes_picture: ClassVar[bool] = True

    upscaler: str | Upscaler = "bicubic"
    """The upscaler: "bicubic", "bilinear", "nearest", or as `module:function` or itself any function of (images
    (1, 3, h, w) in [0, 1], size in pixels) that gives images (1, 3, *size), a network's too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "upscaler", part("upscaler", "upscaler", self.upscaler))

    def stages(self, run: Run) -> Stages:
        smallest, larger = canvases(run, ())
        denoise = first_picture(replace(run, size=smallest), run.denoiser)
        stages: Stages = [Stage("native", range(run.num_steps), denoise, smallest)]
        last = range(2 * run.num_steps - 1, 2 * run.num_steps)

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            given = None if run.image is None else run.image(smallest).to(picture)  # not by way of the VAE
            images = map(run.decode, picture.split(1)) if given is None else given.split(1)
            latents = torch.cat([run.encode(self.enlarged(run, image)) for image in images])
            latents = latents.expand(len(picture), -1, -1, -1)
            # A picture is its own estimate of x0. DDIM may end short of sigma 0, and its state by another factor.
            return latents, Stage("upscale", last, lambda x, sigma, step: x, run.size, end=lambda x: latents)

        return [*stages, Phase(last, run.size, begin)] if larger else stages

    def enlarged(self, run: Run, image: Tensor) -> Tensor:
        """An image (1, 3, h, w) in [0, 1] -> one of the size of the run's canvas, in [0, 1], float32.

        A planned run, whose images have no values, does not call the upscaler. ValueError, which names it, where it
        fails or gives something else.
        """
        shape = (1, 3, *(side * run.denoiser.factor for side in run.size))
        if image.is_meta:
            return image.new_empty(shape)
        upscaler = resolve("upscaler", self.upscaler)
        name = f"upscaler={name_of('upscaler', upscaler)}"
        try:
            larger = upscaler(image, shape[2:])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            words = " ".join(str(error).split())
            raise ValueError(
                f"{name} failed on images of {tuple(image.shape)}, {type(error).__name__}: {words:.300}"
            ) from error
        if not isinstance(larger, Tensor) or larger.shape != shape or not larger.is_floating_point():
            what = f"{tuple(larger.shape)} of {larger.dtype}" if isinstance(larger, Tensor) else type(larger).__name__
            raise ValueError(f"{name} gave {what} for {tuple(image.shape)}, where floats of {shape} are needed")
        low, high = larger.aminmax()
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN is not either
            raise ValueError(f"{name} gave values from {low:.4g} to {high:.4g}, where images in [0, 1] are needed")
        return larger.to(image).clamp(0, 1)


def bicubic(images: Tensor, size: Size) -> Tensor:
    """Bicubic interpolation, as of `resize`."""
    return resize(images, size, "bicubic")


def bilinear(images: Tensor, size: Size) -> Tensor:
    """Bilinear interpolation."""
    return resize(images, size, "bilinear")


def nearest(images: Tensor, size: Size) -> Tensor:
    """The pixel that lies nearest."""
    return resize(images, size, "nearest")
