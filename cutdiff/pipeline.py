"""From a prompt to a picture: noise → method → solver → VAE."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.methods.given import check_counts, check_given, controls_of, fitted, masked_picture
from cutdiff.methods.in_regions import in_regions
from cutdiff.methods.picture import drawn_on
from cutdiff.methods.redrawn import Redrawn
from cutdiff.methods.shared import Run, between, stages_of
from cutdiff.models.backbone import Backbone
from cutdiff.models.compiled import compiled
from cutdiff.models.config import SD15_UNET
from cutdiff.models.positions import AsTrained, Positioned, with_positions
from cutdiff.models.prompts import LORA
from cutdiff.models.shared_text import SharedText
from cutdiff.models.text import TextEncoders
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.options import checked
from cutdiff.output.record import describe, fingerprint, sources_of
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.sampling.conditioning import Prompts, encode_prompts, pairs_read
from cutdiff.sampling.denoiser import Denoiser, Observer, Work
from cutdiff.sampling.draws import Draws, solver_noise
from cutdiff.sampling.draws import checked as checked_draws
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.finite import explained
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.guidance import Changing, LinearGuidance
from cutdiff.sampling.masks import MaskedPicture
from cutdiff.sampling.operators import check_backend
from cutdiff.sampling.schedules import AlignYourSteps, Listed, Schedule, make_schedule
from cutdiff.sampling.solvers import DDIM
from cutdiff.sampling.stages import Phase, Stage, Step, check_stages, solve
from cutdiff.settings import Settings, check_owned, left_to_model
from cutdiff.specs import name_of, resolve

CPU_VIEW_BATCH = 16
"""The patches or views at once on a CPU where nobody says; more are not faster there."""
TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2")
"""The options of a run that are texts for the encoders."""


@dataclass(frozen=True)
class Result:
    images: Tensor
    """(B, 3, H, W), float32 in [0, 1], on the CPU."""
    latents: Tensor
    """(B, C, H / factor, W / factor), float32."""
    record: dict[str, Any]
    """The options, the model and the cost of the images. Draws of your own are named by their class and source."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything was checked, only the prompts were encoded."""

    settings: Settings
    denoiser: Denoiser
    draws: Draws
    size: tuple[int, int]
    """The size of the finished picture, in latents."""
    schedule: Schedule
    denoisers: Sequence[Denoiser]
    """Those of the parts of the picture that are drawn, which share the work of `denoiser`."""
    stages: Sequence[Stage | Phase]
    steps: Iterator[Step]
    sources: dict[str, str]
    """The source hashes of objects that are not the package's, before the run."""
    masked: MaskedPicture | None = None
    """The given picture, where a part of it is redrawn."""

    @property
    def num_steps(self) -> int:
        """The steps of all stages."""
        return sum(len(stage.steps) for stage in self.stages)


