"""DemoFusion (Du et al. 2023, arXiv 2311.16973): a picture of native size, drawn again at twice, thrice … its size.

Each phase enlarges the result of the one before, diffuses it to the first sigma and draws it again with all steps
(progressive upscaling, section 3.2). The same result, diffused to the sigma of each step, holds the state at its side
(skip residual, 3.3); beside the views, blurred interleaved patches see the whole picture (dilated sampling, 3.4).

As in the published code, whose defaults these are: latents are enlarged by bicubic interpolation, without the VAE; the
blur's width fades from its full value to 1% of it, and the blurred canvas is given back its mean and deviation; so is
the result of every phase those of the first one's. Unlike it: that code counts them over the whole batch, we for each
image; with the Euler solver it scales the patches, and all views past the first batch, by the sigma of the next step,
and in a phase's first step its first batch not at all, we everything by that of the step; it pads a canvas that the
patches do not divide with zeros at the top and the left, we by reflection at the other ends; on a size between two
multiples of the native one it draws the first phase larger than native, where we go by multiples and take the size
itself last. It tells the network the finished size in every phase: `size_conditioning="target"` is that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.cutdiffusion import denoise_patches
from cutdiff.methods.multidiffusion import denoise_views
from cutdiff.methods.shared import Run
from cutdiff.sampling.denoiser import Size
from cutdiff.sampling.solvers import CanvasDenoiser, Phase, Stage

BLUR = 0.8
"""Standard deviation, in latents, of the Gaussian that the patches are blurred with at first.

What the published examples are called with; the published function's own default is 1.
"""

MakeLocal = Callable[[Run, range], CanvasDenoiser]
"""(a run on a phase's canvas, the phase's steps) -> its denoiser of views; made when the phase begins."""


def demofusion(run: Run) -> list[Stage | Phase]:
    """Every phase takes num_steps steps; views move at every step."""
    return cascade(run, denoise_picture, lambda phase, steps: denoise_views(phase, phase.jitter), "none")


def cascade(
    run: Run, first: Callable[[Run], CanvasDenoiser], local: MakeLocal, interaction: str
) -> list[Stage | Phase]:
    """A stage that draws the whole picture, at most of native size, and a phase for every size up to the run's."""
    smallest, *larger = phase_sizes(run.size, run.denoiser.native_size)
    start = Stage("phase 1", range(run.num_steps), first(replace(run, size=smallest)), smallest)
    return [start, *(_phase(replace(run, size=size), k, local, interaction) for k, size in enumerate(larger, start=2))]


def phase_sizes(size: Size, native: int) -> list[Size]:
    """The canvases of a cascade up to `size`, of its shape, the longer axis by multiples of the native size."""
    longest = max(size)
    height, width = (
        [max(1, side * k * native // longest) for k in range(1, math.ceil(longest / native))] for side in size
    )
    return [*zip(height, width, strict=True), size]


def denoise_picture(run: Run) -> CanvasDenoiser:
    """D on the whole canvas, conditioned as a picture of its own size, or as the finished one."""

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        return run.denoiser(latents, sigma, original_size=run.told_size, target_size=run.told_size)

    return denoise


def _phase(run: Run, number: int, local: MakeLocal, interaction: str) -> Phase:
    """The phase `number`, counted from 1, on the canvas of `run`, whose patches lie on a grid of number × number."""
    steps = range((number - 1) * run.num_steps, number * run.num_steps)
    grid = (min(number, run.size[0]), min(number, run.size[1]))  # a canvas thinner than that has no more patches
    skip, dilated, blur = run.cosine_scales

    def begin(previous: Tensor) -> tuple[Tensor, Stage]:
        guide = F.interpolate(previous, run.size, mode="bicubic")
        noise = run.draws.phase_noise(tuple(guide.shape), number).to(guide)
        views = local(run, steps)

        def show(canvas: Tensor, sigma: float) -> Tensor:
            width = BLUR * (0.99 * fade(run, sigma) ** blur + 0.01)
            return with_moments(gaussian_blur(canvas, width, radius=number - 1), canvas)

        patches = denoise_patches(run, grid, interaction, show)

        def hold(x: Tensor, sigma: float, step: int) -> Tensor:
            return torch.lerp(x, guide + sigma * noise, fade(run, sigma) ** skip)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            return torch.lerp(views(x, sigma, step), patches(x, sigma, step), fade(run, sigma) ** dilated)

        def end(x: Tensor) -> Tensor:
            return with_moments(x, previous)

        start = guide + run.schedule.sigmas[0] * noise
        return start, Stage(f"phase {number}", steps, denoise, run.size, before=hold, end=end)

    return Phase(steps, run.size, begin)


def fade(run: Run, sigma: float) -> float:
    """From 1 at the noisiest timestep to 0 at the cleanest: half a cosine (section 3.3, before its power)."""
    return (1 - math.cos(math.pi * run.schedule.fraction(sigma))) / 2


def gaussian_blur(canvas: Tensor, width: float, radius: int) -> Tensor:
    """Blur each channel of (B, C, H, W) with a Gaussian of deviation `width`, cut off past `radius`; zeros outside."""
    offsets = torch.arange(-radius, radius + 1, device=canvas.device)
    taps = torch.exp(-(offsets**2) / (2 * width**2))
    taps = (taps / taps.sum()).to(canvas)
    channels = canvas.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)
    return F.conv2d(canvas, kernel, padding=radius, groups=channels)


def with_moments(x: Tensor, like: Tensor) -> Tensor:
    """x (B, C, H, W), scaled and moved to the mean and standard deviation of `like`, each image by itself."""
    (x_std, x_mean), (std, mean) = (torch.std_mean(t, dim=(1, 2, 3), keepdim=True) for t in (x, like))
    return (x - x_mean) / x_std * std + mean
