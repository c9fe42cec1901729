"""Faults that other toolboxes have had in such methods, none of which any method or solver has here.

Each part of this file is one fault. Its tests run over the tables of what ships, so that what is added is tested too.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run, stages_of
from cutdiff.models.config import VAEConfig
from cutdiff.models.layers import TextContext
from cutdiff.models.vae import VAE
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Call, Denoiser, Observer
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.operators import Operator, Patches
from cutdiff.sampling.rows import Rows
from cutdiff.sampling.schedules import Schedule, euler_schedule
from cutdiff.sampling.solvers import Estimating, Noise, TakeStep, euler_step, finished
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.settings import Settings
from cutdiff.specs import METHODS, SOLVERS, options_of, resolve

PROMPT = "a red house at night"
SIZE = {"height": 128, "width": 96}
CANVAS = (16, 12)
"""The size in latents of the finished canvas, twice the native one."""
VARIANTS = (
    *METHODS,
    "multidiffusion,overlaps=swap",
    "upsample_guidance,detail=views,fading=true",
    "cutdiffusion,structure=mean,upsample_guidance=1",
    "magnify,hold=trajectory",
    "magnify,enlarged_in=pixels",
    "diffusehigh,enlarged_in=latents,held_in=latents",
)
"""Methods, and those of their options that change what a run keeps, enlarges or blends."""
NOISIEST = tuple(
    spec for name in SOLVERS for spec in (f"{name},eta=1" if "eta" in options_of(resolve("solver", name)) else name,)
)
"""The solvers, with all the fresh noise that they can add."""
THREE_STEPS = euler_schedule(NoiseConfig(), 3)


def drawn(model: Model, method: Any, prompt: str = PROMPT, **options: Any) -> Tensor:
    steps = list(cutdiff.denoise(model, prompt, method=method, **{"num_steps": 3, **SIZE, **options}))
    return steps[-1].latents


# ---- A run that is listened to


class Taken(NamedTuple):
    """One step of a solver."""

    x: Tensor
    denoised: Tensor
    i: int
    """Its number in the schedule that the solver was started on."""
    out: Tensor
    further: tuple[Tensor, ...]
    """The estimates that it asked for in the step after the first one."""

    def again(self, take: TakeStep) -> Tensor:
        """The state after the same step, taken by another function from the same estimates."""
        further = iter(self.further)
        return finished(take(self.x, self.denoised, self.i), lambda x, sigma: next(further))


@dataclass
class Start:
    """One start of a solver."""

    schedule: Schedule
    noise: Noise
    taken: list[Taken] = field(default_factory=list)


class Spy:
    """A solver, of which all starts and steps are kept."""

    def __init__(self, solver: Any) -> None:
        self.solver, self.starts = solver, []
        if hasattr(solver, "model_schedule"):
            self.model_schedule = solver.model_schedule

    def start(self, schedule: Schedule, noise: Noise) -> TakeStep:
        take, start = self.solver.start(schedule, noise), Start(schedule, noise)
        self.starts.append(start)

        def step(x: Tensor, denoised: Tensor, i: int) -> Estimating:
            out, further = take(x, denoised, i), []
            if isinstance(out, Generator):
                out = yield from noted(out, further)
            start.taken.append(Taken(x.clone(), denoised.clone(), i, out.clone(), tuple(further)))
            return out

        return step


def noted(step: Estimating, further: list[Tensor]) -> Estimating:
    """The same step, whose estimates are kept."""
    try:
        asked = next(step)
        while True:
            further.append((yield asked))
            asked = step.send(further[-1])
    except StopIteration as end:
        return end.value


class Begun(NamedTuple):
    """The start of a phase."""

    state: Tensor
    guide: Tensor
    """The state that it would have begun with without noise."""
    sigma: float
    noises: list[Tensor]
    """The noise that it drew for it."""
    estimate: Tensor | None
    """The last estimate before it."""


class Called(NamedTuple):
    """One call of a stage's denoiser."""

    stage: Stage
    x: Tensor
    sigma: float
    step: int
    out: Tensor


