"""Regions: prompts with masks of their own, on every method, and what they may not be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.given.regions import Region, coverage
from cutdiff.methods.shared import Run
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.sample import main
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.regions import Bootstrapping, Layout, zipped
from cutdiff.sampling.schedules import euler_schedule
from cutdiff.sampling.stages import Phase, Stage, solve
from cutdiff.settings import Settings
from cutdiff.specs import METHODS, resolve

SIZE = {"height": 64, "width": 128}
LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
MIDDLE = (0.25, 0.25, 0.75, 0.75)
HOUSE, TREE, TENT = "a red house", "a blue tree", "a pink tent"
QUICK = {"num_steps": 2, "guidance_scale": 3.0, **SIZE}


def latents(model: Model, prompt: str | list[str] = HOUSE, **options: Any) -> Tensor:
    return cutdiff.generate(model, prompt, **{**QUICK, **options}).latents


def regions(*of: tuple[str, Any], **options: Any) -> list[Region]:
    return [Region(prompt, box, **options) for prompt, box in of]


# ---- What a region covers


@given(st.lists(st.integers(0, 40), min_size=2, max_size=2, unique=True), st.integers(1, 37), st.integers(1, 9))
def test_a_box_covers_its_area_at_every_size(ends: list[int], height: int, width: int) -> None:
    low, high = (end / 40 for end in sorted(ends))
    mask = coverage(Region("a", (low, 0.25, high, 0.75)), (height, width))
    assert mask.shape == (height, width)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.sum() == pytest.approx((high - low) * 0.5 * height * width, abs=1e-4)
    columns = (torch.arange(width) + 0.5) / width
    outside = (columns < low - 0.5 / width) | (columns > high + 0.5 / width)
    assert not mask[:, outside.numpy()].any()


def test_a_mask_covers_the_mean_of_its_pixels() -> None:
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    region = Region("a", mask=mask.numpy())
    expected = torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2, 4)
    torch.testing.assert_close(torch.from_numpy(coverage(region, (2, 4))), expected)
    wide = torch.from_numpy(coverage(region, (16, 16)))
    assert torch.equal(wide, mask.repeat_interleave(2, 0).repeat_interleave(2, 1)), "enlarged by nearest pixels"


def layout_of(*boxes: Any, weights: Sequence[float] = (), sizes: Sequence[tuple[int, int]] = ((16, 16),)) -> Layout:
    masks = [lambda size, box=box: torch.from_numpy(coverage(Region("a", box), size)) for box in boxes]
    return Layout(masks, weights or [1.0] * len(boxes), sizes)


def test_shares_of_the_background_and_of_regions_that_overlap() -> None:
    layout = layout_of(LEFT, MIDDLE, weights=(1.0, 3.0))
    shares = layout.shares((4, 8))
    torch.testing.assert_close(shares.sum(0), torch.ones(4, 8))
    assert shares[:, 1, 3].tolist() == [0.0, 0.25, 0.75], "both regions"
    assert shares[:, 0, 0].tolist() == [0.0, 1.0, 0.0], "the left one"
    assert shares[:, 1, 5].tolist() == [0.0, 0.0, 1.0], "the middle one"
    assert shares[:, 0, 7].tolist() == [1.0, 0.0, 0.0], "none"


def test_a_latent_that_a_region_covers_in_part_is_the_background_otherwise() -> None:
    layout = layout_of((0.0, 0.0, 0.125, 1.0))
    assert layout.shares((1, 2))[:, 0].tolist() == [[0.75, 1.0], [0.25, 0.0]]


def test_there_is_no_background_where_regions_cover_all() -> None:
    thirds = [(i / 3, 0.0, (i + 1) / 3, 1.0) for i in range(3)]
    assert not layout_of(*thirds, sizes=[(16, 16), (7, 5), (1, 1)]).has_background
    gap = layout_of(thirds[0], (0.334, 0.0, 1.0, 1.0), sizes=[(16, 16)])
    assert gap.has_background
    assert len(gap.masks((16, 16))) == 3


# ---- What is drawn


def first_denoised(model: Model, prompt: str, method: Any = "direct", **options: Any) -> Tensor:
    return next(cutdiff.denoise(model, prompt, method=method, **{**QUICK, **options})).denoised


def test_an_estimate_is_the_sum_of_those_of_the_prompts_by_their_masks(tiny_model: Model) -> None:
    """Σ weight · mask · D / Σ weight · mask, each with a negative prompt of its own, and the run's prompt elsewhere."""
    drawn = [
        Region(HOUSE, LEFT, weight=3, negative_prompt="a tent"),
        Region(TREE, MIDDLE),
    ]
    common = {"negative_prompt": "at night", "seed": 5}
    ours = first_denoised(tiny_model, TENT, regions=drawn, bootstrapping=0.0, **common)
    house = first_denoised(tiny_model, HOUSE, negative_prompt="a tent", seed=5)
    tree, tent = (first_denoised(tiny_model, prompt, **common) for prompt in (TREE, TENT))
    left, middle = torch.zeros(2, 8, 16)
    left[:, :8], middle[2:6, 4:12] = 1, 1
    rest = 1 - torch.maximum(left, middle)
    expected = (3 * left * house + middle * tree + rest * tent) / (3 * left + middle + rest)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(house, first_denoised(tiny_model, HOUSE, **common), rtol=1e-3, atol=1e-4)


