"""HiDiffusion (Zhang et al. 2023, arXiv 2311.17528): deep feature maps of native size, attention in windows.

RAU-Net (section 3.2) shrinks the feature maps of a large canvas on the way down, so that the deep levels see a picture
of the size that they know, and grows them on the way up; a threshold ends that. MSW-MSA (same section) attends within
large windows in the highest level with attention, where it costs most; each step shifts the windows anew.

Thresholds and places are those of the published code (github.com/megvii-research/HiDiffusion). It changes level 1 of
SDXL in two ways: its downsampler strides by 4 and not 2, dilated by 2 ("resampled" below), or its maps are averaged
2×2 after its first layer and grown back, bicubically, before the way up joins the skip of the level above ("pooled").
Below four times the native size the first 16% of the steps are resampled and those up to 40% pooled, which it calls
aggressive and does by default. From there on the first 30% are resampled and, with them, the first 70% pooled.
Where it is not followed:
- Its blocks each draw a shift from the global generator; here a step draws one for each image.
- It resizes maps of odd sides to fit the windows; here windows differ by a pixel instead.
- It treats any size and both axes alike, also the native one; here an axis that is not past native is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.direct import denoise_whole, direct
from cutdiff.methods.shared import Run
from cutdiff.models.config import UNetConfig
from cutdiff.models.inside import blocks, replaced, size_at
from cutdiff.models.layers import Downsample
from cutdiff.models.unet import Level, Transformer, UNet
from cutdiff.models.windows import transform_in_windows
from cutdiff.sampling.denoiser import Inputs, Size
from cutdiff.sampling.operators import upload
from cutdiff.sampling.solvers import Stage


def hidiffusion(run: Run) -> list[Stage]:
    """RAU-Net with windows, then windows alone; direct inference where the canvas is nowhere past native."""
    native, steps = run.denoiser.native_size, run.num_steps
    factors = (1 + (run.size[0] > native), 1 + (run.size[1] > native))
    if factors == (1, 1):
        return direct(run)
    if min(run.size) < 4 * native:
        resampled = range(_share(0.16, steps))
        pooled = range(len(resampled), _share(0.4, steps))
    else:
        resampled, pooled = range(_share(0.3, steps)), range(_share(0.7, steps))

    changed = partial(_changed, run, factors, resampled, pooled)
    until = max(resampled.stop, pooled.stop)
    return [
        Stage("resolution-aware", range(until), denoise_whole(run, changed)),
        Stage("windowed", range(until, steps), denoise_whole(run, changed)),
    ]


@contextmanager
def _changed(run: Run, factors: Size, resampled: range, pooled: range, step: int) -> Iterator[None]:
    with ExitStack() as changes:
        changes.enter_context(windowed(run, factors, step))
        if step in resampled:
            changes.enter_context(resampling(run.denoiser.unet, factors))
        if step in pooled:
            changes.enter_context(pooling(run.denoiser.unet, factors, run.size))
        yield


def top_level(config: UNetConfig) -> int:
    """The level whose network is changed: the highest one with attention, but one with a level below it if there is."""
    last = len(config.channels) - 1
    attended = [level for level, layers in enumerate(config.transformer_layers) if layers]
    return min([*attended, max(last - 1, 0)])


@contextmanager
def resampling(unet: UNet, factors: Size) -> Iterator[None]:
    """Stride `factors` times further, with taps as far apart. The way up needs no change: it grows to its skips."""
    block = cast(Level, unet.down_blocks[top_level(unet.config)])
    with ExitStack() as changes:
        for downsample in block.downsamplers:
            conv = cast(Downsample, downsample).conv
            stride = (conv.stride[0] * factors[0], conv.stride[1] * factors[1])
            changes.enter_context(replaced(conv, stride=stride, padding=factors, dilation=factors))
        yield


@contextmanager
def pooling(unet: UNet, factors: Size, size: Size) -> Iterator[None]:
    """Average `factors` blocks of pixels behind the first layer, for a canvas of `size` latents, and grow them back."""
    level = top_level(unet.config)
    down, up = cast(Level, unet.down_blocks[level]), cast(Level, unet.up_blocks[-1 - level])

    def shrink(index: int, *inputs: Tensor) -> Tensor:
        x = Level.layer(down, index, *inputs)
        return F.avg_pool2d(x, factors, ceil_mode=True) if index == 0 else x

    def grow(index: int, *inputs: Tensor) -> Tensor:
        x = Level.layer(up, index, *inputs)
        before_last = len(up.resnets) - 2
        return F.interpolate(x, size_at(size, level), mode="bicubic") if index == before_last else x

    with replaced(down, layer=shrink), replaced(up, layer=grow):
        yield


@contextmanager
def windowed(run: Run, windows: Size, step: int) -> Iterator[None]:
    """Self-attention of the top level in so many `windows` on each axis, shifted as each image draws for `step`."""
    denoiser = run.denoiser
    level = top_level(denoiser.unet.config)
    found = (module for at, block in blocks(denoiser.unet) if at == level for module in block.modules())
    transformers = [module for module in found if isinstance(module, Transformer)]
    shifts = upload(run.draws.window_shifts(step), denoiser.unet.conv_in.weight.device)

    def network(images: Tensor, rows: Inputs) -> Tensor:
        with ExitStack() as changes:
            for transformer in transformers:
                forward = partial(transform_in_windows, transformer, windows, shifts[images])
                changes.enter_context(replaced(transformer, forward=forward))
            return denoiser.evaluate(rows)

    with replaced(denoiser, network=network):
        yield


def _share(share: float, num_steps: int) -> int:
    return math.floor(round(share * num_steps, 9))
