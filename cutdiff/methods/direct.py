"""Direct inference: the network sees the whole canvas at once, and repeats objects on a large one."""

from __future__ import annotations

from cutdiff.methods.shared import Run
from cutdiff.sampling.stages import Stage


def direct(run: Run) -> list[Stage]:
    """D(x), conditioned on the canvas as a picture of its own size."""
    return [Stage("direct", range(run.num_steps), run.denoiser)]
