"""Regions: the stages of several prompts, each with a mask of its own, become those of one picture.

MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113), section 4.2: the estimate of x0 is Σ m·D(x) / Σ m over the
background, whose mask is what no region covers, and the regions. A denoiser that sees the whole canvas does not know
where its mask is, and may draw its subject outside. So in the first steps it is shown a plain colour there
("bootstrapping").

As in the published code (github.com/omerbt/MultiDiffusion), the background is drawn without bootstrapping, and the
colour lies under the first noise of the canvas, at the sigma of the step. Where it is not followed:
- It steps each prompt's state by itself and averages the states; here the estimates are averaged, and the canvas takes
  one step. In a mask of 0 and 1 that is the same with every solver that goes straight to the next sigma.
- It picks one of twenty colours for each prompt and view; here all regions of an image have the one of the step.
- Its masks count alike, and are 0 or 1 in each latent; here they have weights, and cover shares of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.stages import Phase, Stage

Stages = Sequence[Stage | Phase]
Coverage = Callable[[Size], Tensor]
"""(the size of a canvas) -> the share of each of its latents that a region covers, (H, W), on the CPU."""
LEAST = 1e-4
"""The share of a latent that rounding may leave between regions, of which there is no background."""


class Layout:
    """The parts of a picture, which are the background, unless the regions cover all, and the regions."""

    def __init__(self, coverages: Sequence[Coverage], weights: Sequence[float], sizes: Iterable[Size]) -> None:
        """`coverages` are those of the regions, each (H, W), and `sizes` those of all canvases of a run."""
        self._coverages, self._weights = coverages, [1.0, *weights]
        self.has_background = any(bool(self._all_masks(size)[0].any()) for size in sizes)
        """False where the regions leave nothing on any canvas."""

    def masks(self, size: Size) -> Tensor:
        """The share of each latent of a canvas that each part covers: (R, H, W), on the CPU."""
        return self._all_masks(size)[0 if self.has_background else 1 :]

    def shares(self, size: Size) -> Tensor:
        """The share that each part has in the estimate of each latent: (R, H, W) of sum 1, on the CPU."""
        masks = self.masks(size)
        weights = torch.tensor(self._weights[-len(masks) :], dtype=torch.float32, device="cpu")
        weighted = masks * weights[:, None, None]
        return weighted / weighted.sum(dim=0)

    def _all_masks(self, size: Size) -> Tensor:
        """The masks of the background, which is what the regions leave, and of the regions."""
        regions = torch.stack([coverage(size) for coverage in self._coverages])
        rest = 1 - regions.sum(dim=0, keepdim=True)
        return torch.cat([torch.where(rest < LEAST, 0.0, rest), regions])


@dataclass(frozen=True)
class Bootstrapping:
    """A plain colour around each region, another one at every step, in the first steps of a run."""

    steps: range
    layout: Layout
    draws: Draws
    encode: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w)."""
    side: int
    """The side in pixels of the pictures of one colour that are encoded."""

    def shown(self, x: Tensor, sigma: float, step: int) -> Iterable[Tensor]:
        """The canvas (B, C, H, W) that each part's denoiser is shown in the place of x."""
        size = (x.shape[2], x.shape[3])
        masks = self.layout.masks(size)
        if step not in self.steps:
            return [x] * len(masks)
        colors = self.draws.background_colors(step)[:, :, None, None].expand(-1, -1, self.side, self.side)
        noise = self.draws.noise(tuple(x.shape)).to(x)
        around = renoise(resize(self.encode(colors).to(x), size), sigma, noise)
        first = int(self.layout.has_background)
        return chain([x] * first, (torch.lerp(around, x, mask) for mask in masks[first:].to(x)))


def zipped(
    runs: Sequence[Stages], layout: Layout, size: Size, bootstrapping: Bootstrapping, device: torch.device
) -> list[Stage | Phase]:
    """One run of several, one for each part of a layout: every estimate of x0 and every state is the sum of theirs,
    weighted by the part's share of each latent. `size` is that of the finished picture.

    ValueError where the runs have other stages.
    """
    if len(runs) == 1:
        return [*runs[0]]
    _check_alike(runs)
    return [
        _Zip(layout.shares(parts[0].size or size).to(device), bootstrapping).joined(parts)
        for parts in zip(*runs, strict=True)
    ]


@dataclass(frozen=True)
class _Zip:
    """Joins what the parts of a picture do in one stage."""

    shares: Tensor
    """The share of each part in each latent of the stage's canvas, (R, H, W)."""
    bootstrapping: Bootstrapping

    def joined(self, parts: Stages) -> Stage | Phase:
        """The stage or the phase of all parts."""
        stages = [part for part in parts if isinstance(part, Stage)]
        if stages:
            return self.stage(stages)
        phases = [part for part in parts if isinstance(part, Phase)]

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            begun = [phase.begin(x) for phase in phases]
            _check_alike([[stage] for _, stage in begun])
            return self.mixed(state for state, _ in begun), self.stage([stage for _, stage in begun])

        return Phase(phases[0].steps, phases[0].size, begin)

    def stage(self, stages: Sequence[Stage]) -> Stage:
        """The stage of all parts."""

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            shown = zip(stages, self.bootstrapping.shown(x, sigma, step), strict=True)
            return self.mixed(stage.denoise(canvas, sigma, step) for stage, canvas in shown)

        def before(x: Tensor, sigma: float, step: int) -> Tensor:
            return self.mixed(stage.before(x, sigma, step) for stage in stages if stage.before)

        def end(x: Tensor) -> Tensor:
            return self.mixed(stage.end(x) for stage in stages if stage.end)

        def cost(step: int) -> Hashable:
            return (step in self.bootstrapping.steps, *(stage.cost(step) for stage in stages if stage.cost))

        first = stages[0]
        return replace(first, denoise=denoise, before=first.before and before, end=first.end and end, cost=cost)

    def mixed(self, values: Iterable[Tensor]) -> Tensor:
        """The sum of the values (B, C, H, W) of the parts, weighted by their shares."""
        return reduce(torch.add, (share * value for share, value in zip(self.shares, values, strict=True)))


def _check_alike(runs: Sequence[Stages]) -> None:
    """ValueError where the stages of the runs do not take the same steps on the same canvases in the same way."""
    outlines = [[*map(_outline, stages)] for stages in runs]
    for outline in outlines:
        if outline != outlines[0]:
            raise ValueError(
                f"has the stages {outlines[0]} for one prompt and {outline} for another: regions need the same for all"
            )


def _outline(stage: Stage | Phase) -> tuple[object, ...]:
    """All of a stage but what it computes."""
    if isinstance(stage, Phase):
        return stage.steps, stage.size
    functions = (stage.before is not None, stage.end is not None, stage.cost is not None)
    return stage.name, stage.steps, stage.size, stage.sigmas, stage.targets, *functions
