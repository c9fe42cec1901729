"""The parts that methods of patches and views share: options, the denoisers made of them, and a cascade of sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from cutdiff_kernels import Grain
from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Power, Run, Stages, fade, skip_residual
from cutdiff.models.text import TextStates
from cutdiff.options import Count, Options
from cutdiff.sampling.operators import Operator, Patches, Views, ViewWeights, pad_to_grid, view_weights
from cutdiff.sampling.overlaps import Swapped
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.split import gaussian_taps
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Size, Stage

BLUR = 0.8
"""The standard deviation, in latents, of the Gaussian that DemoFusion's patches are blurred with at first.

The published examples are called with it; the published function's own default is 1.
"""


@dataclass(frozen=True, kw_only=True)
class Conditioned(Options):
    """The option of methods whose network is shown parts of the canvas, and what it is told of them."""

    size_conditioning: Literal["native", "target"] = "native"
    """The sizes that the network is told: "native", those of the patch or crop that it sees, or "target", the finished
    picture's, as the published CutDiffusion code has it."""

    def conditioning_size(self, run: Run) -> Size | None:
        """The size that a patch is said to be: its own (None), or that of the finished picture."""
        return None if self.size_conditioning == "native" else run.target_size

    def on_whole(self, run: Run) -> CanvasDenoiser:
        """D on the whole canvas, conditioned as a picture of its own size, or as the finished one."""
        size = self.conditioning_size(run)

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            return run.denoiser(latents, sigma, step, original_size=size, target_size=size)

        return denoise

    def denoise_windows(
        self,
        run: Run,
        operator: Operator,
        crops: Tensor,
        latents: Tensor,
        sigma: float,
        step: int,
        *,
        positive: TextStates | None = None,
    ) -> Tensor:
        """scatter ∘ D ∘ gather of an operator whose items are windows, conditioned as crops at `crops` (B, V, 2).

        "native": original size = the canvas, target = the window. "target": both are the finished picture.
        """
        original, target = (
            (run.size, run.window) if self.size_conditioning == "native" else (run.target_size, run.target_size)
        )
        return run.denoiser.through(
            operator,
            latents,
            sigma,
            step,
            positive=positive,
            crop_origins=crops.flatten(0, 1),
            original_size=original,
            target_size=target,
        )