def test_bootstrapping_shows_a_region_a_colour_around_itself(tiny_model: Model) -> None:
    draws, mask = Draws((5,)), torch.zeros(8, 16)
    mask[:, :8] = 1

    def on_color(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            image = draws.background_colors(step)[:, :, None, None].expand(1, 3, 64, 64)
            plain = torch.nn.functional.interpolate(run.encode(image), (8, 16), mode="bicubic")
            around = plain + sigma * draws.noise((1, 4, 8, 16))
            return run.denoiser(mask * x + (1 - mask) * around, sigma, step)

        return [Stage("direct", range(run.num_steps), denoise)]

    ours = first_denoised(tiny_model, TREE, regions=regions((HOUSE, LEFT)), seed=5)
    house, tree = first_denoised(tiny_model, HOUSE, on_color, seed=5), first_denoised(tiny_model, TREE, seed=5)
    torch.testing.assert_close(ours, mask * house + (1 - mask) * tree, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mask * ours, mask * first_denoised(tiny_model, HOUSE, seed=5), rtol=1e-3, atol=1e-4)


def test_bootstrapping_lasts_for_the_first_steps_and_changes_its_colour() -> None:
    encoded: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        encoded.append(images)
        return images[:, :, ::8, ::8]

    draws, x = Draws((1, 2)), torch.randn(2, 3, 8, 8)
    layout = layout_of(LEFT, (0.5, 0.0, 0.75, 1.0), sizes=[(8, 8)])
    boot = Bootstrapping(range(2), layout, draws, encode, 16)
    for step in range(2):
        for sigma in (3.0, 0.5):
            background, left, right = boot.shown(x, sigma, step)
            around = draws.background_colors(step)[:, :, None, None] + sigma * draws.noise((2, 3, 8, 8))
            assert torch.equal(background, x)
            torch.testing.assert_close(left, torch.cat([x[..., :4], around[..., 4:]], 3))
            torch.testing.assert_close(right, torch.cat([around[..., :4], x[..., 4:6], around[..., 6:]], 3))
    assert not torch.equal(encoded[0], encoded[-1])
    assert encoded[0].shape == (2, 3, 16, 16)
    assert all(torch.equal(each, x) for each in boot.shown(x, 0.1, 2))
    assert len(encoded) == 4, "nothing is encoded where nothing is shown"
    halves = replace(boot, layout=layout_of(LEFT, RIGHT, sizes=[(8, 8)]))
    left, right = halves.shown(x, 3.0, 0)
    assert torch.equal(left[..., :4], x[..., :4])
    assert torch.equal(right[..., 4:], x[..., 4:])
    assert not torch.isclose(right[..., :4], x[..., :4]).any()


def test_colours_of_backgrounds() -> None:
    draws = Draws((3, 4))
    colors = torch.stack([draws.background_colors(step) for step in range(500)])  # (steps, images, RGB)
    assert colors.shape == (500, 2, 3)
    assert colors.dtype == torch.float32
    assert 0 <= colors.min() < 0.01 < 0.99 < colors.max() <= 1
    torch.testing.assert_close(colors.mean(dim=0), torch.full((2, 3), 0.5), rtol=0, atol=0.05)
    assert torch.equal(draws.background_colors(7)[1:], Draws((4,)).background_colors(7))
    assert not torch.equal(draws.background_colors(7)[0], draws.noise((2, 3, 1, 1))[0].flatten())


# ---- On every method


SOLVERS = ("euler", "heun", "euler_ancestral", "unipc")


@pytest.mark.parametrize("method", METHODS)
def test_a_region_of_everything_is_the_run_with_its_prompt(tiny_model: Model, method: str) -> None:
    """To the bit, whatever the run's own prompt, and no evaluation more."""
    options = {**QUICK, "method": method}
    ours = cutdiff.generate(tiny_model, TENT, regions=regions((HOUSE, ALL)), **options)
    plain = cutdiff.generate(tiny_model, HOUSE, **options)
    assert torch.equal(ours.latents, plain.latents)
    assert ours.record["network_evaluations"] == plain.record["network_evaluations"]


@pytest.mark.parametrize("method", METHODS)
def test_two_regions_of_one_prompt_are_one(tiny_model: Model, method: str) -> None:
    """And with the run's prompt in all of them, none; each of them is evaluated."""
    solver = SOLVERS[[*METHODS].index(method) % len(SOLVERS)]
    options = {**QUICK, "method": method, "solver": solver, "bootstrapping": 0.0}
    plain = cutdiff.generate(tiny_model, HOUSE, **{k: v for k, v in options.items() if k != "bootstrapping"})
    halves = cutdiff.generate(tiny_model, TENT, regions=regions((HOUSE, LEFT), (HOUSE, RIGHT)), **options)
    inside = cutdiff.generate(tiny_model, HOUSE, regions=regions((HOUSE, MIDDLE)), **options)
    for ours in (halves, inside):
        torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-3, atol=1e-3)
        assert ours.record["network_evaluations"] == 2 * plain.record["network_evaluations"]