class Noted(Draws):
    """Draws that note the noise which a phase is begun with, or give none."""

    @property
    def notes(self) -> dict[str, Any]:
        return vars(self)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        noise = super().phase_noise(shape, phase)
        self.notes.setdefault("noises", []).append(noise)
        return torch.zeros_like(noise) if self.notes.get("silent") else noise


class Listened:
    """A run of a method: what its phases began with, and all that its stages' denoisers gave."""

    def __init__(
        self, model: Model, method: Any, make_denoiser: Any = Denoiser, solver: str = "dpmpp_2m", **options: Any
    ) -> None:
        self.begun: list[Begun] = []
        self.called: list[Called] = []
        self.draws = Noted((0,))

        def listened(run: Run) -> list[Stage | Phase]:
            return [self._heard(run, part) for part in stages_of(resolve("method", method), run)]

        self.spy = Spy(resolve("solver", solver))
        settings = Settings(method=listened, solver=self.spy, **{"num_steps": 5, **SIZE, **options})
        self.run = prepare(model, PROMPT, settings, self.draws, make_denoiser=make_denoiser)
        self.steps = list(self.run.steps)

    def _heard(self, run: Run, part: Stage | Phase) -> Any:
        if isinstance(part, Stage):
            return self._on(part)

        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            self.draws.notes["silent"] = True
            guide = part.begin(x)[0].clone()
            self.draws.notes.update(silent=False, noises=[])
            state, stage = part.begin(x)
            sigma = stage.sigmas[0] if stage.sigmas else run.schedule.sigmas[stage.steps.start % run.num_steps]
            last = self.called[-1].out if self.called else None
            self.begun.append(Begun(state.clone(), guide, sigma, self.draws.notes.pop("noises"), last))
            return state, self._on(stage)

        return replace(part, begin=begin)

    def _on(self, stage: Stage) -> Stage:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            out = stage.denoise(x, sigma, step)
            self.called.append(Called(stage, x.clone(), sigma, step, out.clone()))
            return out

        return replace(stage, denoise=denoise)


@pytest.fixture(scope="module")
def heard(tiny_model: Model) -> Callable[[str], Listened]:
    """A run of five steps of each method, with a solver that has a memory."""
    return cache(lambda method: Listened(tiny_model, method))


# ---- 1. Noise mixed in the VAE's unscaled space


def moved(vae: VAE, config: VAEConfig) -> VAE:
    """A VAE that encodes and decodes as `vae` does, whose unscaled latents have the scale and centre of `config`."""
    new = VAE(config).eval().requires_grad_(False)
    new.load_state_dict(vae.state_dict())
    assert config.latents_mean
    assert config.latents_std
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    factor = std * vae.config.scaling_factor / config.scaling_factor  # unscaled = old unscaled · factor + mean
    into, out = new.post_quant_conv, new.quant_conv
    assert isinstance(into, torch.nn.Conv2d)
    assert isinstance(out, torch.nn.Conv2d)
    assert into.bias is not None
    assert out.bias is not None
    into.bias -= (into.weight[:, :, 0, 0] * (mean / factor)).sum(dim=1)
    into.weight /= factor[:, None, None]
    both = torch.cat([factor, torch.ones(len(factor))])
    out.weight *= both[:, None, None, None]
    out.bias *= both
    out.bias += torch.cat([mean, 2 * factor.log()])
    return new


@pytest.mark.parametrize("method", VARIANTS)
def test_no_run_depends_on_the_unscaled_space_of_the_vae(tiny_model: Model, method: str) -> None:
    other = replace(
        tiny_model.vae.config,
        scaling_factor=0.13025,
        latents_mean=(1.0, -2.0, 0.5, 3.0),
        latents_std=(2.0, 0.5, 3.0, 1.0),
    )
    model = replace(tiny_model, vae=moved(tiny_model.vae, other))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert relative_error(cutdiff.encode(model, picture), cutdiff.encode(tiny_model, picture)) < 1e-4
    assert relative_error(drawn(model, method), drawn(tiny_model, method)) < 1e-3


