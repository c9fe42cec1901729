"""HiDiffusion (Zhang et al. 2023, arXiv 2311.17528): deep feature maps of native size, attention in windows.

RAU-Net (section 3.2) shrinks the feature maps of a large canvas on the way down, so that the deep levels see a picture
of the size that they know, and grows them on the way up; a threshold ends that. MSW-MSA (same section) attends within
large windows in the highest level with attention, where it costs most; each step shifts the windows anew.

Thresholds and places are those of the published code (github.com/megvii-research/HiDiffusion). It shrinks maps in two
ways: a level's downsampler strides by 4 and not 2, dilated by 2 ("resampled" below), or a level's maps are averaged 2×2
after its first layer and grown back, bicubically, before the way up joins the skip of the level above ("pooled").
In SDXL both are done at level 1. Below four times the native size the first 16% of the steps are resampled and those up
to 40% pooled, which it calls aggressive and does by default. From there on the first 30% are resampled and, with them,
the first 70% pooled. In SD 1.5 and SD 2.1, whose level 0 attends too, level 0 is resampled, for the first 40% of the
steps, from four times the native size on for 70%; level 1 is pooled in none of them, from there on in the first 30%.
Where it is not followed:
- Its blocks each draw a shift from the global generator; here a step draws one for each image.
- It resizes maps of odd sides to fit the windows; here windows differ by a pixel instead.
- It treats any size and both axes alike, also the native one; here an axis that is not past native is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.shared import Run, on_whole_inside
from cutdiff.models.config import UNetConfig
from cutdiff.models.inside import blocks, replaced
from cutdiff.models.layers import Downsample
from cutdiff.models.unet import Level, Transformer, UNet, as_unet
from cutdiff.models.windows import transform_in_windows
from cutdiff.options import Options
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.operators import upload
from cutdiff.sampling.stages import Size, Stage


@dataclass(frozen=True)
class HiDiffusion(Options):
    """RAU-Net with windows, then windows alone; direct inference where the canvas is nowhere past native."""

    changes_network: ClassVar[bool] = True
    unet_only: ClassVar[str] = "shrinks the feature maps"

    def stages(self, run: Run) -> list[Stage]:
        factors = (1 + (run.size[0] > run.native_size), 1 + (run.size[1] > run.native_size))
        if factors == (1, 1):
            return [Stage("direct", range(run.num_steps), run.denoiser)]
        plan = plan_for(as_unet(run.denoiser.unet).config, run.size, run.num_steps)
        denoise = on_whole_inside(partial(changed, run, factors, plan))
        until = max(plan.resampled.stop, plan.pooled.stop)
        return [
            Stage("resolution-aware", range(until), denoise, cost=plan.changes),
            Stage("windowed", range(until, run.num_steps), denoise),
        ]


class Plan(NamedTuple):
    """The levels whose maps are shrunk, and the steps in which they are."""

    resampled_level: int
    resampled: range
    pooled_level: int
    pooled: range

    def changes(self, step: int) -> tuple[bool, bool]:
        """True for what is shrunk at a step: resampled, pooled."""
        return step in self.resampled, step in self.pooled


def plan_for(config: UNetConfig, size: Size, num_steps: int) -> Plan:
    """The published plan for a network, on a canvas of `size` latents."""

    def until(share: float) -> int:
        return math.floor(round(share * num_steps, 9))

    level, last = top_level(config), len(config.channels) - 1
    far = min(size) >= 4 * config.native_size
    if config.transformer_layers[0]:  # SD 1.5 and SD 2.1
        return Plan(level, range(until(0.7 if far else 0.4)), min(level + 1, last), range(until(0.3 if far else 0.0)))
    if far:
        return Plan(level, range(until(0.3)), level, range(until(0.7)))
    return Plan(level, range(until(0.16)), level, range(until(0.16), until(0.4)))


@contextmanager
def changed(run: Run, factors: Size, plan: Plan, step: int) -> Iterator[Denoiser]:
    """The denoiser of `step`, whose network is changed as the plan has it inside the block."""
    unet, (resampled, pooled) = as_unet(run.denoiser.unet), plan.changes(step)
    with ExitStack() as changes:
        if resampled:
            changes.enter_context(resampling(unet, plan.resampled_level, factors))
        if pooled:
            changes.enter_context(pooling(unet, plan.pooled_level, factors))
        yield windowed(run, factors, step)


def top_level(config: UNetConfig) -> int:
    """The level whose network is changed: the highest one with attention, but one with a level below it if there is."""
    last = len(config.channels) - 1
    attended = [level for level, layers in enumerate(config.transformer_layers) if layers]
    return min([*attended, max(last - 1, 0)])


@contextmanager
def resampling(unet: UNet, level: int, factors: Size) -> Iterator[None]:
    """Stride `factors` times further, with taps as far apart. The way up needs no change: it grows to its skips."""
    block = cast(Level, unet.down_blocks[level])
    with ExitStack() as changes:
        for downsample in block.downsamplers:
            conv = cast(Downsample, downsample).conv
            stride = (conv.stride[0] * factors[0], conv.stride[1] * factors[1])
            changes.enter_context(replaced(conv, stride=stride, padding=factors, dilation=factors))
        yield


@contextmanager
def pooling(unet: UNet, level: int, factors: Size) -> Iterator[None]:
    """Average `factors` blocks of pixels behind the level's first layer, and grow them back on the way up."""
    down, up = cast(Level, unet.down_blocks[level]), cast(Level, unet.up_blocks[-1 - level])
    sizes: list[Size] = []  # of the maps before they are shrunk

    def shrink(index: int, *inputs: Tensor) -> Tensor:
        x = Level.layer(down, index, *inputs)
        if index > 0:
            return x
        sizes[:] = [(x.shape[2], x.shape[3])]
        return F.avg_pool2d(x, factors, ceil_mode=True)

    def grow(index: int, *inputs: Tensor) -> Tensor:
        x = Level.layer(up, index, *inputs)
        before_last = len(up.resnets) - 2
        return F.interpolate(x, sizes[0], mode="bicubic") if index == before_last else x

    with replaced(down, layer=shrink), replaced(up, layer=grow):
        yield


def windowed(run: Run, windows: Size, step: int) -> Denoiser:
    """Self-attention of the top level in so many `windows` on each axis, shifted as each image draws for `step`."""
    denoiser, unet = run.denoiser, as_unet(run.denoiser.unet)
    level = top_level(unet.config)
    modules = (module for depth, block in blocks(unet) if depth == level for module in block.modules())
    transformers = [module for module in modules if isinstance(module, Transformer)]
    shifts = upload(run.draws.window_shifts(step), unet.device)

    def network(call: Call) -> Tensor:
        with ExitStack() as changes:
            for transformer in transformers:
                forward = partial(transform_in_windows, transformer, windows, shifts[call.images])
                changes.enter_context(replaced(transformer, forward=forward))
            return denoiser.evaluate(call.inputs)

    return replace(denoiser, network=network)
