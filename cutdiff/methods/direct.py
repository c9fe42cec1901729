"""Direct inference: the network sees the whole canvas at once, and repeats objects on a large one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from cutdiff.methods.shared import Run
from cutdiff.sampling.solvers import CanvasDenoiser, Stage


def direct(run: Run) -> list[Stage]:
    """D(x), conditioned on the canvas as a picture of its own size."""
    return [Stage("direct", range(run.num_steps), denoise_whole(run))]


def denoise_whole(
    run: Run, changed: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
) -> CanvasDenoiser:
    """D(x) inside `changed(step)`, which may change the denoiser or its network for the time of a step."""

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        with changed(step):
            return run.denoiser(latents, sigma)

    return denoise
