"""SpotDiffusion (Frolov et al. 2024, arXiv 2407.15507): windows of the native size that do not overlap, and wander.

MultiDiffusion hides the seams of its views by their overlap. Here windows stand side by side, and at every step
somewhere else, so that the seams of one step lie inside of a window at the next: each pixel is seen once a step, 4
windows where MultiDiffusion has 9. For that the canvas is a torus: what moves out at one border comes in at the
opposite one, and a window that goes over a border shows both.

The published code draws panoramas with SD 2:
- It moves windows along the width alone; here both axes move, but for one that a single window spans.
- It moves the canvas under the windows, after each step and the last one too, so that its picture ends shifted; here
  the windows move over the canvas. The first step, whose windows it does not move, moves them here as any other.
- It leaves a last strip at zero where windows do not fill the canvas; here the last ones are moved back, and averaged.
- Its network reads no sizes. SDXL's is told that a window is the crop at its corner, and of one that goes over a border
  that it is the nearest crop that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cutdiff.methods.shared import Run
from cutdiff.methods.tiled import Conditioned
from cutdiff.sampling.overlaps import Torus
from cutdiff.sampling.stages import Stage


@dataclass(frozen=True, kw_only=True)
class SpotDiffusion(Conditioned):
    """scatter ∘ D ∘ gather of windows side by side on a torus, which is shifted at every step."""

    def stages(self, run: Run) -> list[Stage]:
        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            shifts = run.draws.torus_shifts(step, run.size, run.window)
            torus = Torus(shifts, run.window, run.size, device=latents.device)
            return self.denoise_windows(run, torus, torus.crops, latents, sigma, step)

        return [Stage("windows", range(run.num_steps), denoise)]
