"""I-Max (Du et al. 2024, arXiv 2410.07536): a large picture from pure noise, whose low band follows a native one.

The native picture is enlarged through the VAE, and the large canvas takes all steps from noise of its own. The flow
from its state straight to the enlarged picture is the projected flow. In its low band the network's flow gives way to
it by a weight that falls as half a cosine (paper, section 3.1). In terms of x0, and so for any noise, that is
x0 + c·low(guide − x0).

Its positions, which belong to a transformer, are `--positions ntk,factor=10,proportional=True`; without these, and with
a U-Net, the method is its projected flow alone. Defaults are those of the published code (github.com/PRIS-CV/I-Max)
for FLUX.1-dev. As there, the guide is a sample of the encoder's distribution.
Where it is not followed:
- It takes Haar's low band, the means of 2×2 latents; here what interpolates these (`held_band` has others).
- It repeats the text once for every native square, and pads the canvas by a latent in every other step, so that tokens
  lie elsewhere. Neither is here.
- It draws the native picture with a time shift of 3, the large one with 6; here both have the schedule of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Space, Stages, enlarge, on_whole, phase_sizes, with_guidance_scale
from cutdiff.options import Options, Scale
from cutdiff.sampling.split import Split
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.specs import part, resolve


@dataclass(frozen=True, kw_only=True)
class IMax(Options):
    """All steps on the native picture, then all on the finished canvas."""

    takes_picture: ClassVar[bool] = True

    weight: Literal["decay", "shift", "constant"] = "decay"
    """The weight c of the guide: "decay" falls from 1 to 0; "shift" holds the whole estimate by c, and by the rest its
    low band; "constant" is 1 in all steps."""
    held_band: str | Split = "down_up"
    """The split whose low band is held: a spec of down_up, gaussian, butterworth or wavelet, or an object."""
    enlarged_in: Space = "pixels"
    """The space in which the picture is enlarged: "pixels", through the VAE, or "latents"."""
    detail_guidance_scale: Scale | None = None
    """The guidance scale of the finished canvas; None: that of the run. Published for FLUX.1-dev: 7 after 3.5."""
    size_conditioning: Literal["native", "canvas"] = "native"
    """The size that a network which reads one is told: the "native" picture's, or that of the "canvas"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "held_band", part("split", "held_band", self.held_band))

    def stages(self, run: Run) -> Stages:
        first, larger = canvases(run, ())
        conditioning_size = phase_sizes(run.size, run.native_size)[0] if self.size_conditioning == "native" else None
        denoise = first_picture(replace(run, size=first), on_whole(run, conditioning_size))
        stages: Stages = [Stage("native", range(run.num_steps), denoise, first)]
        if not larger:
            return stages
        steps, split = range(run.num_steps, 2 * run.num_steps), resolve("split", self.held_band)
        network = on_whole(with_guidance_scale(run, self.detail_guidance_scale), conditioning_size)

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            shape = (*picture.shape[:2], *run.size)
            guide = enlarge(run, picture, self.enlarged_in, noise=run.draws.encoder_noise(shape, 2).to(picture))

            def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
                denoised = network(x, sigma, step)
                missing, share = guide - denoised, (1 + math.cos(math.pi * (step - steps.start) / len(steps))) / 2
                low = split.low(missing)
                if self.weight == "shift":
                    return denoised + low.lerp(missing, share)
                return denoised + (share if self.weight == "decay" else 1.0) * low

            noise = run.draws.phase_noise(shape, 2).to(picture)
            return run.schedule.sigmas[0] * noise, Stage("projected", steps, denoise, run.size)

        return [*stages, Phase(steps, run.size, begin)]
