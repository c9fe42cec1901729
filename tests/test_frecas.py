"""FreCaS: its published runs, where its stages begin and end, its guidance, and the attention that they hand on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from published_frecas import GUIDANCE, RUNS, Replayed
from replayed import model_of, published_latents
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.frecas import FreCaS, guided_by_band
from cutdiff.models.attention import blended_attention, text_layers
from cutdiff.models.layers import Attention
from cutdiff.sampling.denoiser import Call
from cutdiff.sampling.edm import EDMConfig
from cutdiff.sampling.guidance import CFG, ByBand
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import (
    Karras,
    Listed,
    ModelSchedule,
    SigmaSchedule,
    ddim_schedule,
    make_schedule,
)
from cutdiff.sampling.solvers import DDIM, Euler
from cutdiff.sampling.split import DownUp
from cutdiff.sampling.text_maps import TextMaps, resized
from cutdiff.specs import SOLVERS

PROMPT = "a red house at night"
SIZE = {"height": 128, "width": 96}
"""Twice the native size of the tiny model and one and a half times it."""


def steps(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> list[cutdiff.Step]:
    return list(cutdiff.denoise(model, prompt, **{"method": "frecas", "num_steps": 5, **SIZE, **options}))


def latents(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> Tensor:
    return steps(model, prompt, **options)[-1].latents


class Calls(cutdiff.Observer):
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append(call)


# ---- Whole runs


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    run = RUNS[name]
    total, (height, width) = sum(run.steps), run.sizes[-1]
    own: dict[str, Any] = {
        "sizes": run.sizes[:-1],
        "shares": tuple(count / total for count in run.steps[:-1]),
        "ends": tuple(end / 1000 for end in run.ends[:-1]),
        "gamma": run.gamma,
    }
    drawn = steps(
        model_of(),
        map_resize="tokens",
        solver="ddim",
        num_steps=total,
        height=8 * height,
        width=8 * width,
        guidance_scale=GUIDANCE,
        draws=Replayed(),
        **({} if name.startswith("defaults") else own),
    )
    assert relative_error(drawn[-1].latents, published_latents("frecas", name)) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, solver: str, height: int, width: int) -> None:
    options: dict[str, Any] = {"height": height, "width": width, "solver": solver}
    assert torch.equal(latents(tiny_model, **options), latents(tiny_model, method="direct", **options))


def test_without_sizes_before_the_last_it_is_direct(tiny_model: Model) -> None:
    assert torch.equal(latents(tiny_model, sizes=()), latents(tiny_model, method="direct"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("height", "width"), [(72, 64), (200, 8), (8, 264), (136, 520)])
def test_any_size_can_be_drawn(tiny_model: Model, solver: str, height: int, width: int) -> None:
    drawn = steps(tiny_model, height=height, width=width, solver=solver, num_steps=3)
    assert drawn[-1].latents.isfinite().all()
    assert drawn[-1].latents.shape == (1, 4, height // 8, width // 8)


@pytest.mark.parametrize("options", [{}, {"view_batch_size": 1}, {"guidance": "by_band"}])
def test_an_image_does_not_depend_on_its_neighbours(tiny_model: Model, options: dict[str, Any]) -> None:
    both = latents(tiny_model, [PROMPT, "a blue tree"], seed=3, **options)
    for i, prompt in enumerate([PROMPT, "a blue tree"]):
        assert relative_error(both[i], latents(tiny_model, prompt, seed=3 + i)[0]) < 1e-4 or "guidance" in options
        assert relative_error(both[i], latents(tiny_model, prompt, seed=3 + i, **options)[0]) < 1e-4


def test_a_run_leaves_no_trace_in_the_network(tiny_model: Model) -> None:
    before = [dict(vars(module)) for module in tiny_model.unet.modules()]
    latents(tiny_model)
    for module, names in zip(tiny_model.unet.modules(), before, strict=True):
        assert vars(module).keys() == names.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# ---- Stages


@pytest.mark.parametrize(
    ("num_steps", "sides", "counts"),
    [
        (50, (128, 128), [40, 10]),
        (50, (256, 192), [30, 5, 15]),
        (10, (128, 128), [8, 2]),
        (4, (256, 256), [2, 1, 1]),
        (2, (128, 128), [1, 1]),
        (1, (128, 128), [1, 1]),
        (1, (256, 64), [1, 1, 1]),
        (20, (512, 64), [12, 2, 2, 4]),
    ],
)
def test_stages_share_the_steps_and_each_takes_one_at_least(
    tiny_model: Model, num_steps: int, sides: tuple[int, int], counts: list[int]
) -> None:
    height, width = sides
    drawn = steps(tiny_model, num_steps=num_steps, height=height, width=width)
    assert [step.index for step in drawn] == [*range(sum(counts))]
    for k, count in enumerate(counts, start=1):
        stage = [step for step in drawn if step.stage == f"stage {k}"]
        longest = max(sides) if k == len(counts) else 64 * 2 ** (k - 1)
        assert len(stage) == count
        assert stage[0].latents.shape[2:] == (height * longest // max(sides) // 8, width * longest // max(sides) // 8)


def test_three_times_the_native_size_has_twice_it_between(tiny_model: Model) -> None:
    drawn = steps(tiny_model, height=192, width=128)
    assert {step.stage: tuple(step.latents.shape[2:]) for step in drawn} == {
        "stage 1": (8, 5),
        "stage 2": (16, 10),
        "stage 3": (24, 16),
    }


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_a_stage_begins_at_the_noise_of_its_size_on_the_estimate_of_the_one_before(
    tiny_model: Model, solver: str
) -> None:
    model = replace(tiny_model, noise=NoiseConfig())
    started: dict[int, Tensor] = {}

    class Noted(cutdiff.Draws):
        def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
            started[phase] = super().phase_noise(shape, phase)
            return started[phase]

    drawn = steps(model, num_steps=50, solver=solver, draws=Noted((0,)), guidance_scale=1.0)
    timestep = {NoiseConfig().sigma(t): t for t in range(1000)}
    times = [timestep[step.sigma] for step in drawn]
    assert times[:4] == [999, 978, 958, 937]
    assert times[39:] == [200, 343, 304, 266, 228, 190, 152, 114, 76, 38, 0]
    wanted = NoiseConfig().sigma(200) * 2 ** (1.5 / 2)
    assert NoiseConfig().sigma(342) < wanted <= NoiseConfig().sigma(343)
    assert torch.equal(drawn[39].latents, drawn[39].denoised), "a stage ends with its estimate"
    assert started.keys() == {2}


def test_the_longer_growth_of_two_axes_is_the_factor_of_the_noise(tiny_model: Model) -> None:
    for sizes, factor in ((((8, 12),), 2.0), (((16, 6),), 2.0), (((16, 9),), 4 / 3)):
        model, noise = replace(tiny_model, noise=NoiseConfig()), NoiseConfig()
        first, second = steps(model, sizes=sizes, num_steps=2, shares=(0.5,))
        wanted = noise.sigma(200) * factor**0.75
        assert first.latents.shape[2:] == sizes[0]
        assert noise.sigma(noise_timestep(second.sigma) - 1) < wanted <= second.sigma


def noise_timestep(sigma: float) -> int:
    return [NoiseConfig().sigma(t) for t in range(1000)].index(sigma)


@pytest.mark.parametrize("schedule", [Karras(), Listed((9.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.0))])
def test_another_schedule_than_the_models_own_is_followed(tiny_model: Model, schedule: SigmaSchedule) -> None:
    noise = NoiseConfig()
    model, run = replace(tiny_model, noise=noise), make_schedule(schedule, Euler(), noise, 9)
    drawn = steps(model, schedule=schedule, num_steps=9)
    sigmas, split = [step.sigma for step in drawn], [step.stage for step in drawn].count("stage 1")
    assert split == 8
    assert sigmas[0] == run.sigmas[0]
    assert sigmas[split - 1 :] == pytest.approx([noise.sigma(200), noise.sigma(200) * 2**0.75])


def test_a_part_is_as_dense_as_its_schedule() -> None:
    """Karras' sigmas are even steps of sigma^(1/7): so are those of any part."""
    schedule = make_schedule(Karras(), Euler(), NoiseConfig(), 200)
    part = schedule.part(5.0, 0.3, 12)
    roots = [sigma ** (1 / 7) for sigma in part.sigmas[:-1]]
    assert (part.sigmas[0], part.sigmas[-2], part.sigmas[-1]) == (pytest.approx(5.0), pytest.approx(0.3), 0.0)
    gaps = [a - b for a, b in pairwise(roots)]
    assert max(gaps) / min(gaps) < 1.01
    assert part.targets == part.sigmas[1:]
    assert schedule.part(math.inf, 0.0, 200).sigmas == pytest.approx(schedule.sigmas)