@pytest.mark.parametrize("method", VARIANTS)
def test_a_phase_begins_with_noise_of_its_sigma(heard: Callable[[str], Listened], method: str) -> None:
    """Whatever the factor of the VAE, what it begins with has as much of the noise that it drew as its sigma says."""
    for state, guide, sigma, noises, _ in heard(method).begun:
        assert len(noises) < 2
        for noise in noises:
            torch.testing.assert_close(state - guide, sigma * noise, rtol=0, atol=1e-4)


# ---- 2. The ends of an interpolation swapped


def pushed(where: Callable[[Operator, Tensor], bool], by: float) -> type[Denoiser]:
    """A denoiser whose estimates are larger by a constant, where the operator and the canvas are such."""

    class Pushed(Denoiser):
        def through(self, operator: Operator, canvas: Tensor, sigma: float, step: int, **how: Any) -> Tensor:
            return super().through(operator, canvas, sigma, step, **how) + (by if where(operator, canvas) else 0)

    return Pushed


def of_smaller_size(operator: Operator, canvas: Tensor) -> bool:
    return tuple(canvas.shape[2:]) != CANVAS


def of_patches(operator: Operator, canvas: Tensor) -> bool:
    return isinstance(operator, Patches) and operator.grid != (1, 1)


def from_the_top(method: str) -> Any:
    """The method with the options by which it begins its last canvas where noise is most, and enlarges latents."""
    top: dict[str, Any] = {"strength": 1.0, "enlarged_in": "latents", "held_in": "latents"}
    if method.startswith(("magnify", "climb")):
        top |= {"structure_fraction": 0.0, "sharpness": 0.0, "corrections": 0}
    thing = resolve("method", method)
    return replace(thing, **{k: v for k, v in top.items() if k in options_of(thing)}) if options_of(thing) else thing


GUIDED = {
    of_smaller_size: (
        "freescale",
        "upsample_guidance",
        "demofusion",
        "accdiffusion",
        "diffusehigh",
        "imax",
        "magnify",
        "climb",
        *(method for method in VARIANTS if "," in method and "swap" not in method),
    ),
    of_patches: ("cutdiffusion", "demofusion", "accdiffusion"),
}
"""The methods that are known to blend, by what guides them."""
STEPS = 4


def guided(plain: Stage, moved: Stage, x: Tensor, push: Tensor, sigma: float, step: int) -> tuple[Any, Any, float]:
    """The state at a step, its estimates of two stages of which one's guide was moved by `push`, and how far state and
    estimate together move with it: 0 not at all, 1 as far."""
    states = [x if stage.before is None else stage.before(x, sigma, step) for stage in (plain, moved)]
    estimates = [stage.denoise(states[0], sigma, step) for stage in (plain, moved)]
    push = push.expand_as(x)
    weight = sum(((b - a) * push).sum() for a, b in (states, estimates)) / push.square().sum()
    return states[0], estimates, float(weight)


def weights(model: Model, method: Any, where: Callable[[Operator, Tensor], bool]) -> tuple[list[float], float, int]:
    """How far each step on the finished canvas moves with its guide, the estimates where `where` says so; how far the
    last one would at the cleanest sigma of all; and the steps of the last stage."""
    settings = Settings(method=method, num_steps=STEPS, **SIZE)
    run, other = (prepare(model, PROMPT, settings, make_denoiser=pushed(where, by)) for by in (0.0, 1.0))
    x = x_other = Draws((0,)).noise((1, 4, *(run.stages[0].size or run.size))) * run.schedule.init_scale
    by_step, cleanest, last = [], math.nan, 0
    for part, part_other in zip(run.stages, other.stages, strict=True):
        push = torch.ones(())
        if isinstance(part, Phase):
            assert isinstance(part_other, Phase)
            (x, part), (x_other, part_other) = part.begin(x), part_other.begin(x_other)
            push = push if torch.equal(x, x_other) else x_other - x
        assert isinstance(part, Stage)
        assert isinstance(part_other, Stage)
        sigmas = part.sigmas or run.schedule.sigmas[part.steps.start % STEPS :][: len(part.steps) + 1]
        for step, (sigma, target) in zip(part.steps, pairwise(sigmas), strict=True):
            state, estimates, weight = guided(part, part_other, x, push, sigma, step)
            if part.size in (None, CANVAS):
                by_step.append(weight)
                if step == part.steps[-1]:
                    cleanest, last = guided(part, part_other, x, push, model.noise.sigma(0), step)[2], len(part.steps)
            x, x_other = (euler_step(state, estimate, sigma, target) for estimate in estimates)
    return by_step, cleanest, last


