"""FreCaS (Zhang et al. 2024, arXiv 2410.18410): a cascade of sizes that draws each band of frequencies once.

A stage ends early, where its size has drawn all that it can hold (section 3.2). Its last estimate of x0 goes through
the VAE to the next size, where it gets noise of σ' = σ·f^(γ/2), f the factor between the sizes, at which the larger
canvas has as much signal in its low band. Guidance there is stronger in the high band, which is new (3.3), and the
attention over the text is blended with M̄, the mean of all heads and layers in the last step of the stage before (3.4).

Defaults are those of the published code (github.com/xtudbxk/FreCaS) for SDXL at 2048² and 4096²: 40 + 10 of 50 steps to
timestep 200, γ 1.5; 30 + 5 + 15 to 400 and 200, γ 2. As there:
- Steps go by whole timesteps, rounded down, even from the noisiest to the last of a stage, whatever spacing the model
  has; σ' is that of the next noisier one. With DDIM a step goes down a fixed number of timesteps, and the next one
  reads what it reached as its own timestep's.
- Pictures are clipped, enlarged by nearest neighbours, and encoded to a sample. Its network is told the native size.
- M̄ is the mean of the levels' means, of each row of a guidance pair by itself; at guidance 1 no stage is guided.
Where it is not followed:
- It resizes M̄ along the flattened tokens, which scrambles it; here in two dimensions (`map_resize="tokens"`: as there).
- It has values for two and three stages; here more share the steps and ends between. Every stage takes a step at least.
- A schedule other than the model's own, and an EDM model's, is followed within the stages: they begin and end where
  they do, from the first sigma of the run to the last, their steps as dense as the run's. σ' is then exact.
- A guidance of another kind draws the first stage only; later ones take its scale for the low band.
Where a step of a stage has no map for its negative rows, as guidance begins after it was drawn, nothing is blended.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from cutdiff.methods.shared import Run, Stages, enlarge, step_at
from cutdiff.options import Between, Count, Options, Scale, Share, options_of
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.guidance import ByBand
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.split import DownUp
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.sampling.text_maps import Axes, TextMaps
from cutdiff.specs import name_of


@dataclass(frozen=True, kw_only=True)
class FreCaS(Options):
    """Stages of growing size whose steps are num_steps in all; direct inference where the canvas is not past native."""

    changes_network: ClassVar[bool] = True

    sizes: tuple[tuple[Count, Count], ...] | None = None
    """The canvases (h, w) before the last, in latents; None: of native size, doubled until the next is the last."""
    shares: tuple[Share, ...] | None = None
    """The share of the steps, rounded up, of each stage but the last; None: 0.8, or 0.6 and then 0.1 each."""
    ends: tuple[Share, ...] | None = None
    """The last noise of each stage but the last, as a share of the training's; None: 0.2, or 0.4 and then 0.2 each."""
    gamma: Annotated[float, Between(0)] | None = None
    """The power of f by which a stage's noise grows, γ; None: 1.5, from three stages on 2."""
    high_guidance_scale: Scale = 35.0
    """The guidance scale of the high band in stages after the first; the low band has that of the run."""
    map_weight: Share = 0.6
    """The weight of M̄ in the attention over the text."""
    map_resize: Axes = "planes"
    """The axes along which M̄ is resized: "planes", height and width, or "tokens", one line of all positions."""
    size_conditioning: Literal["native", "stage"] = "native"
    """The sizes that the network is told: "native", the square that it knows, or "stage", those of the canvas."""

    def stages(self, run: Run) -> Stages:
        sizes = self.canvases(run)
        later, schedule = len(sizes) - 1, run.schedule
        if not later:
            return [Stage("direct", range(run.num_steps), run.denoiser)]
        shares = self.shares if self.shares is not None else (0.6, *[0.1] * (later - 1)) if later > 1 else (0.8,)
        ends = self.ends if self.ends is not None else (0.4, *[0.2] * (later - 1)) if later > 1 else (0.2,)
        gamma = self.gamma if self.gamma is not None else 2.0 if later > 1 else 1.5
        for name, values in (("shares", shares), ("ends", ends)):
            if len(values) != later:
                raise ValueError(
                    f"{name}={values} must have {later} values, one for each of {later + 1} stages but the last"
                )
        phases, maps = [], [TextMaps(self.map_resize) for _ in sizes]
        taken, high = 0, math.inf
        for k in range(len(sizes)):
            stop, low = run.num_steps - (later - k), 0.0  # the stages to come take a step each, at least
            if k < later:
                stop = min(step_at(sum(shares[: k + 1]), run.num_steps), stop)
                low = schedule.noise.sigma(schedule.noise.timestep_at(ends[k]))
            steps = range(taken, max(stop, taken + 1))
            part = schedule.part(high, low, len(steps))
            if any(a <= b for a, b in pairwise(part.sigmas)):
                raise ValueError(
                    f"ends={ends} leave stage {k + 1} the sigmas {part.sigmas}, which must fall at every step"
                )
            phases.append(self.phase(run, sizes, k, steps, part, maps))
            taken = steps.stop
            if k < later:
                factor = max(after / before for after, before in zip(sizes[k + 1], sizes[k], strict=True))
                high = low * factor ** (gamma / 2)
        return phases

    def canvases(self, run: Run) -> list[Size]:
        """The canvas of each stage. ValueError where they do not grow, up to that of the run."""
        (height, width), longest, reach = run.size, max(run.size), run.native_size
        sizes = [*(self.sizes or ())]
        while self.sizes is None and reach < longest:
            sizes.append((max(1, height * reach // longest), max(1, width * reach // longest)))
            reach *= 2
        sizes.append(run.size)
        if any(small == large or small[0] > large[0] or small[1] > large[1] for small, large in pairwise(sizes)):
            raise ValueError(f"sizes={self.sizes} must grow from stage to stage, to the canvas of {run.size} latents")
        return sizes

    def phase(self, run: Run, sizes: list[Size], k: int, steps: range, part: Schedule, maps: list[TextMaps]) -> Phase:
        """Stage k, counted from 0; `maps` are those that each stage leaves to the next one."""
        run, is_last = replace(run, size=sizes[k]), k == len(sizes) - 1
        denoiser = self.by_band(run, sizes[k - 1]) if k else run.denoiser
        size = (run.native_size, run.native_size) if self.size_conditioning == "native" else None

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            changed, copies = denoiser, denoiser.copies_at(sigma, step)
            with ExitStack() as changes:
                if self.map_weight and step == steps[-1] and not is_last:
                    changed = changes.enter_context(maps[k].recorded(changed, run.size, copies))
                if self.map_weight and k:
                    changed = maps[k - 1].blended(changed, run.size, copies, self.map_weight)
                return changed(x, sigma, step, original_size=size, target_size=size)

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            high, shape = part.sigmas[0], (*x.shape[:2], *run.size)
            if k == 0:
                x = x * (math.hypot(high, 1) / run.schedule.init_scale)  # as if a picture lay beneath the noise
            else:
                sample = run.draws.encoder_noise(shape, k + 1).to(x)
                x = enlarge(run, x, "pixels", "nearest", noise=sample)
                x = renoise(x, high, run.draws.phase_noise(shape, k + 1).to(x))
            cost = steps[-1].__eq__
            return x, Stage(f"stage {k + 1}", steps, denoise, run.size, None, None, part.sigmas, part.targets, cost)

        return Phase(steps, run.size, begin)

    def by_band(self, run: Run, below: Size) -> Denoiser:
        """The denoiser guided by band, the low one that of a canvas of the size `below`."""
        scale, split = self.high_guidance_scale, DownUp(size=below, down="bilinear")
        guidance: Any = run.denoiser.guidance
        if "guidance_scale" not in options_of(guidance):
            name = name_of("guidance", guidance)
            raise ValueError(f"high_guidance_scale={scale} needs a guidance with a guidance_scale, which {name} lacks")
        if guidance.guidance_scale == 1:
            return run.denoiser
        return replace(run.denoiser, guidance=ByBand(guidance.guidance_scale, scale, split))
