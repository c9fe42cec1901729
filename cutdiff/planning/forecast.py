"""The cost of a run before it is run: the method itself goes through its stages on tensors of sizes without values.

`Rank` takes the denoiser's place on the meta device and counts. It tries only those steps of a stage that differ in
cost, as the stage declares them, and only one block of each transformer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from cutdiff.checkpoint.kinds import kind_of, published_preferences
from cutdiff.checkpoint.locate import locate
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import TOKENS, GivenText
from cutdiff.models.backbone import Backbone, Shape
from cutdiff.models.bands import GPU_BAND_BYTES, KEPT_BYTES
from cutdiff.models.config import FLUX_VAE, SD3_VAE, SDXL_UNET, SDXL_VAE, VAEConfig
from cutdiff.models.flux import FluxConfig
from cutdiff.models.inside import replaced
from cutdiff.models.layers import TextContext
from cutdiff.models.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from cutdiff.models.text import TextStates
from cutdiff.models.vae import VAE
from cutdiff.parallel.ranks import Ranks
from cutdiff.pipeline import Prepared, canvas_and_schedule, prepare
from cutdiff.planning.meter import Meter, Usage
from cutdiff.sampling.controls import Hint
from cutdiff.sampling.denoiser import Denoiser, Span
from cutdiff.sampling.draws import Draws, solver_noise
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.operators import Operator, items_of
from cutdiff.sampling.rows import Inputs, Rows
from cutdiff.sampling.solvers import TakeStep, finished
from cutdiff.sampling.stages import Phase, Size, Stage, standing
from cutdiff.settings import Settings

T = TypeVar("T")
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
"""The weights of the text encoders: CLIP ViT-L, OpenCLIP ViT-bigG, and T5-XXL's encoder."""
LIVE_BANDS = 7
"""The number of bands of a decoder that live at once, counted at 3072² and 4096²."""


class Sizes(NamedTuple):
    """The sizes of a published model, or of one like it."""

    name: str
    network: Shape
    vae: VAEConfig
    noise: AnyNoise
    text_weights: int
    """The weights of all text encoders."""
    tokens: int = TOKENS
    """The length of a prompt's context."""


SDXL = Sizes("SDXL-base", SDXL_UNET, SDXL_VAE, NoiseConfig(), CLIP_L + CLIP_G)
FLUX_TIMES = FlowConfig(shift=3.0, use_dynamic_shifting=True)
SD3_TIMES = FlowConfig(shift=3.0, timestep_spacing="linspace")
FLUX_TEXT, SD3_TEXT = CLIP_L + T5_XXL, CLIP_L + CLIP_G + T5_XXL
PUBLISHED = (
    Sizes("FLUX.1-dev", FluxConfig(), FLUX_VAE, FLUX_TIMES, FLUX_TEXT, 512),
    Sizes("FLUX.1-schnell", FluxConfig(reads_guidance=False), FLUX_VAE, FlowConfig(), FLUX_TEXT, 256),
    Sizes("SD3-medium", SD3_MEDIUM, SD3_VAE, SD3_TIMES, SD3_TEXT, 77 + 256),
    Sizes("SD3.5-medium", SD35_MEDIUM, SD3_VAE, SD3_TIMES, SD3_TEXT, 77 + 256),
    Sizes("SD3.5-large", SD35_LARGE, SD3_VAE, SD3_TIMES, SD3_TEXT, 77 + 256),
)
"""The models whose sizes are known without a file, beside SDXL-base. A command line takes their names in any case."""


class Cost(NamedTuple):
    """The cost of one step."""

    evaluations: int = 0
    """The rows that go through the network; a guidance pair counts as two."""
    flops: int = 0
    received_bytes: int = 0
    """The bytes of predictions that one device receives from the others."""


class StageCost(NamedTuple):
    """The cost of each step of a stage."""

    name: str
    steps: list[Cost]

    @property
    def total(self) -> Cost:
        return Cost(*(sum(column) for column in zip(*self.steps, strict=True)))


@dataclass(frozen=True)
class Walk:
    """The cost of a run on one of its devices."""

    stages: list[StageCost]
    peak_bytes: int
    """The most bytes that live at once, including the weights."""
    view_batch_size: int | None
    """The number of items that memory allows at once; None stands for all of a step."""


