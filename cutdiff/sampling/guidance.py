"""Guidance: how the estimates of x0 with the prompt and without it become one, on the canvas.

A guidance that is passed in is any function of (conditional, unconditional, sigma, step). One that is linear in the two
says its scale with `scale_at`, so that the kernels apply it on the way. A scale of at most 1 means that guidance is
off: the prompt alone is evaluated, and no negative one. One that needs a third estimate says how the network is changed
for it (`Changing`), and one that reads the schedule or remembers has `begin` (`Guidance`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from cutdiff.models.inside import replaced
from cutdiff.models.unet import TransformerBlock, UNet
from cutdiff.options import MAX_FLOAT32, Between, Options, Scale, Share
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.solvers import DDIM, Euler, EulerAncestral
from cutdiff.sampling.split import Split
from cutdiff.specs import name_of, part, resolve, spec_of

if TYPE_CHECKING:
    from cutdiff.settings import Settings

SDXL_SIDE = 128
"""The side of SDXL's native pictures in latents."""


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
    It also has `changes_network = True`, as a method may.
    """

    def changed(self, unet: UNet) -> AbstractContextManager[None]:
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
class APG(Options):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1): conditional + (scale − 1)·Δ.

    Δ, which is conditional − unconditional, is in turn added to a momentum, cut to a norm, and has the share `eta` of
    its part along the conditional estimate, the part that oversaturates. It takes estimates of x0, as the paper has it
    (diffusers takes predictions). Norms and products are those of a whole image.

    The k-th estimate of a step adds to the k-th of the last step before that was guided, so that with several
    estimates in a step each momentum advances once; where a canvas has another size, it begins anew.
    """

    guidance_scale: Scale = 7.5
    """The scale, as of classifier-free guidance; 1 or less is off."""
    eta: Share = 0.0
    """The share of the parallel part; 1 leaves Δ as it is."""
    norm_threshold: Annotated[float, Between(0, MAX_FLOAT32)] | None = None
    """The most that the norm of Δ may be; 0 is no limit. None: the paper's 15 for SDXL, on canvases that have more or
    fewer than its 128×128 latents in proportion to the root of their number, as norms grow."""
    momentum: Annotated[float, Between(-1, 1)] = -0.5
    """The factor of the sum of the differences before, which is added to each; 0 is none."""

    def begin(self, schedule: Schedule) -> Guidance:
        return Averaging(self)

    def guide(self, conditional: Tensor, unconditional: Tensor, update: Tensor) -> Tensor:
        """The estimate for a Δ to which momentum was added, all (B, C, H, W)."""
        difference, per_image = conditional - unconditional, {"dim": (1, 2, 3), "keepdim": True}
        most = self.norm_threshold
        if most is None:
            most = 15 * math.sqrt(conditional.shape[2] * conditional.shape[3]) / SDXL_SIDE
        if most:
            update = update * (most / update.square().sum(**per_image).sqrt().clamp(min=most))
        if self.eta != 1:
            square = conditional.square().sum(**per_image).clamp(min=1e-24)
            along = (update * conditional).sum(**per_image) / square
            update = update - (1 - self.eta) * along * conditional
        guided = unconditional + self.guidance_scale * difference
        return guided + (self.guidance_scale - 1) * (update - difference)


@dataclass
class Averaging:
    """Adaptive projected guidance in one stage."""

    apg: APG
    step: int | None = None
    """The step under way."""
    count: int = 0
    """The estimates of it so far."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """The sum of the differences, by the number of the estimate in its step."""

    @property
    def is_off(self) -> bool:
        return self.apg.guidance_scale == 1

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        self.step, self.count = step, self.count + 1 if step == self.step else 0
        update = conditional - unconditional
        if self.apg.momentum:
            before = self.sums.get(self.count)
            if before is not None and before.shape == update.shape:
                update = update + self.apg.momentum * before
            self.sums[self.count] = update
        return self.apg.guide(conditional, unconditional, update)


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


@dataclass(frozen=True)
class PAG(Options):
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377) beside classifier-free guidance.

    It adds pag_scale · (conditional − third), the third estimate being that of the prompt by a network in which some
    layers of self-attention attend from each position to that alone. With guidance_scale=1 it stands alone.
    """

    changes_network: ClassVar[bool] = True

    guidance_scale: Scale = 7.5
    """The scale of classifier-free guidance; 1 or less is off."""
    pag_scale: Annotated[float, Between(0, MAX_FLOAT32)] = 3.0
    """The scale of perturbed attention; 0 is off."""
    pag_layers: tuple[str, ...] = ("mid",)
    """The beginnings of the names of the layers that are changed, as checkpoints have them: mid, up_blocks.1, …"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pag_layers:
            raise ValueError("pag_layers=() changes nothing: name a layer, such as mid, or give pag_scale=0")

    def scale_at(self, sigma: float, step: int) -> float:
        return self.guidance_scale

    def change_scale_at(self, sigma: float, step: int) -> float:
        return self.pag_scale

    @contextmanager
    def changed(self, unet: UNet) -> Iterator[None]:
        """Let layers of self-attention give the values as they are. ValueError where a name is that of no layer."""
        layers = {n: m.attn1 for n, m in unet.named_modules() if isinstance(m, TransformerBlock)}
        for name in self.pag_layers:
            if not any(layer.startswith(name) for layer in layers):
                known = ", ".join(dict.fromkeys(layer.partition(".attentions")[0] for layer in layers)) or "none"
                raise ValueError(f"pag_layers={name!r} begins no name of a self-attention layer: they are in {known}")
        with ExitStack() as changes:
            for name, attention in layers.items():
                if name.startswith(self.pag_layers):
                    changes.enter_context(replaced(attention, attend=lambda q, k, v: v))
            yield

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int, third: Tensor | None = None
    ) -> Tensor:
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        return guided if third is None else guided + self.pag_scale * (conditional - third)
