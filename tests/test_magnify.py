"""Magnify: a native picture, enlarged, and drawn on in views that are held to it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff import specs
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import parse
from cutdiff.methods.magnify import Climb, Magnify, Trajectory
from cutdiff.methods.shared import Run, with_guidance_scale
from cutdiff.options import Options
from cutdiff.pipeline import prepare
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.sampling.denoiser import Work
from cutdiff.sampling.guidance import CFG
from cutdiff.sampling.resize import resize
from cutdiff.sampling.schedules import ModelSchedule, make_schedule
from cutdiff.sampling.solvers import Euler
from cutdiff.sampling.split import Butterworth, DownUp, Gaussian, Wavelet, sharpened
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
    guide = resize(picture, (16, 16))
    towards = Magnify().towards_picture
    denoise = towards(run, picture, guide, lambda x, sigma, step: estimate)

    def distance(sigma: float) -> float:
        coarse = F.avg_pool2d(denoise(estimate, sigma, 0), 2)
        return (coarse - picture).norm().item()

    sigmas = run.schedule.sigmas[:-1]
    distances = [distance(sigma) for sigma in sigmas]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * (F.avg_pool2d(estimate, 2) - picture).norm()
    assert torch.equal(
        towards(run, F.avg_pool2d(estimate, 2), guide, lambda x, sigma, step: estimate)(estimate, sigmas[0], 0),
        estimate,
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


# ---- Its holds, splits and enlargements


def last(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> Tensor:
    return steps(model, prompt, **{"height": 128, "width": 104, "seed": 3, **options})[-1].latents


def test_its_defaults_are_those_that_were_always_so(tiny_model: Model) -> None:
    plain = last(tiny_model)
    assert torch.equal(last(tiny_model, enlarged_in="latents", hold="picture", hold_split=None), plain)
    changed = [
        {"enlarged_in": "pixels"},
        {"hold": "none"},
        {"hold": "trajectory"},
        {"hold_split": "down_up"},
        {"hold_split": "wavelet"},
        {"hold": "trajectory", "hold_split": "gaussian,sigma=3"},
        {"hold": "trajectory", "enlarged_in": "pixels"},
    ]
    drawn = [plain, *(last(tiny_model, **options) for options in changed)]
    for i, one in enumerate(drawn):
        assert all(relative_error(one, other) > 1e-4 for other in drawn[:i])


def estimates(model: Model, **options: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The estimates of the structure's steps, its picture, and the estimates of the details' steps."""
    drawn = steps(model, height=128, width=104, seed=3, **options)
    picture = drawn[3].latents
    return [step.denoised for step in drawn[:4]], picture, [step.denoised for step in drawn[4:]]


def free(model: Model, **options: Any) -> list[Tensor]:
    """The estimates of the details' first step where nothing holds them: from there on the states differ."""
    return estimates(model, hold="none", **options)[2][:1]


def test_the_trajectory_is_that_of_estimates_and_its_share_falls_from_1_by_equal_parts(tiny_model: Model) -> None:
    """Each estimate of the details is D's, moved to the structure's of the same step: at a split of all, onto it."""
    options = {"hold": "trajectory", "structure_fraction": 0.25}
    structure, _, details = estimates(tiny_model, **options, hold_split=Everything())
    assert len(details) == 3
    torch.testing.assert_close(details[0], resize(structure[1], (16, 13)), msg="a share of 1")
    (unheld,) = free(tiny_model, structure_fraction=0.25)
    assert relative_error(unheld, details[0]) > 0.01
    reference = resize(structure[1], (16, 13))
    _, _, pulled = estimates(tiny_model, **options)
    torch.testing.assert_close(pulled[0], unheld + Butterworth(4, 0.2).low(reference - unheld))
    _, _, other = estimates(tiny_model, **options, hold_split="wavelet,name=db4")
    torch.testing.assert_close(other[0], unheld + Wavelet("db4").low(reference - unheld))


def test_the_share_of_the_trajectory_by_step(run: Run) -> None:
    structure = Trajectory(lambda x, sigma, step: torch.full((1, 4, 8, 8), float(step + 1)), 4, keeps=True)
    for step in range(4):
        structure(torch.zeros(1, 4, 8, 8), 1.0, step)
    nothing = torch.zeros(1, 4, 16, 16)
    method, detail = Magnify(hold="trajectory", hold_split=Everything()), range(5, 8)
    views = Trajectory(lambda x, sigma, step: nothing, 4, keeps=True)
    towards = method.towards_trajectory(run, structure, detail, views)
    for step, share in zip(detail, (1, 2 / 3, 1 / 3), strict=True):
        estimate = share * (step % 4 + 1)
        torch.testing.assert_close(towards(nothing, 1.0, step), torch.full_like(nothing, estimate))


