"""The `Run` that methods are given, and the parts that several of them share: views, patches, a cascade, fades."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor

from cutdiff.models.shared_text import SharedText
from cutdiff.models.text import TextEncoders
from cutdiff.options import Between, options_of
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.fitted import Fitted
from cutdiff.sampling.mean_picture import Weight
from cutdiff.sampling.resize import Change, Resampling, renoise, resize, resize_pixels
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Size, Stage
from cutdiff.specs import name_of

Power = Annotated[float, Between(0)]
Space = Literal["pixels", "latents"]
Stages = list[Stage | Phase]


@dataclass(frozen=True)
class Run:
    """One run on a canvas: what a method is given."""

    denoiser: Denoiser
    """The denoiser for the native size."""
    draws: Draws
    size: Size
    """The size of the canvas, in latents."""
    target_size: Size
    """The size of the finished picture: that of the canvas, but on the way to it in a cascade of sizes."""
    schedule: Schedule
    prompts: list[str]
    text: TextEncoders | SharedText
    encode: Callable[..., Tensor]
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w), float32, as `cutdiff.encode`, a sample where it is given
    `noise`."""
    decode: Callable[..., Tensor]
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32, on the latents' device, as `cutdiff.decode`;
    with `clamp=False` also past 0 and 1, as the VAE gives them."""
    image: Fitted | None = None
    """The given picture: `image(size)` is it on a canvas of a size in latents, (B or 1, 3, H, W) in [0, 1]."""

    @property
    def num_steps(self) -> int:
        """The steps of the schedule."""
        return self.schedule.num_steps

    @property
    def native_size(self) -> int:
        """The side, in latents, of the pictures that the network was trained on."""
        return self.denoiser.native_size

    @property
    def window(self) -> Size:
        """The size of a view: the native one, or the canvas where that is smaller."""
        return min(self.native_size, self.size[0]), min(self.native_size, self.size[1])

    def given(self, size: Size) -> Tensor:
        """The latents (B, C, h, w) of the given picture on a canvas of a size."""
        assert self.image is not None
        return self.encode(self.image(size)).expand(len(self.prompts), -1, -1, -1)


class Kept:
    """A canvas denoiser that keeps its last estimate of x0, for a phase that begins with it and not with the state."""

    def __init__(self, denoise: CanvasDenoiser) -> None:
        self.denoise = denoise
        self.estimate = torch.empty(0)
        """The last estimate (B, C, H, W), as `denoise` gave it."""

    def __call__(self, latents: Tensor, sigma: float, step: int) -> Tensor:
        self.estimate = self.denoise(latents, sigma, step)
        return self.estimate


class Method(Protocol):
    """A method as it is passed in; a plain function of a `Run` is one without options.

    Besides, a method may have `changes_network = True`, if it changes the inside of the network, which a compiled one
    would not see; `unet_only`, words for what it does to a U-Net, if it is for no other network; `takes_picture =
    True`, if it goes on from a picture that it draws first, for which it takes a given one by `first_picture`;
    `of_strength(share)`, a static function that gives those of its options, by name, which let it draw on such a
    picture by a share of the steps; `check_settings(settings)`, which raises ValueError where the options of a run do
    not suit it; and `check_native(native_size)`, the same for the model's native size in latents.
    """

    def stages(self, run: Run) -> Sequence[Stage | Phase]:
        """The stages in the order in which they run."""
        ...


def stages_of(method: Any, run: Run) -> list[Stage | Phase]:
    """The stages of a method or a function of a run. ValueError where they are none."""
    stages = method.stages(run) if hasattr(method, "stages") else method(run)
    stages = stages if isinstance(stages, str | Stage | Phase) or not isinstance(stages, Iterable) else list(stages)
    if not isinstance(stages, list) or not all(isinstance(part, Stage | Phase) for part in stages):
        kinds = [type(part).__name__ for part in stages] if isinstance(stages, list) else type(stages).__name__
        raise ValueError(f"gives {kinds} where a list of stages is needed")
    if wrong := [part.steps for part in stages if not isinstance(part.steps, range)]:
        raise ValueError(f"gives a stage the steps {wrong[0]!r:.200} where a range is needed")
    return stages


def on_whole_inside(changed: Callable[[int], AbstractContextManager[Denoiser]]) -> CanvasDenoiser:
    """D'(x) on the whole canvas, inside `changed(step)`, which changes the network and gives the denoiser to call."""

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        with changed(step) as denoiser:
            return denoiser(latents, sigma, step)

    return denoise


