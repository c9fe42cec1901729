"""DiffuseHigh: the published runs, the canvases on the way, sharpening, and what is held."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published_diffusehigh import GUIDANCE, RUNS, SEED
from replayed import CONFIG, model_of, noise, published_latents
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.diffusehigh import DiffuseHigh
from cutdiff.methods.shared import Run, Space
from cutdiff.models.inside import replaced
from cutdiff.models.unet import UNet
from cutdiff.pipeline import prepare
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.guidance import CFG
from cutdiff.sampling.split import Butterworth, Wavelet
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.settings import Settings
from cutdiff.specs import resolve, spec_of

PROMPT = "a red house at night"


# ---- The published code


class GivenNoise(Draws):
    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return noise((shape[2], shape[3]))


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    run = RUNS[name]
    height, width = (8 * side for side in run.sizes[-1])
    drawn = list(
        cutdiff.denoise(
            model_of(replace(CONFIG, native_size=run.native)),
            PROMPT,
            method=run.method,
            num_steps=run.num_steps,
            height=height,
            width=width,
            guidance_scale=GUIDANCE,
            solver="euler",
            draws=GivenNoise((SEED,)),
        )
    )
    sizes = list(dict.fromkeys((step.stage, *step.latents.shape[2:]) for step in drawn))
    assert sizes == [(f"phase {i}", *size) for i, size in enumerate([(run.native, run.native), *run.sizes], start=1)]
    assert relative_error(drawn[-1].latents, published_latents("diffusehigh", name)) < 1e-4


# ---- Canvases and steps


def stages_seen(model: Model, method: str, height: int, width: int) -> list[tuple[str, int, int, int]]:
    """For each stage its name, the size of its canvas and the number of its steps."""
    steps = cutdiff.denoise(model, PROMPT, method=method, height=height, width=width, num_steps=4)
    counts = Counter((step.stage, step.latents.shape[2], step.latents.shape[3]) for step in steps)
    return [(*stage, count) for stage, count in counts.items()]


@pytest.mark.parametrize(
    ("options", "size", "sizes"),
    [
        ("", (16, 16), [(8, 8), (12, 12), (16, 16)]),
        ("", (12, 16), [(6, 8), (9, 12), (12, 16)]),
        ("", (5, 12), [(3, 8), (5, 12)]),
        ("", (1, 16), [(1, 8), (1, 12), (1, 16)]),
        ("", (20, 7), [(8, 2), (16, 5), (20, 7)]),
        ("", (24, 24), [(8, 8), (16, 16), (24, 24)]),
        (",factors=()", (16, 16), [(8, 8), (16, 16)]),
        (",factors=(3,1.5,1,2)", (16, 16), [(8, 8), (12, 12), (16, 16)]),
        (",native_shape=square", (9, 15), [(8, 8), (7, 12), (9, 15)]),
        (",native_shape=square", (1, 9), [(8, 8), (1, 9)]),
    ],
)
def test_a_picture_grows_in_its_shape(
    tiny_model: Model, options: str, size: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    drawn = stages_seen(tiny_model, "diffusehigh" + options, 8 * size[0], 8 * size[1])
    expected = [(f"phase {i}", *canvas, 2 if i > 1 else 4) for i, canvas in enumerate(sizes, start=1)]
    assert drawn == expected


@pytest.mark.parametrize("options", ["", ",native_shape=square", ",size_conditioning=canvas"])
@pytest.mark.parametrize("size", [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, options: str, size: tuple[int, int]) -> None:
    drawn, direct = (
        list(cutdiff.denoise(tiny_model, PROMPT, method=method, height=size[0], width=size[1], num_steps=3))
        for method in ("diffusehigh" + options, "direct")
    )
    assert torch.equal(drawn[-1].latents, direct[-1].latents)


@pytest.fixture
def run(tiny_model: Model) -> Callable[..., Run]:
    """Makes a run on 16×16 latents, twice the native size, whose VAE repeats pixels and takes their mean."""

    def make(**options: Any) -> Run:
        runs: list[Run] = []

        def spy(run: Run) -> list[Stage | Phase]:
            runs.append(run)
            return [*DiffuseHigh().stages(run)]

        prepare(tiny_model, PROMPT, Settings(method=spy, height=128, width=128, **options), None)
        return replace(
            runs[0],
            decode=lambda x: F.interpolate(x, scale_factor=8, mode="nearest"),
            encode=lambda x: F.avg_pool2d(x, 8),
        )

    return make


def last_phase(run: Run, previous: Tensor, **options: Any) -> tuple[Tensor, Stage]:
    """The first state and the stage of the largest canvas, which begins with `previous`."""
    phase = DiffuseHigh(**options).stages(run)[-1]
    assert isinstance(phase, Phase)
    start, stage = phase.begin(previous)
    assert phase.steps == stage.steps
    return start, stage


@pytest.mark.parametrize(
    ("num_steps", "redrawn", "held", "first", "until"),
    [
        (50, 0.3, 0.1, 35, 40),
        (25, 0.3, 0.1, 17, 20),
        (10, 0.3, 0.1, 7, 8),
        (10, 1.0, 0.0, 0, 0),
        (10, 0.0, 1.0, 9, 10),
        (1, 0.3, 0.1, 0, 1),
    ],
)
def test_the_last_steps_are_taken_again_and_the_first_of_them_are_held(
    run: Callable[..., Run], num_steps: int, redrawn: float, held: float, first: int, until: int
) -> None:
    options = {"strength": redrawn, "held_fraction": held}
    _, stage = last_phase(run(num_steps=num_steps), torch.zeros(1, 4, 12, 12), **options)
    assert [step % num_steps for step in stage.steps] == list(range(first, num_steps))
    assert stage.cost is not None
    assert [stage.cost(step) for step in stage.steps] == [step < until for step in range(first, num_steps)]


# ---- Enlarged, sharpened, held


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("space", ["pixels", "latents"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.5])
def test_a_canvas_starts_from_the_enlarged_picture_sharpened_and_noised(
    run: Callable[..., Run], space: Space, sharpness: float
) -> None:
    """The paper's (1 + α)·I − α·blur(I), with a Gaussian of 3×3 whose border is mirrored."""
    drawing, previous = run(num_steps=10), picture(1, 4, 12, 12)
    start, _ = last_phase(drawing, previous, enlarged_in=space, sharpness=sharpness, blur=(0.7, 0.7))
    enlarged = drawing.decode(previous) if space == "pixels" else previous
    enlarged = F.interpolate(enlarged, (128, 128) if space == "pixels" else (16, 16), mode="bicubic")
    taps = torch.tensor([math.exp(-1 / (2 * 0.7**2)), 1.0, math.exp(-1 / (2 * 0.7**2))])
    kernel = torch.outer(taps, taps).div(taps.sum() ** 2).expand(4, 1, 3, 3)
    blurred = F.conv2d(F.pad(enlarged, (1, 1, 1, 1), mode="reflect"), kernel, groups=4)
    sharp = (1 + sharpness) * enlarged - sharpness * blurred
    guide = drawing.encode(sharp) if space == "pixels" else sharp
    noise = drawing.draws.phase_noise((1, 4, 16, 16), 3)
    torch.testing.assert_close(start, guide + drawing.schedule.sigmas[7] * noise, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("enlarged_in", ["pixels", "latents"])
@pytest.mark.parametrize("held_in", ["pixels", "latents"])
def test_an_estimate_is_held_in_its_lowest_band_alone(
    run: Callable[..., Run], enlarged_in: Space, held_in: Space
) -> None:
    """LL becomes that of the enlarged picture, the other bands stay; later estimates are not touched."""
    estimate, seen = picture(1, 4, 16, 16, seed=1), list[Tensor]()
    drawing = run(num_steps=10)
    plain, denoiser = drawing.encode, lambda *_args, **_options: estimate

    def encode(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return plain(pictures)

    drawing = replace(drawing, encode=encode)
    phase = DiffuseHigh(enlarged_in=enlarged_in, held_in=held_in).phase(drawing, 2, (8, 8))
    object.__setattr__(drawing, "denoiser", denoiser)
    start, stage = phase.begin(picture(1, 4, 8, 8))
    guide = start - drawing.schedule.sigmas[7] * drawing.draws.phase_noise((1, 4, 16, 16), 2)
    target = seen[0] if enlarged_in == "pixels" else guide
    if enlarged_in != held_in:
        target = guide if held_in == "latents" else drawing.decode(guide)
    held = stage.denoise(start, drawing.schedule.sigmas[7], 17)
    held, before = (seen[-1], drawing.decode(estimate)) if held_in == "pixels" else (held, estimate)
    wavelet = Wavelet("db4")
    bands = wavelet.bands(before)._replace(ll=wavelet.bands(target).ll)
    expected = wavelet.join(bands, (held.shape[2], held.shape[3]))
    torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(stage.denoise(start, drawing.schedule.sigmas[8], 18), estimate)


def test_in_latents_no_vae_is_needed(run: Callable[..., Run]) -> None:
    def no_picture(*_: Any) -> Tensor:
        raise AssertionError("the VAE was asked")

    drawing = replace(run(num_steps=2), encode=no_picture, decode=no_picture)
    start, stage = last_phase(drawing, picture(1, 4, 12, 12), enlarged_in="latents", held_in="latents")
    assert stage.denoise(start, drawing.schedule.sigmas[1], 5).shape == (1, 4, 16, 16)


def test_what_is_held_may_be_another_band(tiny_model: Model) -> None:
    bands = ["wavelet,name=db4", "wavelet", "gaussian,sigma=3", Butterworth()]
    drawn = [
        [*cutdiff.denoise(tiny_model, PROMPT, method=DiffuseHigh(held_band=band), num_steps=4)][-1].latents
        for band in bands
    ]
    assert all(relative_error(a, b) > 1e-4 for i, a in enumerate(drawn) for b in drawn[:i])


def test_each_picture_draws_its_blur_at_every_size() -> None:
    draws = Draws((3, 4, 5))
    widths = torch.stack([draws.blurs(phase, 0.1, 2.0) for phase in range(400)])  # (phases, images)
    assert widths.min() >= 0.1
    assert widths.max() <= 2.0
    torch.testing.assert_close(widths.mean(0), torch.full((3,), 1.05, dtype=torch.float64), rtol=0, atol=0.1)
    torch.testing.assert_close(widths.std(0), torch.full((3,), 0.548, dtype=torch.float64), rtol=0, atol=0.05)
    assert len(widths.unique()) == widths.numel()
    assert torch.equal(draws.blurs(7, 0.1, 2.0)[1:], Draws((4, 5)).blurs(7, 0.1, 2.0))
    assert torch.equal(draws.blurs(7, 0.5, 0.5), torch.full((3,), 0.5, dtype=torch.float64))


def test_the_bounds_of_the_blur_may_stand_either_way(tiny_model: Model) -> None:
    drawn = [
        [*cutdiff.denoise(tiny_model, PROMPT, method=DiffuseHigh(blur=blur), num_steps=2)][-1].latents
        for blur in ((0.1, 2.0), (2.0, 0.1), (2.0, 2.0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert relative_error(drawn[0], drawn[2]) > 1e-4


# ---- What the network is told, and guidance


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("diffusehigh", [(64, 48), (64, 48), (64, 48)]),
        ("diffusehigh,native_shape=square", [(64, 64), (64, 64), (64, 64)]),
        ("diffusehigh,size_conditioning=canvas", [(64, 48), (96, 72), (128, 96)]),
    ],
)
def test_the_size_that_the_network_is_told(tiny_model: Model, method: str, sizes: list[tuple[int, int]]) -> None:
    told: list[tuple[int, ...]] = []

    def forward(*inputs: Any) -> Tensor:
        told.append(tuple(inputs[4][0].int().tolist()))
        return UNet.forward(tiny_model.unet, *inputs)

    with replaced(tiny_model.unet, forward=forward):
        list(cutdiff.denoise(tiny_model, PROMPT, method=method, height=128, width=96, num_steps=1))
    assert told == [(*size, 0, 0, *size) for size in sizes]


@pytest.mark.parametrize(
    ("options", "scale", "expected"),
    [("", 7.5, 10.0), (",detail_guidance_scale=None", 7.5, 7.5), (",detail_guidance_scale=3", 7.5, 3.0)],
)
def test_larger_canvases_have_a_guidance_of_their_own(
    tiny_model: Model, options: str, scale: float, expected: float
) -> None:
    scales: list[float] = []

    class Heard(CFG):
        def scale_at(self, sigma: float, step: int) -> float:
            scales.append(self.guidance_scale)
            return super().scale_at(sigma, step)

    list(cutdiff.denoise(tiny_model, PROMPT, method="diffusehigh" + options, guidance=Heard(scale), num_steps=1))
    assert list(dict.fromkeys(scales)) == list(dict.fromkeys([scale, expected]))


def test_a_run_without_guidance_has_none_on_larger_canvases(tiny_model: Model) -> None:
    options = {"method": "diffusehigh", "height": 128, "width": 128, "num_steps": 4}
    assert cutdiff.generate(tiny_model, PROMPT, guidance_scale=1.0, **options).record["network_evaluations"] == 4 + 4
    assert cutdiff.generate(tiny_model, PROMPT, guidance_scale=2.0, **options).record["network_evaluations"] == 16


# ---- Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur": (0.0, 0.1)}, r"blur=0.0, 0.1 must be 2 values, each a finite number in 0.01 … 1000"),
        ({"held_band": "wavelett"}, r"held_band='wavelett' is not one of .*: did you mean 'wavelet'"),
        ({"held_band": "wavelet,name=haar"}, r"held_band='wavelet,name=haar': name='haar' is not one of db4, sym4"),
        ({"factors": (0.5,)}, r"factors=0.5 must be a list, each a finite number at least 1"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DiffuseHigh(**options)


def test_all_options_can_be_written_and_read(tiny_model: Model) -> None:
    method = DiffuseHigh(factors=(), held_band=Wavelet("sym4"), blur=(0.5, 0.5), detail_guidance_scale=None)
    assert resolve("method", spec_of("method", method)) == method
