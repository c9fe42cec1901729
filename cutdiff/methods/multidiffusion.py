"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): overlapping views of the native size, averaged.

The published code has views at every eighth latent and leaves a last strip uncovered where the stride does not fit the
canvas; here the stride is CutDiffusion's, and the last views are moved back to the border.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutdiff.methods.shared import Run
from cutdiff.methods.tiled import Tiled
from cutdiff.sampling.stages import Stage


@dataclass(frozen=True, kw_only=True)
class MultiDiffusion(Tiled):
    """average ∘ D ∘ views at every step, without jitter."""

    def stages(self, run: Run) -> list[Stage]:
        return [Stage("views", range(run.num_steps), self.on_views(run, jitter=(0, 0)))]