def test_more_steps_than_timesteps_go_between_them() -> None:
    schedule = make_schedule(ModelSchedule(), DDIM(), NoiseConfig(), 50)
    noise = NoiseConfig()
    whole, fine = (schedule.part(noise.sigma(20), noise.sigma(10), count) for count in (11, 21))
    assert whole.timesteps == tuple(range(20, 9, -1))
    assert fine.timesteps == pytest.approx([20 - i / 2 for i in range(21)], abs=0.02)
    assert all(a > b for a, b in pairwise(fine.sigmas))


def test_ddim_goes_down_a_fixed_number_of_timesteps() -> None:
    noise = NoiseConfig()
    schedule = ddim_schedule(noise, 50)
    first, last = schedule.part(math.inf, noise.sigma(200), 40), schedule.part(noise.sigma(343), 0.0, 10)
    assert first.targets == (*(noise.sigma(t - 20) for t in map(int, first.timesteps[:-1])), 0.0)
    assert last.targets == (*(noise.sigma(max(t - 38, 0)) for t in map(int, last.timesteps)),)
    to_zero = ddim_schedule(replace(noise, set_alpha_to_one=True), 50).part(noise.sigma(343), 0.0, 10)
    assert to_zero.targets == (*last.targets[:-1], 0.0)


@pytest.mark.parametrize("noise", [EDMConfig(), EDMConfig(sigma_schedule="exponential"), NoiseConfig()])
def test_a_timestep_lies_at_its_share_of_the_training(noise: Any) -> None:
    timesteps = make_schedule(ModelSchedule(), Euler(), noise, 10).noise
    for share in (0.0, 0.2, 0.7, 0.99):
        assert timesteps.fraction(timesteps.timestep_at(share)) == pytest.approx(share)
    noisiest = 80.0 if isinstance(noise, EDMConfig) else noise.sigma(999)
    assert timesteps.timestep_at(1) == pytest.approx(timesteps.timestep(noisiest))


