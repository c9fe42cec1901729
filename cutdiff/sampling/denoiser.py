"""The network as a denoiser: text, guidance, size conditioning and preconditioning around one network evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutdiff.models.backbone import Backbone
from cutdiff.models.config import Size
from cutdiff.models.layers import TextContext
from cutdiff.models.text import TextStates
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.sampling.controls import Control, residuals
from cutdiff.sampling.flags import Flags
from cutdiff.sampling.guidance import Begun, Changing, Guidance, LinearGuidance, change_scale, is_off
from cutdiff.sampling.operators import Operator, Patches, ToNetwork, takes_flag
from cutdiff.sampling.preconditioning import Coefficients
from cutdiff.sampling.rows import Inputs, Rows, StepText, Text, Texts, size_ids_of
from cutdiff.sampling.stages import Step
from cutdiff.specs import name_of


@dataclass(frozen=True)
class Call:
    """One pass of the network over some of the rows of a step; of an item's rows, the negative one is first."""

    step: int
    sigma: float
    operator: Operator
    """The operator that gathered the rows from the canvas, with its origins or its permutation."""
    inputs: Inputs
    first: int
    """The number of the first row among all of the step."""
    num_rows: int
    """All rows of the step."""
    num_images: int
    copies: int
    """The rows of an item: 2 for a guidance pair."""
    num_terms: int = 1
    """The rows of an item that read the prompt, more than one for a sum of prompts."""
    is_changed: bool = False
    """True where the guidance has changed the network, for a third estimate; then all rows read the prompt."""
    guidance_scale: float | None = 1.0
    """The scale by which guidance joins a pair of rows; None where a guidance that is not linear joins the canvases."""

    @property
    def rows(self) -> Tensor:
        """The numbers of the rows among all of the step, (n,) int64."""
        return torch.arange(self.first, self.first + len(self.inputs[0]), device=self.inputs[0].device)

    @property
    def images(self) -> Tensor:
        """The image of each row, (n,) int64."""
        return self.rows // (self.num_rows // self.num_images)

    @property
    def items(self) -> Tensor:
        """The number of each row's patch or view in its image, (n,) int64."""
        return self.rows // self.copies % (self.num_rows // self.copies // self.num_images)

    @property
    def prompted(self) -> Tensor:
        """True for the rows that read the prompt, False for those that read the negative one, (n,) bool."""
        return self.rows % self.copies >= self.copies - self.num_terms


Network = Callable[[Call], Tensor]
"""(a call) -> the prediction of each of its rows (n, C, h, w)."""
Span = tuple[float, float]
"""The height and width of the picture on a canvas, in latents, from the top left corner: less than the canvas where
that was padded."""
Beside = Callable[[Size, Span], tuple[Tensor, Tensor]]
"""(the size of a canvas, the span of the picture on it) -> what an inpainting model is shown beside the state: the mask
(B or 1, 1, H, W), 1 where it draws, and the latents (B or 1, C, H, W) of the picture without what lies there."""


class Observer:
    """Hears of a run, and changes nothing; with several ranks, each hears of its own calls."""

    def begin(self, num_steps: int) -> None:
        """A run begins that takes so many steps."""

    def during(self, call: Call) -> AbstractContextManager[object]:
        """A block that is open while the network is called, as `recorded_attention` is one, which listens inside it."""
        return nullcontext()

    def call(self, call: Call, prediction: Tensor) -> None:
        """The network was called, and predicted (n, C, h, w)."""

    def step(self, step: Step) -> None:
        """A step was taken."""