@dataclass(frozen=True, kw_only=True)
class Tiled(Conditioned):
    """The options of methods whose network is shown overlapping views of the canvas, and patches, and how."""

    stride: Count | None = None
    """The distance between views, in latents; None: half of the model's native size."""
    view_weights: ViewWeights = "uniform"
    """The weight of a view's pixels where views overlap: "uniform", or falling towards its border as a "gaussian" or a
    "cosine"."""
    overlaps: Literal["average", "swap"] = "average"
    """The value of a pixel that several views show: the "average" of what they draw, or by "swap" what one of them
    draws, views taking turns from pixel to pixel (SaFa, arXiv 2502.05130), which keeps what is fine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlaps == "swap" and self.view_weights != "uniform":
            raise ValueError(
                f"view_weights={self.view_weights!r} weigh an average, and overlaps='swap' takes none: leave one out"
            )

    def check_native(self, native_size: int) -> None:
        """ValueError where the stride leaves gaps between views of a model of this native size, in latents."""
        if self.stride is not None and self.stride > native_size:
            raise ValueError(f"stride={self.stride} must not exceed the window of {native_size} latents")

    def strides(self, run: Run) -> Size:
        """The distance between views on each axis."""
        wanted = max(1, run.native_size // 2) if self.stride is None else self.stride
        return min(wanted, run.window[0]), min(wanted, run.window[1])

    def jitter(self, run: Run) -> Size:
        """The most that a view moves on each axis; a single view, which is the whole picture, does not."""
        if run.size == run.window:
            return 0, 0
        (height, width), (down, right) = run.window, self.strides(run)
        return (height - down) // 4, (width - right) // 4

    def on_patches(
        self, run: Run, grid: Size, interaction: Grain, show: Callable[[Tensor, float], Tensor] | None = None
    ) -> CanvasDenoiser:
        """relocate ∘ permute⁻¹ ∘ D ∘ permute ∘ cut: all patches draw one picture, because they keep exchanging pixels.

        A canvas that the grid does not divide is padded for the cut and cropped after the relocation. Conditioned
        "native", every patch is a whole picture of its own size. The network is shown `show(canvas, sigma)` in the
        place of the canvas.
        """
        size = self.conditioning_size(run)

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            canvas = pad_to_grid(latents, grid)
            batch, channels, height, width = canvas.shape
            shape = (batch, channels, height // grid[0], width // grid[1])
            patches = Patches(grid, run.draws.permutation(step, grid, shape, interaction))
            shown = None if show is None else show(canvas, sigma)
            denoised = run.denoiser.through(
                patches, canvas, sigma, step, shown=shown, original_size=size, target_size=size, span=run.size
            )
            return denoised[:, :, : run.size[0], : run.size[1]]

        return denoise

    def on_views(self, run: Run, *, jitter: Size | None = None, weights: Tensor | None = None) -> CanvasDenoiser:
        """average ∘ D ∘ views, or swap ∘ D ∘ views; they stand elsewhere at every step where there is `jitter`.

        `weights` are as in `Views`, or None for those of the option `view_weights`. ValueError where there are any and
        views are swapped.
        """
        most = self.jitter(run) if jitter is None else jitter

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            origins = run.draws.view_origins(step, run.size, run.window, self.strides(run), most)
            return self.denoise_views(run, origins, most, latents, sigma, step, weights=weights)

        return denoise

    def denoise_views(
        self,
        run: Run,
        origins: Tensor,
        jitter: Size,
        latents: Tensor,
        sigma: float,
        step: int,
        *,
        positive: TextStates | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """average or swap ∘ D ∘ views at `origins` (B, V, 2) or (V, 2); `positive` are text states of each view.

        Conditioned "native", a view's crop is at its origin, not below 0; "target", it is counted from the corner of a
        canvas that is padded by the jitter's range.
        """
        origins = origins.expand(len(latents), *origins.shape[-2:]).cpu()  # (B, V, 2)
        weights = view_weights(self.view_weights, run.window) if weights is None else weights
        if self.overlaps == "swap":
            if weights is not None:
                raise ValueError("weights of views weigh an average, and overlaps='swap' takes none: leave one out")
            views = Swapped(origins, run.window, run.size, latents.device)
        else:
            views = Views(origins, run.window, run.size, weights, latents.device)
        native = self.size_conditioning == "native"
        crops = origins.clamp(min=0) if native else origins + origins.new_tensor(jitter)
        return self.denoise_windows(run, views, crops, latents, sigma, step, positive=positive)


MakeLocal = Callable[[Run, range, Tensor], CanvasDenoiser]
"""(a run on a phase's canvas, the phase's steps, the latents of the phase before) -> its denoiser of views; made when
the phase begins."""


@dataclass(frozen=True, kw_only=True)
class Cascade(Tiled):
    """DemoFusion's cascade of sizes (its head tells of it), which AccDiffusion goes through as well."""

    takes_picture: ClassVar[bool] = True

    cosine_scales: tuple[Power, Power, Power] = (3.0, 1.0, 1.0)
    """The powers of a cosine by which the skip residual, the dilated sampling and the blur fade."""

    def cascade(
        self,
        run: Run,
        first: Callable[[Run], CanvasDenoiser],
        local: MakeLocal,
        interaction: Grain,
        looks: Callable[[int], bool] = lambda step: False,
    ) -> Stages:
        """A stage that draws the whole picture, at most of native size, and a phase for every size up to the run's.
        `looks` are as of `first_picture`."""
        smallest, larger = canvases(run)
        on_smallest = replace(run, size=smallest)
        denoise = first_picture(on_smallest, first(on_smallest), looks)
        start = Stage("phase 1", range(run.num_steps), denoise, smallest)
        phases = [self._phase(replace(run, size=size), number, local, interaction) for number, size in larger]
        return [start, *phases]

    def _phase(self, run: Run, number: int, local: MakeLocal, interaction: Grain) -> Phase:
        """Phase `number`, counted from 1, on the canvas of `run`, whose patches lie on a grid of number × number."""
        steps = range((number - 1) * run.num_steps, number * run.num_steps)
        grid = (min(number, run.size[0]), min(number, run.size[1]))  # a canvas thinner than that has no more patches
        skip, dilated, blur = self.cosine_scales

        def begin(previous: Tensor) -> tuple[Tensor, Stage]:
            guide = resize(previous, run.size)
            noise = run.draws.phase_noise(tuple(guide.shape), number).to(guide)
            views = local(run, steps, previous)

            def show(canvas: Tensor, sigma: float) -> Tensor:
                width = BLUR * (0.99 * fade(run, sigma) ** blur + 0.01)
                return with_moments(gaussian_blur(canvas, width, radius=number - 1), canvas)

            patches = self.on_patches(run, grid, interaction, show)

            hold = skip_residual(run, guide, noise, skip)

            def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
                return torch.lerp(views(x, sigma, step), patches(x, sigma, step), fade(run, sigma) ** dilated)

            def end(x: Tensor) -> Tensor:
                return with_moments(x, previous)

            start = renoise(guide, run.schedule.sigmas[0], noise)
            return start, Stage(f"phase {number}", steps, denoise, run.size, before=hold, end=end)

        return Phase(steps, run.size, begin)


def gaussian_blur(canvas: Tensor, width: float, radius: int) -> Tensor:
    """Blur each channel of (B, C, H, W) with a Gaussian of deviation `width`, cut off past `radius`; zeros outside."""
    taps = gaussian_taps(width, radius, canvas)
    channels = canvas.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)
    return F.conv2d(canvas, kernel, padding=radius, groups=channels)


def with_moments(x: Tensor, like: Tensor) -> Tensor:
    """x (B, C, H, W), scaled and moved to the mean and standard deviation of `like`, each image by itself."""
    (x_std, x_mean), (std, mean) = (torch.std_mean(t, dim=(1, 2, 3), keepdim=True) for t in (x, like))
    return (x - x_mean) / x_std * std + mean