@pytest.mark.parametrize("guide", GUIDED)
@pytest.mark.parametrize("method", VARIANTS)
def test_a_guide_has_its_full_weight_where_noise_is_most_and_none_at_the_end(
    tiny_model: Model, method: str, guide: Callable[[Operator, Tensor], bool]
) -> None:
    model = replace(tiny_model, noise=NoiseConfig(timestep_spacing="trailing"))  # from the noisiest timestep of all
    by_step, cleanest, last = weights(model, from_the_top(method), guide)
    assert all(a >= b - 1e-3 for a, b in pairwise(by_step)), by_step
    assert by_step[-1] > -1e-3
    assert cleanest < 1 / last + 1e-3, "the last of equal steps down to 0, or 0 already"
    if method in GUIDED[guide]:
        assert by_step[0] == pytest.approx(1, abs=1e-2)


# ---- 3. Corrected instead of raw estimates kept


@pytest.mark.parametrize("method", VARIANTS)
def test_an_estimate_depends_on_those_before_it_through_the_state_alone(
    heard: Callable[[str], Listened], method: str
) -> None:
    """Asked again after the run, and backwards, every step gives what it gave, so that none corrects what is kept."""
    for stage, x, sigma, step, out in reversed(heard(method).called):
        assert torch.equal(stage.denoise(x, sigma, step), out)


class FlatVAE(VAE):
    """A VAE that keeps constants: an image is the first three channels of its latents, of which the last are alike."""

    def _decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3] / 1000, scale_factor=8.0)

    def _encode(self, images: Tensor) -> Tensor:
        latents = 1000 * F.avg_pool2d(images, 8)
        mean = torch.cat([latents, latents[:, 2:]], dim=1)
        return torch.cat([mean, torch.full_like(mean, -60)], dim=1)


ANSWER = torch.tensor([1.0, -2.0, 0.5, 0.5])[:, None, None]
"""The answer of an oracle that is given the prompt; without it, it says 0."""


class Oracle(Denoiser):
    """A denoiser whose estimate of each row is ANSWER with the prompt and 0 without it, whatever the row shows."""

    def through(self, operator: Operator, canvas: Tensor, sigma: float, step: int, **how: Any) -> Tensor:
        return super().through(operator, canvas, sigma, step, **(how | {"shown": None}))

    def predict(self, rows: Rows, inputs: Tensor, size_ids: Tensor) -> Tensor:
        if len(inputs) <= 2:
            super().predict(rows, inputs, size_ids)  # methods that look into the network look at whole canvases
        c_in, c_skip, c_out = self.coefficients(rows.sigma)
        prompted = (torch.arange(len(inputs)) % rows.copies == rows.copies - 1).float()
        return (prompted[:, None, None, None] * ANSWER - c_skip * inputs / c_in) / c_out


def amplified(latents: Tensor) -> float:
    """The scale by which guidance has amplified the answer of the oracle, on the whole canvas."""
    scale = (latents * ANSWER).mean() / ANSWER.expand_as(latents).square().mean()
    assert (latents - scale * ANSWER).abs().max() < 0.01 * scale
    return scale.item()


