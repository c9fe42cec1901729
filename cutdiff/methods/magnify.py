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

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.cutdiffusion import switch_step
from cutdiff.methods.demofusion import denoise_picture, fade, phase_sizes
from cutdiff.methods.multidiffusion import denoise_views
from cutdiff.methods.shared import Run, guided
from cutdiff.sampling.solvers import CanvasDenoiser, Phase, Stage

Hold = Callable[[Run, Tensor, CanvasDenoiser], CanvasDenoiser]

STRUCTURE_FRACTION = 0.3
"""Of the steps that the details leave out: measured in notebooks/better.ipynb."""


def magnify(run: Run) -> list[Stage | Phase]:
    """All steps on the native picture, then the steps from structure_fraction · num_steps on, at least the last one."""
    smallest, *larger = phase_sizes(run.size, run.denoiser.native_size)
    stages: list[Stage | Phase] = [
        Stage("structure", range(run.num_steps), denoise_picture(replace(run, size=smallest)), smallest)
    ]
    if larger:
        first = min(switch_step(run, STRUCTURE_FRACTION), run.num_steps - 1)
        stages.append(enlarged(run, range(run.num_steps + first, 2 * run.num_steps)))
    return stages


def enlarged(run: Run, steps: range, hold: Hold | None = None) -> Phase:
    """The detail stage on the run's canvas, from what the structure stage ended with; `hold` in place of `held`."""

    def begin(picture: Tensor) -> tuple[Tensor, Stage]:
        guide = F.interpolate(picture, run.size, mode="bicubic")
        sigma = run.schedule.sigmas[steps.start % run.num_steps]
        x = guide + sigma * run.draws.phase_noise(tuple(guide.shape), 2).to(guide)
        scale = 1.0 if run.detail_guidance_scale is None else run.detail_guidance_scale
        views = guided(run, scale, denoise_views(run, run.jitter))
        return x, Stage("detail", steps, (hold or held)(run, picture, views), run.size)

    return Phase(steps, run.size, begin)


def held(run: Run, picture: Tensor, denoise: CanvasDenoiser) -> CanvasDenoiser:
    """Move what `denoise` estimates towards `picture` (B, C, h, w) in all that a canvas of that size can hold."""

    def hold(x: Tensor, sigma: float, step: int) -> Tensor:
        denoised = denoise(x, sigma, step)
        missing = picture - F.adaptive_avg_pool2d(denoised, (picture.shape[2], picture.shape[3]))
        return denoised + fade(run, sigma) * F.interpolate(missing, run.size, mode="bicubic")

    return hold