@pytest.mark.parametrize("split", [DownUp(), Wavelet(), Butterworth()])
@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_a_split_of_the_picture_is_that_of_the_enlarged_one(tiny_model: Model, split: Any, space: str) -> None:
    options = {"enlarged_in": space, "structure_fraction": 0.5}
    _, picture, (first, _) = estimates(tiny_model, hold_split=split, **options)
    (unheld,) = free(tiny_model, **options)
    schedule = make_schedule(ModelSchedule(), Euler(), tiny_model.noise, 4)
    share = (1 - math.cos(math.pi * schedule.fraction(schedule.sigmas[2]))) / 2
    guide = resize(picture, (16, 13))
    if space == "pixels":
        guide = cutdiff.encode(tiny_model, resize(cutdiff.decode(tiny_model, picture), (128, 104)))
    torch.testing.assert_close(first, unheld + share * split.low(guide - unheld))
    assert relative_error(first, unheld) > 1e-3


@pytest.mark.parametrize(
    "options", [{"hold": "trajectory"}, {"enlarged_in": "pixels", "hold_split": "butterworth"}, {"hold": "none"}]
)
def test_images_do_not_depend_on_their_neighbours_and_runs_cost_what_is_planned(
    tiny_model: Model, options: dict[str, Any]
) -> None:
    prompts = [PROMPT, "a blue tree"]
    both = last(tiny_model, prompts, **options)
    for i, prompt in enumerate(prompts):
        assert relative_error(both[i], last(tiny_model, prompt, **{**options, "seed": 3 + i})[0]) < 1e-4
    settings = Settings(method="magnify", num_steps=4, height=128, width=104, **options)
    record = cutdiff.generate(tiny_model, PROMPT, settings).record
    planned = walk(
        sized(SDXL._replace(network=tiny_model.unet.config, vae=tiny_model.vae.config), tiny_model.dtype), settings
    )
    assert sum(stage.total.evaluations for stage in planned.stages) == record["network_evaluations"]


