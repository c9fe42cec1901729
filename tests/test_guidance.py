"""Guidance: the linear one on the way of the kernels, any other on the canvas, and the steps where it is on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.direct import direct
from cutdiff.methods.shared import Run
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.guidance import CFG, LinearGuidance, Rescale
from cutdiff.sampling.operators import Operator, Patches, Views
from cutdiff.sampling.stages import Stage
from cutdiff.settings import Settings

PROMPTS = ["a red house at night", "a blue tree"]
SIZE, STEPS = (12, 16), 4
RUN: dict[str, Any] = {"num_steps": STEPS, "height": 8 * SIZE[0], "width": 8 * SIZE[1], "seed": 3}
METHODS_ON_THE_CANVAS = ("direct", "multidiffusion", "cutdiffusion", "demofusion", "hidiffusion")


def latents(model: Model, prompt: str | list[str] = PROMPTS, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, **{**RUN, **options}))[-1].latents


@pytest.fixture(scope="module")
def denoiser(tiny_model: Model) -> Denoiser:
    return prepare(tiny_model, PROMPTS, Settings(**RUN)).denoiser


@pytest.fixture(scope="module")
def operators() -> dict[str, Operator]:
    draws = Draws((3, 4))
    shape = (2, 4, SIZE[0] // 2, SIZE[1] // 2)
    return {
        "whole": Patches((1, 1)),
        "patches": Patches((2, 2), draws.permutation(0, (2, 2), shape, "channel")),
        "views": Views(draws.view_origins(0, SIZE, (8, 8), (4, 4), (1, 1)), (8, 8), SIZE),
    }


CANVAS = 5 * torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["whole", "patches", "views"])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0, 7.5])
def test_cfg_on_the_way_is_the_plain_function(
    denoiser: Denoiser, operators: dict[str, Operator], name: str, scale: float
) -> None:
    """The kernels apply the scale to predictions; the plain function gets both estimates of the canvas."""
    cfg, operator = CFG(scale), operators[name]

    def plain(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return cfg(conditional, unconditional, sigma, step)

    assert isinstance(cfg, LinearGuidance)
    assert not isinstance(plain, LinearGuidance)
    fused, canvas = (replace(denoiser, guidance=g).through(operator, CANVAS, 5.0, 1) for g in (cfg, plain))
    assert relative_error(fused, canvas) < 1e-6


@pytest.mark.parametrize("method", METHODS_ON_THE_CANVAS)
def test_rescale_is_cfg_at_phi_0(tiny_model: Model, method: str) -> None:
    plain = latents(tiny_model, method=method, guidance="cfg", guidance_scale=4.0)
    same = latents(tiny_model, method=method, guidance="rescale,phi=0", guidance_scale=4.0)
    assert relative_error(same, plain) < 1e-5
    assert relative_error(latents(tiny_model, method=method, guidance="rescale", guidance_scale=4.0), plain) > 1e-3


@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_rescale_gives_each_image_its_deviation_at_phi_1(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = (torch.randn(3, 4, 5, 7, generator=generator) for _ in range(2))
    conditional = conditional * torch.tensor([0.5, 1, 9]).view(3, 1, 1, 1) + 2
    guided = CFG(scale)(conditional, unconditional, 1.0, 0)
    kept, half = (Rescale(scale, phi)(conditional, unconditional, 1.0, 0) for phi in (1.0, 0.5))
    torch.testing.assert_close(kept.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    for rescaled, image in zip(kept, guided, strict=True):  # by one factor, not moved
        torch.testing.assert_close(rescaled / rescaled.std(), image / image.std())
    torch.testing.assert_close(half, (guided + kept) / 2)


def test_under_rescale_an_image_does_not_depend_on_its_neighbours(tiny_model: Model) -> None:
    for method in METHODS_ON_THE_CANVAS:
        options = {"method": method, "guidance": "rescale,phi=1", "guidance_scale": 5.0}
        both = latents(tiny_model, **options)
        for i, prompt in enumerate(PROMPTS):
            alone = latents(tiny_model, prompt, **{**options, "seed": RUN["seed"] + i})
            assert relative_error(both[i], alone[0]) < 1e-4, method


@pytest.mark.parametrize("method", METHODS_ON_THE_CANVAS)
def test_a_plain_function_gets_both_estimates_of_the_canvas_and_is_used(tiny_model: Model, method: str) -> None:
    calls: list[tuple[Tensor, Tensor, float, int]] = []

    def nothing_but_the_prompt(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        calls.append((conditional, unconditional, sigma, step))
        return conditional

    steps = list(cutdiff.denoise(tiny_model, PROMPTS, method=method, guidance=nothing_but_the_prompt, **RUN))
    heard = sorted({(step, sigma) for _, _, sigma, step in calls})
    assert heard == [(step.index, step.sigma) for step in steps]
    shapes = {step.index: step.latents.shape for step in steps}
    for conditional, unconditional, _, step in calls:
        assert conditional.shape == unconditional.shape == shapes[step]
        assert conditional.dtype == unconditional.dtype == torch.float32
        assert not torch.equal(conditional, unconditional)
    assert relative_error(steps[-1].latents, latents(tiny_model, method=method, guidance_scale=1.0)) < 1e-4

    def nothing_of_it(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional

    without = latents(tiny_model, method=method, guidance=nothing_of_it, negative_prompt="a kite")
    negative = latents(tiny_model, ["a kite"] * len(PROMPTS), method=method, guidance_scale=1.0)
    assert relative_error(without, negative) < 1e-4
    assert relative_error(without, steps[-1].latents) > 1e-3


def test_the_estimates_are_those_of_the_prompt_and_of_the_negative_one(tiny_model: Model) -> None:
    """Swapped prompts swap the estimates."""
    pairs: list[list[Tensor]] = []

    def recording(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        pairs.append([conditional, unconditional])
        return conditional

    model = replace(tiny_model, zeros_for_empty_negative=False)
    options = {**RUN, "method": "multidiffusion", "guidance": recording}
    for prompt, negative in (PROMPTS, PROMPTS[::-1]):
        next(cutdiff.denoise(model, prompt, negative_prompt=negative, **options))
    (a, b), (c, d) = pairs
    torch.testing.assert_close(a, d)
    torch.testing.assert_close(b, c)


def test_a_guidance_of_ones_own_is_recorded_by_name_and_source(tiny_model: Model) -> None:
    def mine(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return conditional

    record = cutdiff.generate(tiny_model, PROMPTS[0], method="direct", guidance=mine, **RUN).record
    assert record["guidance"] == "mine"
    assert len(record["sources"]["guidance"]) == 64


class Timed:
    """A linear guidance that is on from the second step on."""

    def scale_at(self, sigma: float, step: int) -> float:
        return 4.0 if step else 1.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return CFG(self.scale_at(sigma, step))(conditional, unconditional, sigma, step)


@pytest.mark.parametrize(
    ("guidance", "interval", "evaluations"),
    [
        (CFG(1.0), (0.0, 1.0), [1, 1, 1, 1]),
        (CFG(4.0), (0.0, 1.0), [2, 2, 2, 2]),
        (CFG(4.0), (0.25, 0.75), [1, 2, 2, 1]),
        (CFG(4.0), (0.5, 0.5), [1, 1, 1, 1]),
        (Timed(), (0.0, 1.0), [1, 2, 2, 2]),
        (Timed(), (0.0, 0.5), [1, 2, 1, 1]),
        (Rescale(1.0), (0.0, 1.0), [1, 1, 1, 1]),
        (Rescale(4.0), (0.3, 1.0), [1, 1, 2, 2]),
    ],
)
def test_where_guidance_is_off_the_prompt_alone_is_evaluated(
    tiny_model: Model, guidance: Any, interval: tuple[float, float], evaluations: list[int]
) -> None:
    """A scale of 1 is off, in a guidance that is not linear, too; outside of the interval none is asked."""
    rows: list[int] = []
    hook = tiny_model.unet.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    try:
        drawn = latents(tiny_model, "a tent", method="direct", guidance=guidance, guidance_interval=interval)
    finally:
        hook.remove()
    assert rows == evaluations
    assert drawn.isfinite().all()


@pytest.mark.parametrize("guidance", ["cfg", "rescale", lambda c, u, sigma, step: u + 7.5 * (c - u)])
def test_a_detail_scale_of_1_turns_any_guidance_off(tiny_model: Model, guidance: Any) -> None:
    """Magnify's details are unguided; its structure is guided."""
    result = cutdiff.generate(tiny_model, "a tent", method="magnify", guidance=guidance, stride=8, **RUN)
    assert result.record["network_evaluations"] == 4 * 2 + 2 * 4, "the picture, then 4 views in 2 steps"


