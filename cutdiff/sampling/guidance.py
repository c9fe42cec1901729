"""Guidance: how the estimates of x0 with the prompt and without it become one, on the canvas.

A guidance that is passed in is any function of (conditional, unconditional, sigma, step). One that is linear in the two
says its scale with `scale_at`, so that the kernels apply it on the way. A scale of at most 1 means that guidance is
off: the prompt alone is evaluated, and no negative one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from cutdiff.options import Options, Scale, Share
from cutdiff.sampling.split import Split
from cutdiff.specs import part, resolve


class Guidance(Protocol):
    """A guidance as it is passed in.

    One with a memory also has `begin(schedule)`, which returns the function of a run; the canvas of a run may grow, and
    a method may ask for several estimates of a step.
    """

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int, /) -> Tensor:
        """Two estimates of x0 (B, C, H, W), float32 -> the one that the solver takes."""
        ...


@runtime_checkable
class LinearGuidance(Protocol):
    """A guidance that is unconditional + scale · (conditional − unconditional)."""

    def scale_at(self, sigma: float, step: int) -> float:
        """The scale of a step; one of at most 1 evaluates the prompt alone."""
        ...


def is_off(guidance: Guidance, sigma: float, step: int) -> bool:
    """True where a guidance gives the estimate with the prompt as it is: a linear one by its scale, another where its
    `is_off` says so."""
    if isinstance(guidance, LinearGuidance):
        return guidance.scale_at(sigma, step) <= 1
    return getattr(guidance, "is_off", False)


@dataclass(frozen=True)
class CFG(Options):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

    guidance_scale: Scale = 7.5
    """The scale of unconditional + scale·(conditional − unconditional); 1 or less is off."""

    def scale_at(self, sigma: float, step: int) -> float:
        return self.guidance_scale

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.guidance_scale * (conditional - unconditional)


@dataclass(frozen=True)
class Rescale(Options):
    """Classifier-free guidance given back the deviation that each image's estimate with the prompt has.

    Lin et al. 2023 (arXiv 2305.08891), section 3.4, which takes what the network says of v; here it is the estimate of
    x0, which at the noisiest steps, where guidance overexposes, is −v.
    """

    guidance_scale: Scale = 7.5
    """The scale, as without rescaling."""
    phi: Share = 0.7
    """The share of the rescaled estimate; the rest is the plain one."""

    @property
    def is_off(self) -> bool:
        return self.guidance_scale == 1

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        kept, reached = (x.std(dim=(1, 2, 3), keepdim=True) for x in (conditional, guided))
        return guided * (1 - self.phi + self.phi * kept / reached)


@dataclass(frozen=True)
class ByBand(Options):
    """Guidance whose low and high bands have scales of their own: x0 = LP[u + s·(c − u)] + HP[u + s'·(c − u)].

    The defaults are HiWave's (Vontobel et al. 2025, arXiv 2506.20452): the low band, where guidance repeats subjects,
    is that of the estimate with the prompt. HiWave guides each view by itself; here it is the canvas of all views.
    FreCaS (Zhang et al. 2024, 2410.18410) has scales of 7.5 and 35, and the split `down_up` to the size of the stage
    before. Frequency-decoupled guidance (Sadat et al. 2025, 2506.19713) is the general form. With equal scales it is
    classifier-free guidance.
    """

    low_scale: Scale = 1.0
    """The scale of the low band; 1 or less is the estimate with the prompt."""
    guidance_scale: Scale = 7.5
    """The scale of the high band."""
    split: str | Split = "wavelet"
    """A spec of down_up, gaussian, butterworth or wavelet, or an object with `low(x)`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "split", part("split", "split", self.split))

    @property
    def is_off(self) -> bool:
        return self.low_scale == self.guidance_scale == 1

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        difference = conditional - unconditional
        guided = unconditional + self.guidance_scale * difference
        return guided + (self.low_scale - self.guidance_scale) * resolve("split", self.split).low(difference)