def on_whole(run: Run, size: Size | None) -> CanvasDenoiser:
    """D on the whole canvas, which the network is told to have a size in latents; None: its own."""
    return lambda x, sigma, step: run.denoiser(x, sigma, step, original_size=size, target_size=size)


def enlarge(
    run: Run,
    latents: Tensor,
    space: Space,
    resampling: Resampling = "bicubic",
    *,
    change: Change | None = None,
    noise: Tensor | None = None,
    corrections: int = 0,
) -> Tensor:
    """Latents (B, C, h, w) -> those of the run's size, resized themselves or through the VAE (`resize_pixels`, whose
    `change`, `noise` and `corrections` mean nothing for latents)."""
    if space == "latents":
        return resize(latents, run.size, resampling)
    options: dict[str, Any] = {"change": change, "noise": noise, "corrections": corrections}
    return resize_pixels(latents, run.size, run.decode, run.encode, resampling=resampling, **options)


def with_guidance_scale(run: Run, scale: float | None, option: str = "detail_guidance_scale") -> Run:
    """The run with another guidance scale, 1 or less for none; itself where that is None. ValueError, which names the
    option that asks for it, where its guidance has no scale."""
    if scale is None:
        return run
    if scale <= 1:
        return replace(run, denoiser=replace(run.denoiser, guided=lambda sigma: False))
    guidance = replace(scalable(run.denoiser.guidance, f"{option}={scale}"), guidance_scale=scale)
    return replace(run, denoiser=replace(run.denoiser, guidance=guidance))


def scalable(guidance: Any, asked: str) -> Any:
    """The guidance itself, if it has a `guidance_scale`. ValueError, which begins with what is asked for, if not."""
    if "guidance_scale" not in options_of(guidance):
        needs = f"{asked} needs a guidance with a guidance_scale, which {name_of('guidance', guidance)} lacks"
        raise ValueError(f"{needs}: give one that has it, or None where the method takes it")
    return guidance


def step_at(share: float, num_steps: int) -> int:
    """The first of `num_steps` that lies at or after a share of them."""
    return math.ceil(round(share * num_steps, 9))  # 0.28 · 50 is 14, whatever floats say


def between(schedule: Schedule, shares: tuple[float, float]) -> Callable[[float], bool]:
    """Tells for a sigma whether it is one of those of a schedule's steps between two shares of them, or lies there."""
    first, last = (step_at(share, schedule.num_steps) for share in shares)
    high, low = schedule.sigmas[first] if first else math.inf, schedule.sigmas[last]
    return lambda sigma: low < sigma <= high


def falling(weight: float, steps: range) -> Weight:
    """A weight that falls by equal amounts from `weight` at the first of the steps to 0 after the last."""
    return lambda sigma, step: weight * (steps.stop - step) / len(steps)


def fade(run: Run, sigma: float) -> float:
    """Half a cosine, from 1 at the noisiest timestep to 0 at the cleanest (DemoFusion, section 3.3)."""
    return (1 - math.cos(math.pi * run.schedule.fraction(sigma))) / 2


def skip_residual(run: Run, guide: Tensor, noise: Tensor, power: float) -> CanvasDenoiser:
    """Pull a state towards a picture that is diffused with the same noise to the sigma of each step, by a power of
    `fade` (DemoFusion, section 3.3). `guide` and `noise` are (B, C, H, W)."""

    def hold(x: Tensor, sigma: float, step: int) -> Tensor:
        return torch.lerp(x, renoise(guide, sigma, noise), fade(run, sigma) ** power)

    return hold


def phase_sizes(size: Size, native: int, factors: Sequence[float] | None = None) -> list[Size]:
    """The canvases of a cascade up to `size`, of its shape: the native one, then those whose longer axis has the
    `factors` times the native size, as far as they lie between; None: all multiples."""
    longest = max(size)
    between = range(2, math.ceil(longest / native)) if factors is None else sorted(set(factors) - {1})
    shares = [factor * native / longest for factor in (1, *between) if factor * native < longest]
    height, width = ([max(1, int(round(side * share, 9))) for share in shares] for side in size)
    return [*zip(height, width, strict=True), size]