def test_guidance_in_an_interval_is_what_it_says(tiny_model: Model) -> None:
    """Each step's estimate is the guided one inside of the interval and that of the prompt alone outside."""
    steps = list(cutdiff.denoise(tiny_model, PROMPTS, method="direct", guidance_interval=(0.25, 0.75), **RUN))

    def method(run: Run) -> list[Stage]:
        (guided,), (alone,) = direct(run), direct(replace(run, denoiser=replace(run.denoiser, guidance=CFG(1.0))))

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            return (guided if step in (1, 2) else alone).denoise(x, sigma, step)

        return [replace(guided, denoise=denoise)]

    assert torch.equal(latents(tiny_model, method=method), steps[-1].latents)
    assert not torch.allclose(latents(tiny_model, method="direct"), steps[-1].latents, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "apgg"}, "guidance='apgg' is not one of cfg, rescale"),
        ({"guidance": 7.5}, "guidance=7.5 must be a function of"),
        ({"guidance": "rescale,phi=2"}, "phi=2 must be a finite number in 0 … 1"),
        ({"phi": 0.5}, "phi=0.5 is no option of .* but of rescale"),
        ({"guidance": "rescale", "guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
        (
            {"method": "magnify,detail_guidance_scale=2", "guidance": lambda c, u, sigma, step: c},
            "detail_guidance_scale=2.0 needs a guidance with a guidance_scale",
        ),
    ],
)
def test_a_guidance_that_cannot_be_is_an_error(tiny_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        cutdiff.denoise(tiny_model, PROMPTS, **RUN, **options)