@dataclass
class Work:
    """The state that all denoisers of a run share: a count, the batch that memory holds, observers, flags."""

    view_batch_size: int | None = None
    """The items that go through the network at once; None: all. It is halved where memory does not suffice."""
    evaluations: int = 0
    """The rows that this rank evaluated, a guidance pair counted as two; rows that every rank evaluates are counted
    once, by the first."""
    observers: list[Observer] = field(default_factory=list)
    reads_negative: bool = False
    """True once a step has read the negative prompt."""
    largest_side: int = 0
    """The longest side, in latents, of all that the network was shown."""
    counted: set[Callable[[float], bool]] = field(default_factory=set, repr=False)
    """The `is_on` of those controls that have counted at a step."""
    flags: Flags = field(default_factory=Flags, repr=False)
    """The flags that kernels set where an estimate of x0 is not finite."""

    @contextmanager
    def heard_by(self, observer: Observer) -> Iterator[None]:
        """Let one more observer hear of what happens inside the block."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)

    @contextmanager
    def listening(self, call: Call) -> Iterator[None]:
        """The blocks of all observers, open while the network is called."""
        with ExitStack() as opened:
            for observer in self.observers:
                opened.enter_context(observer.during(call))
            yield


@dataclass(frozen=True)
class Memory:
    """The state that denoisers share which draw with the same prompt: what is kept of its text, and of guidance."""

    texts: Texts = field(default_factory=Texts)
    guidances: Begun = field(default_factory=Begun)


@dataclass(frozen=True)
class Denoiser:
    """`denoiser(latents, sigma, step)` for a batch of patches or views of B images, whatever their number.

    The batch is ordered image first; every image's items share its row of the text states. It is divided among the
    `ranks`, and split into parts of `work.view_batch_size` items (a guidance pair is one item). A method that wants
    another denoiser makes it with `dataclasses.replace`: the copy shares `work` and `memory`, and nobody else is
    affected.
    """

    unet: Backbone[Any]
    """The network, a U-Net or a transformer."""
    timestep: Callable[[float], float]
    """The timestep of a sigma, as `Schedule.timestep` has it."""
    coefficients: Callable[[float], Coefficients]
    """The preconditioning at a sigma, as the model's noise configuration has it."""
    positive: Text
    negative: Text
    """As the positive one, but no sum."""
    guidance: Guidance
    factor: int
    """The pixels of an image for one latent, on each axis."""
    beside: Beside | None = None
    """The mask and the masked picture of an inpainting model; None for all others."""
    guided: Callable[[float], bool] = lambda sigma: True
    """Tells for a sigma whether guidance is on; where it is off, the prompt alone is evaluated."""
    guidance_sigma: float | None = None
    """The sigma that guidance is told; None: that of the estimate. For an estimate beside the one of a step."""
    network: Network | None = None
    """A method's own network in the place of one pass of the model's, made of calls of `evaluate`."""
    shares_rows: bool = True
    """Let ranks share the rows. A method that looks into the network may need all of them on every rank."""
    keeps_text: bool = True
    """Make keys and values of the prompt once. Not for a method that changes `to_k` or `to_v` of `attn2`."""
    compiled: Callable[..., Tensor] | None = None
    """The compiled forward pass that takes the place of the network's."""
    controls: tuple[Control, ...] = ()
    """The ControlNets whose residuals are added in the U-Net."""
    ranks: Ranks = ALONE
    """The processes that each compute their share of a batch."""
    items_of_a_call: int | None = None
    """Ranks share whole calls of so many items, as one process makes them, which gives the same bits; None: they share
    the rows evenly, those of a guidance pair too."""
    backend: str = "auto"
    """The kind of operators around the network: "auto", "triton" or "reference"."""
    work: Work = field(default_factory=Work)
    memory: Memory = field(default_factory=Memory, repr=False)

    @property
    def native_size(self) -> int:
        """The side, in latents, of the pictures that the network was trained on."""
        return self.unet.config.native_size

    def text_at(self, step: int) -> StepText:
        """The text that a step reads."""
        return StepText.of(self.positive, self.negative, step)

    def guidance_at(self, sigma: float) -> tuple[Guidance, float] | None:
        """The guidance of the stage under way, and the sigma that it is told; None where it is off."""
        sigma = sigma if self.guidance_sigma is None else self.guidance_sigma
        return (self.memory.guidances.of(self.guidance), sigma) if self.guided(sigma) else None

    def copies_at(self, sigma: float, step: int) -> int:
        """The rows of each item: two for a guidance pair, the positive one last, and for a sum of prompts one for each
        term, after the negative one if that is needed. A network that reads the scale itself needs no pair."""
        return self._copies(self.text_at(step), sigma, step)[0]

    def linear_scale_at(self, sigma: float, step: int) -> float | None:
        """The scale of a linear guidance, 1 where guidance is off, and None where it is not linear."""
        guidance, own_sigma = self.guidance_at(sigma) or (None, sigma)
        if guidance is None:
            return 1.0
        return guidance.scale_at(own_sigma, step) if isinstance(guidance, LinearGuidance) else None

    def change_scale_at(self, sigma: float, step: int) -> float:
        """The scale of the third estimate, as `guidance.change_scale` has it."""
        guided = self.guidance_at(sigma)
        return change_scale(*guided, step) if guided else 0.0

    def _copies(self, text: StepText, sigma: float, step: int) -> tuple[int, bool]:
        """The rows of each item, and whether guidance is on."""
        guided = self.guidance_at(sigma)
        is_guided = guided is not None and not is_off(*guided, step) and not self.unet.config.guidance_dim
        return len(text.terms) + (is_guided or not text.is_mean), is_guided

    def __call__(
        self,
        latents: Tensor,
        sigma: float,
        step: int,
        *,
        crop_origins: Tensor | None = None,
        original_size: Size | None = None,
        target_size: Size | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Estimate x0: latents (B·V, C, h, w) in sigma space, float32 -> denoised, the same shape, float32.

        `original_size` and `target_size`, in latents, and `crop_origins` (B·V, 2) of (top, left), in latents, are the
        size conditioning of each item; left out, each item is a whole picture of its own size. `span` is that of the
        picture, where an item is padded.
        """
        return self.through(
            Patches((1, 1)),
            latents,
            sigma,
            step,
            crop_origins=crop_origins,
            original_size=original_size,
            target_size=target_size,
            span=span,
        )

    @torch.no_grad()
    def through(
        self,
        operator: Operator,
        canvas: Tensor,
        sigma: float,
        step: int,
        *,
        shown: Tensor | None = None,
        positive: TextStates | None = None,
        crop_origins: Tensor | None = None,
        original_size: Size | None = None,
        target_size: Size | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """operator.scatter ∘ D ∘ operator.gather: canvas (B, C, H, W), float32 -> denoised, the same shape, float32.

        D's estimate is linear in its input and in the network's prediction, and scatter undoes gather: so the input's
        part is taken from the canvas itself, and each way is one pass. Where `shown` (B, C, H, W) is given, the network
        reads that, and its prediction is used for the canvas. `positive` are text states in the place of the prompt's,
        B rows or one for each item of the operator. A guidance that is not linear gets both estimates of the canvas.
        An inpainting model is shown mask and masked picture through the same operator; `span` is that of the picture on
        a canvas that was padded.

        The estimate with a sum of prompts is unconditional + Σ weight · (conditional − unconditional), and guidance
        takes it for the one with the prompt. Where guidance is off, it is the estimate itself, for which the negative
        prompt is evaluated unless the weights add up to 1.
        """
        c_in, c_skip, c_out = self.coefficients(sigma)
        dtype = self.unet.dtype
        source = canvas if shown is None else shown
        rows = self.rows_of(operator, sigma, step, positive)
        rows = self.with_hints(rows, canvas)
        inputs = operator.gather(source, self.backend, c_in=c_in, dtype=dtype, copies=rows.copies)
        inputs = self.with_beside(inputs, rows, source, span)
        size_ids = size_ids_of(inputs, rows.copies, self.factor, crop_origins, original_size, target_size)
        guidance, own_sigma = self.guidance_at(sigma) or (None, sigma)
        linear_scale = self.linear_scale_at(sigma, step)
        scale = 1.0 if linear_scale is None else linear_scale
        if self.unet.config.guidance_dim:
            size_ids = torch.cat([size_ids, torch.full_like(size_ids[:, :1], scale)], dim=1)
        predictions, copies = self.predictions(rows, inputs, size_ids), 2 if rows.is_guided else 1
        back = {"canvas": canvas, "c_skip": c_skip, "c_out": c_out}
        if copies > 1 and not isinstance(guidance, LinearGuidance):
            assert guidance is not None
            unconditional, conditional = (predictions[0][half::2] for half in (0, 1))
            parts = [conditional, unconditional, *(each[1::2] for each in predictions[1:])]
            first, second, *third = (operator.scatter(part, self.backend, **back) for part in parts)
            estimate = guidance(first, second, own_sigma, step, *third)
            if not isinstance(estimate, Tensor) or estimate.shape != canvas.shape:
                what = tuple(estimate.shape) if isinstance(estimate, Tensor) else type(estimate).__name__
                name = name_of("guidance", self.guidance)
                raise ValueError(f"guidance={name} gave {what} where {tuple(canvas.shape)} is needed")
            return estimate.to(canvas.dtype)
        prediction, *third = predictions
        if third:  # one scatter for all three, which are linear
            (pair, changed), copies = (each.float().unflatten(0, (-1, copies)) for each in predictions), 1
            guided = pair[:, 0] + scale * (pair[:, -1] - pair[:, 0])
            prediction = guided + self.change_scale_at(sigma, step) * (pair[:, -1] - changed[:, -1])
        how = back | {"copies": copies, "guidance_scale": scale}
        if not takes_flag(operator, self.backend, canvas.device):
            return operator.scatter(prediction, self.backend, **how)
        flag = self.work.flags.new()
        denoised = operator.flagged(flag, prediction, self.backend, **how)
        if flag is not None:
            self.work.flags.written(denoised, flag)
        return denoised

    def with_beside(self, inputs: Tensor, rows: Rows, canvas: Tensor, span: Span | None) -> Tensor:
        """The inputs that were gathered from a canvas (B, C, H, W), and beside their channels, in this order, those of
        the mask and the masked picture, where the network is shown any.

        An operator may move each channel of a pixel by itself. Each channel of the masked picture then goes with that
        of the state, and a pixel is masked where any of its channels is.
        """
        if self.beside is None:
            return inputs
        if len(canvas) != rows.num_images:
            raise ValueError(
                f"an inpainting model is shown the mask of whole canvases, and {len(canvas)} items of "
                f"{rows.num_images} images have none: let `through` gather them by an operator"
            )
        size = canvas.shape[2], canvas.shape[3]
        on_canvas = (part.to(canvas).expand_as(canvas) for part in self.beside(size, span or size))
        how: ToNetwork = {"dtype": inputs.dtype, "copies": rows.copies}
        mask, picture = (rows.operator.gather(x, self.backend, **how) for x in on_canvas)
        return torch.cat([inputs, mask.amax(dim=1, keepdim=True), picture], dim=1)

    def predictions(self, rows: Rows, inputs: Tensor, size_ids: Tensor) -> list[Tensor]:
        """The network's output for all rows, joined to that of a guidance pair or of one row an item, and where
        guidance needs a third estimate, the same with that in the place of the one with the prompt."""
        prediction = self.predict(rows, inputs, size_ids)
        if not self.change_scale_at(rows.sigma, rows.step):
            return [rows.joined(prediction)]
        guidance = self.memory.guidances.of(self.guidance)
        assert isinstance(guidance, Changing)
        prompted = rows._replace(copies=len(rows.text.terms), is_changed=True)
        with guidance.changed(self.unet):
            third = self.predict(prompted, rows.of_prompt(inputs), rows.of_prompt(size_ids))
        return [rows.joined(prediction), rows.joined(rows.with_prompt(prediction, third))]

    def rows_of(self, operator: Operator, sigma: float, step: int, positive: TextStates | None = None) -> Rows:
        """The properties of the rows of a step; `positive` as in `through`."""
        text = self.text_at(step)
        num_images = len(text.terms[0].context)
        if positive is not None:
            text = StepText(text.negative, (positive,), is_kept=False)
        copies, is_guided = self._copies(text, sigma, step)
        self.work.reads_negative |= copies > len(text.terms)
        return Rows(step, sigma, operator, copies, is_guided, text, num_images)

    def controls_at(self, sigma: float) -> tuple[Control, ...]:
        """The controls that count at a sigma."""
        return tuple(control for control in self.controls if control.is_on(sigma))

    def with_hints(self, rows: Rows, canvas: Tensor) -> Rows:
        """The rows with the hints of those controls that count at their sigma, gathered as they are from the canvas."""
        controls = self.controls_at(rows.sigma)
        self.work.counted.update(control.is_on for control in controls)
        if controls and len(canvas) != rows.num_images:
            raise ValueError(
                f"a ControlNet has hints of whole canvases, and {len(canvas)} items of {rows.num_images} images have "
                "none: let `through` gather them by an operator"
            )
        return rows._replace(hints=tuple(each.gathered(rows.operator, canvas, self.backend) for each in controls))

    def run(self, inputs: Inputs) -> Tensor:
        """The prediction of the network, with the residuals of its controls, for rows that are not counted."""
        read, hints = inputs[:5], inputs[5:]
        return (self.compiled or self.unet)(*read, *([residuals(hints, read)] if hints else []))

    def evaluate(self, inputs: Inputs) -> Tensor:
        """One pass of the network over the rows, which are counted."""
        prediction = self.run(inputs)
        self.work.largest_side = max(self.work.largest_side, *inputs[0].shape[2:])
        if self.shares_rows or self.ranks.leads:
            self.work.evaluations += len(inputs[0])
        return prediction

    def predict(self, rows: Rows, inputs: Tensor, size_ids: Tensor) -> Tensor:
        """The network's output for all rows (items·copies, C, h, w), of which this rank evaluates its share.

        Raises torch.OutOfMemoryError where memory does not suffice for a single item.
        """
        num_rows, copies = len(inputs), rows.copies
        networks = (self.unet, *dict.fromkeys(control.network for control in self.controls))
        text = self.memory.texts.read(networks, rows.text, copies, keeps=self.keeps_text)
        timestep = torch.full((1,), self.timestep(rows.sigma), dtype=torch.float32, device=inputs.device)
        timestep = timestep.expand(num_rows)
        ranks = self.ranks if self.shares_rows else ALONE
        scale = self.linear_scale_at(rows.sigma, rows.step)
        starts = self.shares(num_rows, copies, ranks)
        first, end = starts[ranks.rank : ranks.rank + 2]
        parts, start = [], first
        while start < end:
            part = slice(start, min(start + (self.work.view_batch_size or num_rows) * copies, end))
            kept = len(text.by_rows)
            try:
                context, pooled = Texts.of_rows(text, part, num_rows, copies, self.gathered)
                hints = rows.hints_of(part, inputs.device)
                taken = (inputs[part], timestep[part], context, pooled, size_ids[part], *hints)
                counts = num_rows, rows.num_images, copies, len(rows.text.terms)
                call = Call(rows.step, rows.sigma, rows.operator, taken, start, *counts, rows.is_changed, scale)
                with self.work.listening(call):
                    parts.append(self.evaluate(taken) if self.network is None else self.network(call))
            except torch.OutOfMemoryError:
                text.by_rows.clear()
                context = pooled = hints = taken = call = None
                if kept:  # without what was kept of other calls memory may suffice
                    continue
                if part.stop - start <= copies:
                    raise
                self.work.view_batch_size = max((part.stop - start) // copies // 2, 1)
                continue
            for observer in self.work.observers:
                observer.call(call, parts[-1])
            start = part.stop
        if ranks.size == 1:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        # A rank without rows does not know what a method's own network gives: float32 holds it.
        dtype = inputs.dtype if self.network is None else torch.float32
        prediction = inputs.new_empty((num_rows, self.unet.config.out_channels, *inputs.shape[2:]), dtype=dtype)
        if parts:
            prediction[first:end] = torch.cat(parts)
        ranks.gather(prediction, starts)
        return prediction

    def shares(self, num_rows: int, copies: int, ranks: Ranks) -> list[int]:
        """The first row of each rank, and the end of the last one's."""
        together = 1 if self.network is None else copies  # a method may want both rows of a pair
        if self.items_of_a_call is not None:
            together = self.items_of_a_call * copies
        return [min(start * together, num_rows) for start in ranks.starts(math.ceil(num_rows / together))]

    def gathered(self, context: TextContext) -> TextContext:
        """The context with a row of its own for each item."""
        return context.gathered()