@pytest.mark.parametrize("method", METHODS)
def test_two_prompts_in_any_order_draw_a_picture_of_their_own(tiny_model: Model, method: str) -> None:
    options = {**QUICK, "method": method}
    one = latents(tiny_model, TENT, regions=regions((HOUSE, LEFT), (TREE, MIDDLE)), **options)
    other = latents(tiny_model, TENT, regions=regions((TREE, MIDDLE), (HOUSE, LEFT)), **options)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    for prompt in (HOUSE, TREE, TENT):
        assert not torch.allclose(one, latents(tiny_model, prompt, **options), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_do_not_see_each_other(tiny_model: Model, method: str) -> None:
    options = {**QUICK, "method": method, "regions": regions((HOUSE, LEFT), (TREE, MIDDLE))}
    both = latents(tiny_model, [TENT, "a red tent"], seed=3, **options)
    for i, prompt in enumerate((TENT, "a red tent")):
        alone = latents(tiny_model, prompt, seed=3 + i, **options)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", ["apg,momentum=-0.5", "rescale", "cfg_plus_plus", "pag"])
def test_every_prompt_has_a_memory_of_guidance(tiny_model: Model, guidance: str) -> None:
    """A guidance that remembers, on two regions of one prompt, is that on one."""
    own = {} if guidance == "cfg_plus_plus" else {"guidance_scale": 3.0}
    options = {"num_steps": 4, **SIZE, "method": "direct", "guidance": guidance, **own}
    ours = cutdiff.generate(
        tiny_model, TENT, regions=regions((HOUSE, LEFT), (HOUSE, RIGHT)), bootstrapping=0.0, **options
    ).latents
    plain = cutdiff.generate(tiny_model, HOUSE, **options).latents
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_a_prompt_of_a_region_may_change_by_step_and_be_a_sum(tiny_model: Model) -> None:
    options = {"method": "direct", "bootstrapping": 0.0}
    for prompt in ("[a red house:a blue tree:0.5]", "a red house AND a blue tree", "(red:1.4) house BREAK tent"):
        ours = latents(tiny_model, TENT, regions=regions((prompt, LEFT), (prompt, RIGHT)), **options)
        torch.testing.assert_close(ours, latents(tiny_model, prompt, method="direct"), rtol=1e-3, atol=1e-3)


def test_a_mask_of_pixels_draws_as_its_box(tiny_model: Model) -> None:
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    boxed = latents(tiny_model, TENT, regions=regions((HOUSE, LEFT)))
    assert torch.equal(latents(tiny_model, TENT, regions=[Region(HOUSE, mask=mask.numpy())]), boxed)


# ---- Stages


SCHEDULE = euler_schedule(NoiseConfig(), 4)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NEVER = Bootstrapping(range(0), layout_of(LEFT), Draws((0,)), lambda images: images, 8)


def a_run(value: float, **options: Any) -> list[Stage | Phase]:
    """A stage whose estimates are one value, and a phase on a larger canvas."""

    def begin(x: Tensor) -> tuple[Tensor, Stage]:
        return torch.full((*x.shape[:2], 16, 16), value), Stage("b", range(4, 8), lambda x, sigma, step: x * value)

    stage = Stage("a", range(4), lambda x, sigma, step: 0 * x + value, (8, 8))
    return [replace(stage, **options), Phase(range(4, 8), (16, 16), begin)]


def joined(*runs: list[Stage | Phase]) -> list[Stage | Phase]:
    layout = layout_of(LEFT, sizes=[(8, 8), (16, 16)])
    return zipped(runs, layout, (16, 16), replace(NEVER, layout=layout), torch.device("cpu"))


def by_part(size: int, background: float, left: float) -> Tensor:
    values = torch.full((size, size), background)
    values[:, : size // 2] = left
    return values


def test_stages_are_joined_whole() -> None:
    """Estimates, states that a step starts from, what a stage ends with, and what a phase begins with."""
    runs = [
        a_run(
            value,
            before=lambda x, sigma, step, value=value: x + value,
            end=lambda x, value=value: x - 10 * value,
            sigmas=(3.0, 2.0, 1.0, 0.5, 0.1),
            targets=(2.0, 1.0, 0.5, 0.1),
            cost=lambda step, value=value: step > value,
        )
        for value in (1.0, 2.0)
    ]
    stage, phase = joined(*runs)
    assert isinstance(stage, Stage)
    assert isinstance(phase, Phase)
    assert (stage.name, stage.steps, stage.size) == ("a", range(4), (8, 8))
    assert (stage.sigmas, stage.targets) == ((3.0, 2.0, 1.0, 0.5, 0.1), (2.0, 1.0, 0.5, 0.1))
    assert stage.before is not None
    assert stage.end is not None
    assert stage.cost is not None
    assert [stage.cost(step) for step in range(4)] == [
        (False, False, False), (False, False, False), (False, True, False), (False, True, True),
    ]  # fmt: skip
    parts = by_part(8, 1.0, 2.0)
    torch.testing.assert_close(stage.denoise(X, 1.0, 0), parts.expand_as(X))
    torch.testing.assert_close(stage.before(X, 1.0, 0), X + parts)
    torch.testing.assert_close(stage.end(X), X - 10 * parts)
    state, later = phase.begin(X)
    assert (phase.steps, phase.size, later.name, later.steps) == (range(4, 8), (16, 16), "b", range(4, 8))
    torch.testing.assert_close(state, by_part(16, 1.0, 2.0).expand_as(state))
    torch.testing.assert_close(later.denoise(state, 1.0, 4), by_part(16, 1.0, 4.0).expand_as(state))
    assert (later.before, later.end) == (None, None)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "unipc"])
