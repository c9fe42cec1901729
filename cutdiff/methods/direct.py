"""Direct inference: the network sees the whole canvas at once, and repeats objects on a large one."""

from __future__ import annotations

from torch import Tensor

from cutdiff.methods.common import Run
from cutdiff.solvers import Stage


def direct(run: Run) -> list[Stage]:
    """D(x), conditioned on the canvas as a picture of its own size."""

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        return run.denoiser(latents, sigma)

    return [Stage("direct", range(run.num_steps), denoise)]