def denoise(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings | None = None,
    *,
    draws: Draws | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Run step by step: yields a `Step` after each. Options are those of `Settings`, given as one or by name; without
    `settings`, the model's own preferences take the place of defaults.

    A sequence of prompts makes one image each; `draws` replaces the draws that the seeds would make. Prompts of more
    than 75 tokens pad the shorter ones beside them with empty chunks, which these images show. `ranks` that share the
    work all call this with the same arguments, and get the same steps. `observer` hears of every step and every call of
    the network.
    """
    return prepare(model, prompt, with_options(model, settings, options), draws, ranks, observer).steps


def generate(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings | None = None,
    *,
    draws: Draws | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
    on_step: Callable[[Step, int], None] | None = None,
    **options: Any,
) -> Result:
    """Run to the end and decode: the same run as `denoise`. `on_step(step, num_steps)` hears of each step and of the
    number of all.

    Threads may draw with one model at the same time, but not beside one whose method changes the network: that one must
    have a model of its own.
    """
    settings = with_options(model, settings, options)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    prepared = prepare(model, prompt, settings, draws, ranks, observer)
    latents, seconds, began = torch.empty(0), {}, now(model.device)
    received_before, ends = ranks.received_bytes, {part.steps[-1] for part in prepared.stages if part.steps}
    for step in prepared.steps:
        latents = step.latents
        if on_step is not None:
            on_step(step, prepared.num_steps)
        if step.index in ends:  # only then does the clock wait for the device
            ended = now(model.device)
            seconds[step.stage] = seconds.get(step.stage, 0.0) + ended - began
            began = ended
    received = ranks.received_bytes - received_before
    if not latents.isfinite().all():
        raise FloatingPointError("the last step of the solver gave NaN or infinity")
    images, dtype = _decode(model, latents, ranks)
    if prepared.masked is not None:
        images = prepared.masked.laid_onto(images, settings.feather)
    seconds["decode"] = now(model.device) - began
    record = _record(model, prompt, prepared, seconds)
    record |= {
        "received_bytes_per_step": received / prepared.num_steps,
        "decoded_in": dtype_name(dtype),
        "one_value": any(bool(image.amin() == image.amax()) for image in images),
    }
    negatives = [settings.negative_prompt, settings.negative_prompt_2]
    negatives += [region.negative_prompt for region in settings.regions or ()]
    if any(negatives) and not prepared.denoiser.work.reads_negative:
        record["negative_prompt_unread"] = True
    if unread := [c for c in prepared.denoiser.controls if c.is_on not in prepared.denoiser.work.counted]:
        numbers = [prepared.denoiser.controls.index(control) for control in unread]
        record["control_unread"] = [record["control_interval"][number] for number in numbers]
    positions = settings.positions and prepared.denoiser.unet.positions
    if isinstance(positions, AsTrained) and prepared.denoiser.work.largest_side <= model.native_size:
        record["positions_unread"] = True  # those of one's own may change a native picture too
    if cut := _cut_texts(model, prompt, settings):
        record["prompt_cut"] = cut
    if any(prompt) and all(denoiser is not prepared.denoiser for denoiser in prepared.denoisers):
        record["prompt_unread"] = True
    return Result(images, latents, record)


def _cut_texts(model: Model, prompt: str | Sequence[str], settings: Settings) -> list[str]:
    """The words for the parts of a run's texts that its encoders leave out."""
    beside = settings.prompt_2, settings.negative_prompt, settings.negative_prompt_2
    runs = [Prompts([prompt] if isinstance(prompt, str) else [*prompt], *beside)]
    for region in settings.regions or ():
        own = region.negative_prompt
        runs.append(Prompts([region.prompt or ""], None, settings.negative_prompt if own is None else own))
    pairs = dict.fromkeys(pair for run in runs for pair in pairs_read(run, settings.num_steps))
    return [*dict.fromkeys(words for first, second in pairs for words in model.text.left_out(first, second))]


def with_options(model: Model, settings: Settings | None, options: dict[str, Any]) -> Settings:
    """The settings with these options; the very same ones where there are none, whose sources stand as they were. Where
    options alone are given, the model's preferences are taken for those that they leave open."""
    if settings is None:
        check_owned(options, options)
        return Settings(**{**left_to_model(options, model.preferred), **options})
    return replace(settings, **options) if options else settings


@torch.no_grad()
def encode(model: Model, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, H / factor, W / factor), float32, on the model's device: the mean
    of the VAE's distribution, or its sample at `noise` of the latents' shape, one image at a time.

    Where the VAE overflows in its own dtype, it encodes again in float32. Raises FloatingPointError where that does not
    help, and ValueError where the images or the noise have another shape, a size that the VAE's factor does not divide,
    or integers.
    """
    sides = images.shape[2:]
    if images.ndim != 4 or not len(images) or images.shape[1] != 3 or any(side % model.factor for side in sides):
        raise ValueError(
            f"images of {tuple(images.shape)} cannot be encoded: give (B, 3, H, W) in multiples of {model.factor}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} cannot be encoded: give floats in [0, 1]")
    shape = (len(images), model.vae.config.latent_channels, *(side // model.factor for side in sides))
    if noise is not None and noise.shape != shape:
        raise ValueError(f"noise of {tuple(noise.shape)} cannot sample latents of {shape}")

    def encoded(vae: VAE, dtype: torch.dtype) -> Tensor:
        pixels = (2 * images - 1).to(model.device, dtype)
        posteriors = (vae.encode(image[None]) for image in pixels)
        if noise is None:
            return torch.cat([posterior.mean.float() for posterior in posteriors])
        return torch.cat([posterior.at(z).float() for posterior, z in zip(posteriors, noise.split(1), strict=True)])

    return _in_safe_dtype(model, encoded)[0]


def decode(model: Model, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W), float32 in [0, 1], on the CPU; one at a time to save memory.

    Where the VAE overflows in its own dtype, it decodes again in float32. Raises FloatingPointError where that does not
    help, and ValueError where the latents have another shape.
    """
    channels = model.vae.config.latent_channels
    if latents.ndim != 4 or not len(latents) or latents.shape[1] != channels:
        raise ValueError(f"latents of {tuple(latents.shape)} cannot be decoded: give (B, {channels}, h, w)")
    return _decode(model, latents)[0]


@torch.no_grad()
def _decode(model: Model, latents: Tensor, ranks: Ranks = ALONE, *, clamp: bool = True) -> tuple[Tensor, torch.dtype]:
    """The images, and the dtype that they were decoded in."""

    device = "meta" if latents.is_meta else "cpu"  # a planned run has sizes only

    def decoded(vae: VAE, dtype: torch.dtype) -> Tensor:
        return torch.cat([vae.decode(image[None].to(dtype), ranks=ranks).float().to(device) for image in latents])

    images, dtype = _in_safe_dtype(model, decoded)
    images = images / 2 + 0.5
    return images.clamp(0, 1) if clamp else images, dtype


def _in_safe_dtype(model: Model, run: Callable[[VAE, torch.dtype], Tensor]) -> tuple[Tensor, torch.dtype]:
    """The output of the VAE in its own dtype, or where it overflows there in float32; and the dtype."""
    for dtype in dict.fromkeys((model.vae_dtype, torch.float32)):
        same = model.vae.dtype == dtype
        values = run(model.vae if same else deepcopy(model.vae).to(dtype), dtype)
        if values.is_meta or values.isfinite().all():
            return values, dtype
    raise FloatingPointError(f"the VAE gave NaN or infinity; {model.bad_weights() or 'all weights are finite'}")


def canvas_and_schedule(model: Model, settings: Settings) -> tuple[tuple[int, int], Schedule]:
    """The canvas in latents and the schedule of a run; ValueError where the model cannot do it."""
    check_backend(settings.backend, model.device)
    if settings.cuda_graphs and model.device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a GPU, and the device is {model.device}: leave it out")
    model.text.skipping(settings.clip_skip)
    for name in ("prompt_2", "negative_prompt_2"):
        if getattr(settings, name) is not None and len(model.text.encoders) < 2:
            raise ValueError(
                f"{name}={getattr(settings, name)!r} is for a second text encoder, which this model does not have"
            )
    if not isinstance(model.unet, UNet):
        _check_for_transformer(settings)
    if callable(check := getattr(settings.method, "check_native", None)):
        check(model.native_size)
    if model.unet.config.guidance_dim and not isinstance(settings.guidance, LinearGuidance):
        name = name_of("guidance", settings.guidance)
        raise ValueError(f"guidance={name} needs two estimates, and this model reads the scale itself: choose cfg")
    if isinstance(settings.guidance, Changing):
        with settings.guidance.changed(model.unet):  # which says so where it cannot change this network
            pass
    network_of(model, settings)
    size = settings.canvas_size(model.native_size, model.factor)
    noise = _shifted_noise(model, settings, size)
    schedule = make_schedule(_of_family(settings.schedule, model), settings.solver, noise, settings.num_steps)
    if callable(check := getattr(settings.solver, "check_schedule", None)):
        check(schedule)
    check_given(model, settings, size, schedule)
    return size, schedule


def _check_for_transformer(settings: Settings) -> None:
    """ValueError where the run needs a U-Net."""
    for kind, others in (("method", "multidiffusion, cutdiffusion, magnify or climb"), ("guidance", "cfg")):
        thing = getattr(settings, kind)
        if what := getattr(thing, "unet_only", ""):
            name = name_of(kind, thing)
            raise ValueError(f"{kind}={name} {what} of a U-Net, and this model is a transformer: choose {others}")
    if settings.control:
        raise ValueError(f"control={settings.control[0]} is for a U-Net, and this model is a transformer: leave it out")


def _shifted_noise(model: Model, settings: Settings, size: tuple[int, int]) -> AnyNoise:
    """The model's noise with the shift of a run on a canvas of `size` latents. ValueError where it has none."""
    noise, shift = model.noise, settings.shift
    if shift is not None and isinstance(settings.schedule, Listed):
        raise ValueError(f"shift={shift} moves times, and those of the schedule are given one by one: leave one out")
    if not isinstance(noise, FlowConfig):
        if shift is not None:
            raise ValueError(f"shift={shift} is for models of flow matching, which this one is not: leave it out")
        return noise
    if isinstance(shift, float | int):
        return noise.shifted_by(shift)
    if shift is not None and not noise.use_dynamic_shifting:
        raise ValueError(
            f"shift={shift!r} is for models whose shift grows with the size, and this one's is {noise.shift:g} always: "
            "give a number, or leave it out"
        )
    patch = model.unet.config.patch
    native, canvas = (
        math.prod(-(-side // patch) for side in sides) for sides in ((model.native_size, model.native_size), size)
    )
    return noise.shifted_for({"native": native, "canvas": canvas, None: min(native, canvas)}[shift])


def network_of(model: Model, settings: Settings) -> Backbone[Any]:
    """The model's network as a run has it, with the positions of the run where there are any. ValueError where the
    network has none to change."""
    if settings.positions is None:
        return model.unet
    positions = resolve("positions", settings.positions)
    if not isinstance(model.unet, Positioned):
        raise ValueError(
            f"positions={name_of('positions', positions)} is for a transformer that is told where its tokens lie, "
            f"and this model has a {type(model.unet).__name__}: leave it out"
        )
    return with_positions(model.unet, positions)


def _of_family(schedule: Any, model: Model) -> Any:
    """The schedule, with the table of the model's family where it is one of tables and none was chosen."""
    if not isinstance(schedule, AlignYourSteps) or schedule.table is not None:
        return schedule
    unet = model.unet.config
    if not unet.pooled_dim and unet.context_dim != SD15_UNET.context_dim:
        raise ValueError(
            "schedule=align_your_steps has tables for SD 1.5 and SDXL, and this model is neither: "
            "give table=sd15 or sdxl"
        )
    return replace(schedule, table="sdxl" if unet.pooled_dim else "sd15")


def prepare(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings,
    draws: Draws | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
    make_denoiser: Callable[..., Denoiser] = Denoiser,
) -> Prepared:
    """Check everything and encode the prompts: a run whose first step was not taken. Arguments as of `generate`."""
    prompts = [prompt] if isinstance(prompt, str) else [*checked("prompt", prompt, list[str] | tuple[str, ...])]
    if not prompts:
        raise ValueError("prompt is an empty list: give at least one prompt")
    _check_texts(prompts, settings)
    check_counts(prompts, settings)
    size, schedule = canvas_and_schedule(model, settings)
    if isinstance(observer, type) or isinstance(draws, str | type):
        what = f"observer={observer}" if isinstance(observer, type) else f"draws={draws!r}"
        raise ValueError(f"{what} must be an object: make one of its class")
    if draws is None:
        draws = Draws(tuple(settings.seed + i for i in range(len(prompts))), model.device)
    sources = sources_of(settings, draws)  # before a run could change what it is given
    text: TextEncoders | SharedText = model.text.skipping(settings.clip_skip)
    if ranks.size > 1:
        text = SharedText(text, ranks, model.device, model.dtype)
    encoded = partial(
        encode_prompts, text, num_steps=settings.num_steps, zeros_for_empty_negative=model.zeros_for_empty_negative
    )
    positive, negative = encoded(
        Prompts(prompts, settings.prompt_2, settings.negative_prompt, settings.negative_prompt_2)
    )
    encodes, beside = partial(encode, model), None
    masked = masked_picture(model, settings, size, encodes)
    if model.unet.config.inpaints:
        beside = (masked or MaskedPicture.all_redrawn(size, encodes, model.factor)).beside
    network = network_of(model, settings)
    denoiser = make_denoiser(
        unet=network,
        timestep=schedule.timestep,
        coefficients=model.noise.coefficients,
        positive=positive,
        negative=negative,
        guidance=settings.guidance,
        beside=beside,
        guided=between(schedule, settings.guidance_interval),
        factor=model.factor,
        compiled=_compiled(network, settings),
        controls=controls_of(model, settings, schedule, partial(_compiled, settings=settings)),
        ranks=ranks,
        items_of_a_call=settings.view_batch_size,
        backend=settings.backend,
        work=Work(first_view_batch_size(model, settings), observers=[] if observer is None else [observer]),
    )
    denoisers = [denoiser]

    def begin_guidance(schedule: Schedule) -> None:
        own = schedule if isinstance(settings.solver, DDIM) else replace(schedule, targets=schedule.sigmas[1:])
        for each in denoisers:
            each.memory.guidances.begin(own)

    run = Run(
        denoiser=denoiser,
        draws=checked_draws(draws, len(prompts)),
        size=size,
        target_size=size,
        schedule=schedule,
        prompts=prompts,
        text=text,
        encode=encodes,
        decode=lambda latents, clamp=True: _decode(model, latents, ranks, clamp=clamp)[0].to(latents.device),
        image=fitted(settings.image, model, size, settings.fit) if settings.image and masked is None else None,
    )
    try:
        stages = stages_of(settings.method, run)
        if settings.regions:
            stages, denoisers[:] = in_regions(run, stages, settings, encoded)
        if masked is not None:
            redrawn = Redrawn(run, masked, holds=not model.unet.config.inpaints)
            stages = redrawn.stages(stages, settings.img2img_strength)
        elif run.image is not None and not getattr(settings.method, "takes_picture", False):
            strength, scale = settings.img2img_strength, schedule.init_scale
            stages = drawn_on(run, stages, strength, scale, invert=settings.invert)
        check_stages(stages, settings.num_steps)
        if stages[-1].size not in (None, size):
            raise ValueError(f"ends on a canvas of {stages[-1].size} latents, where the picture has {size}")
    except ValueError as error:
        if re.match(r"\w+=", str(error)):  # it names an option, which is nearer to the cause than the method
            raise
        raise ValueError(f"method={settings.method_name} {error}") from None
    begin_guidance(schedule)
    first = stages[0]
    shape = (len(prompts), model.vae.config.latent_channels, *(first.size or size))
    noise = run.draws.noise(shape).to(model.device, torch.float32)
    x, flags = noise * _init_scale(first, schedule), denoiser.work.flags
    noise_of_step = partial(solver_noise, run.draws)
    steps = solve(stages, x, schedule, settings.solver, noise_of_step, flags, begin_guidance)
    steps = explained(steps, denoiser, model.why_not_finite)
    if observer is not None:
        steps = _observed(steps, observer, sum(len(stage.steps) for stage in stages))
    return Prepared(settings, denoiser, draws, size, schedule, denoisers, stages, steps, sources, masked)


def _compiled(network: Backbone[Any], settings: Settings) -> Callable[..., Any] | None:
    """The compiled forward pass of a network, where the run is to have any."""
    return compiled(network, cuda_graphs=settings.cuda_graphs) if settings.compile else None


def _check_texts(prompts: Sequence[str], settings: Settings) -> None:
    """ValueError where a text names a LoRA, which is a matter of the model."""
    texts = [("prompt", prompt) for prompt in prompts] + [(name, getattr(settings, name) or "") for name in TEXTS]
    for number, region in enumerate(settings.regions or (), start=1):
        texts += [(f"regions=region {number}", text or "") for text in (region.prompt, region.negative_prompt)]
    for name, text in texts:
        if match := LORA.search(text):
            raise ValueError(f"{name} names {match[0]}: load the model with loras=[(FILE, SCALE)], and leave it out")


def _observed(steps: Iterator[Step], observer: Observer, num_steps: int) -> Iterator[Step]:
    """The steps, each after the observer has heard of it."""
    observer.begin(num_steps)
    for step in steps:
        observer.step(step)
        yield step


def _init_scale(first: Stage | Phase, schedule: Schedule) -> float:
    """The factor of the noise that a run begins with: at a later step, or sigmas of its own, the first one's sigma."""
    if isinstance(first, Stage) and first.sigmas is not None:
        return first.sigmas[0]
    start = first.steps.start % schedule.num_steps
    return schedule.init_scale if start == 0 else schedule.sigmas[start]


def first_view_batch_size(model: Model, settings: Settings) -> int | None:
    """The patches or views that a run first tries at once; None: all of a step."""
    return settings.view_batch_size or (CPU_VIEW_BATCH if model.device.type == "cpu" else None)


def _record(model: Model, prompt: str | Sequence[str], prepared: Prepared, seconds: dict[str, float]) -> dict[str, Any]:
    described = describe(model, prompt, prepared.settings, prepared.draws, prepared.schedule, prepared.sources)
    ranks, work = prepared.denoiser.ranks, prepared.denoiser.work
    view_batch_size = min(ranks.values(work.view_batch_size or 0)) or None
    return {
        **described,
        "fingerprint": fingerprint(described),
        "view_batch_size": view_batch_size,
        "view_batch_halved": view_batch_size != first_view_batch_size(model, prepared.settings),
        "network_evaluations": sum(ranks.values(work.evaluations)),
        "ranks": ranks.size,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "peak_memory_bytes": peak_memory(model.device),
    }


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device, so that each stage is charged with its own work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: the accelerator's in this run, or the process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
