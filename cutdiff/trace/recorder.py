"""The observer that makes a `Moment` of each step: what the network was given and predicted, item by item.

It listens to the public `Observer` only, during whose calls it records the attention over the text. Nothing is copied
while the network runs: the rows of a step are kept until the step is taken, and read then.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from cutdiff_kernels.permutations import SeededPermutation, as_index
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.models.config import Size
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.operators import Operator, Patches
from cutdiff.sampling.overlaps import Torus
from cutdiff.sampling.stages import NotFinite, Step
from cutdiff.trace.measures import bands, rms
from cutdiff.trace.words import Words


@dataclass(frozen=True)
class Items:
    """The patches, views or other items of a canvas that one evaluation read, and what each of them predicted."""

    kind: str
    """The kind of items: "patches", "views" (of any operator with origins), "whole", or "items" of another operator."""
    estimates: Tensor
    """(N, C, h, w), the estimate of x0 that each item gives alone, guided if the guidance is linear."""
    distances: Tensor
    """(N,), the distance of each estimate to the others': for patches to their mean, else to what the operator makes of
    all of them at its place, as a root mean square relative to the deviation of that canvas."""
    guidance: Tensor | None
    """(N,), the size of what guidance adds to each estimate, relative as well; None where it is not a linear one."""
    grid: tuple[int, int] | None = None
    """The rows and columns of patches."""
    permutation: Tensor | None = None
    """(N, C or 1, h, w), int64: by the exchange patch n gets the value of patch permutation[n]; None: there is none."""
    origins: Tensor | None = None
    """(N, 2), int64, the top and left of each view."""
    wraps: bool = False
    """True for views that go on at the opposite border."""


@dataclass(frozen=True)
class Moment:
    """One step of a run. The tensors are float32, on the CPU; None in a step of which only the cost was kept."""

    index: int
    stage: str
    sigma: float
    evaluations: int
    seconds: float
    """The time that the step took, without that of the recorder but for recording the attention."""
    state: Tensor | None = None
    """(C, H, W), the canvas as the step's network read it; where it read none, as the step left it."""
    denoised: Tensor | None = None
    """(C, H, W), the estimate of x0."""
    latents: Tensor | None = None
    """(C, H, W), the canvas after the step; None for a step that failed."""
    items: tuple[Items, ...] = ()
    """The items of each kind that the step's network read, at the first estimate of the step."""
    attention: Tensor | None = None
    """(words, h, w), the attention over each word of the prompt, on the whole canvas."""
    curves: dict[str, float | list[float] | None] = field(default_factory=dict)
    """Numbers of the step, by the names of `measures.CURVES`."""
    digest: dict[str, str] = field(default_factory=dict)
    """The first digits of the SHA-256 of `denoised` and `latents`, in every step, and of `state` where that was kept:
    by them two runs are compared to the bit."""
    time: float | None = None
    """The time t of a flow at this sigma; None: the model goes by sigma."""
    failed: bool = False
    """True for the step that NaN or infinity ended."""


@dataclass
class _Pass:
    """One evaluation of all rows of a step, call by call."""

    calls: list[tuple[Call, Tensor]]
    attention: list[Tensor] = field(default_factory=list)

    @property
    def call(self) -> Call:
        return self.calls[0][0]

    @cached_property
    def inputs(self) -> Tensor:
        """The rows that read the prompt, (N, C, h, w), as the network was given them."""
        return self._of_items(torch.cat([call.inputs[0] for call, _ in self.calls]))[:, -1]

    @cached_property
    def predictions(self) -> Tensor:
        """(N, copies, C, h, w), the negative one first."""
        return self._of_items(torch.cat([prediction for _, prediction in self.calls]))

    def _of_items(self, rows: Tensor) -> Tensor:
        return rows.float().unflatten(0, (-1, self.call.copies))


Sink = Callable[[Moment], int]
"""Takes a moment, and returns the bytes that it takes."""