@pytest.mark.parametrize("method", VARIANTS)
def test_guidance_does_not_compound_over_steps_and_canvases(tiny_model: Model, method: str) -> None:
    """Every estimate is amplified by a scale that was asked for, on three canvases and more, and the larger ones begin
    from what the smaller ones ended with."""
    scales, thing = {3.0}, resolve("method", method)
    for name in options_of(thing):
        if name.endswith("guidance_scale"):
            thing, scales = replace(thing, **{name: 5.0}), {3.0, 5.0}
    model = replace(tiny_model, vae=FlatVAE(tiny_model.vae.config))
    heard = Listened(model, thing, Oracle, height=256, width=256, guidance_scale=3.0)
    reached = [amplified(step.denoised) for step in heard.steps]
    assert min(scales) - 0.05 < min(reached) <= max(reached) < max(scales) + 0.05, reached
    for begun in heard.begun:
        if begun.estimate is not None and begun.guide.any():  # without one, a phase begins with noise alone
            assert amplified(begun.guide) == pytest.approx(amplified(begun.estimate), rel=1e-2)


def test_a_trajectory_keeps_the_estimates_that_the_native_picture_was_drawn_with(tiny_model: Model) -> None:
    """Estimates of details, which it corrects, do not come into it: by equal parts they go to their own scale, 1."""
    model = replace(tiny_model, vae=FlatVAE(tiny_model.vae.config))
    heard = Listened(model, "magnify,hold=trajectory,structure_fraction=0", Oracle, guidance_scale=3.0)
    reached = [amplified(step.denoised) for step in heard.steps]
    assert reached == pytest.approx([3.0] * 5 + [1 + 2 * share for share in (1, 0.8, 0.6, 0.4, 0.2)], rel=1e-3)


# ---- 4. An empty negative prompt amplified by guidance


class Ear(Observer):
    """Hears what the network reads."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append(call)


def of_layers(model: Model, context: Any, rows: Tensor) -> list[Tensor]:
    """The keys and values that each layer makes of some rows of the text."""
    read = context if isinstance(context, TextContext) else model.unet.read(context)
    assert isinstance(read, TextContext)
    return [part[rows] for layer in read.kept for part in read.of(layer)]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("method", VARIANTS)
def test_the_negative_rows_of_all_canvases_read_the_empty_prompt_of_the_model(
    tiny_model: Model, method: str, zeros: bool
) -> None:
    model, ear = replace(tiny_model, zeros_for_empty_negative=zeros), Ear()
    for _ in cutdiff.denoise(model, PROMPT, method=method, num_steps=3, **SIZE, observer=ear):
        pass
    empty = model.text.encode([""])
    context, pooled = (torch.zeros_like(x) if zeros else x for x in (empty.context, empty.pooled))
    expected = of_layers(model, context, torch.tensor([0]))
    guided = [call for call in ear.calls if call.copies == 2]
    assert guided
    for call in guided:
        negative = (~call.prompted).nonzero()[:, 0]
        assert torch.equal(call.inputs[3][negative], pooled.expand(len(negative), -1))
        for part, one in zip(of_layers(model, call.inputs[2], negative), expected, strict=True):
            torch.testing.assert_close(part, one.expand_as(part))
            assert not (zeros and part.any())


@pytest.mark.parametrize("method", VARIANTS)
def test_guidance_1_reads_no_negative_prompt_on_any_canvas(tiny_model: Model, method: str) -> None:
    ear = Ear()
    for _ in cutdiff.denoise(tiny_model, PROMPT, method=method, num_steps=3, guidance_scale=1.0, **SIZE, observer=ear):
        pass
    assert {call.copies for call in ear.calls} == {1}


@pytest.mark.parametrize("method", VARIANTS)
def test_guidance_between_two_empty_prompts_does_nothing(tiny_model: Model, method: str) -> None:
    model = replace(tiny_model, zeros_for_empty_negative=False)
    plain, guided = (drawn(model, method, "", guidance_scale=scale) for scale in (1.0, 7.5))
    assert relative_error(guided, plain) < 1e-3


# ---- 5. Patches, maps or text kept from the run before

FRESH = """
import os, sys, torch, cutdiff
from cutdiff.specs import resolve
torch.set_num_threads(int(sys.argv[1]))
model = cutdiff.load(sys.argv[2], device="cpu", dtype=torch.float32)
methods = [resolve("method", method) for method in sys.argv[4:]]
for i, method in enumerate(methods):
    if os.fork() == 0:
        *_, step = cutdiff.denoise(model, {prompt!r}, method=method, **{options!r})
        torch.save(step.latents, f"{{sys.argv[3]}}/{{i}}.pt")
        os._exit(0)
    assert os.wait()[1] == 0
