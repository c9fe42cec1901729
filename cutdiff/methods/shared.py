"""What every method is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cutdiff.models.inside import replaced
from cutdiff.models.shared_text import SharedText
from cutdiff.models.text import TextEncoders
from cutdiff.sampling.denoiser import Denoiser, Size
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.schedule import Schedule
from cutdiff.sampling.solvers import CanvasDenoiser, Phase, Stage


@dataclass(frozen=True)
class Run:
    """One run on a canvas: the denoiser for the native size, the draws, and the options that methods read."""

    denoiser: Denoiser
    draws: Draws
    size: Size
    """Of the canvas, in latents."""
    target_size: Size
    """Of the finished picture: that of the canvas, but on the way to it in a cascade of sizes."""
    schedule: Schedule
    prompts: list[str]
    text: TextEncoders | SharedText
    stride: int | None = None
    """Between views, in latents; half of the window where it is None."""
    structure_fraction: float | None = None
    detail_guidance_scale: float | None = None
    interaction: str = "channel"
    size_conditioning: str = "native"
    cosine_scales: tuple[float, float, float] = (3.0, 1.0, 1.0)
    word_threshold: float = 0.3

    @property
    def num_steps(self) -> int:
        """Of the schedule."""
        return self.schedule.num_steps

    @property
    def window(self) -> Size:
        """Of a view: the native size, or the canvas where that is smaller."""
        native = self.denoiser.native_size
        return min(native, self.size[0]), min(native, self.size[1])

    @property
    def strides(self) -> Size:
        """Between views, on each axis."""
        wanted = max(1, self.denoiser.native_size // 2) if self.stride is None else self.stride
        return min(wanted, self.window[0]), min(wanted, self.window[1])

    @property
    def jitter(self) -> Size:
        """How far a view may move on each axis; a single view, which is the whole picture, does not."""
        if self.size == self.window:
            return 0, 0
        return (self.window[0] - self.strides[0]) // 4, (self.window[1] - self.strides[1]) // 4

    @property
    def told_size(self) -> Size | None:
        """What the network is told a patch to be: a whole picture of its own size (None), or the finished picture."""
        return None if self.size_conditioning == "native" else self.target_size


def step_at(share: float, num_steps: int) -> int:
    """The first of `num_steps` that lies at or after a share of them."""
    return math.ceil(round(share * num_steps, 9))  # 0.28 · 50 is 14, whatever floats say


def guided(run: Run, scale: float | None, denoise: CanvasDenoiser) -> CanvasDenoiser:
    """`denoise` under a guidance scale of its own, or the run's where that is None."""

    def with_scale(latents: Tensor, sigma: float, step: int) -> Tensor:
        with replaced(run.denoiser, guidance_scale=scale):
            return denoise(latents, sigma, step)

    return denoise if scale is None else with_scale


def guided_between(run: Run, interval: tuple[float, float], stages: Sequence[Stage | Phase]) -> list[Stage | Phase]:
    """The stages with guidance in the steps from one share of the schedule to another only."""
    first, last = (step_at(share, run.num_steps) for share in interval)

    def limited(stage: Stage) -> Stage:
        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            with replaced(run.denoiser, guided=first <= step % run.num_steps < last):
                return stage.denoise(latents, sigma, step)

        return replace(stage, denoise=denoise)

    def begun(phase: Phase) -> Phase:
        def begin(latents: Tensor) -> tuple[Tensor, Stage]:
            state, stage = phase.begin(latents)
            return state, limited(stage)

        return replace(phase, begin=begin)

    return [limited(part) if isinstance(part, Stage) else begun(part) for part in stages]
