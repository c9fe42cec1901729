"""Magnify: a native picture, enlarged, and drawn on in views that are held to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.magnify import Magnify
from cutdiff.methods.shared import Run, with_guidance_scale
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Work
from cutdiff.sampling.guidance import CFG
from cutdiff.sampling.stages import Phase
from cutdiff.settings import Settings

PROMPT = "a red house at night"


def steps(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> list[cutdiff.Step]:
    return list(cutdiff.denoise(model, prompt, **{"method": "magnify", "num_steps": 4, **options}))


@pytest.fixture
def run(tiny_model: Model) -> Run:
    """A run on a canvas of 16×16 latents, twice the native size, with 4 steps."""
    found: list[Run] = []

    def spy(run: Run) -> list[Any]:
        found.append(run)
        return Magnify().stages(run)

    prepare(tiny_model, PROMPT, Settings(method=spy, num_steps=4, height=128, width=128), None)
    return found[0]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, height: int, width: int) -> None:
    direct = steps(tiny_model, method="direct", height=height, width=width)[-1]
    assert torch.equal(steps(tiny_model, height=height, width=width)[-1].latents, direct.latents)


def test_its_structure_is_the_native_picture_of_the_same_seed(tiny_model: Model) -> None:
    drawn = steps(tiny_model, height=128, width=128, seed=3)
    native = steps(tiny_model, method="direct", height=64, width=64, seed=3)[-1]
    assert [step.stage for step in drawn] == ["structure"] * 4 + ["detail"] * 2
    assert torch.equal(drawn[3].latents, native.latents)
    assert drawn[4].latents.shape == (1, 4, 16, 16)
    assert drawn[4].sigma == drawn[2].sigma, "the detail stage begins at step ceil(0.3 · 4)"


@pytest.mark.parametrize(("fraction", "details"), [(0.0, 4), (0.5, 2), (1.0, 1)])
def test_the_detail_stage_takes_the_steps_that_are_left_at_least_one(
    tiny_model: Model, fraction: float, details: int
) -> None:
    drawn = steps(tiny_model, height=96, width=128, structure_fraction=fraction)
    assert [step.stage for step in drawn].count("detail") == details
    assert drawn[-1].latents.shape == (1, 4, 12, 16)


@pytest.mark.parametrize(("scale", "copies"), [(None, 1), (1.0, 1), (3.0, 2)])
def test_details_are_drawn_without_guidance_unless_told(tiny_model: Model, scale: float | None, copies: int) -> None:
    options = {"method": "magnify", "num_steps": 4, **({} if scale is None else {"detail_guidance_scale": scale})}
    record = cutdiff.generate(tiny_model, PROMPT, height=128, width=128, **options).record
    assert record["network_evaluations"] == 4 * 2 + 2 * 9 * copies, "a native picture, then 9 views"


def test_a_stage_of_its_own_guidance_leaves_the_denoiser_as_it_was(run: Run) -> None:
    other = with_guidance_scale(run, 2.0)
    assert (other.denoiser.guidance, run.denoiser.guidance) == (CFG(2.0), CFG(7.5))
    assert other.denoiser.work is run.denoiser.work, "what is counted and kept is the run's"
    assert with_guidance_scale(run, None) is run


def test_guidance_may_change_where_the_number_of_rows_does_not(run: Run) -> None:
    """Two items under guidance and four without take as many rows of text, and not the same ones."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fresh = replace(run.denoiser, guidance=CFG(1.0), work=Work())(x, 5.0, 0)
    run.denoiser(x[:2], 5.0, 0)
    later = with_guidance_scale(run, 1.0).denoiser(x, 5.0, 0)
    assert torch.equal(later, fresh)


def test_estimates_are_held_to_the_picture_most_where_noise_is_most(run: Run) -> None:
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    estimate = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    hold = Magnify().hold
    denoise = hold(run, picture, lambda x, sigma, step: estimate)

    def distance(sigma: float) -> float:
        coarse = F.avg_pool2d(denoise(estimate, sigma, 0), 2)
        return (coarse - picture).norm().item()

    sigmas = run.schedule.sigmas[:-1]
    distances = [distance(sigma) for sigma in sigmas]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * (F.avg_pool2d(estimate, 2) - picture).norm()
    assert torch.equal(
        hold(run, F.avg_pool2d(estimate, 2), lambda x, sigma, step: estimate)(estimate, sigmas[0], 0), estimate
    ), "an estimate that agrees is left alone"


def test_a_method_of_ones_own_is_a_function_and_is_recorded_by_its_name(tiny_model: Model, run: Run) -> None:
    def mine(run: Run) -> Any:
        return Magnify().stages(run)

    assert isinstance(mine(run)[1], Phase)
    result = cutdiff.generate(tiny_model, PROMPT, method=mine, num_steps=2)
    assert result.record["method"] == "mine"
    named, itself = (cutdiff.generate(tiny_model, PROMPT, method=m, num_steps=2) for m in ("magnify", Magnify()))
    assert named.record["method"].startswith("magnify,")
    assert torch.equal(result.latents, named.latents)
    assert torch.equal(result.latents, itself.latents)
