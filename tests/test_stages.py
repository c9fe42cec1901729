"""The stages of a run: where they may begin, the sigmas that they visit, and what cannot be one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import Schedule, euler_schedule
from cutdiff.sampling.solvers import finished
from cutdiff.sampling.stages import Phase, Stage, Step, check_stages, solve
from cutdiff.specs import SOLVERS, resolve

PROMPT = "a red house"
SIZE = {"height": 64, "width": 64}
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SCHEDULE = euler_schedule(NoiseConfig(), 5)


def estimate(x: Tensor, sigma: float, step: int) -> Tensor:
    return torch.tanh(x / math.hypot(sigma, 1))


def steps_of(stages: list[Stage | Phase], x: Tensor = NOISE, solver: str = "euler") -> list[Step]:
    return list(solve(stages, x, SCHEDULE, resolve("solver", solver), noise))


def noise(shape: tuple[int, ...], step: int, part: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * part + step))


def drawn(model: Model, method: Callable[[Run], Any], **options: Any) -> list[Step]:
    return list(cutdiff.denoise(model, PROMPT, method=method, **{"num_steps": 5, **SIZE, **options}))


def direct_on(*stages: tuple[range, tuple[float, ...] | None]) -> Callable[[Run], list[Stage]]:
    """D(x) in stages of these steps and sigmas."""

    def method(run: Run) -> list[Stage]:
        return [Stage(f"stage {i}", steps, run.denoiser, sigmas=sigmas) for i, (steps, sigmas) in enumerate(stages)]

    return method


# ---- Where a stage stands


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_a_run_may_begin_at_any_step(tiny_model: Model, first: int) -> None:
    """It begins with noise of the sigma there, and takes the rest of the schedule."""
    schedules: list[Schedule] = []

    def late(run: Run) -> list[Stage]:
        schedules.append(run.schedule)
        return [Stage("late", range(first, 5), run.denoiser)]

    steps = drawn(tiny_model, late)
    (schedule,) = schedules
    assert [step.index for step in steps] == [*range(first, 5)]
    assert [step.sigma for step in steps] == [*schedule.sigmas[first:-1]]
    states: list[Tensor] = []

    def recording(run: Run) -> list[Stage]:
        return [Stage("late", range(first, 5), lambda x, sigma, step: states.append(x) or run.denoiser(x, sigma, step))]

    drawn(tiny_model, recording)
    scale = schedule.sigmas[first] if first else schedule.init_scale
    assert torch.equal(states[0], cutdiff.Draws((0,)).noise((1, 4, 8, 8)) * scale)


def test_the_rest_of_a_run_is_the_run_from_there() -> None:
    whole = steps_of([Stage("all", range(5), estimate)])
    rest = steps_of([Stage("rest", range(2, 5), estimate)], whole[1].latents)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stage_may_visit_sigmas_of_its_own(solver: str) -> None:
    """Its steps are those of a run on a schedule of these sigmas, and the next stage is back on the run's."""
    own = (SCHEDULE.sigmas[1], 3.0, 2.5, SCHEDULE.sigmas[2])
    stages = [
        Stage("before", range(1), estimate),
        Stage("between", range(1, 4), estimate, sigmas=own),
        Stage("after", range(4, 5), estimate),
    ]
    steps = steps_of(stages, solver=solver)
    assert [step.index for step in steps] == [*range(5)]
    assert [step.sigma for step in steps] == [SCHEDULE.sigmas[0], *own[:3], SCHEDULE.sigmas[4]]
    x = steps[0].latents
    take = resolve("solver", solver).start(SCHEDULE.visiting(own), lambda shape, i, *part: noise(shape, 1 + i, *part))
    for i in range(3):
        x = finished(take(x, estimate(x, own[i], 1 + i), i), lambda x, sigma, i=i: estimate(x, sigma, 1 + i))
        assert torch.equal(steps[1 + i].latents, x)
    take = resolve("solver", solver).start(SCHEDULE, noise)
    last = finished(take(x, estimate(x, SCHEDULE.sigmas[4], 4), 4), lambda *_: pytest.fail("sigma 0 needs no estimate"))
    assert torch.equal(steps[4].latents, last)


def test_sigmas_of_its_own_tell_the_network_their_timesteps(tiny_model: Model) -> None:
    """Given the sigmas of the run, a stage draws what the run draws; halfway between, the network hears of it."""
    timesteps: list[float] = []
    hook = tiny_model.unet.register_forward_pre_hook(lambda _module, inputs: timesteps.append(float(inputs[1][0])))
    try:
        plain = drawn(tiny_model, direct_on((range(5), None)))
        whole = timesteps.copy()
        sigmas = tuple(step.sigma for step in plain)
        same = drawn(tiny_model, direct_on((range(2), None), (range(2, 5), (*sigmas[2:], 0.0))))
        assert timesteps == whole * 2
        assert torch.equal(same[-1].latents, plain[-1].latents)
        timesteps.clear()
        between = math.sqrt(sigmas[1] * sigmas[2])
        drawn(tiny_model, direct_on((range(2), (sigmas[0], between, 0.0))))
        assert timesteps[0] == whole[0]
        assert whole[2] < timesteps[1] < whole[1]
    finally:
        hook.remove()