def test_a_joined_run_solves_as_each_part_does(solver: str) -> None:
    """With estimates that look at one latent alone, the parts of the canvas are those of the single runs."""

    def noise(shape: tuple[int, ...], step: int, part: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * part + step))

    def run(scale: float) -> list[Stage | Phase]:
        return [Stage("a", range(4), lambda x, sigma, step: torch.tanh(x * scale / math.hypot(sigma, 1)))]

    def solved(stages: Sequence[Stage | Phase]) -> Tensor:
        return [*solve(stages, X, SCHEDULE, resolve("solver", solver), noise)][-1].latents

    layout = layout_of(LEFT, sizes=[(8, 8)])
    ours = solved(zipped([run(1.0), run(2.0)], layout, (8, 8), replace(NEVER, layout=layout), torch.device("cpu")))
    torch.testing.assert_close(ours, torch.cat([solved(run(2.0))[..., :4], solved(run(1.0))[..., 4:]], dim=3))


OTHER_STAGES = {
    "steps": {"steps": range(3)},
    "a name": {"name": "c"},
    "a size": {"size": (4, 4)},
    "sigmas": {"sigmas": (3.0, 2.0, 1.0, 0.5, 0.1)},
    "a state": {"before": lambda x, sigma, step: x},
    "an end": {"end": lambda x: x},
}


@pytest.mark.parametrize("name", OTHER_STAGES)
def test_stages_that_depend_on_the_prompt_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^has the stages .* for one prompt and .*: regions need the same for all"):
        joined(a_run(1.0), a_run(2.0, **OTHER_STAGES[name]))
    with pytest.raises(ValueError, match="for one prompt"):
        joined(a_run(1.0), a_run(2.0)[:1])


# ---- What a run says of them


