"""From a prompt to a picture: noise → method → solver → VAE."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.methods import METHODS, Run
from cutdiff.methods.shared import guided_between
from cutdiff.models.compiled import compiled
from cutdiff.models.shared_text import SharedText
from cutdiff.models.text import TextEncoders, TextStates
from cutdiff.models.vae import VAE
from cutdiff.output.record import describe, fingerprint
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.finite import explained
from cutdiff.sampling.operators import check_backend
from cutdiff.sampling.schedule import Schedule
from cutdiff.sampling.solvers import Phase, Solver, Stage, Step, make_solver, solve
from cutdiff.settings import Settings

CPU_VIEW_BATCH = 16
"""Patches or views at once where nobody says; more are not faster there."""


@dataclass(frozen=True)
class Result:
    images: Tensor
    """(B, 3, H, W), float32 in [0, 1], on the CPU."""
    latents: Tensor
    """(B, C, H / factor, W / factor), float32."""
    record: dict[str, Any]
    """How the images were made, and what it cost. With draws of your own, the record names their class only."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything was checked, only the prompts were encoded."""

    settings: Settings
    denoiser: Denoiser
    draws: Draws
    size: tuple[int, int]
    """Of the finished picture, in latents."""
    schedule: Schedule
    stages: list[Stage | Phase]
    num_steps: int
    """Of all phases."""
    steps: Iterator[Step]


def denoise(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings | None = None,
    *,
    draws: Draws | None = None,
    ranks: Ranks = ALONE,
    **changes: Any,
) -> Iterator[Step]:
    """Run step by step: yields a `Step` after each. Options are those of `Settings`, given as one or by name.

    A sequence of prompts makes one image each; `draws` replaces the draws that the seeds would make. Prompts of more
    than 75 tokens pad the shorter ones beside them with empty chunks, which these images show. `ranks` that share the
    work all call this with the same arguments, and get the same steps.
    """
    return prepare(model, prompt, replace(settings or Settings(), **changes), draws, ranks).steps


def generate(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings | None = None,
    *,
    draws: Draws | None = None,
    ranks: Ranks = ALONE,
    on_step: Callable[[Step, int], None] | None = None,
    **changes: Any,
) -> Result:
    """Run to the end and decode: the same run as `denoise`. `on_step(step, num_steps)` hears of each step and of all of
    their number."""
    settings = replace(settings or Settings(), **changes)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    prepared = prepare(model, prompt, settings, draws, ranks)
    latents, seconds, began = torch.empty(0), {}, now(model.device)
    received_before = ranks.received_bytes
    for step in prepared.steps:
        latents = step.latents
        if on_step is not None:
            on_step(step, prepared.num_steps)
        ended = now(model.device)
        seconds[step.stage] = seconds.get(step.stage, 0.0) + ended - began
        began = ended
    received = ranks.received_bytes - received_before
    images, dtype = _decode(model, latents, ranks)
    seconds["decode"] = now(model.device) - began
    record = _record(model, prompt, prepared, seconds)
    record |= {
        "received_bytes_per_step": received / prepared.num_steps,
        "decoded_in": dtype_name(dtype),
        "one_value": any(bool(image.amin() == image.amax()) for image in images),
    }
    return Result(images, latents, record)


