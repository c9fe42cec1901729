"""Magnify: one whole picture of native size, enlarged, given back some of its noise, and drawn on in views.

CutDiffusion draws the structure N times, on patches that must be made to agree, and at a 4×4 grid they do not. Here it
is drawn once, as the one picture that the network knows best; relocation becomes enlargement. The detail stage is
CutDiffusion's but for three things: it begins earlier; it goes without guidance, because a prompt that is pressed onto
a view makes the view show all of it, and so costs half; and of each estimate the low frequencies, those that the native
picture has, are held to that picture, less and less. What each of these does is measured in notebooks/better.ipynb.

`Climb` is its next form, found in notebooks/newer.ipynb: it grows by no more than twice at a time, in pixels, sharpened
once, gives back what the VAE takes from them, and begins its details later.

The parts are known: re-noising an enlarged picture is SDEdit (Meng et al. 2021, arXiv 2108.01073), progressive sizes
with a residual are DemoFusion's (2311.16973), which draws every size between and guides its views by patches as well.

`hold="trajectory"` is the hold of HiFlow (Bu et al. 2025, 2504.06232): the low band of each estimate is moved to that
of the estimate which the native picture had at the same sigma, all the way at the first step of the details and less at
each that follows. It is said of flows there, in terms of x0, so that it is the same here. Its code enlarges the picture
in pixels, sharpened, as `Climb`, and adds an alignment of accelerations, which is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Space, Stages, enlarge, fade, falling, step_at, with_guidance_scale
from cutdiff.methods.tiled import Tiled
from cutdiff.methods.trajectory import Trajectory
from cutdiff.options import Between, Scale, Share
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.split import Gaussian, Split, sharpened
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Size, Stage
from cutdiff.settings import Settings
from cutdiff.specs import part, resolve


@dataclass(frozen=True, kw_only=True)
class Magnify(Tiled):
    """All steps on the native picture, then on each larger canvas the steps from structure_fraction · num_steps on, at
    least the last one."""

    takes_picture: ClassVar[bool] = True

    structure_fraction: Share = 0.3
    """The share of the steps, rounded up, that the details leave out: measured in notebooks/better.ipynb."""
    detail_guidance_scale: Scale = 1.0
    """The guidance scale of the details; 1 or less evaluates the prompt alone."""
    growth: Annotated[float, Between(1.01)] | None = None
    """The most by which a canvas is larger than the one before; those between grow evenly. None: at once."""
    enlarged_in: Space = "latents"
    """The space in which a picture is enlarged: its "latents" themselves, or its "pixels", through the VAE."""
    sharpness: Annotated[float, Between(0, 1000)] = 0.0
    """How much of what a Gaussian takes from the enlarged native picture is added to it, in pixels; 0 is off. The
    Gaussian's deviation is the side of an enlarged pixel."""
    corrections: Annotated[int, Between(0, 100)] = 0
    """How many times an enlarged picture is given back what the VAE takes from it on the way there and back."""
    hold: Literal["picture", "trajectory", "none"] = "picture"
    """The guide that the low band of each estimate is moved to: the "picture" before, by a share that fades with sigma;
    the "trajectory" of estimates that led to it, by one that falls with every step from 1 (HiFlow); or "none"."""
    hold_split: str | Split | None = None
    """The split that tells the low band, a spec of down_up, gaussian, butterworth or wavelet, or an object with
    `low(x)`; None: for the picture the mean over the area of each of its pixels, for the trajectory butterworth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold_split is None:
            return
        if self.hold == "none":
            raise ValueError(f"hold_split={self.hold_split!r} is for a hold, and hold='none': leave one out")
        object.__setattr__(self, "hold_split", part("split", "hold_split", self.hold_split))

    def check_settings(self, settings: Settings) -> None:
        """ValueError where latents are to be sharpened or corrected."""
        for name in ("sharpness", "corrections"):
            if (value := getattr(self, name)) and self.enlarged_in != "pixels":
                raise ValueError(f"{name}={value} is of pixels: give enlarged_in='pixels', or {name}=0")

    @staticmethod
    def of_strength(share: float) -> dict[str, Any]:
        """The options that let the details take a share of the steps."""
        return {"structure_fraction": 1 - share}

    def stages(self, run: Run) -> Stages:
        native, *larger = self.sizes(run)
        on_native = replace(run, size=native)
        denoise = first_picture(on_native, self.on_whole(on_native))
        before = Trajectory(denoise, run.num_steps, self.hold == "trajectory")
        stages: Stages = [Stage("structure", range(run.num_steps), before, native)]
        first = min(step_at(self.structure_fraction, run.num_steps), run.num_steps - 1)
        for number, size in enumerate(larger, 1):
            steps = range(number * run.num_steps + first, (number + 1) * run.num_steps)
            name = "detail" if len(larger) == 1 else f"detail {number}"
            on_canvas = with_guidance_scale(replace(run, size=size), self.detail_guidance_scale)
            views = Trajectory(self.on_views(on_canvas), run.num_steps, self.hold == "trajectory")
            stages.append(self.enlarged(on_canvas, name, steps, before, views))
            before = views
        return stages

    def sizes(self, run: Run) -> list[Size]:
        """The canvases, from the native one or the given picture's own on."""
        first, _ = canvases(run, ())
        start, scale = max(first) / run.native_size, max(run.size) / max(first)
        count = 1 if self.growth is None else math.ceil(round(math.log(scale, self.growth), 9))
        _, larger = canvases(run, [start * scale ** (i / count) for i in range(1, count)])
        return [first, *(size for _, size in larger)]

    def enlarged(self, run: Run, name: str, steps: range, before: Trajectory, views: Trajectory) -> Phase:
        """Details on the run's canvas, from what the stage of the denoiser `before` ended with."""
        number = steps.start // run.num_steps

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            width = max(large / small for large, small in zip(run.size, picture.shape[2:], strict=True))
            sharpen = partial(sharpened, amount=self.sharpness, split=Gaussian(width))
            change = sharpen if self.sharpness and number == 1 and width > 1 else None
            guide = enlarge(run, picture, self.enlarged_in, change=change, corrections=self.corrections)
            sigma = run.schedule.sigmas[steps.start % run.num_steps]
            x = renoise(guide, sigma, run.draws.phase_noise(tuple(guide.shape), number + 1).to(guide))
            denoise: CanvasDenoiser = views
            if self.hold == "trajectory":
                denoise = self.towards_trajectory(run, before, steps, views)
            elif self.hold == "picture":
                denoise = self.towards_picture(run, picture, guide, views)
            return x, Stage(name, steps, denoise, run.size)

        return Phase(steps, run.size, begin)

    def towards_picture(self, run: Run, picture: Tensor, guide: Tensor, denoise: CanvasDenoiser) -> CanvasDenoiser:
        """Move the low band of the estimate of `denoise` towards that of `picture` (B, C, h, w), which is enlarged in
        `guide` (B, C, H, W): without a split, all that a canvas of the picture's size can hold."""

        def denoise_towards(x: Tensor, sigma: float, step: int) -> Tensor:
            denoised = denoise(x, sigma, step)
            if self.hold_split is not None:
                missing = resolve("split", self.hold_split).low(guide - denoised)
            else:
                coarse = resize(denoised, (picture.shape[2], picture.shape[3]), "area")
                missing = resize(picture - coarse, run.size)
            return denoised + fade(run, sigma) * missing

        return denoise_towards

    def towards_trajectory(self, run: Run, before: Trajectory, steps: range, denoise: Trajectory) -> CanvasDenoiser:
        """Move the low band of each estimate of `denoise` to that of the same one before, of the same step and sigma,
        enlarged in latents, by a share of 1 at the first of `steps` that falls by equal parts."""

        split, share = resolve("split", self.hold_split or "butterworth"), falling(1.0, steps)

        def denoise_towards(x: Tensor, sigma: float, step: int) -> Tensor:
            denoised = denoise(x, sigma, step)
            reference = denoise.reference(before, sigma, step, run.size)
            return denoised + share(sigma, step) * split.low(reference - denoised)

        return denoise_towards


@dataclass(frozen=True, kw_only=True)
class Climb(Magnify):
    """Magnify in several steps of size: the same options with other defaults."""

    structure_fraction: Share = 0.5
    """The share of the steps, rounded up, that the details leave out."""
    growth: Annotated[float, Between(1.01)] | None = 2.0
    """The most by which a canvas is larger than the one before; those between grow evenly. None: at once."""
    enlarged_in: Space = "pixels"
    """The space in which a picture is enlarged: its "latents" themselves, or its "pixels", through the VAE."""
    sharpness: Annotated[float, Between(0, 1000)] = 2.0
    """How much of what a Gaussian takes from the enlarged native picture is added to it, in pixels; 0 is off. The
    Gaussian's deviation is the side of an enlarged pixel."""
    corrections: Annotated[int, Between(0, 100)] = 1
    """How many times an enlarged picture is given back what the VAE takes from it on the way there and back."""
