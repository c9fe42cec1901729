"""CutDiffusion (Lin et al. 2024, arXiv 2404.15141): structure on interleaved patches, then detail on views.

The published code tells the network the full size in both stages (`size_conditioning="target"`). It switches stages by
an event that an odd number of steps skips; here the state is on the canvas from the first step to the last. With its
Euler scheduler it scales all view batches past the first by the sigma of the next step; here each view is scaled by
that of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutdiff.methods.shared import Grain, Run, Tiled, step_at, with_guidance_scale
from cutdiff.options import Scale, Share
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import Stage


@dataclass(frozen=True, kw_only=True)
class CutDiffusion(Tiled):
    """All patches draw one structure, because they keep exchanging pixels; then overlapping views draw its details."""

    structure_fraction: Share = 0.5
    """The share of the steps, rounded up, that draw the structure: the paper's T' = T / 2."""
    interaction: Grain = "channel"
    """The unit that patches exchange: each "channel" of a pixel by itself, as in the published code, every "pixel" as a
    whole, as in the paper's text, or "none"."""
    detail_guidance_scale: Scale | None = None
    """The guidance scale of the detail stage; None: that of the run."""

    def stages(self, run: Run) -> list[Stage]:
        switch = step_at(self.structure_fraction, run.num_steps)
        structure = self.on_patches(run, grid_for(run.size, run.native_size), self.interaction)
        detail = self.on_views(with_guidance_scale(run, self.detail_guidance_scale))
        return [
            Stage("structure", range(switch), structure),
            Stage("detail", range(switch, run.num_steps), detail),
        ]
