"""Observers hear of every step and of every call of the network, and change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run
from cutdiff.models.inside import replaced
from cutdiff.models.text import TextStates
from cutdiff.sampling.denoiser import Call
from cutdiff.sampling.operators import Patches, SeededPermutation, Views
from cutdiff.sampling.stages import Stage, Step
from cutdiff.specs import METHODS, resolve

PROMPTS = ["a red house at night", "a blue tree"]
RUN: dict[str, Any] = {"num_steps": 4, "height": 96, "width": 128, "guidance_scale": 4.0, "seed": 3}


class Ear(cutdiff.Observer):
    """Keeps all that it hears of, in order."""

    def __init__(self) -> None:
        self.heard: list[Step | tuple[Call, Tensor]] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.heard.append((call, prediction))

    def step(self, step: Step) -> None:
        self.heard.append(step)

    @property
    def steps(self) -> list[Step]:
        return [item for item in self.heard if isinstance(item, Step)]

    def calls_of(self, index: int) -> list[Call]:
        """The calls of a step."""
        return [item[0] for item in self.heard if isinstance(item, tuple) and item[0].step == index]


def listened(model: Model, prompts: str | list[str] = PROMPTS, **options: Any) -> tuple[Ear, list[Step], Tensor]:
    """The calls and steps that the observer heard of, the steps that came, and the noise that the run began with."""
    ear, options = Ear(), {**RUN, **options}
    start: list[Tensor] = []

    def method(run: Run) -> Any:
        start.append(run.draws.noise((len(run.prompts), 4, *run.size)) * run.schedule.init_scale)
        stages = resolve("method", options["method"])
        return getattr(stages, "stages", stages)(run)

    steps = list(cutdiff.denoise(model, prompts, observer=ear, **{**options, "method": method}))
    return ear, steps, start[0]


@pytest.mark.parametrize("method", METHODS)
def test_an_observer_changes_no_bit_and_hears_of_every_step(tiny_model: Model, method: str) -> None:
    plain = cutdiff.generate(tiny_model, PROMPTS, method=method, **RUN)
    ear = Ear()
    heard = cutdiff.generate(tiny_model, PROMPTS, method=method, observer=ear, **RUN)
    assert torch.equal(plain.latents, heard.latents)
    assert torch.equal(plain.images, heard.images)
    assert plain.record["fingerprint"] == heard.record["fingerprint"]
    steps = list(cutdiff.denoise(tiny_model, PROMPTS, method=method, **RUN))
    for ours, theirs in zip(ear.steps, steps, strict=True):
        assert (ours.index, ours.stage, ours.sigma) == (theirs.index, theirs.stage, theirs.sigma)
        assert torch.equal(ours.latents, theirs.latents)
    pending: list[int] = []  # the steps of calls since the last step, which comes after its calls
    for item in ear.heard:
        if isinstance(item, Step):
            expected = set() if item.stage == "upscale" else {item.index}  # the former asks no network
            assert set(pending) == expected, f"the calls before step {item.index}"
            pending.clear()
        else:
            call, prediction = item
            pending.append(call.step)
            assert prediction.shape == call.inputs[0].shape
            sigma = next(step.sigma for step in steps if step.index == call.step)
            assert call.sigma == sigma or (method == "upsample_guidance" and call.sigma < sigma)  # of the mean picture
    rows = sum(len(item[0].inputs[0]) for item in ear.heard if isinstance(item, tuple))
    if method != "scalecrafter":  # whose own network may take more evaluations than it is given rows
        assert rows == heard.record["network_evaluations"]


@pytest.mark.parametrize("view_batch_size", [1, 4, 5, 100])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_a_call_says_what_its_rows_are(tiny_model: Model, view_batch_size: int, interval: tuple[float, float]) -> None:
    """Each row is the patch or view of that number, of that image, under the prompt or the negative one."""
    states: list[tuple[TextStates, TextStates]] = []

    def method(run: Run) -> list[Stage]:
        states.append((run.denoiser.positive, run.denoiser.negative))
        return resolve("method", "cutdiffusion").stages(run)

    options = {"view_batch_size": view_batch_size, "guidance_interval": interval}
    ear, steps, x = listened(tiny_model, method=method, **options)
    ((positive, negative),) = states
    for step in steps:
        calls = ear.calls_of(step.index)
        copies = 2 if interval[0] <= step.index / 4 < interval[1] else 1
        operator, c_in = calls[0].operator, tiny_model.noise.coefficients(step.sigma).c_in
        rows = operator.gather(x).unflatten(0, (len(PROMPTS), -1))  # (B, N, C, h, w)
        num_items = rows.shape[1]
        kind, count = (Patches, 4) if step.stage == "structure" else (Views, 2 * 3)
        assert isinstance(operator, kind)
        assert num_items == count
        expected = [(b, n, c) for b in range(len(PROMPTS)) for n in range(num_items) for c in range(copies)]
        rows_said = [
            (int(b), int(n), int(p) - 2 + copies)
            for call in calls
            for b, n, p in zip(call.images, call.items, call.prompted, strict=True)
        ]
        assert rows_said == expected
        assert [row for call in calls for row in call.rows.tolist()] == list(range(len(expected)))
        assert len(calls) == -(-len(PROMPTS) * num_items // view_batch_size)
        for call in calls:
            assert call.operator is operator
            assert (call.step, call.sigma, call.copies) == (step.index, step.sigma, copies)
            assert (call.num_rows, call.num_images) == (len(expected), len(PROMPTS))
            latents, timesteps, _, pooled, _ = call.inputs
            torch.testing.assert_close(latents, c_in * rows[call.images, call.items])
            assert set(timesteps.tolist()) == {timesteps[0].item()}
            sides = torch.where(call.prompted[:, None], positive.pooled[call.images], negative.pooled[call.images])
            assert torch.equal(pooled, sides)
        x = step.latents


def test_the_operator_has_the_permutation_and_the_origins_of_the_step(tiny_model: Model) -> None:
    ear, steps, _ = listened(tiny_model, method="cutdiffusion")
    draws = cutdiff.Draws((3, 4))
    for step in steps:
        (operator,) = {id(call.operator): call.operator for call in ear.calls_of(step.index)}.values()
        if isinstance(operator, Patches):
            assert operator.grid == (2, 2)
            assert operator.permutation == SeededPermutation((3, 4), step.index, "channel")
        else:
            assert isinstance(operator, Views)
            origins = draws.view_origins(step.index, (12, 16), (8, 8), (4, 4), (1, 1))
            assert torch.equal(operator.origins, origins)
    assert [step.stage for step in steps] == ["structure"] * 2 + ["detail"] * 2


def test_a_cascade_tells_of_patches_and_of_views_on_each_canvas(tiny_model: Model) -> None:
    ear, steps, _ = listened(tiny_model, method="demofusion")
    for step in steps:
        kinds = [type(call.operator) for call in ear.calls_of(step.index)]
        assert set(kinds) == ({Patches} if step.stage == "phase 1" else {Patches, Views})
        for call in ear.calls_of(step.index):
            if isinstance(call.operator, Views):
                assert call.operator.size == tuple(step.latents.shape[2:])


@pytest.mark.parametrize("method", ["hidiffusion", "scalecrafter", "accdiffusion", "freescale"])
def test_it_hears_of_a_methods_own_network(tiny_model: Model, method: str) -> None:
    """The prediction is what that network gives, of whole guidance pairs."""
    size = {"height": 8 * 32, "width": 8 * 32, "num_steps": 2} if method == "scalecrafter" else {}
    ear, steps, x = listened(tiny_model, method=method, view_batch_size=1, **size)
    plain = list(cutdiff.denoise(tiny_model, PROMPTS, **{**RUN, **size, "method": method, "view_batch_size": 1}))
    assert torch.equal(steps[-1].latents, plain[-1].latents)
    if method in ("accdiffusion", "freescale"):  # which begin on another canvas
        return
    for step in steps:
        calls = ear.calls_of(step.index)
        assert [call.images.tolist() for call in calls] == [[0, 0], [1, 1]]
        assert all(call.prompted.tolist() == [False, True] for call in calls)
        _, c_skip, c_out = tiny_model.noise.coefficients(step.sigma)
        predictions = [item[1] for item in ear.heard if isinstance(item, tuple) and item[0].step == step.index]
        negative, positive = torch.cat(predictions).float().unflatten(0, (-1, 2)).unbind(1)
        guided = negative + 4.0 * (positive - negative)
        torch.testing.assert_close(step.denoised, c_skip * x + c_out * guided, rtol=1e-4, atol=1e-4)
        x = step.latents


def test_it_hears_of_no_call_that_memory_did_not_hold(tiny_model: Model) -> None:
    last = tiny_model.unet.conv_out

    def forward(x: Tensor) -> Tensor:
        if len(x) > 6:
            raise torch.OutOfMemoryError
        return nn.Conv2d.forward(last, x)

    with replaced(last, forward=forward):
        ear, steps, _ = listened(tiny_model, method="multidiffusion", view_batch_size=100)
    for step in steps:
        assert [row for call in ear.calls_of(step.index) for row in call.rows.tolist()] == list(range(2 * 6 * 2))


def test_an_observer_may_hear_of_a_part_of_a_run_only(tiny_model: Model) -> None:
    """A denoiser's work has any number of observers, for as long as one wants."""
    first, second = Ear(), Ear()

    def method(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            with run.denoiser.work.heard_by(second):
                run.denoiser(x, sigma, step)
            return run.denoiser(x, sigma, step)

        return [Stage("twice", range(2), denoise)]

    list(cutdiff.denoise(tiny_model, "a tent", observer=first, method=method, **{**RUN, "num_steps": 2}))
    assert (len(first.heard), len(second.heard)) == (2 * 2 + 2, 2)
    assert [len(ear.calls_of(step)) for ear in (first, second) for step in (0, 1)] == [2, 2, 1, 1]


def test_its_block_is_open_while_the_network_is_called(tiny_model: Model) -> None:
    """And is closed before it hears of the call, and where memory did not hold one."""
    heard: list[str] = []
    last = tiny_model.unet.conv_out

    class Inside(cutdiff.Observer):
        @contextmanager
        def during(self, call: Call) -> Iterator[None]:
            heard.append("open")
            try:
                yield
            finally:
                heard.append("closed")

        def call(self, call: Call, prediction: Tensor) -> None:
            heard.append("call")

    def forward(x: Tensor) -> Tensor:
        heard.append("network")
        if len(x) > 6:
            raise torch.OutOfMemoryError
        return nn.Conv2d.forward(last, x)

    with replaced(last, forward=forward):
        list(cutdiff.denoise(tiny_model, "a tent", observer=Inside(), method="multidiffusion", **RUN))
    once = ["open", "network", "closed"]
    first_two, whole = [*once, *once, "call", *once, "call"], [*once, "call"]  # of 6 views, memory holds 3
    assert heard == first_two + whole * 2 * 3