# ---- Guidance


def test_later_stages_are_guided_by_band(tiny_model: Model) -> None:
    given: list[Any] = []

    def listening(run: Any) -> Any:
        for k in (1, 2):
            given.append(guided_by_band(run, 35.0, (8 * k, 6)).guidance)
        return FreCaS().stages(run)

    latents(tiny_model, method=listening, guidance_scale=4.0)
    assert given == [ByBand(4.0, 35.0, DownUp(size=(8 * k, 6), down="bilinear")) for k in (1, 2)]
    plain = latents(tiny_model, guidance_scale=4.0)
    assert relative_error(latents(tiny_model, guidance_scale=4.0, high_guidance_scale=4.0), plain) > 1e-3
    equal = steps(tiny_model, guidance_scale=4.0, high_guidance_scale=4.0)
    assert torch.equal(equal[3].latents, steps(tiny_model, guidance_scale=4.0)[3].latents), (
        "the first stage is as it was"
    )


def test_without_guidance_no_stage_is_guided(tiny_model: Model) -> None:
    counts = [
        cutdiff.generate(tiny_model, PROMPT, method="frecas", num_steps=5, guidance_scale=scale, **SIZE).record[
            "network_evaluations"
        ]
        for scale in (1.0, 4.0)
    ]
    assert counts == [5, 10]


def test_the_network_is_told_the_native_size_or_that_of_the_stage(tiny_model: Model) -> None:
    for conditioning, expected in (("native", [(64, 64)] * 2), ("stage", [(64, 48), (128, 96)])):
        calls = Calls()
        steps(tiny_model, size_conditioning=conditioning, observer=calls)
        ids = [call.inputs[4][0].tolist() for call in (calls.calls[0], calls.calls[-1])]
        assert ids == [[*size, 0, 0, *size] for size in expected]


# ---- Attention over the text


def attention_layers(model: Model) -> list[Attention]:
    return text_layers(model.unet)


def test_blended_attention_is_attention_with_blended_weights() -> None:
    torch.manual_seed(0)
    model = model_of()
    layer = attention_layers(model)[0]
    x, context = torch.randn(2, 6, layer.to_q.in_features), torch.randn(2, 5, layer.to_k.in_features)
    maps = torch.rand(2, 6, 5)
    values = layer.keys_and_values(context)[1]
    weights = 0.7 * layer.weights(x, context) + 0.3 * maps[:, None]
    expected = layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2))
    with blended_attention(model.unet, lambda positions: {6: maps}[positions], 0.3):
        torch.testing.assert_close(layer(x, context), expected)
    assert "attend" not in vars(layer)


def run_of(model: Model, **options: Any) -> Any:
    """The run that a method is given."""
    given: list[Any] = []

    def method(run: Any) -> Any:
        given.append(run)
        return FreCaS().stages(run)

    cutdiff.denoise(model, PROMPT, method=method, num_steps=2, **{**SIZE, **options})
    return given[0]


