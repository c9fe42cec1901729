"""Upsample guidance (Hwang et al. 2024, arXiv 2404.01709): a native picture inside the canvas guides its estimate.

The mean of m×m pixels of the noisy canvas is a noisy picture of native size, with noise of sigma / m. The network
denoises it well, and the canvas not: x0 + w·up(D(pool(x); σ/m) − pool(x0)) moves the canvas towards it (section 4; the
paper writes the same of the noise). The weight w is constant in the first steps, the share η of the noise's range,
and 0 afterwards, so that the artefacts of enlarged latents are drawn over. One evaluation more in each of these steps.

Defaults are the paper's w = 1, and the η of public codes; the authors' own is not public. github.com/viperyl/
Upsample-Guidance and Isekai-Creation's copy for SDXL (commits f9d4ba9 and b27c2f4) have w = 1.2. They round the
timestep of sigma / m to a whole one, evaluate the small picture in all steps, those too where w is 0, and enlarge
pool(x0) by 2 whatever m is. That for SDXL tells the network the finished size for both: `size_conditioning="target"`.
One factor m serves both axes, so that shapes are not squeezed; sizes that it does not divide are padded by reflection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cutdiff.methods.shared import Run, falling
from cutdiff.methods.tiled import Tiled
from cutdiff.options import Between, Share
from cutdiff.sampling.mean_picture import MeanPicture
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import Stage
from cutdiff.settings import Settings


@dataclass(frozen=True, kw_only=True)
class UpsampleGuidance(Tiled):
    """Guided while there is much noise, then as it is; direct inference where the canvas is nowhere past native."""

    weight: Annotated[float, Between(0)] = 1.0
    """The weight w of the guidance: at 1 the mean of the estimate is what the network says of the native picture."""
    guided_share: Share = 0.6
    """The share η of the noise's range, from the noisiest timestep downwards, in which there is guidance."""
    fading: bool = False
    """Let the weight fall by equal amounts from step to step, to 0 where guidance ends."""
    upsampling: Literal["nearest", "bicubic"] = "nearest"
    """The interpolation of what is added to the estimate."""
    detail: Literal["whole", "views"] = "whole"
    """The estimate that is guided: that of the "whole" canvas, or of "views" of native size, which are averaged."""

    def check_settings(self, settings: Settings) -> None:
        """ValueError where an option of views is given and there are none."""
        for name in ("stride", "view_weights", "overlaps"):
            if self.detail == "whole" and (value := getattr(self, name)) != getattr(Tiled, name):
                raise ValueError(f"{name}={value} is for views, and detail=whole has none: give detail='views'")

    def stages(self, run: Run) -> list[Stage]:
        most = max(grid_for(run.size, run.native_size))
        grid = (min(most, run.size[0]), min(most, run.size[1]))  # a canvas thinner than that is pooled to one pixel
        end = round(1 - self.guided_share, 9)  # 1 - 0.7 is 0.3, whatever floats say
        until = sum(run.schedule.fraction(sigma) >= end for sigma in run.schedule.sigmas[:-1]) if self.weight else 0
        guided, steps = range(until), range(until, run.num_steps)
        detail = self.on_whole(run) if self.detail == "whole" else self.on_views(run)
        picture = MeanPicture(run.denoiser, grid, self.upsampling, self.conditioning_size(run))
        weight = falling(self.weight, guided) if self.fading else lambda sigma, step: self.weight
        return [Stage("guided", guided, picture.guiding(detail, weight)), Stage("detail", steps, detail)]
