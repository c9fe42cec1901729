"""CutDiffusion (Lin et al. 2024, arXiv 2404.15141): structure on interleaved patches, then detail on views.

The published code tells the network the full size in both stages (`size_conditioning="target"`). It switches stages by
an event that an odd number of steps skips; here the state is on the canvas from the first step to the last. With its
Euler scheduler it scales all view batches past the first by the sigma of the next step; here each view is scaled by
that of its own.

Two options go past the paper. The mean of the N patches is a picture of native size with less noise, as Upsample
guidance (Hwang et al. 2024, arXiv 2404.01709) has it: with `structure="mean"` one evaluation of it draws the structure
in the place of N, and with `upsample_guidance` it guides the views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cutdiff.methods.shared import Run, falling, step_at, with_guidance_scale
from cutdiff.methods.tiled import Grain, Tiled
from cutdiff.options import Between, Scale, Share
from cutdiff.sampling.mean_picture import MeanPicture
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import Stage
from cutdiff.settings import Settings


@dataclass(frozen=True, kw_only=True)
class CutDiffusion(Tiled):
    """All patches draw one structure, because they keep exchanging pixels; then overlapping views draw its details."""

    structure_fraction: Share = 0.5
    """The share of the steps, rounded up, that draw the structure: the paper's T' = T / 2."""
    structure: Literal["patches", "mean"] = "patches"
    """The pictures that draw the structure: all "patches", as in the paper, or their "mean" alone, enlarged."""
    interaction: Grain = "channel"
    """The unit that patches exchange: each "channel" of a pixel by itself, as in the published code, every "pixel" as a
    whole, as in the paper's text, or "none"."""
    detail_guidance_scale: Scale | None = None
    """The guidance scale of the detail stage; None: that of the run."""
    upsample_guidance: Annotated[float, Between(0)] = 0.0
    """The weight by which the patches' mean, guided as the run is, guides the views; it falls to 0 by step."""
    upsampling: Literal["bicubic", "nearest"] = "bicubic"
    """The interpolation that enlarges the mean."""

    def check_settings(self, settings: Settings) -> None:
        """ValueError where an option is given that the others leave nothing to do."""
        if self.structure == "mean" and self.interaction != CutDiffusion.interaction:
            raise ValueError(f"interaction={self.interaction} is for patches, and structure=mean has one picture")
        if self.upsampling != CutDiffusion.upsampling and self.structure == "patches" and not self.upsample_guidance:
            raise ValueError(f"upsampling={self.upsampling} is for structure='mean', or upsample_guidance above 0")

    def stages(self, run: Run) -> list[Stage]:
        switch = step_at(self.structure_fraction, run.num_steps)
        grid = grid_for(run.size, run.native_size)
        mean = MeanPicture(run.denoiser, grid, self.upsampling, self.conditioning_size(run))
        structure = mean if self.structure == "mean" else self.on_patches(run, grid, self.interaction)
        steps = range(switch, run.num_steps)
        detail = self.on_views(with_guidance_scale(run, self.detail_guidance_scale))
        if self.upsample_guidance:
            detail = mean.guiding(detail, falling(self.upsample_guidance, steps))
        return [Stage("structure", range(switch), structure), Stage("detail", steps, detail)]