def test_a_record_has_regions_by_their_content(tiny_model: Model) -> None:
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    drawn = [Region(HOUSE, LEFT, weight=2), Region(TREE, mask=mask.numpy(), negative_prompt="")]
    record = cutdiff.generate(tiny_model, TENT, regions=drawn, bootstrapping=0.5, method="direct", **QUICK).record
    house, tree = record["regions"]
    assert house == {"prompt": HOUSE, "box": [0.0, 0.0, 0.5, 1.0], "weight": 2.0}
    assert (tree["prompt"], tree["mask"]["name"], tree["negative_prompt"]) == (TREE, "pixels", "")
    assert len(tree["mask"]["sha256"]) == 64
    assert record["bootstrapping"] == 0.5
    plain = Settings(method="direct").described()
    assert not {"regions", "bootstrapping"} & plain.keys()


def test_a_set_with_regions_goes_on(quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of regions lies beside that of prompts, and the mask beside that; names and places do not matter."""
    folder = tmp_path / "own"
    folder.mkdir()
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "half.png")
    drawn = [{"prompt": "red", "box": [0, 0, 0.5, 1]}, {"prompt": "b", "mask": "half.png"}]
    (folder / "r.json").write_text(json.dumps(drawn))
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text('a\n{"prompt": "b", "regions": "own/r.json", "bootstrapping": 1}\n')
    size = ["--width", "128", "--height", "64"]
    given = ["--model", str(quick_folder), "--prompts", str(prompts), "--out", str(out)]
    run = [*given, "--method", "direct", "--steps", "1", *size]
    assert main(run) == 0
    first, second = sorted(out.glob("*.png"))
    record = json.loads(second.with_suffix(".json").read_text())
    assert record["regions"][0] == drawn[0]
    assert record["regions"][1]["mask"]["name"] == "half.png"
    assert record["network_evaluations"] == 4
    assert "so PROMPT was not read" in capsys.readouterr().err
    inline = [drawn[0], {**drawn[1], "mask": "own/half.png"}]
    (tmp_path / "inline.txt").write_text(json.dumps({"prompt": "b", "regions": inline, "bootstrapping": 1}))
    again = [str(tmp_path / "inline.txt") if word == str(prompts) else word for word in run]
    assert main([str(tmp_path / "in") if word == str(out) else word for word in again]) == 0
    (path,) = (tmp_path / "in").glob("*.json")
    assert json.loads(path.read_text())["fingerprint"] == record["fingerprint"], "they may stand in the line itself"
    capsys.readouterr()
    before = second.stat().st_mtime_ns
    first.unlink()
    (folder / "half.png").rename(folder / "other.png")
    (folder / "s.json").write_text(json.dumps(drawn).replace("half.png", "other.png"))
    prompts.write_text(prompts.read_text().replace("r.json", "s.json"))
    assert main(run) == 0
    assert "1 of 2 pictures are finished already" in capsys.readouterr().err
    assert second.stat().st_mtime_ns == before
    mask[0, 0] = 255
    Image.fromarray(mask).save(folder / "other.png")
    assert main(run) == 2
    assert f"{second} was drawn with --regions [" in capsys.readouterr().err


def test_a_region_that_others_overlap_is_told_of(
    quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps([{"prompt": "a", "box": ALL}, {"prompt": "b", "box": LEFT}]))
    run = ["a", "--model", str(quick_folder), "--method", "direct", "--steps", "1", "--width", "64", "--height", "64"]
    assert main([*run, "--regions", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]) == 0
    assert "cutdiff: --regions region 2 ('b') has 50% of what it covers" in capsys.readouterr().err


def test_a_transparent_mask_is_said_to_be_that_of_its_region() -> None:
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 4, 8))
    (notice,) = Settings(regions=[Region("a", (0.5, 0, 1, 1)), Region("b", mask=mask)]).notices()
    assert notice.startswith("regions=region 2: mask=Image of (8, 8) has transparent parts")


def test_a_plan_counts_regions_whose_terms_change(tiny_model: Model) -> None:
    """Here a region has one term, and then two, and the run's prompt has one, or is drawn nowhere."""
    sizes = sized(SDXL._replace(network=tiny_model.unet.config, vae=tiny_model.vae.config), torch.float32)
    for boxes in ((LEFT,), (LEFT, RIGHT)):
        drawn = [Region("[a house:a tree AND a tent:0.5]", box) for box in boxes]
        settings = Settings(method="direct", regions=drawn, **{**QUICK, "num_steps": 4})
        record = cutdiff.generate(tiny_model, TENT, settings).record
        planned = walk(sizes, settings)
        assert sum(stage.total.evaluations for stage in planned.stages) == record["network_evaluations"]
