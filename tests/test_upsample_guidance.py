"""Upsample guidance: the picture that the mean of a canvas's patches is, and the methods that it guides.

published_upsample_guidance.npz holds final latents by two public codes, neither of them the authors', whose own is not
public: github.com/viperyl/Upsample-Guidance (commit f9d4ba9, for SD 1.5) and github.com/Isekai-Creation/
Upsample-Guidance (commit b27c2f4, for SDXL). Their pipelines ran on diffusers' networks and DDIM scheduler
with the weights, states and noise of replayed.py. The second one's calls of torch_xla were replaced by
nothing; for a factor of 3 the first one's pooling and upsampling had their default factor, which is 2, set to 3.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from replayed import CONFIG, published_latents
from test_plan import sizes_of
from test_unet_methods import SD, latents, make_run, sample, stages_of
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run, falling
from cutdiff.planning.forecast import walk
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.edm import EDMConfig
from cutdiff.sampling.mean_picture import MeanPicture
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.operators import Patches, grid_for, pad_to_grid
from cutdiff.sampling.schedules import euler_schedule
from cutdiff.sampling.stages import Stage
from cutdiff.settings import Settings

PROMPT = "a red house at night"
TRIAL = "cutdiffusion,structure=mean,detail_guidance_scale=1,upsample_guidance=1"
PUBLISHED = {
    "sdxl_2": (CONFIG, (16, 24), 12, "upsample_guidance,weight=1.2,size_conditioning=target"),
    "sd_2": (SD, (16, 24), 12, "upsample_guidance,weight=1.2"),
    "sd_3": (SD, (24, 15), 8, "upsample_guidance,guided_share=0.3"),
}
"""The network, the canvas and the native size in latents, and the method of each published run."""


RUN = make_run((16, 16))


class Ear(Observer):
    def __init__(self) -> None:
        self.calls: list[tuple[Call, Tensor]] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append((call, prediction))


def by_hand(
    run: Run, x: Tensor, x0: Tensor, weight: float, grid: tuple[int, int], upsampling: str, sigma: float
) -> Tensor:
    """x0 + w·up(D(pool(x); σ/√n) − pool(x0)), step by step in plain torch."""

    def pool(canvas: Tensor) -> Tensor:
        bottom, right = -canvas.shape[2] % grid[0], -canvas.shape[3] % grid[1]
        return F.avg_pool2d(F.pad(canvas, (0, right, 0, bottom), mode="reflect"), grid)

    estimate = run.denoiser(pool(x), sigma / math.sqrt(grid[0] * grid[1]), 0)
    difference = F.interpolate(estimate - pool(x0), scale_factor=grid, mode=upsampling)  # pyright: ignore[reportArgumentType]
    return x0 + weight * difference[:, :, : x.shape[2], : x.shape[3]]


def stages(method: str, run: Run) -> list[Stage]:
    found = stages_of(method, run)
    assert all(isinstance(stage, Stage) for stage in found)
    return found  # type: ignore[return-value]


# ---- Whole runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_codes_end_in_the_same_latents(name: str) -> None:
    """They tell the network of whole timesteps only, and so does our denoiser for once."""
    config, size, native, method = PUBLISHED[name]
    run = make_run(size, config=replace(config, native_size=native))
    timestep = run.schedule.timestep
    rounded = replace(run, denoiser=replace(run.denoiser, timestep=lambda sigma: round(timestep(sigma))))
    published = published_latents("upsample_guidance", name)
    assert relative_error(latents(method, rounded), published) < 1e-4
    assert relative_error(latents("direct", run), published) > 0.1


@pytest.mark.parametrize("method", ["upsample_guidance", "cutdiffusion,structure=mean,upsample_guidance=1"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit_and_costs_no_more(
    tiny_model: Model, method: str, height: int, width: int
) -> None:
    options = {"height": height, "width": width, "num_steps": 3}
    ours, direct = (cutdiff.generate(tiny_model, PROMPT, method=m, **options) for m in (method, "direct"))
    assert torch.equal(ours.latents, direct.latents)
    assert ours.record["network_evaluations"] == direct.record["network_evaluations"]


@pytest.mark.parametrize("method", [TRIAL, "upsample_guidance,detail=views,fading=True,guided_share=1"])
@pytest.mark.parametrize("config", [CONFIG, SD], ids=["sdxl", "sd"])
@pytest.mark.parametrize(("size", "num_steps"), [((16, 16), 3), ((9, 15), 3), ((41, 3), 2), ((1, 20), 1)])
def test_any_size_can_be_drawn(method: str, config: Any, size: tuple[int, int], num_steps: int) -> None:
    run = make_run(size, config=config, num_steps=num_steps, solver="euler")
    drawn = latents(method, run, solver="euler")
    assert drawn.shape == (1, 2, *size)
    assert drawn.isfinite().all()


def test_a_batch_of_two_prompts_gives_what_two_runs_give(tiny_model: Model) -> None:
    options = {"method": TRIAL, "num_steps": 4, "height": 128, "width": 96}
    prompts = [PROMPT, "a pink balloon over a lake"]
    both = cutdiff.generate(tiny_model, prompts, seed=5, **options).latents
    for i, prompt in enumerate(prompts):
        alone = cutdiff.generate(tiny_model, prompt, seed=5 + i, **options).latents
        assert relative_error(both[i], alone[0]) < 1e-4


# ---- Costs


def planned_and_taken(model: Model, method: str, **options: Any) -> tuple[int, int]:
    """The evaluations of a picture of twice the native size, where 9 views stand."""
    settings = Settings(method=method, height=128, width=128, **options)
    taken = cutdiff.generate(model, PROMPT, settings).record["network_evaluations"]
    return sum(stage.total.evaluations for stage in walk(sizes_of(model), settings).stages), taken


def test_the_trial_takes_65_evaluations(tiny_model: Model) -> None:
    """CutDiffusion takes 130, and magnify 83."""
    assert planned_and_taken(tiny_model, TRIAL, num_steps=10) == (65, 65)


@pytest.mark.parametrize(
    ("method", "evaluations"),
    [
        ("cutdiffusion,structure=mean", 2 * 2 + 2 * 9 * 2),
        ("cutdiffusion,upsample_guidance=0.5,structure_fraction=0", 4 * (9 + 1) * 2),
        ("upsample_guidance", 2 * 2 * 2 + 2 * 2),
        ("upsample_guidance,weight=0", 4 * 2),
        ("upsample_guidance,detail=views,guided_share=1", 4 * (9 + 1) * 2),
    ],
)
def test_evaluations_are_those_of_the_plan(tiny_model: Model, method: str, evaluations: int) -> None:
    assert planned_and_taken(tiny_model, method, num_steps=4) == (evaluations, evaluations)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.5, 1.0)])
def test_evaluations_of_an_interval_are_those_of_the_plan(tiny_model: Model, interval: tuple[float, float]) -> None:
    method = "cutdiffusion,structure=mean,structure_fraction=0.25,upsample_guidance=1"
    twice = 1 + 10 if interval == (0.0, 0.5) else 10 + 10  # the first step of four draws the structure
    evaluations = 1 + 3 * 10 + twice
    assert planned_and_taken(tiny_model, method, num_steps=4, guidance_interval=interval) == (evaluations, evaluations)


def test_the_picture_is_guided_where_the_step_is(tiny_model: Model) -> None:
    """A step of the run that stands at the sigma of the picture does not count."""
    ear = Ear()
    options = {"method": "upsample_guidance,guided_share=1", "num_steps": 8, "guidance_interval": (0.25, 0.5)}
    cutdiff.generate(tiny_model, PROMPT, height=128, width=128, observer=ear, **options)
    assert [(call.step, call.copies) for call, _ in ear.calls] == [
        (step, 2 if step in (2, 3) else 1) for step in range(8) for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("conditioning", "ids"), [("native", [64, 48, 0, 0, 64, 48]), ("target", [128, 96, 0, 0, 128, 96])]
)
def test_what_the_network_is_told_of_the_picture(tiny_model: Model, conditioning: str, ids: list[float]) -> None:
    """A whole picture of its own size, 8×6 latents of a canvas of 16×12, or one of the canvas's size; half the sigma
    of the step. Upsample guidance has the canvas go first, CutDiffusion's structure the picture alone."""
    for method, canvases in (("upsample_guidance", 1), ("cutdiffusion,structure=mean", 0)):
        ear = Ear()
        options = {"method": f"{method},size_conditioning={conditioning}", "num_steps": 2, "observer": ear}
        step = next(cutdiff.denoise(tiny_model, PROMPT, height=128, width=96, **options))
        (*before, (picture, _)) = ear.calls
        assert [call.sigma for call, _ in before] == [step.sigma] * canvases
        assert picture.sigma == step.sigma / 2
        assert picture.inputs[0].shape[2:] == (8, 6)
        assert picture.inputs[4].tolist() == [ids] * 2