class Recorder(Observer):
    """Hears of a run of one picture, and gives each step to `sink` as a `Moment`.

    Only every `every`-th step has its tensors, and those that a stage begins with and the last. Without `every` all
    have, unless their bytes as the sink counts them would come to more than `limit`.
    """

    def __init__(
        self,
        model: Model,
        sink: Sink,
        *,
        words: Words | None = None,
        every: int | None = None,
        limit: int = 200 << 20,
        on_begin: Callable[[int], None] = lambda num_steps: None,
    ) -> None:
        self.model, self.sink, self.words, self.on_begin = model, sink, words, on_begin
        self.every, self.limit = every or 1, None if every else limit
        self.num_steps = self.taken = self.bytes = 0
        self.stage: str | None = None
        self.passes: list[_Pass] = []
        self.before: Tensor | None = None  # the canvas that the step before ended with
        self.spent = 0.0  # seconds of this step that were the recorder's own
        self.began = 0.0

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """The step that an error cuts short inside the block becomes a moment, too."""
        try:
            yield self
        except FloatingPointError as error:
            self._fail(error.__context__)
            raise

    def begin(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.on_begin(num_steps)
        self.began = time.perf_counter()

    def during(self, call: Call) -> AbstractContextManager[object]:
        return super().during(call) if self.words is None else self.words.listening(call)

    def call(self, call: Call, prediction: Tensor) -> None:
        start = time.perf_counter()
        if call.first == 0:
            self.passes.append(_Pass([]))
        self.passes[-1].calls.append((call, prediction))
        if self.words is not None and (maps := self.words.take()) is not None:
            self.passes[-1].attention.append(maps)
        self.spent += time.perf_counter() - start

    @torch.no_grad()
    def step(self, step: Step) -> None:
        begins, is_last = step.stage != self.stage, self.taken == self.num_steps - 1
        is_kept = begins or is_last or self.taken % self.every == 0
        latents = step.latents[0].float().cpu()  # waits for the device, so that the clock is right
        start = time.perf_counter()
        cost = (self._evaluations(), start - self.began - self.spent)
        if is_kept:
            moment = self._moment(step.index, step.stage, step.sigma, cost, step.denoised[:1], latents)
        else:
            digest = _digest(denoised=step.denoised[0].float().cpu(), latents=latents)
            moment = Moment(step.index, step.stage, step.sigma, *cost, digest=digest, time=self._time(step.sigma))
        size = self.sink(moment)
        self.taken, self.stage, self.before, self.passes = self.taken + 1, step.stage, latents, []
        self.bytes += size
        if is_kept and self.limit is not None:
            left, steps = max(self.limit - self.bytes, 1), self.num_steps - self.taken
            self.every = max(self.every, -(-size * steps // left))
        self.spent, self.began = 0.0, time.perf_counter()

    @torch.no_grad()
    def _fail(self, error: BaseException | None) -> None:
        """Give the sink the step that failed. If its estimate was not finite, that is known, and was made once more
        to find the item, after the first time; else only the network's part is."""
        if isinstance(error, NotFinite):
            self.passes = self.passes[: len(self.passes) // 2]
            begun = (error.step, error.stage.name, error.sigma)
            canvases = (error.denoised[:1], error.latents[0].float().cpu())
        elif self.passes:
            call = self.passes[0].call
            begun, canvases = (call.step, self.stage or "", call.sigma), (None, None)
        else:
            return
        cost = (self._evaluations(), time.perf_counter() - self.began - self.spent)
        moment = self._moment(*begun, cost, *canvases)
        digest = {name: value for name, value in moment.digest.items() if name != "latents"}
        self.sink(replace(moment, latents=None, digest=digest, failed=True))

    def _time(self, sigma: float) -> float | None:
        noise = self.model.noise
        return noise.time(sigma) if isinstance(noise, FlowConfig) else None

    def _evaluations(self) -> int:
        return sum(len(call.inputs[0]) for each in self.passes for call, _ in each.calls)

    def _moment(
        self,
        index: int,
        stage: str,
        sigma: float,
        cost: tuple[int, float],
        denoised: Tensor | None,
        latents: Tensor | None,
    ) -> Moment:
        firsts: dict[tuple[object, ...], _Pass] = {}  # the first pass of each kind of items
        for each in self.passes:
            if not each.call.is_changed:
                firsts.setdefault((type(each.call.operator), _size(each.inputs)), each)
        size = None if denoised is None else _size(denoised)
        read = [self._read(each, size) for each in firsts.values()]
        if denoised is None:
            denoised = next((average for _, average, _ in read if average is not None), None)
            size = None if denoised is None else _size(denoised)
        states = [state for _, _, state in read if state is not None and size and self._covers(state, size)]
        state = states[0][0, :, : size[0], : size[1]].cpu() if states and size else latents
        if self.before is not None and state is not None and _is_close(self.before, state):
            state = self.before  # to the bit, where the network read it in fewer bits
        estimate = None if denoised is None else denoised[0].float().cpu()
        items = tuple(item for item, _, _ in read)
        attention = None if size is None else self._attention([*firsts.values()], size)
        curves = self._curves(state, estimate, items)
        digest = _digest(state=state, denoised=estimate, latents=latents)
        kept = (state, estimate, latents, items, attention, curves, digest)
        return Moment(index, stage, sigma, *cost, *kept, self._time(sigma))

    def _attention(self, passes: list[_Pass], size: Size) -> Tensor | None:
        """The maps on the canvas of the first pass that has any."""
        for each in passes:
            if self.words is not None and sum(map(len, each.attention)) == len(each.inputs):
                return self.words.on_canvas(torch.cat(each.attention), each.call.operator, _size(each.inputs), size)
        return None

    def _covers(self, state: Tensor, size: Size) -> bool:
        """True for a canvas of the run's own size, which may be padded for its grid."""
        fits = all(0 <= a - b < self.model.native_size for a, b in zip(state.shape[2:], size, strict=True))
        return len(state) == 1 and fits

    def _read(self, each: _Pass, size: Size | None) -> tuple[Items, Tensor | None, Tensor | None]:
        """The items of a pass, the canvas that its operator makes of their estimates, and the one that they read."""
        call, operator = each.call, _explicit(each.call.operator, each.inputs)
        c_in, c_skip, c_out = self.model.noise.coefficients(call.sigma)
        shown, predictions = each.inputs / c_in, each.predictions
        prompted = predictions[:, -call.num_terms :].mean(dim=1)
        guided, guidance = prompted, None
        if call.copies > call.num_terms and call.guidance_scale is not None:
            guided = predictions[:, 0] + call.guidance_scale * (prompted - predictions[:, 0])
        estimates = c_skip * shown + c_out * guided
        average, state = _scattered(operator, estimates), _scattered(operator, shown)
        deviation = float((estimates if average is None else average).std().clamp(min=1e-12))
        if call.guidance_scale is not None:
            guidance = (rms(c_out * (guided - prompted)) / deviation).cpu()
        if isinstance(operator, Patches) or average is None:
            apart = rms(estimates - estimates.mean(dim=0, keepdim=True))
        else:  # what lies outside the canvas is compared with nothing
            inside = operator.gather(torch.ones_like(average)) != 0
            apart = rms((estimates - operator.gather(average)) * inside) / inside.flatten(1).float().mean(dim=1).sqrt()
        distances = (apart / deviation).cpu()
        geometry = _geometry(operator, estimates)
        return Items(_kind(operator, estimates, size), estimates.cpu(), distances, guidance, **geometry), average, state

    def _curves(
        self, state: Tensor | None, denoised: Tensor | None, items: tuple[Items, ...]
    ) -> dict[str, float | list[float] | None]:
        several = [item for item in items if len(item.estimates) > 1]
        guided = [item.guidance for item in items if item.guidance is not None]
        canvases = [each for each in (state, denoised) if each is not None]
        return {
            "state_std": None if state is None else float(state.std()),
            "denoised_std": None if denoised is None else float(denoised.std()),
            "bands": None if denoised is None else bands(denoised),
            "disagreement": float(several[0].distances.mean()) if several else None,
            "guidance": float(guided[0].mean()) if guided else None,
            "not_finite": float(sum(int((~each.isfinite()).sum()) for each in canvases)),
        }


def _digest(**canvases: Tensor | None) -> dict[str, str]:
    """The hash that `Moment.digest` keeps of these canvases."""
    return {
        name: hashlib.sha256(each.numpy().tobytes()).hexdigest()[:16]
        for name, each in canvases.items()
        if each is not None
    }


def _is_close(a: Tensor, b: Tensor) -> bool:
    """True where two canvases are the same but for the rounding of 16 bits."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 0.02 * float(a.abs().max())


def _scattered(operator: Operator, items: Tensor) -> Tensor | None:
    """The canvas that an operator makes of items; None where it makes several, as of items that were cut by hand."""
    canvas = operator.scatter(items)
    return canvas if len(canvas) == 1 else None


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def _kind(operator: Operator, estimates: Tensor, size: Size | None) -> str:
    """The kind of items, of a canvas of `size`; None: it is not known, as of a step that failed."""
    if isinstance(operator, Patches):
        if operator.grid != (1, 1):
            return "patches"
        return "whole" if len(estimates) == 1 and size in (None, _size(estimates)) else "items"
    return "views" if isinstance(getattr(operator, "origins", None), Tensor) else "items"


def _explicit(operator: Operator, items: Tensor) -> Operator:
    """The operator of items (N, C, h, w), which need not draw their permutation by counter again."""
    if type(operator) is not Patches or not isinstance(operator.permutation, SeededPermutation):
        return operator
    return replace(operator, permutation=_index(operator, items))


def _index(operator: Patches, items: Tensor) -> Tensor | None:
    """The permutation (B or 1, N, C or 1, h, w) of patches (N, C, h, w)."""
    number, channels, height, width = items.shape
    return as_index(operator.permutation, number, (channels, height, width), items.device)


def _geometry(operator: Operator, estimates: Tensor) -> dict[str, Any]:
    """The grid and the permutation of patches, or the origins of views."""
    if isinstance(operator, Patches) and operator.grid != (1, 1):
        index = _index(operator, estimates)
        return {"grid": operator.grid, "permutation": None if index is None else index[0].cpu()}
    origins = getattr(operator, "origins", None)
    return {"origins": origins[0].cpu(), "wraps": isinstance(operator, Torus)} if isinstance(origins, Tensor) else {}