def decode(model: Model, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W), float32 in [0, 1], on the CPU; one at a time to save memory.

    Where the VAE overflows in its own dtype, it decodes again in float32. Raises FloatingPointError where that does not
    help.
    """
    return _decode(model, latents)[0]


@torch.no_grad()
def _decode(model: Model, latents: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, torch.dtype]:
    """The images, and the dtype that they were decoded in."""
    dtype = model.vae_dtype
    images = _decoded(model.vae, dtype, latents, ranks)
    if not images.isfinite().all() and dtype != torch.float32:
        dtype = torch.float32
        images = _decoded(model.vae, dtype, latents, ranks)
    if not images.isfinite().all():
        raise FloatingPointError(f"the VAE gave NaN or infinity; {model.bad_weights() or 'all weights are finite'}")
    return (images / 2 + 0.5).clamp(0, 1), dtype


def _decoded(vae: VAE, dtype: torch.dtype, latents: Tensor, ranks: Ranks) -> Tensor:
    if vae.post_quant_conv.weight.dtype != dtype:
        vae = deepcopy(vae).to(dtype)
    return torch.cat([vae.decode(image[None].to(dtype), ranks=ranks).float().cpu() for image in latents])


def plan(model: Model, settings: Settings) -> tuple[tuple[int, int], Solver, Schedule]:
    """The canvas in latents, the solver and the schedule of a run; ValueError where the model cannot do it."""
    check_backend(settings.backend, model.device)
    if settings.cuda_graphs and model.device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a GPU, and the device is {model.device}: leave it out")
    model.text.skipping(settings.clip_skip)
    for name in ("prompt_2", "negative_prompt_2"):
        if getattr(settings, name) is not None and model.text.text_encoder_2 is None:
            raise ValueError(f"{name}={getattr(settings, name)!r} is for a second text encoder, which only SDXL has")
    solver = make_solver(settings.solver, settings.eta)
    schedule = solver.make_schedule(model.noise, settings.num_steps)
    return settings.canvas_size(model.native_size, model.factor), solver, schedule


def prepare(
    model: Model,
    prompt: str | Sequence[str],
    settings: Settings,
    draws: Draws | None,
    ranks: Ranks = ALONE,
    make_denoiser: Callable[..., Denoiser] = Denoiser,
) -> Prepared:
    """Check everything and encode the prompts: a run whose first step was not taken. Arguments as of `generate`."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list: give at least one prompt")
    size, solver, schedule = plan(model, settings)
    if draws is None:
        draws = Draws(tuple(settings.seed + i for i in range(len(prompts))), model.device)
    text: TextEncoders | SharedText = model.text.skipping(settings.clip_skip)
    if ranks.size > 1:
        text = SharedText(text, ranks, model.device, model.dtype)
    positive, negative = _encode(text, prompts, settings, model.zeros_for_empty_negative)
    denoiser = make_denoiser(
        unet=model.unet,
        timestep=schedule.timestep,
        coefficients=model.noise.coefficients,
        positive=positive,
        negative=negative,
        guidance_scale=settings.guidance_scale,
        factor=model.factor,
        compiled=compiled(model.unet, cuda_graphs=settings.cuda_graphs) if settings.compile else None,
        view_batch_size=_view_batch_size(model, settings),
        ranks=ranks,
        items_of_a_call=settings.view_batch_size,
        backend=settings.backend,
    )
    run = Run(
        denoiser=denoiser,
        draws=draws,
        size=size,
        target_size=size,
        schedule=schedule,
        prompts=prompts,
        text=text,
        stride=settings.stride,
        structure_fraction=settings.structure_fraction,
        detail_guidance_scale=settings.detail_guidance_scale,
        interaction=settings.interaction,
        size_conditioning=settings.size_conditioning,
        cosine_scales=settings.cosine_scales,
        word_threshold=settings.word_threshold,
    )
    method = settings.method if callable(settings.method) else METHODS[settings.method]
    stages = method(run)
    _check_stages(stages, settings)
    stages = guided_between(run, settings.guidance_interval, stages)
    shape = (len(prompts), model.unet.config.in_channels, *(stages[0].size or size))
    noise = draws.noise(shape).to(model.device, torch.float32)
    if noise.shape != shape:
        raise ValueError(f"draws.noise gave {tuple(noise.shape)} where {shape} is needed")
    steps = solve(stages, noise * schedule.init_scale, schedule, solver, draws.noise)
    num_steps = sum(len(stage.steps) for stage in stages)
    return Prepared(settings, denoiser, draws, size, schedule, stages, num_steps, explained(steps, denoiser, model))


def _view_batch_size(model: Model, settings: Settings) -> int | None:
    return settings.view_batch_size or (CPU_VIEW_BATCH if model.device.type == "cpu" else None)


def _check_stages(stages: Any, settings: Settings) -> None:
    """ValueError where a method's stages do not lead to the last step: what they ended with would still be noise."""
    taken = [step for stage in stages or () for step in stage.steps]
    in_order = all(a < b for a, b in pairwise(taken))
    if not taken or not in_order or taken[0] != 0 or (taken[-1] + 1) % settings.num_steps:
        raise ValueError(
            f"method={settings.method_name} takes the steps {taken}: its stages must take them in order, each once, "
            f"from 0 to the last of {settings.num_steps}"
        )


def _encode(
    text: TextEncoders | SharedText, prompts: list[str], settings: Settings, zeros_for_empty_negative: bool
) -> tuple[TextStates, TextStates]:
    """The states of the prompts and of their negative prompt, equally long: a guidance pair is one batch."""
    others = (settings.negative_prompt, settings.prompt_2, settings.negative_prompt_2)
    length = max(text.length(prompt) for prompt in (*prompts, *others) if prompt is not None)
    positive = text.encode(prompts, settings.prompt_2, min_length=length)
    if zeros_for_empty_negative and not (settings.negative_prompt or settings.negative_prompt_2):
        return positive, TextStates.zeros_like(positive)
    negative = [settings.negative_prompt] * len(prompts)
    return positive, text.encode(negative, settings.negative_prompt_2, min_length=length)


def _record(model: Model, prompt: str | Sequence[str], prepared: Prepared, seconds: dict[str, float]) -> dict[str, Any]:
    described, ranks = describe(model, prompt, prepared.settings, prepared.draws), prepared.denoiser.ranks
    held = min(ranks.values(prepared.denoiser.view_batch_size or 0)) or None
    return {
        **described,
        "fingerprint": fingerprint(described),
        "view_batch_size": held,
        "view_batch_halved": held != _view_batch_size(model, prepared.settings),
        "network_evaluations": sum(ranks.values(prepared.denoiser.evaluations)),
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
    """Of the accelerator in this run, or of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
