"""RectifiedHR: its published runs, and the steps, canvases and guidance scales that it grows by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from published_rectifiedhr import GUIDANCE, RUNS, UNET, VAE, Published, noises, sampled
from replayed import model_of, published_latents
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.direct import direct
from cutdiff.methods.rectifiedhr import RectifiedHR
from cutdiff.methods.shared import Kept, Run, Space
from cutdiff.models.inside import replaced
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.guidance import CFG
from cutdiff.sampling.resize import Resampling, resize
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.settings import Settings

PROMPT = "a red house at night"


# ---- The published runs


@pytest.fixture(scope="module")
def published_model() -> Model:
    return model_of(UNET, VAE)


@dataclass(frozen=True)
class Replayed(Draws):
    """The noise of a published run."""

    seeds: tuple[int, ...] = (0,)
    drawn: tuple[Tensor, ...] = ()

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return self.phase_noise(shape, 1)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        assert self.drawn[phase - 1].shape == shape
        return self.drawn[phase - 1]


def replayed(model: Model, published: Published, **options: Any) -> Tensor:
    """The latents of a run with the settings and draws of a published one, every second of them."""
    first, *_, last = published.canvases
    settings: dict[str, Any] = {
        "num_sizes": len(published.canvases),
        "first_size": first[0] / last[0],
        "first_refresh": published.first_refresh / published.num_steps,
        "refresh_power": published.refresh_power,
        "max_guidance_scale": published.max_guidance_scale,
        "guidance_power": published.guidance_power,
        "height": 8 * last[0],
        "width": 8 * last[1],
        "num_steps": published.num_steps,
        "solver": published.solver,
        "guidance_scale": GUIDANCE,
        "draws": Replayed(drawn=noises(published)),
    }
    return sampled(steps(model, **settings | options)[-1].latents)


def resized_in_8_bits(image: Tensor, size: tuple[int, int], _: str) -> Tensor:
    picture = Image.fromarray((255 * image[0].permute(1, 2, 0).numpy()).astype(np.uint8))
    return torch.from_numpy(np.array(picture.resize(size[::-1]))).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(
    published_model: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its pictures of 8 bits, some of which flip, and where guidance makes the most of that, at twice the size."""
    published, expected = RUNS[name], published_latents("rectifiedhr", name)
    ours = replayed(published_model, published)
    assert relative_error(ours, expected) < (1e-2 if len(published.canvases) == 2 else 6e-2)
    if name == "2x2":
        for other in ({"resampling": "bicubic"}, {"enlarged_in": "latents"}, {"max_guidance_scale": None}):
            assert relative_error(replayed(published_model, published, **other), expected) > 1.5e-2
    monkeypatch.setattr("cutdiff.sampling.resize.resize", resized_in_8_bits)
    assert relative_error(replayed(published_model, published), expected) < 5e-3


def test_defaults_are_the_settings_of_the_published_runs(published_model: Model) -> None:
    for name in ("2x2", "4x4"):
        published = RUNS[name]
        size = {"height": 8 * published.canvases[-1][0], "width": 8 * published.canvases[-1][1]}
        run = {"num_steps": published.num_steps, "guidance_scale": GUIDANCE}
        draws = Replayed(drawn=noises(published))
        plain = steps(published_model, **size, **run, solver="ddim", draws=draws)[-1].latents
        assert torch.equal(sampled(plain), replayed(published_model, published))


# ---- Canvases, steps and scales