def test_maps_are_the_mean_of_the_levels_means() -> None:
    """Both levels of the network count alike, whatever the number of their layers."""
    model = model_of()
    run = run_of(model)
    x, recorded = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(0)), {}

    def remember(layer: Attention) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            recorded[layer] = layer.weights(*args).mean(dim=1)

        return hook

    hooks = [layer.register_forward_hook(remember(layer)) for layer in attention_layers(model)]
    maps = TextMaps("planes")
    with maps.recorded(run.denoiser, (8, 12), copies=2, num_images=1) as denoiser:
        assert not denoiser.shares_rows
        denoiser(x, 3.0, 0)
    for hook in hooks:
        hook.remove()
    fine, coarse = (
        torch.stack([weights for weights in recorded.values() if weights.shape[1] == n]).mean(dim=0) for n in (24, 6)
    )
    fine, coarse = fine.mT.unflatten(2, (4, 6)), coarse.mT.unflatten(2, (2, 3))
    large = torch.nn.functional.interpolate(coarse, (4, 6), mode="bilinear")
    torch.testing.assert_close(maps.maps, (fine + large) / 2)
    assert len(recorded) == len(attention_layers(model)) > 2


def test_planes_keep_their_columns_and_tokens_scramble_them() -> None:
    columns = torch.arange(4.0).expand(1, 1, 4, 4)
    planes, tokens = (resized(columns, (4, 8), axes) for axes in ("planes", "tokens"))
    assert torch.equal(planes, planes[:, :, :1].expand_as(planes))
    assert planes[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert not torch.equal(tokens, tokens[:, :, :1].expand_as(tokens))


@pytest.mark.parametrize("view_batch_size", [1, 16])
def test_each_row_is_blended_with_its_own_map(view_batch_size: int) -> None:
    """Blended in full, the network sees nothing else of the text than values: maps of one-hot tokens choose them."""
    model = model_of()
    run = run_of(model, view_batch_size=view_batch_size)
    positive, negative = run.denoiser.positive, run.denoiser.negative
    denoiser = replace(run.denoiser, positive=positive.repeat(2), guidance=ByBand(2.0, 3.0, "gaussian"))
    maps = torch.rand(4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    text_maps = TextMaps("planes", copies=2, maps=maps)
    both = text_maps.blended(denoiser, (16, 16), 2, 1.0)(x, 3.0, 0)
    for i in range(2):
        alone = TextMaps("planes", copies=2, maps=maps[2 * i : 2 * i + 2])
        denoised = alone.blended(replace(denoiser, positive=positive), (16, 16), 2, 1.0)(x[i : i + 1], 3.0, 0)
        assert relative_error(both[i], denoised[0]) < 1e-5
    swapped = TextMaps("planes", copies=2, maps=maps.flip(0)).blended(denoiser, (16, 16), 2, 1.0)(x, 3.0, 0)
    assert relative_error(swapped, both) > 1e-4
    assert negative is run.denoiser.negative
    unguided = replace(denoiser, guidance=CFG(1.0))
    prompted = text_maps.blended(unguided, (16, 16), 1, 1.0)(x, 3.0, 0)
    own = TextMaps("planes", copies=1, maps=maps[1::2]).blended(unguided, (16, 16), 1, 1.0)(x, 3.0, 0)
    assert torch.equal(prompted, own)


def test_rows_without_a_map_are_not_blended(tiny_model: Model) -> None:
    """The first stage ends without guidance where the second has it, and then the other way round."""
    one = {"num_steps": 10, "shares": (0.9,)}
    for interval, differs in (((0.0, 0.7), False), ((0.7, 1.0), True)):
        blended, plain = (
            latents(tiny_model, guidance_interval=interval, map_weight=weight, **one) for weight in (0.6, 0.0)
        )
        assert torch.equal(blended, plain) != differs


# ---- What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 0.2)}, r"shares=\(0.5, 0.2\) must have one value for each stage but the last, 1 in all"),
        ({"ends": ()}, r"ends=\(\) must have one value for each stage but the last, 1 in all"),
        ({"sizes": ((8, 6), (16, 13))}, r"sizes=.* must grow from stage to stage, to the canvas of \(16, 12\) latents"),
        ({"sizes": ((16, 12),)}, r"sizes=.* must grow"),
        ({"ends": (1.0,)}, r"ends=\(1.0,\) leave stage 1 the sigmas .* must fall"),
        ({"sizes": ((8, 6), (12, 9)), "ends": (0.2, 0.6)}, r"ends=\(0.2, 0.6\) leave stage 2 the sigmas"),
        ({"gamma": -1}, "gamma=-1 must be"),
        ({"gamma": 1e30}, r"gamma=1e\+30 must be a finite number in 0 … 100"),
        (
            {"guidance": lambda conditional, unconditional, sigma, step: conditional},
            "high_guidance_scale=35.0 needs a guidance with a guidance_scale, which .* lacks",
        ),
    ],
)
def test_what_cannot_be_is_an_error_before_the_first_step(
    tiny_model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cutdiff.denoise(tiny_model, PROMPT, **{"method": "frecas", "num_steps": 20, **SIZE, **options})