def walk(model: Model, settings: Settings, devices: int = 1, memory: float = math.inf) -> Walk:
    """Go through a run of one picture on the meta device, as the busiest of `devices` with `memory` bytes each.

    The rows of every step are divided among the devices as `Denoiser` divides them, and every device gathers all
    predictions. A single item is evaluated even if memory does not suffice. ValueError if the model cannot draw the
    picture.
    """
    canvas_and_schedule(model, settings)  # which reads the ControlNets
    meter, weights = Meter(), weight_bytes(model)
    ranks = CountingRanks(devices - 1, devices)  # no rank has more to do than the last one

    def rank_of(**fields: Any) -> Rank:
        return Rank(**fields | {"ranks": ranks, "meter": meter, "free_bytes": memory - weights})

    stages = []
    with torch.no_grad(), meter, one_block_for_all(model.unet, meter):
        run = prepare(model, "", settings, SizedDraws((0,), "meta"), make_denoiser=rank_of)
        x = torch.empty(1, model.vae.config.latent_channels, *(run.stages[0].size or run.size), device="meta")
        for part in run.stages:
            stage, begun = part, Cost()
            if isinstance(part, Phase):
                (x, stage), begun = _counted(run, meter, part.begin, x)
            assert isinstance(stage, Stage)
            costs = _costs(run, stage, x, meter)
            if costs:
                costs[0] = _sum(costs[0], begun)
            if costs and stage.end is not None:
                x, ended = _counted(run, meter, stage.end, x)
                costs[-1] = _sum(costs[-1], ended)
            stages.append(StageCost(stage.name, costs))
    return Walk(stages, weights + meter.peak_bytes, run.denoiser.work.view_batch_size)


def _costs(run: Prepared, stage: Stage, x: Tensor, meter: Meter) -> list[Cost]:
    """The cost of each step of a stage.

    Those cost the same for which the stage says so and guidance is equally on or off, except the first of them, which
    is counted by itself: it may be the one that reads the prompts.
    """
    costs = cast(dict[Hashable, Cost], {})
    schedule, first = standing(stage, run.schedule)
    take = run.settings.solver.start(schedule, partial(solver_noise, run.draws))
    steps: list[Cost] = []
    known: set[Hashable] = set()

    def cost(step: int, sigmas: list[float]) -> Cost:
        total, state = Cost(), x
        if stage.before is not None:
            state, total = _counted(run, meter, stage.before, x, sigmas[0], step)
        for sigma in sigmas:
            total = _sum(total, _counted(run, meter, stage.denoise, state, sigma, step)[1])
        return total

    for step in stage.steps:
        sigmas = [schedule.sigmas[step - first], *_further(take, x, step - first)]
        rows = tuple(
            (
                denoiser.guided(sigma),
                denoiser.copies_at(sigma, step),
                bool(denoiser.change_scale_at(sigma, step)),
                denoiser.controls_at(sigma),
            )
            for sigma in sigmas
            for denoiser in run.denoisers
        )
        kind = stage.cost and stage.cost(step), rows
        key = kind, kind in known
        known.add(kind)
        if key not in costs:
            costs[key] = cost(step, sigmas)
        steps.append(costs[key])
    return steps


def _further(take: TakeStep, x: Tensor, i: int) -> list[float]:
    """The sigmas of the estimates that a solver asks for in step i, after the first one."""
    sigmas: list[float] = []
    if isgeneratorfunction(take):
        finished(take(x, x, i), lambda x, sigma: sigmas.append(sigma) or x)
    return sigmas


def _counted(run: Prepared, meter: Meter, call: Callable[..., T], *args: Any) -> tuple[T, Cost]:
    """The value that a call returns, and its cost."""
    work, ranks = run.denoiser.work, run.denoiser.ranks
    before = work.evaluations, meter.flops, ranks.received_bytes
    value = call(*args)
    after = work.evaluations, meter.flops, ranks.received_bytes
    return value, Cost(*(a - b for a, b in zip(after, before, strict=True)))


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(*map(operator.add, a, b))


@dataclass
class Trial:
    """The measured cost of a step's rows."""

    copies: int = 1
    by_row: dict[Hashable, Usage] = field(default_factory=dict)
    """The usage of a row of the plain network, by the shape and the kind of the rows."""


