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
- M̄ is the mean of the levels' means; at guidance 1 no stage is guided.
Where it is not followed:
- It resizes M̄ along the flattened tokens, which scrambles it; here in two dimensions (`map_resize="tokens"` is its way).
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

import torch
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
    """The share of the steps, rounded up, of each stage but the last; None: 0.8, or 0.6 and 0.1 for all between."""
    ends: tuple[Share, ...] | None = None
    """The last noise of each stage but the last, as a share of the training's timesteps; None: 0.2, or 0.4 … 0.2."""
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
        if len(sizes) == 1:
            return [Stage("direct", range(run.num_steps), run.denoiser)]
        maps, phases, first = [TextMaps(self.map_resize) for _ in sizes], [], 0
        for k, times in enumerate(self.timesteps(run.schedule, sizes)):
            steps = range(first, first + len(times))
            phases.append(self.phase(run, sizes, k, steps, times, maps))
            first = steps.stop
        return phases

    def canvases(self, run: Run) -> list[Size]:
        """The canvas of each stage. ValueError where they do not grow, up to that of the run."""
        sizes, longest, reach = [*(self.sizes or ())], max(run.size), run.native_size
        while self.sizes is None and reach < longest:
            sizes.append((max(1, run.size[0] * reach // longest), max(1, run.size[1] * reach // longest)))
            reach *= 2
        sizes.append(run.size)
        if any(small == large or min(b - a for a, b in zip(small, large)) < 0 for small, large in pairwise(sizes)):
            raise ValueError(
                f"sizes={self.sizes} must grow from stage to stage, up to the canvas of {run.size} latents"
            )
        return sizes

    def timesteps(self, schedule: Schedule, sizes: list[Size]) -> list[list[float]]:
        """The timesteps of each stage."""
        noise, even, later = schedule.noise, schedule.is_even, len(sizes) - 1
        between = [k / (later - 1) for k in range(1, later)]
        ends = self._one_each("ends", [0.4 - 0.2 * k for k in (0, *between)] if between else [0.2], later)
        shares = self._one_each("shares", [0.6, *[0.1 / (later - 1) for _ in between]] if between else [0.8], later)
        gamma = self.gamma if self.gamma is not None else 2.0 if between else 1.5
        start = noise.timestep_at(1) if even else schedule.timesteps[0]
        most, stages, taken = noise.sigma(start), [], 0
        for k, size in enumerate(sizes):
            stop = schedule.num_steps - (later - k)  # the stages to come take a step each, at least
            end = 0.0 if even else schedule.timesteps[-1]
            if k < later:
                stop = min(step_at(sum(shares[: k + 1]), schedule.num_steps), stop)
                end = round(noise.timestep_at(ends[k])) if even else noise.timestep_at(ends[k])
            count = max(stop - taken, 1)
            times = schedule.spaced(start, end, count)
            if even and start - end >= count - 1:
                times = torch.linspace(start, end, count).int().tolist()
            if any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"ends={tuple(ends)} leaves stage {k + 1} the timesteps {times}, which must fall")
            stages.append(times)
            taken += count
            if k < later:
                factor = max(after / before for after, before in zip(sizes[k + 1], size, strict=True))
                start = noise.timestep(min(noise.sigma(end) * factor ** (gamma / 2), most))
                start = math.ceil(start) if even else start
        return stages

    def _one_each(self, name: str, published: list[float], count: int) -> list[float]:
        """An option that has a value for each stage but the last, or the published ones."""
        values = getattr(self, name)
        if values is not None and len(values) != count:
            raise ValueError(
                f"{name}={values} must have {count} values, one for each stage but the last of {count + 1}"
            )
        return published if values is None else [*values]

    def phase(
        self, run: Run, sizes: list[Size], k: int, steps: range, times: list[float], maps: list[TextMaps]
    ) -> Phase:
        """Stage k, counted from 0; `maps` are those that each stage leaves to the next one."""
        run, is_last = replace(run, size=sizes[k]), k == len(sizes) - 1
        sigmas, targets = sigmas_and_targets(run.schedule, times, is_last=is_last)
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
            if k == 0:
                x = x * (math.hypot(sigmas[0], 1) / run.schedule.init_scale)  # as if a picture lay beneath the noise
            else:
                shape = (*x.shape[:2], *run.size)
                sample, noise = run.draws.encoder_noise(shape, k + 1), run.draws.phase_noise(shape, k + 1)
                x = renoise(enlarge(run, x, "pixels", "nearest", noise=sample.to(x)), sigmas[0], noise.to(x))
            name, cost = f"stage {k + 1}", steps[-1].__eq__
            return x, Stage(name, steps, denoise, run.size, sigmas=sigmas, targets=targets, cost=cost)

        return Phase(steps, run.size, begin)

    def by_band(self, run: Run, below: Size) -> Denoiser:
        """The denoiser guided by band, the low one that of a canvas of the size `below`."""
        guidance: Any = run.denoiser.guidance
        if "guidance_scale" not in options_of(guidance):
            name = name_of("guidance", guidance)
            raise ValueError(
                f"high_guidance_scale={self.high_guidance_scale} goes with a guidance_scale, which {name} lacks"
            )
        if guidance.guidance_scale == 1:
            return run.denoiser
        split = DownUp(size=below, down="bilinear")
        return replace(run.denoiser, guidance=ByBand(guidance.guidance_scale, self.high_guidance_scale, split))


def sigmas_and_targets(
    schedule: Schedule, times: list[float], *, is_last: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The sigmas of a stage at these timesteps, which ends with its estimate of x0, and the targets of DDIM's steps: at
    whole timesteps they lie a fixed number of them down."""
    noise, count = schedule.noise, len(times) - 1
    sigmas = [*map(noise.sigma, times), 0.0]
    targets, last = sigmas[1:], schedule.targets[-1]
    if count and all(isinstance(t, int) for t in times):
        total = int(noise.timestep_at(1)) + 1
        stride = total // int(total / (times[0] - times[-1]) * count)
        targets = [noise.sigma(t - stride) if t >= stride else last for t in times[:-1]] + targets[-1:]
    return tuple(sigmas), (*targets[:-1], last if is_last else 0.0)
