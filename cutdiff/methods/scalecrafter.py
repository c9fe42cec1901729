"""ScaleCrafter (He et al. 2023, arXiv 2310.07702): convolutions as wide as the canvas, while the structure is drawn.

Re-dilation (section 3.2) spreads the 3×3 convolutions of the middle block and of the deepest levels, in the first steps
only; later ones draw detail with the network as it is. Far past the native size more levels are spread, and the network
denoises less well; noise-damped guidance (section 3.4) then takes the direction to the prompt from it, and the estimate
without a prompt from a network that is spread less: base + s·(positive − negative).

Settings are those that the published code (github.com/YingqingHe/ScaleCrafter) runs with:
- Its lists for SDXL name `down_blocks.3` and a third downsampler, which SDXL has not: at twice the native size only the
  middle block and the deepest level on the way up are spread. So it is here.
- At four times the size its dilations shrink from step to step, but not below 2. So it is here.
- Convolution dispersion (section 3.3) hangs on `inflate_tau`, which is 0 in all its configurations, also in those named
  after it: what it runs does without, and so does this. Only the longer side counts, on both axes.
It also adds FreeU and DDIM with eta = 1, which are no part of the method; and at 4096×2048 it spreads the deepest level
on the way down by 3, where the rule here says 4, as at 4096×4096.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from cutdiff.methods.shared import Run, on_whole_inside, step_at
from cutdiff.models.dilated import dilated
from cutdiff.models.inside import blocks
from cutdiff.models.unet import DownLevel, MidBlock, UNet, as_unet
from cutdiff.options import Options
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.guidance import Changing
from cutdiff.sampling.rows import Inputs
from cutdiff.sampling.stages import Stage
from cutdiff.specs import name_of


@dataclass(frozen=True)
class ScaleCrafter(Options):
    """Re-dilated for the first steps, then as it is; direct inference where the canvas is nowhere past native."""

    changes_network: ClassVar[bool] = True
    unet_only: ClassVar[str] = "changes the convolutions"

    def stages(self, run: Run) -> list[Stage]:
        scale = max(run.size) / run.native_size
        if scale <= 1:
            return [Stage("direct", range(run.num_steps), run.denoiser)]
        plan = plan_for(scale)
        if plan.base is not None and isinstance(run.denoiser.guidance, Changing):
            raise ValueError(
                f"guidance={name_of('guidance', run.denoiser.guidance)} needs the estimate with the prompt, which past "
                "three times the native size noise-damped guidance does not give: choose cfg, or another method"
            )
        until = step_at(plan.share, run.num_steps)
        changed = partial(redilated_step, run.denoiser, plan, until)
        return [
            Stage("redilated", range(until), on_whole_inside(changed)),
            Stage("direct", range(until, run.num_steps), run.denoiser),
        ]


@dataclass(frozen=True)
class Dilations:
    """Factors of the convolutions' reach, from the deepest level upwards; levels that are not listed keep theirs."""

    mid: float
    up: tuple[float, ...]
    down: tuple[float, ...] = ()

    def of(self, block: nn.Module, depth: int) -> float:
        """The factor of a block `depth` levels above the deepest."""
        if isinstance(block, MidBlock):
            return self.mid
        factors = self.down if isinstance(block, DownLevel) else self.up
        return factors[depth] if depth < len(factors) else 1.0

    def shrunk(self, remaining: float) -> Dilations:
        """The dilations of a step with the share `remaining` of re-dilated ones to go: whole factors, not below 2."""
        mid, up, down = ([max(math.ceil(f * remaining), 2) for f in fs] for fs in ((self.mid,), self.up, self.down))
        return Dilations(mid[0], tuple(up), tuple(down))


@dataclass(frozen=True)
class Plan:
    """The convolutions that are spread, and for how long."""

    share: float
    """The share of the steps, from the first one on, in which they are."""
    dilations: Dilations
    base: Dilations | None = None
    """The dilations of noise-damped guidance's estimate without a prompt; None: plain guidance, constant dilations."""


def plan_for(scale: float) -> Plan:
    """The plan for a canvas whose longer side is `scale` times the native one: as published at 2, 2.5 and 4.

    Elsewhere the factors follow the scale; noise-damped guidance and the further levels come in above 3.
    """
    if scale <= 3:
        return Plan(0.6, Dilations(mid=scale, up=(scale,)))
    wide = Dilations(mid=scale, up=(scale, 0.75 * scale, 0.5 * scale), down=(scale,))
    return Plan(0.7, wide, base=Dilations(mid=0.5 * scale, up=(0.5 * scale,)))


@contextmanager
def redilated_step(denoiser: Denoiser, plan: Plan, until: int, step: int) -> Iterator[Denoiser]:
    """The denoiser of `step`, the network re-dilated inside the block or, for noise-damped guidance, in each call."""
    unet = as_unet(denoiser.unet)
    if plan.base is None:
        with redilated(unet, plan.dilations):
            yield denoiser
        return
    remaining = (until - step) / until
    wide, base = plan.dilations.shrunk(remaining), plan.base.shrunk(remaining)

    def damped(call: Call) -> Tensor:
        """Rows (base, base + positive − negative, …), which plain guidance turns into the noise-damped estimate."""
        with redilated(unet, wide):
            prediction = denoiser.evaluate(call.inputs)
        if call.copies == call.num_terms:
            return prediction
        items = prediction.float().unflatten(0, (-1, call.copies))
        with redilated(unet, base):
            calm = denoiser.evaluate(cast(Inputs, tuple(values[:: call.copies] for values in call.inputs))).float()
        calm = calm[:, None]
        return torch.cat([calm, calm + items[:, 1:] - items[:, :1]], dim=1).flatten(0, 1)

    yield replace(denoiser, network=damped)


def redilated(unet: UNet, dilations: Dilations) -> AbstractContextManager[None]:
    """Spread the 3×3 convolutions of resnets, downsamplers and upsamplers inside the block."""
    last = len(unet.down_blocks) - 1
    parts = ((block, dilations.of(block, last - level)) for level, block in blocks(unet))
    return dilated((module, factor) for block, factor in parts for module in block.modules())