def test_a_run_with_sigmas_of_its_own_begins_with_noise_of_the_first(tiny_model: Model) -> None:
    first: list[Tensor] = []

    def method(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            first.append(x)
            return run.denoiser(x, sigma, step)

        return [Stage("own", range(2), denoise, sigmas=(6.0, 2.0, 0.0))]

    assert [step.sigma for step in drawn(tiny_model, method)] == [6.0, 2.0]
    assert torch.equal(first[0], 6.0 * cutdiff.Draws((0,)).noise((1, 4, 8, 8)))


@pytest.mark.parametrize("sigmas", [None, (4.0, 2.0, 1.0, 0.5, 0.25, 0.0)])
def test_a_second_pass_through_the_schedule_counts_its_draws_on(sigmas: tuple[float, ...] | None) -> None:
    """The draws are counted on where the canvas is the same, so that no two steps add the same noise."""
    asked: list[int] = []

    def counted(shape: tuple[int, ...], step: int) -> Tensor:
        asked.append(step)
        return noise(shape, step)

    again = Stage("again", range(5, 10), estimate, before=lambda x, sigma, i: x + sigma if i == 5 else x, sigmas=sigmas)
    stages = [Stage("once", range(5), estimate), again]
    steps = list(solve(stages, NOISE, SCHEDULE, resolve("solver", "euler_ancestral"), counted))
    assert asked == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [step.sigma for step in steps] == [*SCHEDULE.sigmas[:-1], *(sigmas or SCHEDULE.sigmas)[:-1]]


@pytest.mark.parametrize("first", [5, 7])
def test_a_phase_may_leave_steps_out_and_have_sigmas_of_its_own(first: int) -> None:
    taken = range(first, 10)
    for sigmas in (None, tuple(float(i) for i in range(10 - first, -1, -1))):
        stage = Stage("large", taken, estimate, sigmas=sigmas)
        phase = Phase(taken, (16, 16), lambda x, stage=stage: (x.repeat(1, 1, 2, 2), stage))
        check_stages([Stage("small", range(5), estimate), phase], 5)
        steps = steps_of([Stage("small", range(5), estimate), phase])
        assert [step.index for step in steps] == [*range(5), *taken]
        assert [step.sigma for step in steps[5:]] == [*(sigmas or SCHEDULE.sigmas[first - 5 :])[:-1]]
        assert steps[-1].latents.shape == (1, 4, 16, 16)


def test_a_run_may_begin_with_a_phase(tiny_model: Model) -> None:
    """It is given the noise, of the size of the picture or of the phase's own."""
    given: list[Tensor] = []

    def method(run: Run) -> list[Phase]:
        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            given.append(x)
            return x / 2, Stage("only", range(2, 5), run.denoiser)

        return [Phase(range(2, 5), run.size, begin)]

    steps = drawn(tiny_model, method)
    assert [step.index for step in steps] == [2, 3, 4]
    assert torch.equal(given[0], cutdiff.Draws((0,)).noise((1, 4, 8, 8)) * steps[0].sigma)


# ---- What cannot be a stage


def stage(start: int, stop: int, *sigmas: float) -> Stage:
    return Stage("mine", range(start, stop), estimate, sigmas=sigmas or None)


def phase(start: int, stop: int) -> Phase:
    return Phase(range(start, stop), (8, 8), lambda x: (x, stage(start, stop)))


ORDER = "its stages must take them in order, each once; only a phase leaves some out"
END = "its stages must take them in order, to the last of 4"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], rf"takes the steps \[\]: {END}"),
        ([stage(2, 2)], rf"takes the steps \[\]: {END}"),
        ([stage(0, 2), stage(3, 4)], rf"takes the steps \[0, 1, 3\]: {ORDER}"),
        ([stage(0, 3), stage(2, 4)], rf"takes the steps \[0, 1, 2, 2, 3\]: {ORDER}"),
        ([stage(2, 4), stage(0, 2)], rf"takes the steps \[2, 3, 0, 1\]: {ORDER}"),
        ([phase(0, 3), phase(2, 4)], rf"takes the steps \[0, 1, 2, 2, 3\]: {ORDER}"),
        ([phase(0, 2), stage(3, 4)], rf"takes the steps \[0, 1, 3\]: {ORDER}"),
        ([Stage("mine", range(0, 4, 2), estimate)], rf"takes the steps \[0, 2\]: {ORDER}"),
        ([Stage("mine", range(3, -1, -1), estimate)], rf"takes the steps \[3, 2, 1, 0\]: {ORDER}"),
        ([stage(0, 3)], rf"takes the steps \[0, 1, 2\]: {END}"),
        ([stage(0, 4), stage(4, 6)], rf"takes the steps \[0, 1, 2, 3, 4, 5\]: {END}"),
        (
            [stage(0, 8)],
            r"cannot run: stage mine takes range\(0, 8\), past the end of a schedule of 4: divide it there",
        ),
        ([phase(0, 2), stage(2, 8)], r"cannot run: stage mine takes range\(2, 8\), past the end of a schedule of 4"),
        (
            [replace(stage(0, 4), targets=(3.0, 2.0, 1.0, 0.0))],
            "cannot run: stage mine has 4 targets and no sigmas: give both or neither",
        ),
        (
            [replace(stage(0, 2, 3.0, 1.0, 0.0), targets=(0.5,))],
            "cannot run: stage mine has 1 targets, where 2 steps take one each",
        ),
        ([stage(0, 2, 3.0, 0.0)], "cannot run: stage mine has 2 sigmas, where 2 steps take one more"),
        ([stage(0, 1, 3.0, 1.0, 0.0)], "cannot run: stage mine has 3 sigmas, where 1 steps take one more"),
        ([stage(0, 2, 1.0, 3.0, 0.0)], r"cannot run: stage mine has the sigmas \(1.0, 3.0, 0.0\), which must fall"),
        ([stage(0, 2, 3.0, 0.0, -1.0)], r"cannot run: stage mine has the sigmas \(3.0, 0.0, -1.0\), which must fall"),
        ([stage(0, 2, 3.0, math.nan, 0.0)], r"cannot run: stage mine has the sigmas \(3.0, nan, 0.0\), which must"),
        ([stage(0, 2, math.inf, 1.0, 0.0)], r"cannot run: stage mine has the sigmas \(inf, 1.0, 0.0\), which must"),
        (
            [stage(0, 1), stage(1, 2, 3.0, 1.0)],
            r"ends with the sigmas \(3.0, 1.0\) of stage mine: the last one must be 0",
        ),
    ],
)
def test_stages_that_are_no_run(tiny_model: Model, stages: list[Stage | Phase], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_stages(stages, 4)
    with pytest.raises(ValueError, match=f"^method=method {message}"):
        cutdiff.denoise(tiny_model, PROMPT, method=given(stages), num_steps=4)


def given(stages: list[Stage | Phase]) -> Callable[[Run], list[Stage | Phase]]:
    def method(run: Run) -> list[Stage | Phase]:
        return stages

    return method


@pytest.mark.parametrize(
    "stages",
    [
        [stage(0, 4)],
        [stage(3, 4)],
        [stage(0, 4), stage(4, 8)],
        [stage(0, 0), stage(0, 2), stage(2, 2), stage(2, 4)],
        [stage(0, 4), phase(6, 8), phase(11, 12)],
        [stage(0, 9, *range(9, -1, -1))],
        [stage(0, 3, *(9.0, 5.0, 3.0, 2.0)), stage(3, 4)],
    ],
)
def test_stages_that_are_a_run(stages: list[Stage | Phase]) -> None:
    check_stages(stages, 4)


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        ((1, 4, 16, 8), {}, "stage large begins with (1, 4, 16, 8) and takes range(5, 10)"),
        ((2, 4, 16, 16), {}, "stage large begins with (2, 4, 16, 16) and takes range(5, 10)"),
        ((1, 3, 16, 16), {}, "stage large begins with (1, 3, 16, 16) and takes range(5, 10)"),
        ((1, 4, 16, 16), {"steps": range(6, 10)}, "stage large begins with (1, 4, 16, 16) and takes range(6, 10)"),
        ((1, 4, 16, 16), {"size": (16, 8)}, "and takes range(5, 10) on a canvas of (16, 8), where its phase said"),
        ((1, 4, 16, 16), {"sigmas": (2.0, 0.0)}, "stage large has 2 sigmas, where 5 steps take one more"),
    ],
)
def test_a_phase_must_be_what_it_said(state: tuple[int, ...], changes: dict[str, Any], message: str) -> None:
    begun = replace(Stage("large", range(5, 10), estimate), **changes)
    large = Phase(range(5, 10), (16, 16), lambda previous: (torch.zeros(state), begun))
    steps = solve([Stage("small", range(5), estimate), large], NOISE, SCHEDULE, resolve("solver", "euler"), noise)
    for _ in range(5):
        next(steps)
    with pytest.raises(ValueError, match=re.escape(message)):
        next(steps)


def test_a_phase_may_not_go_past_the_end_of_the_schedule() -> None:
    large = Phase(range(8, 11), (8, 8), lambda x: (x, Stage("large", range(8, 11), estimate)))
    with pytest.raises(ValueError, match=r"^stage large takes range\(8, 11\), past the end of a schedule of 5"):
        steps_of([Stage("small", range(5), estimate), large])


@pytest.mark.parametrize("shape", [(1, 4, 8, 7), (1, 3, 8, 8), (2, 4, 8, 8), (4, 8, 8)])
def test_a_denoiser_must_give_the_canvas_that_it_got(tiny_model: Model, shape: tuple[int, ...]) -> None:
    def method(run: Run) -> list[Stage]:
        return [Stage("other", range(5), lambda x, sigma, step: torch.zeros(shape))]

    message = f"stage other gave {shape} for a canvas of (1, 4, 8, 8)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        drawn(tiny_model, method)
