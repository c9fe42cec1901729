"""DemoFusion (Du et al. 2023, arXiv 2311.16973): a picture of native size, drawn again at twice, thrice … its size.

Each phase enlarges the result of the one before, diffuses it to the first sigma and draws it again with all steps
(progressive upscaling, section 3.2). The same result, diffused to the sigma of each step, holds the state at its side
(skip residual, 3.3); beside the views, blurred interleaved patches see the whole picture (dilated sampling, 3.4).

Defaults are those of the published code. As there:
- Latents are enlarged by bicubic interpolation, without the VAE.
- The blur's width fades from its full value to 1% of it, and the blurred canvas is given back its mean and deviation.
- So is the result of every phase those of the first one's.
Where it is not followed:
- It counts mean and deviation over the whole batch; here each image has its own.
- With the Euler solver it scales the patches, and all views past the first batch, by the sigma of the next step, and in
  a phase's first step its first batch not at all; here all are scaled by the sigma of the step.
- It pads a canvas that the patches do not divide with zeros at the top and the left; here by reflection at the other
  ends.
- On a size between two multiples of the native one it draws the first phase larger than native; here sizes go by
  multiples, and the size itself comes last.
- It tells the network the finished size in every phase: `size_conditioning="target"` is that.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutdiff.methods.shared import Run, Stages
from cutdiff.methods.tiled import Cascade


@dataclass(frozen=True, kw_only=True)
class DemoFusion(Cascade):
    """A cascade of sizes whose views move at every step. Every phase takes num_steps steps."""

    def stages(self, run: Run) -> Stages:
        return self.cascade(run, self.on_whole, lambda phase, steps, previous: self.on_views(phase), "none")
