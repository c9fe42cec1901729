"""Magnify: one whole picture of native size, enlarged, given back some of its noise, and drawn on in views.

CutDiffusion draws the structure N times, on patches that must be made to agree, and at a 4×4 grid they do not. Here it
is drawn once, as the one picture that the network knows best; relocation becomes enlargement. The detail stage is
CutDiffusion's but for three things: it begins earlier; it goes without guidance, because a prompt that is pressed onto
a view makes the view show all of it, and so costs half; and of each estimate the low frequencies, those that the native
picture has, are held to that picture, less and less. What each of these does is measured in notebooks/better.ipynb.

The parts are known: re-noising an enlarged picture is SDEdit (Meng et al. 2021, arXiv 2108.01073), progressive sizes
with a residual are DemoFusion's (2311.16973), which draws every size between and guides its views by patches as well.

`hold="trajectory"` is the hold of HiFlow (Bu et al. 2025, 2504.06232): the low band of each estimate is moved to that
of the estimate which the native picture had at the same sigma, all the way at the first step of the details and less at
each that follows. It is said of flows there, in terms of x0, so that it is the same here. Its code enlarges the picture
through the VAE (`enlarged_in="pixels"`), sharpened, and adds an alignment of accelerations, which is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from cutdiff.methods.shared import Run, Space, Stages, enlarge, fade, phase_sizes, step_at, with_guidance_scale
from cutdiff.methods.tiled import Tiled
from cutdiff.options import Scale, Share
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.split import Split
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Stage
from cutdiff.specs import part, resolve


@dataclass(frozen=True, kw_only=True)
class Magnify(Tiled):
    """All steps on the native picture, then the steps from structure_fraction · num_steps on, at least the last one."""

    structure_fraction: Share = 0.3
    """The share of the steps, rounded up, that the details leave out: measured in notebooks/better.ipynb."""
    detail_guidance_scale: Scale = 1.0
    """The guidance scale of the detail stage; 1 evaluates the prompt alone."""
    enlarged_in: Space = "latents"
    """The space in which the native picture is enlarged: its "latents" themselves, or its "pixels", through the VAE."""
    hold: Literal["picture", "trajectory", "none"] = "picture"
    """What the low band of each estimate is moved to: the native "picture", by a share that fades with sigma; the
    "trajectory" of estimates that led to it, by one that falls with every step from 1 (HiFlow); or "none"."""
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

    def stages(self, run: Run) -> Stages:
        smallest, *larger = phase_sizes(run.size, run.native_size)
        structure = self.on_whole(replace(run, size=smallest))
        if self.hold == "trajectory":
            structure = Trajectory(structure, run.num_steps)
        stages: Stages = [Stage("structure", range(run.num_steps), structure, smallest)]
        if larger:
            first = min(step_at(self.structure_fraction, run.num_steps), run.num_steps - 1)
            stages.append(self.enlarged(run, range(run.num_steps + first, 2 * run.num_steps), structure))
        return stages

    def enlarged(self, run: Run, steps: range, structure: CanvasDenoiser) -> Phase:
        """The detail stage on the run's canvas, from what the structure stage, whose denoiser is given, ended with."""
        views = self.on_views(with_guidance_scale(run, self.detail_guidance_scale))

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            guide = enlarge(run, picture, self.enlarged_in)
            sigma = run.schedule.sigmas[steps.start % run.num_steps]
            x = renoise(guide, sigma, run.draws.phase_noise(tuple(guide.shape), 2).to(guide))
            denoise = views
            if isinstance(structure, Trajectory):
                denoise = self.towards_trajectory(run, structure, steps, views)
            elif self.hold == "picture":
                denoise = self.towards_picture(run, picture, guide, views)
            return x, Stage("detail", steps, denoise, run.size)

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

    def towards_trajectory(
        self, run: Run, structure: Trajectory, steps: range, denoise: CanvasDenoiser
    ) -> CanvasDenoiser:
        """Move the low band of the estimate of `denoise` to that of the structure's at the same sigma, enlarged in
        latents, by a share of 1 at the first of `steps` that falls by equal parts."""

        def denoise_towards(x: Tensor, sigma: float, step: int) -> Tensor:
            denoised = denoise(x, sigma, step)
            reference = resize(structure.estimates[step % run.num_steps], run.size)
            missing = resolve("split", self.hold_split or "butterworth").low(reference - denoised)
            return denoised + (steps.stop - step) / len(steps) * missing

        return denoise_towards


class Trajectory:
    """A canvas denoiser that keeps its estimates of x0 of all the steps of a run."""

    def __init__(self, denoise: CanvasDenoiser, num_steps: int) -> None:
        self.denoise, self.num_steps = denoise, num_steps

    def __call__(self, latents: Tensor, sigma: float, step: int) -> Tensor:
        estimate = self.denoise(latents, sigma, step)
        if step == 0:
            self.estimates = estimate.new_empty(self.num_steps, *estimate.shape)
        self.estimates[step] = estimate
        return estimate