# ---- The picture


@hypothesis_settings(max_examples=20)
@given(
    height=st.integers(8, 21),
    width=st.integers(8, 21),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_the_picture_is_the_mean_of_the_patches(height: int, width: int, grid: tuple[int, int], seed: int) -> None:
    canvas = pad_to_grid(sample(2, 3, height, width, seed=seed), grid)
    patches = Patches(grid).gather(canvas).unflatten(0, (2, -1))
    picture = MeanPicture(RUN.denoiser, grid)
    torch.testing.assert_close(picture.pool(canvas), patches.mean(1))
    torch.testing.assert_close(picture.pool(canvas[:, :, :height, :width]), patches.mean(1))
    deviation = picture.pool(sample(1, 1, 120 * grid[0], 120 * grid[1], seed=seed)).std().item()
    assert deviation == pytest.approx(1 / math.sqrt(grid[0] * grid[1]), rel=0.05), "by which sigma is divided"


@pytest.mark.parametrize("upsampling", ["nearest", "bicubic"])
@pytest.mark.parametrize(
    ("size", "grid"), [((16, 16), (2, 2)), ((13, 20), (2, 3)), ((7, 16), (1, 2)), ((25, 9), (4, 2))]
)
def test_guidance_is_the_formula(upsampling: Any, size: tuple[int, int], grid: tuple[int, int]) -> None:
    run = make_run(size, seeds=(0, 1))
    x, x0, sigma = 5 * sample(2, 2, *size), sample(2, 2, *size, seed=1), 3.0
    picture = MeanPicture(run.denoiser, grid, upsampling)
    guided = picture.guiding(lambda canvas, sigma, step: x0, lambda sigma, step: 0.7)
    torch.testing.assert_close(guided(x, sigma, 0), by_hand(run, x, x0, 0.7, grid, upsampling, sigma))
    zero = torch.zeros_like(x0)
    torch.testing.assert_close(picture(x, sigma, 0), by_hand(run, x, zero, 1.0, grid, upsampling, sigma))


def test_at_weight_1_the_mean_of_the_estimate_is_the_pictures() -> None:
    run = make_run((16, 24))
    x, x0 = 5 * sample(1, 2, 16, 24), sample(1, 2, 16, 24, seed=1)
    picture = MeanPicture(run.denoiser, (2, 2))
    guided = picture.guiding(lambda canvas, sigma, step: x0, lambda sigma, step: 1.0)(x, 3.0, 0)
    torch.testing.assert_close(picture.pool(guided), picture.denoise(x, 3.0, 0))
    torch.testing.assert_close(
        guided - picture.up(picture.pool(guided), run.size), x0 - picture.up(picture.pool(x0), run.size)
    )


def test_below_the_smallest_sigma_the_noise_is_removed_that_is_there() -> None:
    """A model with timesteps is told the cleanest one, an EDM model the sigma itself."""
    smallest = euler_schedule(NoiseConfig(), 1000).sigmas[-2]
    run, ear = RUN, Ear()
    x, sigma = sample(1, 2, 16, 16), smallest
    for model in (NoiseConfig(), EDMConfig(sigma_min=smallest)):
        timestep = run.schedule.timestep if isinstance(model, NoiseConfig) else model.timestep
        denoiser = replace(run.denoiser, coefficients=model.coefficients, timestep=timestep, guided=lambda _: False)
        picture = MeanPicture(denoiser, (2, 2))
        with denoiser.work.heard_by(ear):
            estimate = picture.denoise(x, sigma, 0)
        call, prediction = ear.calls[-1]
        expected = 0.0 if isinstance(model, NoiseConfig) else math.log(smallest / 2) / 4
        assert call.inputs[1].tolist() == pytest.approx([expected])
        _, c_skip, c_out = model.coefficients(smallest / 2)
        torch.testing.assert_close(estimate, c_skip * picture.pool(x) + c_out * prediction)
        assert relative_error(estimate, picture.pool(x)) < 0.05


# ---- The methods


@pytest.mark.parametrize(
    ("num_steps", "share", "guided"),
    [(50, 0.6, 30), (50, 0.3, 15), (10, 0.6, 6), (10, 1.0, 10), (10, 0.0, 0), (1, 0.9, 0), (1, 1.0, 1)],
)
def test_steps_in_the_share_of_the_noise_are_guided(num_steps: int, share: float, guided: int) -> None:
    """t is 981 … 1 at 50 steps and 901 … 1 at 10; 1 is where a single step stands."""
    first, second = stages(f"upsample_guidance,guided_share={share}", make_run((16, 16), num_steps=num_steps))
    assert (first.steps, second.steps) == (range(guided), range(guided, num_steps))


def test_a_step_on_the_edge_of_the_share_is_guided() -> None:
    """At t 900, 800 … 0 a share of 0.7 ends with 300, though 1 - 0.7 is more than 0.3."""
    run = make_run((16, 16))
    schedule = euler_schedule(NoiseConfig(steps_offset=0), 10)
    assert schedule.timesteps[6] == 300
    assert len(stages("upsample_guidance,guided_share=0.7", replace(run, schedule=schedule))[0].steps) == 7


def test_weights_fall_by_equal_amounts() -> None:
    weight = falling(2.0, range(5, 10))
    assert [weight(1.0, step) for step in range(5, 10)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


@pytest.mark.parametrize(("size", "fading"), [((16, 7), False), ((7, 16), True)])
def test_the_whole_canvas_is_guided(size: tuple[int, int], fading: bool) -> None:
    """Two thirds of the weight are left at the third of 6 steps. One factor serves both axes of 16×7, native 8."""
    run = make_run(size)
    first, second = stages(f"upsample_guidance,weight=0.9,fading={fading}", run)
    x, sigma = 5 * sample(1, 2, *size), 3.0
    x0 = run.denoiser(x, sigma, 2)
    expected = by_hand(run, x, x0, 0.6 if fading else 0.9, (2, 2), "nearest", sigma)
    torch.testing.assert_close(first.denoise(x, sigma, 2), expected)
    torch.testing.assert_close(second.denoise(x, sigma, 2), x0)


def test_views_are_guided() -> None:
    run = make_run((16, 16))
    (plain,) = (stage for stage in stages("cutdiffusion", run) if stage.name == "detail")
    first, second = stages("upsample_guidance,detail=views,upsampling=bicubic", run)
    x, sigma = 5 * sample(1, 2, 16, 16), 3.0
    x0 = plain.denoise(x, sigma, 2)
    torch.testing.assert_close(first.denoise(x, sigma, 2), by_hand(run, x, x0, 1.0, (2, 2), "bicubic", sigma))
    assert torch.equal(second.denoise(x, sigma, 2), x0)


@pytest.mark.parametrize(("given", "upsampling"), [("", "bicubic"), (",upsampling=nearest", "nearest")])
def test_cutdiffusion_draws_its_structure_from_the_mean_and_guides_its_details(given: str, upsampling: str) -> None:
    """On 16×7 the grid is 2×1, that of the patches. The picture is guided as the run is, the views by their own scale;
    2/5 of the weight are left at the fourth of 5 steps."""
    run = make_run((16, 7))
    (plain,) = (stage for stage in stages("cutdiffusion,detail_guidance_scale=1", run) if stage.name == "detail")
    structure, detail = stages(f"cutdiffusion,structure=mean,detail_guidance_scale=1,upsample_guidance=2{given}", run)
    assert grid_for(run.size, 8) == (2, 1)
    x, sigma = 5 * sample(1, 2, 16, 7), 3.0
    expected = by_hand(run, x, torch.zeros_like(x), 1.0, (2, 1), upsampling, sigma)
    torch.testing.assert_close(structure.denoise(x, sigma, 0), expected)
    x0 = plain.denoise(x, sigma, 8)
    torch.testing.assert_close(detail.denoise(x, sigma, 8), by_hand(run, x, x0, 0.8, (2, 1), upsampling, sigma))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("upsample_guidance,stride=4", "stride=4 is for views, and detail=whole has none: give detail='views'"),
        ("upsample_guidance,view_weights=cosine", "view_weights=cosine is for views, and detail=whole has none"),
        ("upsample_guidance,overlaps=swap", "overlaps=swap is for views, and detail=whole has none"),
        ("cutdiffusion,structure=mean,interaction=none", "interaction=none is for patches, and structure=mean has one"),
        ("cutdiffusion,upsampling=nearest", "upsampling=nearest is for structure='mean', or upsample_guidance above 0"),
        ("upsample_guidance,weight=-1", "weight=-1 must be a finite number at least 0"),
        ("upsample_guidance,guided_share=1.5", "guided_share=1.5 must be a finite number in 0 … 1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Settings(method=method)
