"""A run that redraws a part of a given picture, by any method: its stages, held to the picture outside of the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutdiff.methods.picture import from_step
from cutdiff.methods.shared import Run, step_at
from cutdiff.models.config import Size
from cutdiff.sampling.masks import MaskedPicture
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.stages import Phase, Stage, standing


@dataclass(frozen=True)
class Redrawn:
    """The stages of a run that redraws a part of a picture."""

    run: Run
    given: MaskedPicture
    holds: bool
    """False for an inpainting model, which is shown what to keep."""

    def stages(self, stages: Sequence[Stage | Phase], strength: float) -> list[Stage | Phase]:
        """The stages, held, from the last steps on the first canvas, a share `strength` of them, rounded up; with less
        than all the run begins with the whole picture and noise. Later canvases are drawn on as ever.

        ValueError where no step on the first canvas is left.
        """
        first = self.run.num_steps - step_at(strength, self.run.num_steps)
        start, *later = [part for part in stages if part.steps]
        while start.steps.stop <= first:
            if not later or isinstance(later[0], Phase) or later[0].size != start.size:
                least = 1 - (start.steps.stop - 1) / self.run.num_steps
                raise ValueError(
                    f"strength={strength:g} leaves out the {start.steps.stop} steps on the first canvas: give at least "
                    f"{least:.3g}, or choose a method with one canvas"
                )
            start, *later = later
        return [self._start(start, first), *(self._part(part, number) for number, part in enumerate(later, 2))]

    def _start(self, part: Stage | Phase, first: int) -> Phase:
        """The first stage, from the step `first` on where that is not its own first."""
        size = part.size or self.run.size
        steps = part.steps[max(0, first - part.steps.start) :]

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            state, stage = part.begin(x) if isinstance(part, Phase) else (x, part)
            stage = from_step(stage, first)
            noise = self.run.draws.noise(tuple(x.shape)).to(x)
            return self._state(state, stage, noise, everywhere=first > 0), self._stage(stage, size)

        return Phase(steps, size, begin)

    def _part(self, part: Stage | Phase, number: int) -> Stage | Phase:
        """A later stage; phase `number`, counted from 1, has noise of its own outside of the mask."""
        if isinstance(part, Stage):
            return self._stage(part, part.size or self.run.size)

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            state, stage = part.begin(x)
            noise = self.run.draws.phase_noise(tuple(state.shape), number).to(state)
            return self._state(state, stage, noise), self._stage(stage, part.size)

        return replace(part, begin=begin)

    def _state(self, x: Tensor, stage: Stage, noise: Tensor, *, everywhere: bool = False) -> Tensor:
        """The state (B, C, H, W) that a stage begins with: the picture with noise of its first sigma where that is
        held, or everywhere."""
        if not (self.holds or everywhere):
            return x
        redrawn, picture = self.given.on_canvas((x.shape[2], x.shape[3]))
        schedule, first = standing(stage, self.run.schedule)
        state = renoise(picture, schedule.sigmas[stage.steps.start - first], noise)
        return state if everywhere else torch.where(redrawn, x, state)

    def _stage(self, stage: Stage, size: Size) -> Stage:
        """The stage, whose denoiser answers with the picture outside of the mask; its `before` and `end` change nothing
        there."""
        if not self.holds:
            return stage

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            redrawn, picture = self.given.on_canvas(size)
            return torch.where(redrawn, stage.denoise(x, sigma, step), picture)

        def inside(change: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
            if change is None:
                return None
            return lambda x, *of: torch.where(self.given.on_canvas(size)[0], change(x, *of), x)

        return replace(stage, denoise=denoise, before=inside(stage.before), end=inside(stage.end))
