"""FreeScale (Qiu et al. 2024, arXiv 2412.09626): a picture of native size is drawn again at twice and four times it.

Each size begins from the picture before, enlarged in pixels and diffused to where 70% of the steps are left, and stays
near it: the state is pulled to the enlarged picture, diffused to the sigma of each step (tailored self-cascade
upscaling). In the first steps the convolutions of the deepest level are as wide as the canvas, but none on the way up
(restrained dilated convolution). Every self-attention takes its low frequencies from native windows, which repeat
nothing within themselves, and its high ones from the whole picture (scale fusion).

Defaults are those of the published code (github.com/ali-vilab/FreeScale). As there, where the paper does not say it:
- G blurs over neighbouring channels of a feature too, as if they were a third axis of the picture: all its pictures
  were made so. `blurs_channels=False` is the Gaussian over height and width that the paper speaks of.
- The convolutions are dilated by the picture's width over the native size: those of a tall picture by less than its
  longer side, at 2×1 not at all. `dilated_by="longer"` is that side.
- The network is told the native size throughout, and windows reach past the picture, where they see zeros.
- An image enters the encoder past 0 and 1, as decoder and resizing give it.
Where it is not followed:
- It rounds the scale of a picture down, to enlarge windows between multiples of the native size, and to dilate and blur
  less: below twice it changes nothing but the windows. Here windows are native, dilations fractional, as in
  ScaleCrafter (2310.07702), and G reaches as far as at the next multiple.
- It decodes and encodes large images in tiles; here all is seen at once.
FreeU, which its scripts switch on, is no part of the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from cutdiff.methods.shared import Power, Run, Stages, enlarge, skip_residual, step_at
from cutdiff.models.dilated import dilated
from cutdiff.models.fused_scales import Fusion, Windows, attend_fused
from cutdiff.models.inside import blocks, replaced, size_at
from cutdiff.models.layers import Attention
from cutdiff.models.unet import TransformerBlock, UNet
from cutdiff.options import Between, Options, Share
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.operators import grid_for, upload
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.split import gaussian_taps
from cutdiff.sampling.stages import Phase, Size, Stage


@dataclass(frozen=True, kw_only=True)
class FreeScale(Options):
    """All steps on the native picture, then the last ones at each larger size."""

    changes_network: ClassVar[bool] = True

    sizes: tuple[Annotated[float, Between(1)], ...] | None = None
    """The sizes between the native one and the picture's, in multiples of the native one; None: each twice the last."""
    strength: Share = 0.7
    """The share of the steps, rounded up, that each larger size takes, at least the last one."""
    cosine_scale: Power = 2.0
    """The power of the cosine by which the pull to the enlarged picture fades."""
    dilated_fraction: Share = 0.7
    """The share of all steps, rounded up, before whose end convolutions are dilated."""
    dilated_by: Literal["width", "longer"] = "width"
    """The side whose scale they are dilated by: the "width", or the "longer" one."""
    blurs_channels: bool = True
    """Blur attention over neighbouring channels too."""
    fast_mode: bool = False
    """Attend to the whole picture in interleaved parts of native size, each by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes is not None and [*self.sizes] != sorted({*self.sizes} - {1.0}):
            raise ValueError(f"sizes={self.sizes} must rise from one to the next, the first one from above 1")

    def stages(self, run: Run) -> Stages:
        smallest, *larger = self.all_sizes(run)
        start = Stage("phase 1", range(run.num_steps), run.denoiser, smallest)
        return [start, *(self.phase(replace(run, size=size), n, smallest) for n, size in enumerate(larger, start=2))]

    def all_sizes(self, run: Run) -> list[Size]:
        """The canvases from the native one, of the shape of the run's, up to the run's."""
        scale = max(run.size) / run.native_size
        doubled = (2.0**k for k in range(1, max(1, math.ceil(math.log2(scale)))))
        factors = [factor for factor in (1.0, *(doubled if self.sizes is None else self.sizes)) if factor < scale]
        height, width = ([max(1, int(side * factor / scale)) for factor in factors] for side in run.size)
        return [*zip(height, width, strict=True), run.size]

    def phase(self, run: Run, number: int, native: Size) -> Phase:
        """Phase `number`, counted from 1, on the canvas of `run`; `native` is that of the first."""
        total, until = run.num_steps, step_at(self.dilated_fraction, run.num_steps)
        steps = range(number * total - max(1, step_at(self.strength, total)), number * total)
        side = run.size[1] if self.dilated_by == "width" else max(run.size)
        widened = [(conv, side / run.native_size) for conv in restrained(run.denoiser.unet)]

        def is_dilated(step: int) -> bool:
            return step % total < until

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            with dilated(widened if is_dilated(step) else []):
                fused = self.fused(run, x, step, native)
                return fused(x, sigma, step, original_size=native, target_size=native)

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            shape = (*picture.shape[:2], *run.size)
            unclamped = replace(run, decode=partial(run.decode, clamp=False))
            sample = run.draws.encoder_noise(shape, number).to(picture)
            guide = enlarge(unclamped, picture, "pixels", noise=sample)
            noise = run.draws.phase_noise(shape, number).to(guide)
            start = renoise(guide, run.schedule.sigmas[steps.start % total], noise)
            hold = skip_residual(run, guide, noise, self.cosine_scale)
            return start, Stage(f"phase {number}", steps, denoise, run.size, before=hold, cost=is_dilated)

        return Phase(steps, run.size, begin)

    def fused(self, run: Run, x: Tensor, step: int, native: Size) -> Denoiser:
        """The denoiser of `step` on a canvas x, whose self-attentions fuse the scales."""
        denoiser = run.denoiser
        grid = grid_for(run.size, run.native_size) if self.fast_mode else (1, 1)
        taps = gaussian_taps(1.0, math.ceil(max(run.size) / run.native_size) - 1, x)
        channel_taps = taps if self.blurs_channels else torch.ones_like(taps[:1])
        layers = [
            (attention, Fusion(windows, upload(windows.corners, x.device), grid, taps, channel_taps))
            for attention, windows in windows_of_layers(run, len(x), step, native)
        ]

        def network(call: Call) -> Tensor:
            with ExitStack() as changes:
                for attention, fusion in layers:
                    forward = partial(attend_fused, attention, fusion, call.images)
                    changes.enter_context(replaced(attention, forward=forward))
                return denoiser.evaluate(call.inputs)

        return replace(denoiser, network=network)


def restrained(unet: UNet) -> list[nn.Module]:
    """The modules whose convolutions are dilated: the deepest level on the way down and the middle, and the
    downsampler above."""
    above, deepest = unet.down_blocks[-2:-1], unet.down_blocks[-1]
    downsamplers = (level.get_submodule("downsamplers") for level in above)
    return [module for part in (*downsamplers, deepest, unet.mid_block) for module in part.modules()]


def windows_of_layers(run: Run, batch: int, step: int, native: Size) -> Iterator[tuple[Attention, Windows]]:
    """Every self-attention and the windows of `step` on its maps: the `native` canvas, moved by half of it and up to
    an eighth more."""
    layer = 0
    for level, block in blocks(run.denoiser.unet):
        size = size_at(run.size, level)
        window, stride = (
            (max(1, part[0] * size[0] // run.size[0]), max(1, part[1] * size[1] // run.size[1]))
            for part in (native, (native[0] // 2, native[1] // 2))
        )
        for module in block.modules():
            if isinstance(module, TransformerBlock):
                jitter = (window[0] // 8, window[1] // 8)
                origins = run.draws.attention_origins(step, layer, size, window, stride, jitter)
                yield module.attn1, Windows(origins.expand(batch, *origins.shape[-2:]), window, size)
                layer += 1