"""
REFERENCE = {"num_steps": 2, **SIZE, "seed": 1}


@pytest.fixture(scope="module")
def loaded(quick_folder: Path) -> Model:
    return cutdiff.load(str(quick_folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def fresh(quick_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The picture that each method draws with that model in a process that has drawn nothing else."""
    out = tmp_path_factory.mktemp("fresh")
    code = FRESH.format(prompt=PROMPT, options=REFERENCE)
    command = [sys.executable, "-c", code, str(torch.get_num_threads()), str(quick_folder), str(out), *VARIANTS]
    subprocess.run(command, check=True)
    return {method: torch.load(out / f"{i}.pt") for i, method in enumerate(VARIANTS)}


def drawn_between(model: Model, method: str) -> list[Tensor]:
    """The same run three times by the same objects: at first, after one with another prompt, size, seed and negative
    prompt and beside one with another prompt alone, and after the end of that."""
    thing = resolve("method", method)
    settings = Settings(method=thing, **REFERENCE)

    def again() -> Tensor:
        *_, last = cutdiff.denoise(model, PROMPT, settings)
        return last.latents

    runs = [again()]
    drawn(model, thing, "a blue tent", seed=2, height=96, width=128, negative_prompt="a tent", num_steps=2)
    beside = cutdiff.denoise(model, "a pink balloon over a lake", settings)
    next(beside)
    runs.append(again())
    if not getattr(thing, "changes_network", False):
        *_, other = beside
        assert relative_error(other.latents, runs[0]) > 1e-4
    return [*runs, again()]


@pytest.mark.parametrize("method", VARIANTS)
def test_runs_between_leave_nothing(tiny_model: Model, method: str) -> None:
    first, second, third = drawn_between(tiny_model, method)
    assert torch.equal(second, first)
    assert torch.equal(third, first)


@pytest.mark.parametrize("method", VARIANTS)
def test_a_process_that_has_drawn_much_draws_as_a_fresh_one(
    loaded: Model, fresh: dict[str, Tensor], method: str
) -> None:
    drawn(loaded, method, "a blue tent", **{**REFERENCE, "seed": 7})
    assert all(relative_error(run, fresh[method]) < 1e-5 for run in drawn_between(loaded, method))


# ---- 6. Ancestral noise drawn for each view and averaged


def fresh_noise(solver: Any, schedule: Schedule, i: int) -> float:
    """The noise that a solver adds in its step i, alone on a canvas of one pixel, where 1 is drawn."""
    pixel = torch.zeros(1, 1, 1, 1)
    takes = [solver.start(schedule, lambda shape, *_, one=one: torch.full(shape, one)) for one in (1.0, 0.0)]
    one, none = (finished(take(pixel, pixel, i), lambda x, sigma: pixel) for take in takes)
    return (one - none).item()


ADDING = [spec for spec in NOISIEST if fresh_noise(resolve("solver", spec), THREE_STEPS, 1) and spec[:9] != "dpmpp_sde"]
"""The solvers that add noise, but the one whose second estimate sees some of it."""