@pytest.mark.parametrize(("num_steps", "fraction"), [(1, 0.3), (3, 1.0), (5, 0.0)])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (72, 200), (8, 72), (64, 40)])
def test_the_trajectory_at_every_size_and_number_of_steps(
    tiny_model: Model, num_steps: int, fraction: float, height: int, width: int
) -> None:
    options = {"num_steps": num_steps, "structure_fraction": fraction, "height": height, "width": width}
    drawn = last(tiny_model, hold="trajectory", **options)
    assert drawn.shape == (1, 4, height // 8, width // 8)
    assert drawn.isfinite().all()


@dataclass(frozen=True)
class Everything(Options):
    """A split whose low band is all there is."""

    def low(self, x: Tensor) -> Tensor:
        return x


def test_its_split_is_recorded_in_full_and_one_of_ones_own_by_its_source(tiny_model: Model) -> None:
    assert Magnify(hold_split="wavelet").hold_split == "wavelet,name=sym4"
    assert Magnify(hold_split=Wavelet("db4")) == Magnify(hold_split="wavelet,name=db4")
    described = specs.spec_of("method", Magnify(hold_split=Everything()))
    assert re.search(r",hold=picture,hold_split='?<Everything [0-9a-f]{16}>'?$", described)
    flags = ["--method=magnify", "--hold=trajectory", "--hold-split", "gaussian,sigma=3", "--enlarged-in", "pixels"]
    expected = Magnify(hold="trajectory", hold_split="gaussian,sigma=3", enlarged_in="pixels")
    assert Settings(**parse(flags).options).method == expected
    both = Settings(method="magnify", guidance="by_band", split="wavelet", hold_split="down_up")
    assert both.method.hold_split != both.guidance.split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_split": "wavelett"}, "hold_split='wavelett' is not one of down_up, .* did you mean 'wavelet'"),
        ({"hold_split": "gaussian,sigma=-2"}, "hold_split='gaussian,sigma=-2': sigma=-2"),
        ({"hold_split": 3}, "hold_split=3 must be a text or a Split or None"),
        ({"hold": "none", "hold_split": "wavelet"}, "hold_split='wavelet' is for a hold, and hold='none': leave one"),
        ({"hold": "path"}, "hold='path' is not one of picture, trajectory, none"),
        ({"enlarged_in": "pixel"}, "enlarged_in='pixel' is not one of pixels, latents: did you mean 'pixels'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(method="magnify", **options)


# ---- In several steps of size


@pytest.mark.parametrize(
    ("side", "growth", "sides"),
    [
        (16, 2.0, [8, 16]),
        (24, 2.0, [8, 13, 24]),
        (32, 2.0, [8, 16, 32]),
        (48, 2.0, [8, 14, 26, 48]),
        (48, None, [8, 48]),
        (8, 2.0, [8]),
        (5, 2.0, [5]),
        (9, 2.0, [8, 9]),
    ],
)
def test_canvases_grow_evenly_and_by_no_more_than_asked(
    tiny_model: Model, side: int, growth: float | None, sides: list[int]
) -> None:
    method = replace(Climb(), growth=growth)
    drawn = cutdiff.denoise(tiny_model, "a", method=method, num_steps=4, height=8 * side, width=8 * side)
    steps = list(drawn)
    assert list(dict.fromkeys(step.latents.shape[2] for step in steps)) == sides
    assert [step.index for step in steps] == [0, 1, 2, 3, *(4 * k + i for k in range(1, len(sides)) for i in (2, 3))]
    later = list(dict.fromkeys(step.stage for step in steps))[1:]
    assert later == (["detail"] if len(sides) == 2 else [f"detail {k}" for k in range(1, len(sides))])


IN_LATENTS = {"sharpness": 0.0, "corrections": 0}
"""The options of climb that only pixels have."""


def test_climbing_is_magnify_with_other_defaults(tiny_model: Model) -> None:
    options = {"structure_fraction": 0.5, "growth": 2.0, "enlarged_in": "pixels", "sharpness": 2.0, "corrections": 1}
    by_name, by_options = last(tiny_model, method="climb"), last(tiny_model, method=Magnify(**options))
    assert torch.equal(by_name, by_options)
    others = {"growth": None, "enlarged_in": "latents", "structure_fraction": 0.0, "sharpness": 0.0, "corrections": 0}
    for name, value in others.items():
        changed = {**options, name: value} | (IN_LATENTS if name == "enlarged_in" else {})
        size = {"height": 256, "width": 256} if name == "growth" else {}
        other = last(tiny_model, method=Magnify(**changed), **size)
        assert other.shape != by_name.shape or relative_error(other, by_name) > 1e-4, name


def test_only_the_native_picture_is_sharpened(run: Run) -> None:
    encoded: list[Tensor] = []

    def encode(images: Tensor, **options: Any) -> Tensor:
        encoded.append(images)
        return run.encode(images, **options)

    def start(amount: float) -> list[Tensor]:
        encoded.clear()
        on = replace(run, size=(32, 32), encode=encode)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for phase in Climb(sharpness=amount, corrections=0).stages(on)[1:]:
            assert isinstance(phase, Phase)
            phase.begin(x)
            x = torch.randn(1, 4, *phase.size, generator=torch.Generator().manual_seed(0))
        return [*encoded]

    (plain, later), (sharp, later_sharp) = start(0.0), start(2.0)
    torch.testing.assert_close(sharp, sharpened(plain, 2.0, Gaussian(2.0)))
    assert relative_error(sharp, plain) > 1e-3
    assert torch.equal(later, later_sharp)


def test_each_size_is_held_to_the_trajectory_of_the_size_before(tiny_model: Model) -> None:
    climbed = last(tiny_model, method=Climb(hold="trajectory"), height=256, width=256)
    assert relative_error(climbed, last(tiny_model, method=Climb(), height=256, width=256)) > 1e-4


def test_sharpness_and_corrections_are_of_pixels() -> None:
    with pytest.raises(ValueError, match=r"^sharpness=2.0 is of pixels: give enlarged_in='pixels'"):
        Settings(method="climb,enlarged_in=latents")
    with pytest.raises(ValueError, match=r"^corrections=1 is of pixels: give enlarged_in='pixels', or corrections=0"):
        Settings(method="climb,enlarged_in=latents,sharpness=0")
    Settings(method="climb,enlarged_in=latents,sharpness=0,corrections=0")
