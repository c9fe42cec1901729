"""A given picture at the start of a run: a method that draws a native picture and goes on from it takes the given one
in its place (upscale); of all others the last steps alone are taken, from the picture and noise (img2img)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cutdiff.methods.shared import Run, phase_sizes, step_at
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Size, Stage, standing


class Given:
    """A canvas denoiser that answers with the given picture on its run's canvas, whatever it is shown, so that any
    solver ends with that. `looks(step)` tells whether `denoise` is asked all the same, for what a method reads in the
    network."""

    def __init__(self, run: Run, denoise: CanvasDenoiser, looks: Callable[[int], bool]) -> None:
        self.run, self.denoise, self.looks = run, denoise, looks
        self.latents: Tensor | None = None

    def __call__(self, latents: Tensor, sigma: float, step: int) -> Tensor:
        if self.looks(step):
            self.denoise(latents, sigma, step)
        if self.latents is None:
            self.latents = self.run.given(self.run.size).to(latents)
        return self.latents


def first_picture(
    run: Run, denoise: CanvasDenoiser, looks: Callable[[int], bool] = lambda step: False
) -> CanvasDenoiser:
    """The denoiser of the picture, on the run's canvas, that a method goes on from: `denoise`, or where a picture is
    given, `Given`, which evaluates no network but at steps where the method `looks` into it."""
    return denoise if run.image is None else Given(run, denoise, looks)


def canvases(run: Run, factors: Sequence[float] | None = None) -> tuple[Size, list[tuple[int, Size]]]:
    """The canvas of the first picture, and all larger ones with their numbers among those of `phase_sizes`, from 2 on.

    A given picture that is larger than native is the first one itself, at the most as large as the run's, and those
    that are no larger are left out; but the run's own canvas, which is drawn in any case.
    """
    first, *larger = phase_sizes(run.size, run.native_size, factors)
    numbered = [*enumerate(larger, 2)]
    if run.image is None:
        return first, numbered
    if max(own := run.image.own_size(run.size)) > max(first):
        first = min(own, run.size, key=max)
    return first, [(n, size) for n, size in numbered if max(size) > max(first)] or [(max(len(larger), 1) + 1, run.size)]


def drawn_on(
    run: Run, stages: Sequence[Stage | Phase], strength: float, scale: float, *, invert: bool = False
) -> list[Stage | Phase]:
    """The last steps of stages on one canvas, a share `strength` of them, rounded up, from the given picture and noise:
    SDEdit (Meng et al. 2021, arXiv 2108.01073), or with `invert` from the state that `inverted` gives. `scale` is that
    of the noise which a run begins with at the first step.

    ValueError where the stages draw a picture of another size first.
    """
    if any(isinstance(stage, Phase) or stage.size not in (None, run.size) for stage in stages):
        raise ValueError(
            "draws on several canvases and does not say how it takes an image: let it take run.image by "
            "methods.picture.first_picture, with takes_picture = True"
        )
    first = run.num_steps - step_at(strength, run.num_steps)
    kept = [from_step(stage, first) for stage in stages if isinstance(stage, Stage) and stage.steps.stop > first]
    start = kept[0]
    sigma, _ = sigmas_of(run, start, start.steps.start)

    def begin(x: Tensor) -> tuple[Tensor, Stage]:
        picture = run.given(run.size).to(x)
        if invert:
            return inverted(run, kept, picture), start
        return renoise(picture, sigma, x / (scale if first == 0 else sigma)), start

    return [Phase(start.steps, run.size, begin), *kept[1:]]


def inverted(run: Run, stages: Sequence[Stage], picture: Tensor) -> Tensor:
    """The state (B, C, H, W) from which the stages' steps lead back to a picture: DDIM inversion (Song et al. 2020,
    arXiv 2010.02502, section 4.3), which takes Euler's steps from the last to the first.

    The noise of a step is that which its own denoiser sees in the state above it. That state is not known yet: it is
    guessed with the noise of the step below, which leaves an error of second order, for one estimate a step.
    """
    x, noise = picture, torch.zeros_like(picture)
    for stage in reversed(stages):
        for step in reversed(stage.steps):
            sigma, target = sigmas_of(run, stage, step)
            above = x + (sigma - target) * noise
            noise = (above - stage.denoise(above, sigma, step)) / sigma
            x = x + (sigma - target) * noise
    return x


def sigmas_of(run: Run, stage: Stage, step: int) -> tuple[float, float]:
    """The sigma of a step of the stage, and that of the next."""
    schedule, first = standing(stage, run.schedule)
    return schedule.sigmas[step - first], schedule.sigmas[step - first + 1]


def from_step(stage: Stage, first: int) -> Stage:
    """The stage without its steps before the step `first`."""
    left_out = max(0, first - stage.steps.start)
    sigmas, targets = (None if values is None else values[left_out:] for values in (stage.sigmas, stage.targets))
    return replace(stage, steps=stage.steps[left_out:], sigmas=sigmas, targets=targets)
