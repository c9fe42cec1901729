"""FreeScale (Qiu et al. 2024, arXiv 2412.09626): a picture of native size is drawn again at twice and four times it.

Each size begins from the picture before, enlarged in pixels and diffused to where 70% of the steps are left, and is
pulled to it at every step, less and less (tailored self-cascade upscaling). In the first steps, convolutions of the
deepest level are spread to the canvas, but none on the way up (restrained dilated convolution). Every self-attention
is G(local) + global − G(global), G a Gaussian: native windows give the low frequencies, and the whole picture the high
ones (scale fusion).

Defaults are those of the published code (github.com/ali-vilab/FreeScale). As there, though the paper does not say so:
- G runs over neighbouring channels too, as if they were a third axis of the picture; `blurs_channels=False` is the
  Gaussian of the picture that the text speaks of.
- Convolutions are spread by the width alone: in a tall picture less, or not at all. `dilated_by="longer"` is
  the rule that treats both alike.
- The network is told the native size throughout; windows may reach past the picture, into zeros.
Where it is not followed:
- It rounds a picture's scale down: between multiples of the native size its windows are larger than native, dilations
  and G are those of the lower multiple. Here windows are native, dilations fractional, and G is that of the next one.
- It decodes and encodes a large picture in tiles, here it is in one piece.
FreeU, which its scripts add, is no part of the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Power, Run, Stages, enlarge, phase_sizes, skip_residual, step_at
from cutdiff.models.dilated import dilated
from cutdiff.models.fused_scales import Fusion, Windows, fused_scales, on_map
from cutdiff.models.inside import self_attentions, size_at
from cutdiff.models.unet import as_unet
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
    unet_only: ClassVar[str] = "changes the convolutions and self-attentions"
    takes_picture: ClassVar[bool] = True

    factors: tuple[Annotated[float, Between(1)], ...] | None = None
    """The sizes between native and the picture's, in native ones; None: 2, 4, 8 and so on."""
    strength: Share = 0.7
    """The share of the steps, rounded up, that each larger size takes, at least the last one."""
    cosine_scale: Power = 2.0
    """The power of the cosine by which the pull to the enlarged picture fades: the more, the more detail."""
    dilated_fraction: Share = 0.7
    """The share of the schedule, rounded up, in whose steps convolutions are dilated."""
    dilated_by: Literal["width", "longer"] = "width"
    """The side that says how far: the "width", or the "longer" one."""
    blurs_channels: bool = True
    """Let G run over neighbouring channels too."""
    fast_mode: bool = False
    """Attend to the whole picture in interleaved parts of native size, each by itself."""

    def check_settings(self, settings: object) -> None:
        """ValueError where factors do not rise."""
        if self.factors is not None and [*self.factors] != sorted({*self.factors} - {1.0}):
            raise ValueError(f"factors={self.factors} must rise, all above 1: give multiples of the native size")

    def stages(self, run: Run) -> Stages:
        between = [2.0**k for k in range(1, 32)] if self.factors is None else self.factors
        native, *_ = phase_sizes(run.size, run.native_size)
        first, larger = canvases(run, between)
        denoise = first_picture(replace(run, size=first), run.denoiser)
        start = Stage("phase 1", range(run.num_steps), denoise, first)
        return [start, *(self.phase(replace(run, size=size), n, native) for n, size in larger)]

    def phase(self, run: Run, number: int, native: Size) -> Phase:
        """Phase `number`, counted from 1, on the canvas of `run`; `native` is that of the first."""
        total, until = run.num_steps, step_at(self.dilated_fraction, run.num_steps)
        steps = range(number * total - max(1, step_at(self.strength, total)), number * total)
        reach = (run.size[1] if self.dilated_by == "width" else max(run.size)) / run.native_size
        unet = as_unet(run.denoiser.unet)
        last = len(unet.down_blocks) - 1
        names = (f"down_blocks.{last - 1}.downsamplers", f"down_blocks.{last}", "mid_block")
        modules = [(module, reach) for name, module in unet.named_modules() if name.startswith(names)]

        def is_dilated(step: int) -> bool:
            return step % total < until

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            with dilated(modules if is_dilated(step) else []):
                return self.fused(run, native, x, step)(x, sigma, step, original_size=native, target_size=native)

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            shape = (*picture.shape[:2], *run.size)
            unclamped = replace(run, decode=partial(run.decode, clamp=False))
            guide = enlarge(unclamped, picture, "pixels", noise=run.draws.encoder_noise(shape, number).to(picture))
            noise = run.draws.phase_noise(shape, number).to(guide)
            start = renoise(guide, run.schedule.sigmas[steps.start % total], noise)
            hold = skip_residual(run, guide, noise, self.cosine_scale)
            return start, Stage(f"phase {number}", steps, denoise, run.size, before=hold, cost=is_dilated)

        return Phase(steps, run.size, begin)

    def fused(self, run: Run, native: Size, x: Tensor, step: int) -> Denoiser:
        """The denoiser of `step` on the canvas x, whose self-attentions fuse windows of `native` size and the whole."""
        taps = gaussian_taps(1.0, math.ceil(max(run.size) / run.native_size) - 1, x)
        channel_taps = taps if self.blurs_channels else torch.ones_like(taps[:1])
        grid, layers = grid_for(run.size, run.native_size) if self.fast_mode else (1, 1), []
        for layer, (level, attention) in enumerate(self_attentions(as_unet(run.denoiser.unet))):
            size = size_at(run.size, level)
            window, stride = (on_map(part, run.size, size) for part in (native, (native[0] // 2, native[1] // 2)))
            jitter = (window[0] // 8, window[1] // 8)
            origins = run.draws.attention_origins(step, layer, size, window, stride, jitter)
            windows = Windows(origins.expand(len(x), *origins.shape[-2:]), window, size)
            layers.append((attention, Fusion(windows, upload(windows.corners, x.device), grid, taps, channel_taps)))

        def network(call: Call) -> Tensor:
            with fused_scales(layers, call.images):
                return run.denoiser.evaluate(call.inputs)

        return replace(run.denoiser, network=network)