def steps(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> list[cutdiff.Step]:
    return list(cutdiff.denoise(model, prompt, **{"method": "rectifiedhr", "num_steps": 5, **options}))


def run_of(model: Model, size: tuple[int, int], **options: Any) -> Run:
    """A run on a canvas of so many latents."""
    runs: list[Run] = []

    def spy(run: Run) -> list[Stage]:
        runs.append(run)
        return direct(run)

    height, width = (8 * side for side in size)
    prepare(model, PROMPT, Settings(method=spy, height=height, width=width, **options), None)
    return runs[0]


@pytest.mark.parametrize(
    ("size", "options", "sizes", "refreshes", "scales"),
    [
        ((16, 16), {}, [(8, 8)], [30], [30.0]),
        ((24, 15), {}, [(8, 5)], [30], [30.0]),
        ((32, 32), {}, [(8, 8), (20, 20)], [40, 47], [36.8198, 50.0]),
        # the settings that the published code has for 4096 × 2048 pixels, an eighth of them
        (
            (64, 32),
            {"num_sizes": 3, "first_size": 0.375, "refresh_power": 1, "guidance_power": 1},
            [(24, 12), (44, 22)],
            [40, 45],
            [27.5, 50.0],
        ),
        ((25, 9), {}, [(8, 3), (17, 6)], [40, 47], [36.8198, 50.0]),  # 2.88, 16.5 and 5.94, rounded up
        ((8, 5), {}, [], [], []),
        ((8, 8), {"first_size": 0.5, "first_refresh": 0.2}, [(4, 4)], [10], [30.0]),
        # the paper's own refreshes of 4096 × 4096, by their published power
        ((32, 32), {"refresh_power": 0.8}, [(8, 8), (20, 20)], [40, 45], [36.8198, 50.0]),
    ],
)
def test_canvases_steps_and_guidance_scales_are_the_published_ones(
    tiny_model: Model,
    size: tuple[int, int],
    options: dict[str, Any],
    sizes: list[tuple[int, int]],
    refreshes: list[int],
    scales: list[float],
) -> None:
    run, method = run_of(tiny_model, size, num_steps=50, guidance_scale=5.0), RectifiedHR(**options)
    count = len(sizes) + 1
    assert method.sizes(run) == [*sizes, size]
    assert [part.start for part in method.steps(run, count)] == [0, *refreshes]
    assert [part.stop for part in method.steps(run, count)] == [*refreshes, 50]
    first, *others = method.guidance_scales(run, count)
    assert first is None
    assert others == pytest.approx(scales)


@pytest.mark.parametrize("count", [1, 10**11])
def test_a_number_of_canvases_that_cannot_be_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_sizes={count} must be a whole number in 2 … 1000 or None"):
        RectifiedHR(num_sizes=count)


def test_a_step_number_becomes_a_share_and_comes_back(tiny_model: Model) -> None:
    run = run_of(tiny_model, (16, 16), num_steps=100)
    for first in range(100):  # 0.29 · 100 is 28.999999999999996
        assert RectifiedHR(first_refresh=first / 100).steps(run, 2) == [range(first), range(first, 100)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_up_to_the_native_size_it_is_direct_to_the_bit(tiny_model: Model, height: int, width: int) -> None:
    plain = steps(tiny_model, method="direct", height=height, width=width)[-1]
    assert torch.equal(steps(tiny_model, height=height, width=width)[-1].latents, plain.latents)


def test_every_step_is_taken_once_and_the_first_on_the_native_picture(tiny_model: Model) -> None:
    drawn = steps(tiny_model, height=256, width=192, num_steps=10)
    assert [step.index for step in drawn] == list(range(10))
    assert [step.stage for step in drawn] == ["phase 1"] * 8 + ["phase 2"] + ["phase 3"]
    assert [tuple(step.latents.shape[2:]) for step in drawn[7:]] == [(8, 6), (20, 15), (32, 24)]
    native = steps(tiny_model, method="direct", height=64, width=48, num_steps=10)
    assert [step.sigma for step in drawn] == [step.sigma for step in native]
    assert torch.equal(drawn[7].latents, native[7].latents)


@pytest.mark.parametrize(
    ("num_steps", "options", "stages"),
    [
        (1, {}, ["phase 3"]),
        (2, {}, ["phase 1", "phase 3"]),
        (5, {}, ["phase 1"] * 4 + ["phase 3"]),
        (3, {"first_refresh": 0.0}, ["phase 2"] * 2 + ["phase 3"]),
        (3, {"first_refresh": 1.0}, ["phase 1"] * 2 + ["phase 3"]),
        (4, {"refresh_power": 0.0, "first_refresh": 0.5}, ["phase 1"] * 3 + ["phase 3"]),
        (4, {"num_sizes": 9, "first_refresh": 0.5}, ["phase 1"] * 2 + ["phase 3"] + ["phase 9"]),
    ],
)
def test_canvases_without_steps_are_left_out_but_for_the_last(
    tiny_model: Model, num_steps: int, options: dict[str, Any], stages: list[str]
) -> None:
    drawn = steps(tiny_model, height=256, width=256, num_steps=num_steps, **options)
    assert [step.stage for step in drawn] == stages
    assert drawn[-1].latents.shape == (1, 4, 32, 32)
    assert drawn[-1].latents.isfinite().all()


# ---- A refresh


@pytest.mark.parametrize("enlarged_in", ["pixels", "latents"])
def test_a_refresh_noises_the_enlarged_estimate_to_the_next_sigma(tiny_model: Model, enlarged_in: Space) -> None:
    run = run_of(tiny_model, (16, 12), num_steps=5)
    native, refresh = RectifiedHR(enlarged_in=enlarged_in).stages(run)
    assert isinstance(native, Stage)
    assert isinstance(refresh, Phase)
    assert (native.steps, refresh.steps) == (range(3), range(3, 5))
    estimate = native.denoise(5 * run.draws.noise((1, 4, 8, 6)), 5.0, 2)
    x, stage = refresh.begin(torch.full((1, 4, 8, 6), torch.nan))
    if enlarged_in == "pixels":
        image = resize(cutdiff.decode(tiny_model, estimate), (128, 96), "catmull_rom")
        assert image.amin() < 0 or image.amax() > 1, "the kernel goes past what a picture holds"
        enlarged = cutdiff.encode(tiny_model, image.clamp(0, 1))
    else:
        enlarged = resize(estimate, (16, 12), "catmull_rom")
    assert torch.equal(x, enlarged + run.schedule.sigmas[3] * run.draws.phase_noise((1, 4, 16, 12), 2))
    assert isinstance(stage.denoise, Kept)
    assert isinstance(stage.denoise.denoise, Denoiser)
    assert stage.denoise.denoise.guidance == CFG(30.0)


def test_each_refresh_has_noise_of_its_own(tiny_model: Model) -> None:
    drawn: list[tuple[int, tuple[int, ...]]] = []

    class Recorded(Draws):
        def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
            drawn.append((phase, shape))
            return super().phase_noise(shape, phase)

    steps(tiny_model, height=256, width=256, num_steps=10, draws=Recorded((0,)))
    assert drawn == [(2, (1, 4, 20, 20)), (3, (1, 4, 32, 32))]


@pytest.mark.parametrize("options", [{"enlarged_in": "latents"}, {"first_size": 1.0}])
def test_without_pictures_the_vae_is_not_asked(tiny_model: Model, options: dict[str, Any]) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise AssertionError

    with replaced(tiny_model.vae, encode=fail, decode=fail):
        plain = steps(tiny_model, height=128, width=128, **options)
        with pytest.raises(AssertionError):
            steps(tiny_model, height=128, width=128)
    assert len({step.stage for step in plain}) == 2


def test_the_resampling_is_used(tiny_model: Model) -> None:
    options = {"height": 128, "width": 128, "guidance_scale": 1.0}
    pictures = [steps(tiny_model, resampling=r, **options)[-1].latents for r in get_args(Resampling)]
    for picture in pictures[1:]:
        assert relative_error(picture, pictures[0]) > 1e-3


# ---- Guidance


@pytest.mark.parametrize(
    ("own", "most", "evaluations"),
    [(5.0, "published", 10), (1.0, "published", 5), (1.0, None, 5), (1.0, 4.0, 3 + 4), (5.0, 1.0, 6 + 2)],
)
def test_a_run_without_guidance_has_none_unless_a_scale_is_given(
    tiny_model: Model, own: float, most: Any, evaluations: int
) -> None:
    record = cutdiff.generate(
        tiny_model, PROMPT, method="rectifiedhr", num_steps=5, guidance_scale=own, max_guidance_scale=most
    ).record
    assert record["network_evaluations"] == evaluations


def test_none_is_the_guidance_of_the_run(tiny_model: Model) -> None:
    options = {"height": 128, "width": 128, "guidance_scale": 4.0}
    assert torch.equal(
        steps(tiny_model, max_guidance_scale=None, **options)[-1].latents,
        steps(tiny_model, max_guidance_scale=4.0, **options)[-1].latents,
    )


def test_a_guidance_without_a_scale_is_named_and_can_be_kept(tiny_model: Model) -> None:
    def mine(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return conditional

    for side, most in ((128, 30.0), (256, 50.0)):  # that of the option, though the canvas between would have less
        with pytest.raises(ValueError, match=rf"^max_guidance_scale={most} needs a guidance with a guidance_scale"):
            cutdiff.denoise(tiny_model, PROMPT, method="rectifiedhr", guidance=mine, height=side, width=side)
    assert steps(tiny_model, guidance=mine, max_guidance_scale=None)[-1].latents.isfinite().all()
