"""Magnify: one whole picture of native size, enlarged, given back some of its noise, and drawn on in views.

CutDiffusion draws the structure N times, on patches that must be made to agree, and at a 4×4 grid they do not. Here it
is drawn once, as the one picture that the network knows best; relocation becomes enlargement. The detail stage is
CutDiffusion's but for three things: it begins earlier; it goes without guidance, because a prompt that is pressed onto
a view makes the view show all of it, and so costs half; and of each estimate the low frequencies, those that the native
picture has, are held to that picture, less and less. What each of these does is measured in notebooks/better.ipynb.

The parts are known: re-noising an enlarged picture is SDEdit (Meng et al. 2021, arXiv 2108.01073), progressive sizes
with a residual are DemoFusion's (2311.16973), which draws every size between and guides its views by patches as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cutdiff.methods.shared import Run, Stages, Tiled, fade, phase_sizes, step_at, with_guidance_scale
from cutdiff.options import Scale, Share
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Stage


@dataclass(frozen=True, kw_only=True)
class Magnify(Tiled):
    """All steps on the native picture, then the steps from structure_fraction · num_steps on, at least the last one."""

    structure_fraction: Share = 0.3
    """The share of the steps, rounded up, that the details leave out: measured in notebooks/better.ipynb."""
    detail_guidance_scale: Scale = 1.0
    """The guidance scale of the detail stage; 1 evaluates the prompt alone."""

    def stages(self, run: Run) -> Stages:
        smallest, *larger = phase_sizes(run.size, run.native_size)
        stages: Stages = [
            Stage("structure", range(run.num_steps), self.on_whole(replace(run, size=smallest)), smallest)
        ]
        if larger:
            first = min(step_at(self.structure_fraction, run.num_steps), run.num_steps - 1)
            stages.append(self.enlarged(run, range(run.num_steps + first, 2 * run.num_steps)))
        return stages

    def enlarged(self, run: Run, steps: range) -> Phase:
        """The detail stage on the run's canvas, from what the structure stage ended with."""
        views = self.on_views(with_guidance_scale(run, self.detail_guidance_scale))

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            guide = resize(picture, run.size)
            sigma = run.schedule.sigmas[steps.start % run.num_steps]
            x = renoise(guide, sigma, run.draws.phase_noise(tuple(guide.shape), 2).to(guide))
            return x, Stage("detail", steps, self.hold(run, picture, views), run.size)

        return Phase(steps, run.size, begin)

    def hold(self, run: Run, picture: Tensor, denoise: CanvasDenoiser) -> CanvasDenoiser:
        """Move the estimate of `denoise` towards `picture` (B, C, h, w) in all that a canvas of that size can hold."""

        def denoise_towards(x: Tensor, sigma: float, step: int) -> Tensor:
            denoised = denoise(x, sigma, step)
            missing = picture - resize(denoised, (picture.shape[2], picture.shape[3]), "area")
            return denoised + fade(run, sigma) * resize(missing, run.size)

        return denoise_towards
