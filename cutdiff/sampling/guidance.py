"""Guidance: how the estimates of x0 with the prompt and without it become one, on the canvas.

A guidance that is passed in is any function of (conditional, unconditional, sigma, step). One that is linear in the two
says its scale with `scale_at`, so that the kernels apply it on the way. A scale of at most 1 means that guidance is
off: the prompt alone is evaluated, and no negative one. One that needs a third estimate says how the network is changed
for it (`Changing`), and one that reads the schedule or remembers has `begin` (`Guidance`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from cutdiff.models.backbone import Backbone
from cutdiff.options import Options, Scale, Share
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.solvers import DDIM, Euler, EulerAncestral
from cutdiff.sampling.split import Split
from cutdiff.specs import name_of, part, resolve, spec_of

if TYPE_CHECKING:
    from cutdiff.settings import Settings


class Guidance(Protocol):
    """A guidance as it is passed in.

    One that reads the schedule, or has a memory, also has `begin(schedule)`, which returns the function of a stage. It
    is called anew wherever the solver is started anew: for every phase, and for every stage with sigmas of its own,
    with the sigmas and targets of that stage. A method or a solver may ask for several estimates of a step, on canvases
    of several sizes. Besides, a guidance may have `check_settings(settings)`, as a method may, and `is_off`, True where
    it gives the estimate with the prompt as it is.
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


@runtime_checkable
class Changing(Protocol):
    """A guidance that needs a third estimate: that with the prompt by a network which is changed for those rows alone.

    A linear one adds change_scale_at(sigma, step) · (conditional − third) to what its `scale_at` says, where a scale of
    0 means that the third is not evaluated. Any other is given the third as its last argument: (conditional,
    unconditional, sigma, step, third). Keys and values that the network made of the text are those before the change.
    It also has `changes_network = True`, and where it is for U-Nets `unet_only`, as a method may.
    """

    def changed(self, network: Backbone[Any]) -> AbstractContextManager[None]:
        """A block inside which the network is another one. ValueError where this network cannot be changed so."""
        ...


class Begun:
    """The guidances of the stage under way, each begun once, by what they were made of."""

    def __init__(self) -> None:
        self._schedule: Schedule | None = None
        self._functions: list[tuple[Guidance, Guidance]] = []

    def begin(self, schedule: Schedule) -> None:
        """Begin a stage: `targets` are the sigmas that the solver goes to."""
        self._schedule, self._functions = schedule, []

    def of(self, guidance: Any) -> Any:
        """The function of the stage; a guidance without `begin` is that itself. Equal ones share a memory."""
        begin = getattr(guidance, "begin", None)
        if begin is None or self._schedule is None:
            return guidance
        for known, function in self._functions:
            if known is guidance or known == guidance:
                return function
        self._functions.append((guidance, begin(self._schedule)))
        return self._functions[-1][1]


def is_off(guidance: Guidance, sigma: float, step: int) -> bool:
    """True where a guidance gives the estimate with the prompt as it is: where its `is_off` says so, or where it has
    none and is linear, by its scale."""
    own = getattr(guidance, "is_off", None)
    if own is None:
        return isinstance(guidance, LinearGuidance) and guidance.scale_at(sigma, step) <= 1
    return own


def change_scale(guidance: Guidance, sigma: float, step: int) -> float:
    """The scale of (conditional − third) in a step; 0 where no third estimate is needed, and 1 where a guidance that is
    not linear needs one."""
    if not isinstance(guidance, Changing):
        return 0.0
    if isinstance(guidance, LinearGuidance):
        return guidance.change_scale_at(sigma, step)  # pyright: ignore[reportAttributeAccessIssue]
    return 0.0 if is_off(guidance, sigma, step) else 1.0


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


@dataclass(frozen=True)
class CFGPlusPlus(Options):
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x' = D_λ + σ'·(x − D_∅)/σ, with D_λ = D_∅ + λ·(D_c − D_∅).

    A step renoises by the estimate without the prompt. A solver that goes straight from σ to σ' does that where it is
    given D_∅ + λ/(1 − σ'/σ)·(D_c − D_∅): it is classifier-free guidance with a scale for each step. The paper has it
    for DDIM, so it is for solvers of first order that add no noise.
    """

    lam: Share = 0.6
    """The paper's scale λ: 0 is the estimate without the prompt, 1 denoises to that with it."""

    def check_settings(self, settings: Settings) -> None:
        """ValueError where the solver does not go straight to the next sigma."""
        solver = settings.solver
        if not isinstance(solver, Euler | DDIM | EulerAncestral) or getattr(solver, "eta", 0):
            raise ValueError(
                f"guidance={name_of('guidance', self)} is for steps straight to the next sigma, and "
                f"solver={spec_of('solver', solver)} takes others: choose euler, or ddim with eta=0"
            )

    def begin(self, schedule: Schedule) -> LinearGuidance:
        return Renoising(self.lam, schedule)


@dataclass(frozen=True)
class Renoising:
    """CFG++ in one stage."""

    lam: float
    schedule: Schedule
    is_off: ClassVar[bool] = False
    """A scale below 1 is one as well."""

    def scale_at(self, sigma: float, step: int) -> float:
        """The scale in the step that stands at `sigma`. ValueError where none does."""
        if sigma not in self.schedule.sigmas[:-1]:
            raise ValueError(
                f"guidance=cfg_plus_plus is asked for an estimate at sigma {sigma:.4g}, where no step of the stage "
                "stands: choose another guidance for this method"
            )
        return self.lam / (1 - self.schedule.targets[self.schedule.sigmas.index(sigma)] / sigma)

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.scale_at(sigma, step) * (conditional - unconditional)