@dataclass(frozen=True, kw_only=True)
class Rank(Denoiser):
    """The denoiser of one of the devices that share the items of every step; it counts and computes nothing."""

    meter: Meter
    free_bytes: float
    """The memory that the weights leave free."""
    trial: Trial = field(default_factory=Trial, repr=False)

    def through(
        self,
        operator: Operator,
        canvas: Tensor,
        sigma: float,
        step: int,
        *,
        positive: TextStates | None = None,
        span: Span | None = None,
        **_: Any,
    ) -> Tensor:
        """Count one step through the operator; the size conditioning and the picture shown change no cost."""
        if self.beside is not None:
            self.beside(own := (canvas.shape[2], canvas.shape[3]), span or own)  # which it is encoded for
        rows, (items, size) = self.rows_of(operator, sigma, step, positive), items_of(operator, canvas)
        rows = self.with_hints(rows, canvas)
        channels = self.unet.config.in_channels  # with those of the mask and the masked picture
        inputs = canvas.new_empty(items * rows.copies, channels, *size, dtype=self.unet.dtype)
        self.predictions(rows, inputs, canvas.new_empty(len(inputs), 6))
        return torch.empty_like(canvas)

    def with_hints(self, rows: Rows, canvas: Tensor) -> Rows:
        items, size = items_of(rows.operator, canvas)
        hints = []
        for control in self.controls_at(rows.sigma):
            sides = (side * control.network.control.factor for side in size)
            hints.append(Hint(control, canvas.new_empty(items, 3, *sides, dtype=self.unet.dtype)))
        return rows._replace(hints=tuple(hints))

    def predict(self, rows: Rows, inputs: Tensor, size_ids: Tensor) -> Tensor:
        self.trial.copies = rows.copies
        self.trial.by_row.clear()  # another step, or another estimate of it, may meet another network
        return super().predict(rows, inputs, size_ids)

    def evaluate(self, inputs: Inputs) -> Tensor:
        rows = len(inputs[0])
        flops, num_bytes = self._by_row(inputs)
        if self.meter.live_bytes + rows * num_bytes > self.free_bytes and rows > self.trial.copies:
            raise torch.OutOfMemoryError
        self.meter.add(Usage(rows * flops, rows * num_bytes))
        self.work.evaluations += rows
        return inputs[0].new_empty(rows, self.unet.config.out_channels, *inputs[0].shape[2:])

    def gathered(self, context: TextContext) -> TextContext:
        rows = len(context)
        if self.meter.live_bytes + rows * context.row_bytes > self.free_bytes and rows > self.trial.copies:
            raise torch.OutOfMemoryError
        return super().gathered(context)

    def _by_row(self, inputs: Inputs) -> Usage:
        """The usage of one row. A plain network is tried once a step, and a method's own network in every call."""
        x, _, context, _, _, *hints = inputs
        kind = (x.shape[1:], type(context), *(hint.control for hint in hints))
        if self.network is not None or kind not in self.trial.by_row:
            usage = self.meter.aside(lambda: self.run(inputs))
            self.trial.by_row[kind] = Usage(usage.flops // len(x), math.ceil(usage.peak_bytes / len(x)))
        return self.trial.by_row[kind]


class CountingRanks(Ranks):
    """Ranks of which only one exists; it counts the bytes that the others would send."""

    def gather(self, whole: Tensor, starts: Sequence[int], dim: int = 0) -> None:
        own = starts[self.rank + 1] - starts[self.rank]
        self.received_bytes += whole.nbytes // whole.shape[dim] * (whole.shape[dim] - own)


@contextmanager
def one_block_for_all(network: Backbone[Any], meter: Meter) -> Iterator[None]:
    """Run only the first block of each stack of blocks that are alike, and count it for all."""

    def count(forward: Callable[..., T], times: int, *read: Any) -> T:
        before = meter.flops
        out = forward(*read)
        meter.flops += (times - 1) * (meter.flops - before)
        return out

    with ExitStack() as changes:
        for blocks, skip in network.stacks():
            for first in blocks[:1]:  # a network may have no block of a kind
                changes.enter_context(replaced(first, forward=partial(count, first.forward, len(blocks))))
            for block in blocks[1:]:
                changes.enter_context(replaced(block, forward=skip))
        yield


class SizedDraws(Draws):
    """Draws whose noise has a size but no values."""

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return torch.empty(shape, device=self.device)

    def second_noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return torch.empty(shape, device=self.device)


def decoding(model: Model, size: Size) -> Usage:
    """The cost of decoding one picture of `size` latents on one device that holds all weights.

    The FLOPs are those of decoding the whole picture at once, a·n + b·n² for n latents; the square is the attention's.
    Decoding in bands computes some values anew where not all are kept: SDXL's needs, without the attention, 1.01 times
    as many FLOPs at 2048² in bfloat16 (1.16 times in float32), and 1.55 times (1.88) as many at 4096².
    """
    dtype = model.vae_dtype
    weights, vae = weight_bytes(model), model.vae
    if vae.dtype != dtype:
        vae = deepcopy(vae).to(dtype)
        weights += _bytes(vae)
    (n, flops), (m, more) = ((side * side, _decoded(vae, (side, side), banded=False).flops) for side in (8, 16))
    b = (more * n - flops * m) // (n * m * (m - n))
    a = (flops - b * n * n) // n
    num_latents, c = math.prod(size), vae.config.channels
    pixel_bytes = model.factor**2 * num_latents * dtype.itemsize
    if c[0] * pixel_bytes <= KEPT_BYTES:
        num_bytes = _decoded(vae, size).peak_bytes
    else:  # as `models.bands` keeps them: the last level, and the one before it at half the size
        num_bytes = (c[0] + c[min(1, len(c) - 1)] // 4) * pixel_bytes + LIVE_BANDS * GPU_BAND_BYTES
    return Usage(a * num_latents + b * num_latents**2, weights + num_bytes)


@torch.no_grad()
def _decoded(vae: VAE, size: Size, *, banded: bool | None = None) -> Usage:
    latents = torch.empty(1, vae.config.latent_channels, *size, dtype=vae.dtype, device="meta")
    with Meter() as meter:
        return meter.aside(lambda: vae.decode(latents, banded=banded))


def weight_bytes(model: Model) -> int:
    """The bytes of the weights of all networks of a model, those of ControlNets too that were read for it."""
    networks = (model.unet, model.vae, *model.text.encoders, *model.controls.values())
    return sum(_bytes(network) for network in networks)


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def outline(path: str | None, dtype: str, config: str | None = None) -> Model:
    """The model at `path`, or where nothing lies there that of `PUBLISHED`, or SDXL-base if it is None, on the meta
    device, with a prompt of the usual length. FileNotFoundError, which lists the published ones, if it is neither."""
    kind: torch.dtype = getattr(torch, dtype)
    if path is None:
        return sized(SDXL, kind)
    published = {sizes.name.lower(): sizes for sizes in PUBLISHED}
    if path.lower() in published and not Path(path).exists():
        return sized(published[path.lower()], kind)
    from cutdiff.checkpoint.load import load_outline

    try:
        locate(path)
    except FileNotFoundError as error:
        names = ", ".join(sizes.name for sizes in PUBLISHED)
        raise FileNotFoundError(f"{error}; {names} are known without files") from None
    model = load_outline(path, dtype=kind, config=config)
    return replace(model, text=_text(model.unet.config, kind, tuple(model.text.encoders), model.text.length("")))


def sized(sizes: Sizes, dtype: torch.dtype) -> Model:
    """A model of these sizes on the meta device."""
    with torch.device("meta"):
        encoders = nn.Linear(sizes.text_weights, 1, bias=False, dtype=dtype)
        network, vae = kind_of(sizes.network).network(sizes.network), VAE(sizes.vae)
    for each in (network, vae):
        each.to(dtype).requires_grad_(False)
    text = _text(sizes.network, dtype, (encoders,), sizes.tokens)
    zeros = isinstance(sizes.noise, NoiseConfig)
    preferred = published_preferences(sizes.network, sizes.noise)
    origin = {"source": sizes.name, "files": {}, "preferred": preferred}
    return Model(network, vae, text, sizes.noise, zeros_for_empty_negative=zeros, **origin)


def _text(config: Shape, dtype: torch.dtype, encoders: tuple[nn.Module, ...], tokens: int) -> Any:
    with torch.device("meta"):
        states = torch.empty(1, tokens, config.context_dim, dtype=dtype), torch.empty(1, config.pooled_dim, dtype=dtype)
    return GivenText(TextStates(*states), encoders)
