"""I-Max and HiFlow: the large canvas is led by the native picture as their papers write it, in velocities."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.hiflow import HiFlow
from cutdiff.methods.imax import IMax
from cutdiff.methods.shared import Run
from cutdiff.sampling.resize import resize
from cutdiff.sampling.split import Butterworth, DownUp, Gaussian, sharpened
from cutdiff.sampling.stages import Phase, Stage

PROMPTS = ["a red house at night", "a blue tree"]
RUN: dict[str, Any] = {"num_steps": 4, "height": 128, "width": 104, "seed": 3, "guidance_scale": 3}


def steps(model: Model, method: Any, prompt: str | list[str] = PROMPTS, **options: Any) -> list[cutdiff.Step]:
    return list(cutdiff.denoise(model, prompt, method=method, **{**RUN, **options}))


def velocity(x: Tensor, x0: Tensor, sigma: float) -> tuple[Tensor, float, Tensor]:
    """The state of flow matching, its time, and the velocity that goes with an estimate of x0."""
    time = sigma / (1 + sigma)
    state = x / (1 + sigma)
    return state, time, (state - x0) / time


Alignment = Callable[[Tensor, Tensor, float, int], Tensor]
"""(the canvas, the network's x0, sigma, the number of the step in its phase) -> x0."""


def on_larger(
    run: Run, size: tuple[int, int], steps: range, begin: Callable[[Tensor], tuple[Tensor, Alignment]]
) -> Phase:
    """A phase whose estimates are aligned; the network is told the size of the first picture."""
    native = (8, round(8 * run.size[1] / run.size[0]))

    def start(picture: Tensor) -> tuple[Tensor, Stage]:
        x, aligned = begin(picture)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            x0 = run.denoiser(x, sigma, step, original_size=native, target_size=native)
            return aligned(x, x0, sigma, step - steps.start)

        return x, Stage("larger", steps, denoise, size)

    return Phase(steps, size, start)


# ---- I-Max


def projected(run: Run, weight: str) -> list[Stage | Phase]:
    """I-Max in velocities, as its code has it, but for the low band."""

    def begin(picture: Tensor) -> tuple[Tensor, Alignment]:
        shape = (*picture.shape[:2], *run.size)
        pixels = resize(run.decode(picture), (8 * run.size[0], 8 * run.size[1]))
        guide = run.encode(pixels, noise=run.draws.encoder_noise(shape, 2))

        def aligned(x: Tensor, x0: Tensor, sigma: float, i: int) -> Tensor:
            state, time, own = velocity(x, x0, sigma)
            towards, low = (state - guide) / time, DownUp().low
            share = 0.5 * (1 + math.cos(math.pi * i / run.num_steps))
            flow = {
                "decay": own + share * (low(towards) - low(own)),
                "constant": own + low(towards) - low(own),
                "shift": own + share * (towards - own) + (1 - share) * (low(towards) - low(own)),
            }[weight]
            return state - time * flow

        return run.draws.phase_noise(shape, 2) * run.schedule.sigmas[0], aligned

    native = (8, round(8 * run.size[1] / run.size[0]))
    first = Stage("native", range(run.num_steps), run.denoiser, native)
    return [first, on_larger(run, run.size, range(run.num_steps, 2 * run.num_steps), begin)]


@pytest.mark.parametrize("weight", ["decay", "shift", "constant"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_i_max_is_its_projected_flow_in_velocities(tiny_model: Model, weight: Any, solver: str) -> None:
    ours = steps(tiny_model, IMax(weight=weight), solver=solver)
    theirs = steps(tiny_model, partial(projected, weight=weight), solver=solver)
    assert [step.stage for step in ours] == ["native"] * 4 + ["projected"] * 4
    torch.testing.assert_close(ours[-1].latents, theirs[-1].latents, rtol=1e-3, atol=1e-3)


def test_a_guide_that_is_held_in_all_steps_is_what_the_picture_ends_as(tiny_model: Model) -> None:
    """If all of it is the low band, the network has no say."""
    everything = type("Everything", (), {"low": lambda self, x: x})()
    end = steps(tiny_model, IMax(weight="constant", held_band=everything, enlarged_in="latents"))
    torch.testing.assert_close(end[-1].latents, resize(end[3].latents, (16, 13)), rtol=1e-3, atol=1e-4)


# ---- HiFlow


def aligned_flow(run: Run, method: HiFlow) -> list[Stage | Phase]:
    """HiFlow in velocities, with the memory of its code."""
    raw: dict[float, Tensor] = {}  # the network's last estimate at each sigma

    def kept(x: Tensor, sigma: float, step: int) -> Tensor:
        raw[sigma] = run.denoiser(x, sigma, step)
        return raw[sigma]

    native = (8, round(8 * run.size[1] / run.size[0]))
    stages: list[Stage | Phase] = [Stage("phase 1", range(run.num_steps), kept, native)]
    sizes = [(2 * native[0], 2 * native[1]), run.size] if run.size[0] > 16 else [run.size]
    for number, size in enumerate(sizes, 2):
        which = number - 2
        count = math.ceil(method.strengths[which] * run.num_steps)
        own_steps = range(number * run.num_steps - count, number * run.num_steps)

        def begin(
            picture: Tensor, number: int = number, size: tuple[int, int] = size, which: int = which, count: int = count
        ) -> tuple[Tensor, Alignment]:
            widths = run.draws.blurs(number, 0.1, 2.0).tolist()
            larger = [
                sharpened(resize(run.decode(x), (8 * size[0], 8 * size[1])), 1.0, Gaussian(width, radius=1))
                for x, width in zip(picture.split(1), widths, strict=True)
            ]
            guide = run.encode(torch.cat(larger))
            before: list[tuple[Tensor, Tensor]] = []

            def aligned(x: Tensor, x0: Tensor, sigma: float, i: int) -> Tensor:
                reference = resize(raw[sigma], size)
                raw[sigma] = x0
                fall = (count - i) / count
                x0 = x0 + method.direction[which] * fall * Butterworth(4, 0.2).low(reference - x0)
                state, time, own = velocity(x, x0, sigma)
                theirs = velocity(x, reference, sigma)[2]
                if before:
                    own_before, theirs_before = before[-1]
                    own = own + method.acceleration[which] * fall * (own_before + theirs - theirs_before - own)
                before.append((own, theirs))
                return state - time * own

            x = guide + run.schedule.sigmas[run.num_steps - count] * run.draws.phase_noise(tuple(guide.shape), number)
            return x, aligned

        stages.append(on_larger(run, size, own_steps, begin))
    return stages


@pytest.mark.parametrize(("height", "width"), [(128, 104), (256, 192)])
def test_hiflow_is_its_alignment_in_velocities(tiny_model: Model, height: int, width: int) -> None:
    method = HiFlow(strengths=(0.75, 0.5), direction=(1.0, 0.25), acceleration=(0.5, 0.3))
    options = {"height": height, "width": width, "num_steps": 5}
    ours, theirs = (steps(tiny_model, each, **options) for each in (method, partial(aligned_flow, method=method)))
    assert [step.index for step in ours] == [step.index for step in theirs]
    torch.testing.assert_close(ours[-1].latents, theirs[-1].latents, rtol=1e-3, atol=1e-3)


def test_without_weights_hiflow_is_the_enlarged_picture_drawn_on(tiny_model: Model) -> None:
    off = HiFlow(direction=(0, 0), acceleration=(0, 0))
    high = "diffusehigh,factors=(2,),strength=0.53,held_fraction=0,detail_guidance_scale=None"
    ours, theirs = (steps(tiny_model, method)[-1].latents for method in (off, high))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_strength_is_that_of_every_larger_canvas(tiny_model: Model) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"image": image, "height": 256, "width": 256}
    drawn = steps(tiny_model, "hiflow", "a tent", strength=0.25, **options)
    assert [step.stage for step in drawn[4:]] == ["phase 2", "phase 3"]


# ---- Both


@pytest.mark.parametrize("method", ["imax", "hiflow"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, method: str, height: int, width: int) -> None:
    ours, direct = (steps(tiny_model, each, height=height, width=width)[-1] for each in (method, "direct"))
    assert torch.equal(ours.latents, direct.latents)


@pytest.mark.parametrize(("method", "size"), [("imax", "native"), ("imax", "canvas"), ("hiflow", "canvas")])
def test_the_network_is_told_the_size_that_is_asked_for(tiny_model: Model, method: str, size: str) -> None:
    numbers = []

    class Listening(cutdiff.Observer):
        def call(self, call: Any, prediction: Tensor) -> None:
            numbers.append(call.inputs[4][0].tolist()[:2])

    options: dict[str, Any] = {"size_conditioning": size, "observer": Listening()}
    list(cutdiff.denoise(tiny_model, "a tent", method=method, **RUN, **options))
    assert numbers[0] == [64, 48]
    assert numbers[-1] == ([64, 48] if size == "native" else [128, 104])