@pytest.mark.parametrize("solver", ADDING)
@pytest.mark.parametrize("method", VARIANTS)
def test_the_noise_of_a_step_is_drawn_once_on_the_canvas(tiny_model: Model, method: str, solver: str) -> None:
    """Without the noise of one step the canvas after it lacks that noise, as a pixel alone would, everywhere alike."""
    asked: list[tuple[int, tuple[int, ...]]] = []
    silent: int | None = None

    class Silent(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            if step is not None:
                asked.append((step, shape))
            noise = super().noise(shape, step)
            return noise if step is None or step != silent else torch.zeros_like(noise)

    spy, draws = Spy(resolve("solver", solver)), Silent((0,))
    options = {"method": method, "solver": spy, "draws": draws, "num_steps": 3, **SIZE}
    steps = {step.index: step for step in cutdiff.denoise(tiny_model, PROMPT, **options)}
    taken = dict(zip(steps, ((start, one) for start in spy.starts for one in start.taken), strict=True))
    assert [shape for _, shape in asked] == [tuple(steps[step].latents.shape) for step, _ in asked]
    assert len({step for step, _ in asked}) == len(asked)
    silent = max(i for i, _ in asked if i + 1 in steps and steps[i + 1].stage == steps[i].stage)
    without = next(step.latents for step in cutdiff.denoise(tiny_model, PROMPT, **options) if step.index == silent)
    start, one = taken[silent]
    scale = fresh_noise(spy.solver, start.schedule, one.i)
    added = steps[silent].latents - without
    torch.testing.assert_close(added, scale * Draws((0,)).noise(tuple(added.shape), silent), rtol=0, atol=1e-3 * scale)
    assert added.std().item() == pytest.approx(scale, rel=0.15)
    sigma, target = start.schedule.sigmas[one.i : one.i + 2]
    if "eta" in options_of(spy.solver) and start.schedule.rescale(one.i) == 1:
        assert scale == pytest.approx(target * math.sqrt(1 - (target / sigma) ** 2), rel=1e-4), "that of DDPM"


# ---- 7. A multistep solver whose history is kept for each view


def second_order(x: Tensor, denoised: Tensor, before: Tensor | None, sigmas: tuple[float, ...]) -> Tensor:
    """A step of DPM-Solver++(2M), as its paper writes it (arXiv 2211.01095, algorithm 2): from sigmas[1] to sigmas[2],
    where `before` is the estimate at sigmas[0]."""
    last, sigma, target = sigmas
    if target == 0:
        return denoised
    step = math.log(sigma / target)
    if before is not None:
        r = math.log(last / sigma) / step
        denoised = (1 + 1 / (2 * r)) * denoised - before / (2 * r)
    return target / sigma * x - math.expm1(-step) * denoised


@pytest.mark.parametrize("method", VARIANTS)
def test_a_multistep_solver_has_one_history_on_each_canvas(heard: Callable[[str], Listened], method: str) -> None:
    run = heard(method)
    starts = run.spy.starts
    assert len(starts) == len(run.begun) + isinstance(run.run.stages[0], Stage), "one for each canvas"
    taken = [one for start in starts for one in start.taken]
    assert all(torch.equal(one.denoised, step.denoised) for one, step in zip(taken, run.steps, strict=True))
    for start in starts:
        before = None
        for one in start.taken:
            sigmas = (start.schedule.sigmas[max(one.i - 1, 0)], *start.schedule.sigmas[one.i : one.i + 2])
            assert relative_error(one.out, second_order(one.x, one.denoised, before, sigmas)) < 1e-5
            before = one.denoised


@pytest.mark.parametrize("method", ["cutdiffusion", "demofusion", "rectifiedhr", "frecas", "magnify"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_takes_the_steps_of_each_canvas_alone(tiny_model: Model, solver: str, method: str) -> None:
    """Started anew by hand for each canvas, the last one first, it takes the same steps from its estimates."""
    spy = Spy(resolve("solver", solver))
    for _ in cutdiff.denoise(tiny_model, PROMPT, method=method, solver=spy, num_steps=5, **SIZE):
        pass
    for start in reversed(spy.starts):
        take = spy.solver.start(start.schedule, start.noise)
        assert all(torch.equal(one.again(take), one.out) for one in start.taken)
