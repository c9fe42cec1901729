"""DiffuseHigh (Kim et al. 2024, arXiv 2406.18459): the native picture, drawn on at growing sizes, its low band held.

For each larger size the picture before it is enlarged in pixels, sharpened, encoded and noised, and the whole canvas
takes the last steps again. In the first of these each estimate is decoded, and the low band of its wavelet (LL) is
exchanged for that of the enlarged picture, which so keeps its structure; the network adds details.

Defaults are those of the published code, with a guidance of 5 for the native picture. As there:
- The blur's deviation is drawn at each size. Decoding clamps; resizing, sharpening and the exchange do not.
- The network is told the native size throughout, and a run without guidance has none on larger canvases either.
Where it is not followed:
- It draws one deviation for all pictures of a batch; here each picture has its own.
- It draws a square first, whatever the shape, and stretches it: `native_shape="square"` is that.
- It runs the VAE on tiles of large pictures, which it blends; here the VAE sees the whole.
- It takes a list of sizes, and Euler's solver; here sizes are multiples of the native one, and any solver will do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Space, Stages, on_whole, phase_sizes, step_at, with_guidance_scale
from cutdiff.options import Between, Options, Scale, Share
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.split import Gaussian, Split, sharpened
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.settings import Settings
from cutdiff.specs import part, resolve

Deviation = Annotated[float, Between(0.01, 1000)]


@dataclass(frozen=True, kw_only=True)
class DiffuseHigh(Options):
    """All steps on the native picture, then the last ones on every larger canvas."""

    takes_picture: ClassVar[bool] = True

    factors: tuple[Annotated[float, Between(1)], ...] | None = None
    """The longer sides of the canvases on the way, in native ones. None: 1.5 up to twice that, else 2, 3, …"""
    strength: Share = 0.3
    """The share of the steps, rounded up, that a larger canvas takes, at least one: the published 15 of 50."""
    held_fraction: Share = 0.1
    """The share of the steps, rounded up, in which a larger canvas is held at first: the published 5 of 50."""
    held_band: str | Split = "wavelet,name=db4"
    """The split whose low band is held: a spec of down_up, gaussian, butterworth or wavelet, or an object."""
    held_in: Space = "pixels"
    """The space in which estimates are held: "pixels", for which each goes through the VAE, or "latents"."""
    enlarged_in: Space = "pixels"
    """The space in which a picture is enlarged and sharpened: "pixels" or "latents"."""
    sharpness: Annotated[float, Between(0, 1000)] = 1.0
    """The paper's α in (1 + α)·picture − α·blur(picture); 0 is off."""
    blur: tuple[Deviation, Deviation] = (0.1, 2.0)
    """The bounds between which each picture draws the deviation of its blur, a Gaussian of 3×3, at every size."""
    detail_guidance_scale: Scale | None = 10.0
    """The guidance scale of the larger canvases, where the run is guided; None: that of the run."""
    size_conditioning: Literal["native", "canvas"] = "native"
    """The size that the network is told: the "native" picture's on every canvas, or that of the "canvas"."""
    native_shape: Literal["canvas", "square"] = "canvas"
    """The shape of the native picture: that of the "canvas", or a "square" that is stretched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "held_band", part("split", "held_band", self.held_band))

    def check_settings(self, settings: Settings) -> None:
        """ValueError where a given picture is to be a square first."""
        if settings.image is not None and not settings.redraws and self.native_shape == "square":
            raise ValueError("native_shape='square' is of a picture that is drawn, and an image is given: leave it out")

    def stages(self, run: Run) -> Stages:
        usual = (1.5,) if max(run.size) <= 2 * run.native_size else None
        native, *_ = phase_sizes(run.size, run.native_size)
        first, larger = canvases(run, usual if self.factors is None else self.factors)
        if larger and self.native_shape == "square":
            native = first = (run.native_size, run.native_size)
        conditioning_size = native if self.size_conditioning == "native" else None
        denoise = first_picture(replace(run, size=first), on_whole(run, conditioning_size))
        stages: Stages = [Stage("phase 1", range(run.num_steps), denoise, first)]
        if getattr(run.denoiser.guidance, "guidance_scale", None) != 1:
            run = with_guidance_scale(run, self.detail_guidance_scale)
        return stages + [self.phase(replace(run, size=size), number, conditioning_size) for number, size in larger]

    def phase(self, run: Run, number: int, conditioning_size: Size | None) -> Phase:
        """Phase `number`, counted from 1, on the run's canvas."""
        steps = range(number * run.num_steps)[-max(1, step_at(self.strength, run.num_steps)) :]
        held = steps[: step_at(self.held_fraction, run.num_steps)]
        denoise_whole, band = on_whole(run, conditioning_size), resolve("split", self.held_band)

        def begin(previous: Tensor) -> tuple[Tensor, Stage]:
            picture = shown(run, previous, self.enlarged_in)
            factor = picture.shape[2] // previous.shape[2]
            picture = resize(picture, (factor * run.size[0], factor * run.size[1]), antialias=False)
            if self.sharpness:
                each = zip(picture.split(1), run.draws.blurs(number, *sorted(self.blur)).tolist(), strict=True)
                picture = torch.cat([sharpened(x, self.sharpness, Gaussian(width, radius=1)) for x, width in each])
            guide = latents_of(run, picture, self.enlarged_in)
            target = shown(run, guide, self.held_in) if held and self.held_in != self.enlarged_in else picture

            def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
                denoised = denoise_whole(x, sigma, step)
                if step not in held:
                    return denoised
                estimate = shown(run, denoised, self.held_in)
                return latents_of(run, estimate + band.low(target - estimate), self.held_in)

            noise = run.draws.phase_noise(tuple(guide.shape), number).to(guide)
            start = renoise(guide, run.schedule.sigmas[steps.start % run.num_steps], noise)
            return start, Stage(f"phase {number}", steps, denoise, run.size, cost=lambda step: step in held)

        return Phase(steps, run.size, begin)


def shown(run: Run, latents: Tensor, space: Space) -> Tensor:
    """Latents in a space: as pictures (B, 3, H, W) in [0, 1], or as they are."""
    return run.decode(latents) if space == "pixels" else latents


def latents_of(run: Run, shown: Tensor, space: Space) -> Tensor:
    """The latents of what is shown in a space; pictures may go past 0 and 1."""
    return run.encode(shown) if space == "pixels" else shown
