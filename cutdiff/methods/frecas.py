"""FreCaS (Zhang et al. 2024, arXiv 2410.18410): a cascade of sizes that draws each band of frequencies once.

A stage ends early, where its size has drawn all that it can hold (section 3.2). Its last estimate of x0 goes through
the VAE to the next size, where it gets noise of σ' = σ·f^(γ/2), f the factor between the sizes, at which the larger
canvas has as much signal in its low band. Guidance there is stronger in the high band, which is new (3.3), and the
attention over the text is blended with M̄, the mean of all heads and layers in the last step of the stage before (3.4).

Defaults are those of the published code (github.com/xtudbxk/FreCaS) for SDXL at 2048² and 4096²: 40 + 10 of 50 steps to
timestep 200, γ 1.5; 30 + 5 + 15 to 400 and 200, γ 2. As there:
- Steps go by whole timesteps, rounded down, even from the noisiest to the last of a stage, whatever spacing the model
  has; σ' is that of the next noisier one. A DDIM step goes down a fixed number, read as the next step's timestep.
- Pictures are clipped, enlarged by nearest neighbours, and encoded to a sample. The network is told the native size.
- M̄ is the mean of the levels' means, of each row of a guidance pair; at guidance 1 no stage is guided.
Where it is not followed:
- It resizes M̄ along the flattened tokens, which scrambles it; here in two dimensions (`map_resize="tokens"`: as there).
- It has values for two and three stages; here more share the steps and ends between. Every stage takes a step at least.
- Other schedules than a model's own, and EDM models', are followed from their first sigma to their last, in steps as
  dense as the run's. σ' is then exact.
- A guidance of another kind draws the first stage only; later ones take its scale for the low band.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Stages, enlarge, scalable, step_at
from cutdiff.options import Between, Count, Options, Scale, Share
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.guidance import ByBand
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.split import DownUp
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.sampling.text_maps import Axes, TextMaps

DOUBLED = tuple(2.0**k for k in range(1, 32))
SHARES, ENDS = (0.6, *[0.1] * 31), (0.4, *[0.2] * 31)


@dataclass(frozen=True, kw_only=True)
class FreCaS(Options):
    """Stages of growing size whose steps are num_steps in all; direct inference where the canvas is not past native."""

    changes_network: ClassVar[bool] = True
    takes_picture: ClassVar[bool] = True

    sizes: tuple[tuple[Count, Count], ...] | None = None
    """The canvases (h, w) before the last, in latents; None: of native size, doubled until the next is the last."""
    shares: tuple[Share, ...] | None = None
    """The share of the steps, rounded up, of each stage but the last; None: 0.8, or 0.6 and then 0.1 each."""
    ends: tuple[Share, ...] | None = None
    """The last noise of each stage but the last, as a share of the training's; None: 0.2, or 0.4 and then 0.2 each."""
    gamma: Annotated[float, Between(0, 100)] | None = None
    """The power of f by which a stage's noise grows, γ; None: 1.5, from three stages on 2."""
    high_guidance_scale: Scale | None = 35.0
    """The guidance scale of the high band in stages after the first; the low band has that of the run. None: these
    stages have the guidance of the run, of any kind."""
    map_weight: Share = 0.6
    """The weight of M̄ in the attention over the text."""
    map_resize: Axes = "planes"
    """The axes along which M̄ is resized: "planes", height and width, or "tokens", one line of all positions."""
    size_conditioning: Literal["native", "stage"] = "native"
    """The sizes that the network is told: "native", the square that it knows, or "stage", those of the canvas."""

    @property
    def unet_only(self) -> str:
        """The words for its need of a U-Net, where attention is blended."""
        return "blends the attention over the text, unless map_weight=0," if self.map_weight else ""

    def stages(self, run: Run) -> Stages:
        first, larger = canvases(run, DOUBLED)
        sizes = [first, *(size for _, size in larger)] if self.sizes is None else [*self.sizes, run.size]
        shrinks = any(small == large or small[0] > large[0] or small[1] > large[1] for small, large in pairwise(sizes))
        if shrinks and not (self.sizes is None and run.image is not None):  # a given picture may be as large
            raise ValueError(f"sizes={self.sizes} must grow from stage to stage, to the canvas of {run.size} latents")
        later, noise = len(sizes) - 1, run.schedule.noise
        if not later:
            return [Stage("direct", range(run.num_steps), run.denoiser)]
        shares, ends, gamma = ((0.8,), (0.2,), 1.5) if later == 1 else (SHARES[:later], ENDS[:later], 2.0)
        shares, ends = (own if given is None else given for own, given in ((shares, self.shares), (ends, self.ends)))
        for name, values in (("shares", shares), ("ends", ends)):
            if len(values) != later:
                raise ValueError(f"{name}={values} must have one value for each stage but the last, {later} in all")
        lows = [noise.sigma(noise.timestep_at(end)) for end in ends]
        growth = [max(after / before for after, before in zip(b, a, strict=True)) for a, b in pairwise(sizes)]
        gamma = gamma if self.gamma is None else self.gamma
        highs = [math.inf, *(low * factor ** (gamma / 2) for low, factor in zip(lows, growth, strict=True))]
        taken, maps, phases = 0, [TextMaps(self.map_resize) for _ in sizes], []
        for k, (high, low) in enumerate(zip(highs, [*lows, 0.0], strict=True)):
            stop = step_at(sum(shares[: k + 1]), run.num_steps) if k < later else run.num_steps
            steps = range(taken, max(min(stop, run.num_steps - later + k), taken + 1))  # stages to come take one each
            part, taken = run.schedule.part(high, low, len(steps)), steps.stop
            if any(a <= b for a, b in pairwise(part.sigmas)):
                raise ValueError(f"ends={ends} leave stage {k + 1} the sigmas {part.sigmas}, which must fall")
            phases.append(self.phase(run, sizes, k, steps, part, maps))
        return phases

    def phase(self, run: Run, sizes: list[Size], k: int, steps: range, part: Schedule, maps: list[TextMaps]) -> Phase:
        """Stage k, counted from 0; `maps` are those that each stage leaves to the next one."""
        run, is_last = replace(run, size=sizes[k]), k == len(sizes) - 1
        denoiser, scale = run.denoiser, self.high_guidance_scale
        if k and scale is not None:
            denoiser = guided_by_band(run, scale, sizes[k - 1])
        size = (run.native_size, run.native_size) if self.size_conditioning == "native" else None

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            changed, copies = denoiser, denoiser.copies_at(sigma, step)
            with ExitStack() as changes:
                if self.map_weight and step == steps[-1] and not is_last:
                    changed = changes.enter_context(maps[k].recorded(changed, run.size, copies, len(x)))
                if self.map_weight and k:
                    changed = maps[k - 1].blended(changed, run.size, copies, self.map_weight)
                return changed(x, sigma, step, original_size=size, target_size=size)

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            high, shape = part.sigmas[0], (*x.shape[:2], *run.size)
            if k == 0:
                x = x * (math.hypot(high, 1) / run.schedule.init_scale)  # as if a picture lay beneath the noise
            else:
                x = enlarge(run, x, "pixels", "nearest", noise=run.draws.encoder_noise(shape, k + 1).to(x))
                x = renoise(x, high, run.draws.phase_noise(shape, k + 1).to(x))
            own = denoise if k else first_picture(run, denoise, lambda step: step == steps[-1] and self.map_weight > 0)
            stage = Stage(f"stage {k + 1}", steps, own, run.size, sigmas=part.sigmas, cost=steps[-1].__eq__)
            return x, replace(stage, targets=part.targets)

        return Phase(steps, run.size, begin)


def guided_by_band(run: Run, scale: float, below: Size) -> Denoiser:
    """The run's denoiser with the guidance scale `scale` for all that a canvas of the size `below` cannot hold."""
    guidance = scalable(run.denoiser.guidance, f"high_guidance_scale={scale}")
    by_band = ByBand(guidance.guidance_scale, scale, DownUp(size=below, down="bilinear"))
    return run.denoiser if guidance.guidance_scale == 1 else replace(run.denoiser, guidance=by_band)
