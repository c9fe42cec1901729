"""Flow matching: its times and solvers against the published ones, and runs of transformers beside diffusers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from published import drawing, in_float64
from test_transformers import FLUX, published_flux
from tiny import QUICK_VAE, relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.noise import NoiseOptions, decide_noise
from cutdiff.checkpoint.random_model import random_model
from cutdiff.checkpoint.schedulers import noise_config, noise_to_diffusers
from cutdiff.methods import METHODS
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.flow import NOISIEST, FlowConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import Listed, ModelSchedule, Schedule, make_schedule, model_schedule
from cutdiff.sampling.stages import Stage, solve
from cutdiff.settings import Settings
from cutdiff.specs import SCHEDULES, SOLVERS, resolve

TOLERANCE = 1e-5
SHAPE = (2, 4, 5, 3)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
SCHNELL = FlowConfig()
DEV = FlowConfig(shift=3.0, use_dynamic_shifting=True)
"""The times of FLUX.1-dev."""
SD3 = FlowConfig(shift=3.0, timestep_spacing="linspace")
NATIVE = 8
SMALL = replace(FLUX, native_size=NATIVE, num_layers=1, num_single_layers=1, num_heads=2)
"""A transformer of FLUX.1-dev's kind, which reads the guidance scale."""
UNET_ONLY = {"attention_scaling", "scalecrafter", "hidiffusion", "freescale", "accdiffusion", "frecas"}


@st.composite
def configs(draw: st.DrawFn) -> FlowConfig:
    spread = draw(st.sampled_from(["karras", "exponential", "beta", None]))
    return FlowConfig(
        num_train_timesteps=draw(st.sampled_from([1000, 100])),
        shift=draw(st.floats(0.3, 8)),
        use_dynamic_shifting=draw(st.booleans()),
        base_shift=draw(st.floats(0.2, 0.6)),
        max_shift=draw(st.floats(0.7, 2)),
        image_seq_len=draw(st.integers(1, 10_000)),
        time_shift_type=draw(st.sampled_from(["exponential", "linear"])),
        shift_terminal=draw(st.none() | st.floats(0.02, 0.3)),
        timestep_spacing=draw(st.sampled_from(["trailing", "linspace"])),
        **({f"use_{spread}_sigmas": True} if spread else {}),
    )


def published(config: FlowConfig, num_steps: int) -> Any:  # a FlowMatchEulerDiscreteScheduler
    """The scheduler, given the times that the pipelines hand it: FLUX's, or none."""
    fields = {name: value for name, value in noise_to_diffusers(config).items() if not name.startswith("_")}
    scheduler = FlowMatchEulerDiscreteScheduler(**fields)
    how: dict[str, Any] = {"num_inference_steps": num_steps}
    if config.timestep_spacing == "trailing":
        how = {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        how["mu"] = config.base_shift + slope * (config.tokens - config.base_image_seq_len)
    scheduler.set_timesteps(**how)
    return scheduler


def times(schedule: Schedule) -> list[float]:
    return [sigma / (1 + sigma) for sigma in schedule.sigmas]


def network(x: Tensor, timestep: float) -> Tensor:
    """A stand-in for a transformer: smooth, not linear, mixing channels, and depending on the time."""
    return torch.einsum("ij,bjhw->bihw", MIX, torch.tanh(x)) + 0.3 * x + math.sin(3 * timestep / 1000)


def ours(config: FlowConfig, schedule: Schedule, solver: str, fresh: Tensor | None = None) -> Tensor:
    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        c_in, c_skip, c_out = config.coefficients(sigma)
        return c_skip * x + c_out * network(c_in * x, schedule.timestep(sigma))

    def noise(shape: tuple[int, ...], step: int) -> Tensor:
        assert fresh is not None
        return fresh[step]

    stages = [Stage("all", range(schedule.num_steps), denoise)]
    *_, last = solve(stages, NOISE * schedule.init_scale, schedule, resolve("solver", solver), noise)
    return last.latents


def theirs(scheduler: Any) -> Tensor:
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, return_dict=False)[0]
    return x


@settings(max_examples=60)
@given(configs(), st.integers(1, 60))
def test_the_times_are_the_published_ones(config: FlowConfig, num_steps: int) -> None:
    if num_steps == 1 and config.shift_terminal is not None:  # the published one then divides by zero
        config = replace(config, shift_terminal=None)
    expected = published(config, num_steps)
    schedule = model_schedule(config, num_steps)
    np.testing.assert_allclose(times(schedule), expected.sigmas.numpy(), atol=2e-6)
    scale = 1000 / config.num_train_timesteps
    np.testing.assert_allclose(np.multiply(schedule.timesteps, scale), 1000 * expected.sigmas[:-1].numpy(), atol=2e-3)
    assert schedule.init_scale == pytest.approx(1 + NOISIEST)
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))


@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize(
    "config",
    [FlowConfig(), SD3, DEV, replace(SD3, shift=0.4), replace(DEV, time_shift_type="linear"),
     replace(SD3, use_karras_sigmas=True), replace(SD3, shift_terminal=0.1)],
)  # fmt: skip
def test_euler_goes_where_the_published_scheduler_goes(config: FlowConfig, solver: str) -> None:
    for num_steps in (2, 5, 28):
        with in_float64():
            expected = theirs(published(config, num_steps))
        assert relative_error(ours(config, model_schedule(config, num_steps), solver), expected) < TOLERANCE


@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_heun_takes_the_mean_of_slopes_over_time(shift: float) -> None:
    """Over sigma, the first step would have no mean at all, as its sigma is infinite."""
    config = FlowConfig(shift=shift, timestep_spacing="linspace")
    for num_steps in (2, 5, 28):
        with in_float64():
            scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(num_steps)
            expected = theirs(scheduler)
        schedule = make_schedule(ModelSchedule(), resolve("solver", "heun"), config, num_steps)
        assert relative_error(ours(config, schedule, "heun"), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("solver", "make"),
    [
        ("dpmpp_2m", lambda **how: DPMSolverMultistepScheduler(**how, solver_order=2, solver_type="midpoint")),
        ("unipc", UniPCMultistepScheduler),
    ],
)
@pytest.mark.parametrize("values", [(0.99, 0.9, 0.7, 0.4, 0.1, 0.0), (0.9, 0.5, 0.2, 0.0)])
def test_multistep_solvers_go_where_the_published_ones_go(
    solver: str, make: Callable[..., Any], values: tuple[float, ...]
) -> None:
    """λ = log((1 − t) / t) is −log sigma. Both begin with the noise as it is, also where there is less at first."""
    with in_float64():
        scheduler = make(prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero")
        scheduler.set_timesteps(len(values) - 1)
        scheduler.sigmas = torch.tensor(values, dtype=torch.float64)
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
        scheduler.set_begin_index(0)
        expected = theirs(scheduler)
    schedule = make_schedule(Listed(values), None, FlowConfig(), len(values) - 1)
    assert relative_error(ours(FlowConfig(), schedule, solver), expected) < TOLERANCE


def test_stochastic_sampling_is_the_solver_lcm() -> None:
    fresh = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with in_float64(), drawing(fresh):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        scheduler.set_timesteps(5)
        expected = theirs(scheduler)
    assert relative_error(ours(SD3, model_schedule(SD3, 5), "lcm", fresh), expected) < TOLERANCE


@given(st.floats(1e-6, 1e9))
def test_the_estimate_is_exact_where_the_prediction_is(sigma: float) -> None:
    x0, noise = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    c_in, c_skip, c_out = FlowConfig().coefficients(sigma)
    t = FlowConfig().timestep(sigma) / 1000
    torch.testing.assert_close(c_in * (x0 + sigma * noise), (1 - t) * x0 + t * noise, rtol=1e-6, atol=1e-9)
    estimate = c_skip * (x0 + sigma * noise) + c_out * (noise - x0)
    torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-6)


@given(configs(), st.floats(0, 1), st.integers(1, 40))
def test_places_in_the_schedule_fall_evenly(config: FlowConfig, place: float, num_steps: int) -> None:
    assert config.fraction(config.timestep_at(place)) == pytest.approx(place, abs=1e-9)
    assert config.sigma(config.timestep(5.0)) == pytest.approx(5.0)
    even = replace(config, shift_terminal=None, timestep_spacing="trailing", use_karras_sigmas=False)
    even = replace(even, use_exponential_sigmas=False, use_beta_sigmas=False)
    schedule = model_schedule(even, num_steps)
    expected = 1 - np.arange(num_steps) / num_steps
    np.testing.assert_allclose([*map(schedule.fraction, schedule.sigmas[:-1])], expected, atol=1e-9)


@pytest.mark.parametrize("config", [FlowConfig(), SD3, DEV, replace(DEV, use_karras_sigmas=True)])
def test_parts_of_a_schedule_are_as_dense_as_it_is(config: FlowConfig) -> None:
    """Past the noise itself, where log sigma has no bounds, no step is spent."""
    schedule = model_schedule(config, 10)
    same = schedule.part(math.inf, 0.0, 10)
    np.testing.assert_allclose(times(same), times(schedule), rtol=1e-9)
    part = times(schedule.part(math.inf, 0.0, 19))
    np.testing.assert_allclose(part[:-1:2], times(schedule)[:-1], rtol=1e-9)
    assert part[0] > part[1] > part[2]
    assert part[1] == pytest.approx((part[0] + part[2]) / 2, rel=0.05)


@pytest.mark.parametrize("spec", [name for name in SCHEDULES if name not in ("align_your_steps", "list")])
@pytest.mark.parametrize("config", [FlowConfig(shift=3.0), SD3, DEV])
def test_every_schedule_begins_with_noise_and_has_times_between(config: FlowConfig, spec: str) -> None:
    schedule = make_schedule(resolve("schedule", spec), resolve("solver", "euler"), config, 8)
    assert times(schedule)[0] == pytest.approx(1)
    assert all(0.99 > a > b for a, b in zip(times(schedule)[1:], times(schedule)[2:], strict=False))
    if spec in ("karras", "exponential", "beta"):
        own = replace(config, **{f"use_{spec}_sigmas": True})
        assert times(schedule) == pytest.approx(times(model_schedule(own, 8)))
    if spec in ("trailing", "sgm_uniform"):
        assert schedule.sigmas == model_schedule(replace(config, timestep_spacing="trailing"), 8).sigmas


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("align_your_steps", "schedule=align_your_steps has no table for models of flow matching: choose"),
        ([14.6, 1.0, 0.0], r"schedule=\(14.6, 1.0, 0.0\) has times above 1"),
    ],
)
def test_schedules_that_flows_have_not(schedule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(resolve("schedule", schedule), resolve("solver", "euler"), FlowConfig(), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift": 0}, "shift=0 must be a number from 1e-06 to 1e"),
        ({"shift": math.nan}, "shift=nan must be a number"),
        ({"shift": "3"}, "shift='3' must be a number"),
        ({"shift": None}, "shift=None must be a number"),
        ({"base_shift": math.inf}, "base_shift=inf must be a number from -10 to 10"),
        ({"max_shift": 11}, "max_shift=11 must be a number from -10 to 10"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be a whole number from 1"),
        ({"max_image_seq_len": 2.5}, "max_image_seq_len=2.5 must be a whole number"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "base_image_seq_len=256 must be below"),
        ({"use_dynamic_shifting": True, "max_shift": 9.0, "image_seq_len": 40_000}, "give 40000 tokens the shift"),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": -9, "image_seq_len": 1},
         "give 1 tokens the shift -9"),
        ({"shift_terminal": 1.0}, "shift_terminal=1.0 must lie between 0 and 1"),
        ({"time_shift_type": "cosine"}, "time_shift_type='cosine' is not one of exponential, linear"),
        ({"timestep_spacing": "leading"}, "timestep_spacing='leading' is not one of trailing, linspace"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas are True"),
    ],
)  # fmt: skip
def test_what_a_flow_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**fields)


@settings(max_examples=30)
@given(configs())
def test_what_is_saved_is_read_again_by_both(config: FlowConfig) -> None:
    saved = noise_to_diffusers(config)
    read = FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in saved.items() if k != "_class_name"})
    assert {**read.config}.items() >= {k: v for k, v in saved.items() if not k.startswith("_")}.items()
    unsaved = {name: getattr(config, name) for name in ("timestep_spacing", "image_seq_len")}
    found = noise_config(saved)
    assert isinstance(found, FlowConfig)
    assert replace(found, **unsaved) == config


def test_files_of_schedulers() -> None:
    name = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert noise_config(name) == FlowConfig()
    assert noise_config({**name, "shift": 3.0, "shift_terminal": 0}) == FlowConfig(shift=3.0)
    assert noise_config({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2}) == FlowConfig(shift=2)
    with pytest.raises(ValueError, match="invert_sigmas=True is not supported"):
        noise_config({**name, "invert_sigmas": True})
    noise, decided_by = decide_noise(NoiseOptions(), DEV)
    assert (noise, decided_by) == (DEV, dict.fromkeys(DEV.described(), "scheduler"))
    for options in (
        NoiseOptions("epsilon"),
        NoiseOptions(zero_terminal_snr=False),
        NoiseOptions(None, None, "trailing"),
    ):
        with pytest.raises(ValueError, match=r"=\w+ is not for a model of flow matching, .*: leave it out"):
            options.check_fit(DEV)


def flux(noise: AnyNoise = SCHNELL, **fields: Any) -> Model:
    """A random model whose network is a transformer."""
    return replace(random_model(replace(SMALL, **fields), QUICK_VAE, torch.device("cpu")), noise=noise)


@pytest.fixture(scope="module")
def guided() -> Model:
    """One with classifier-free guidance."""
    return flux(reads_guidance=False)


class Fixed(Draws):
    """Draws whose first noise is given."""

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("reads_guidance", [False, True])
@pytest.mark.parametrize(
    ("noise", "size", "shift"),
    [(FlowConfig(shift=2.0), (8, 8), None), (DEV, (8, 6), None), (DEV, (16, 12), "canvas")],
)
def test_a_run_is_that_of_the_published_pipeline(
    noise: FlowConfig, size: tuple[int, int], shift: Any, reads_guidance: bool
) -> None:
    noise = replace(noise, base_image_seq_len=4, max_image_seq_len=64)
    model = flux(noise, reads_guidance=reads_guidance)
    transformer = published_flux(model.unet.config)
    transformer.load_state_dict(model.unet.state_dict())
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        {k: v for k, v in noise_to_diffusers(noise).items() if k != "_class_name"}
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=scheduler, transformer=transformer.eval(), **nothing)
    pipeline.set_progress_bar_config(disable=True)
    states, scale = model.text.encode([""]), 3.0
    start = Fixed((0,)).noise((1, 4, *size))
    published = pipeline(
        prompt_embeds=states.context,
        pooled_prompt_embeds=states.pooled,
        latents=pipeline._pack_latents(start, 1, 4, *size),
        height=8 * size[0],
        width=8 * size[1],
        num_inference_steps=4,
        guidance_scale=scale,
        output_type="latent",
    ).images
    expected = pipeline._unpack_latents(published, 8 * size[0], 8 * size[1], pipeline.vae_scale_factor)
    result = cutdiff.generate(
        model,
        "a house",
        draws=Fixed((0,)),
        method="direct",
        height=8 * size[0],
        width=8 * size[1],
        num_steps=4,
        guidance_scale=scale if reads_guidance else 1,
        shift=shift,
    )
    assert relative_error(result.latents, expected) < TOLERANCE
    assert result.record["network_evaluations"] == 4, "a network that reads the scale needs no pair"


def schedule_of(model: Model, **options: Any) -> list[float]:
    from cutdiff.pipeline import canvas_and_schedule

    _, schedule = canvas_and_schedule(model, Settings(num_steps=4, **options))
    return times(schedule)


def test_a_large_canvas_has_the_shift_of_the_training() -> None:
    model = flux(replace(DEV, base_image_seq_len=4, max_image_seq_len=64))

    def expected(tokens: int) -> list[float]:
        return times(model_schedule(model.noise.shifted_for(tokens), 4))

    native, large, small = {"height": 64, "width": 64}, {"height": 128, "width": 144}, {"height": 32, "width": 56}
    assert schedule_of(model, **native) == expected(16) == schedule_of(model, **large)
    assert schedule_of(model, **large, shift="canvas") == expected(72) != expected(16)
    assert schedule_of(model, **small) == expected(8) != schedule_of(model, **small, shift="native")
    assert schedule_of(model, **small, shift="native") == expected(16)
    assert schedule_of(model, **large, shift=2.5) == times(model_schedule(FlowConfig(shift=2.5), 4))
    assert schedule_of(flux(DEV), **large, shift=2.5, schedule="karras")[-2] == pytest.approx(2.5 / (2.5 + 3))


@pytest.mark.parametrize(
    ("noise", "shift", "message"),
    [
        (NoiseConfig(), 3.0, "shift=3.0 is for models of flow matching, which this one is not: leave it out"),
        (FlowConfig(shift=3.0), "canvas", "shift='canvas' is for models whose shift grows with the size, and this"),
    ],
)
def test_shifts_that_a_model_has_not(noise: AnyNoise, shift: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_of(flux(noise), shift=shift)


@pytest.mark.parametrize("schedule", [[1.0, 0.5, 0.25, 0.125, 0], "1,0.5,0.25,0.125,0"])
def test_a_shift_moves_no_times_that_are_listed(schedule: Any) -> None:
    assert schedule_of(flux(DEV), schedule=schedule) == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0])
    for shift in (3.0, "canvas"):
        with pytest.raises(ValueError, match=f"^shift={shift} moves times, and those of the schedule are given"):
            schedule_of(flux(DEV), schedule=schedule, shift=shift)


@pytest.mark.parametrize("shift", [0, -1, math.inf, "large"])
def test_what_no_shift_is(shift: Any) -> None:
    with pytest.raises(ValueError, match=rf"^shift={shift!r} must be"):
        Settings(shift=shift)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNET_ONLY] + ["frecas,map_weight=0"])
@pytest.mark.parametrize("size", [(16, 16), (11, 17)])
def test_methods_draw_with_a_transformer(guided: Model, method: str, size: tuple[int, int]) -> None:
    """One seed is one picture, whatever goes through the network at once."""
    options: dict[str, Any] = {"method": method, "height": 8 * size[0], "width": 8 * size[1], "num_steps": 3}
    one = cutdiff.generate(guided, "a house", **options, seed=4, view_batch_size=1)
    assert one.images.shape == (1, 3, 8 * size[0], 8 * size[1])
    other = cutdiff.generate(guided, ["a tree", "a house"], **options, seed=3, view_batch_size=3)
    assert relative_error(other.latents[1:], one.latents) < 1e-4
    assert relative_error(other.latents[:1], one.latents) > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_draw_with_a_transformer(solver: str) -> None:
    model, options = flux(), {"method": "cutdiffusion", "num_steps": 3, "height": 128, "width": 128}
    result = cutdiff.generate(model, "a house", **options, solver=solver, guidance_scale=3.5)
    assert 0.1 < result.latents.std() < 10
    assert result.record["prediction_type"] == "flow_prediction"
    assert result.record["flow"] == asdict(FlowConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"method": name}, rf"^method={name} .* of a U-Net, and this model is a transformer: choose multidiffusion")
          for name in sorted(UNET_ONLY)),
        ({"guidance": "pag"}, "^guidance=pag changes self-attentions of a U-Net, and this model is a transformer: "),
    ],
)  # fmt: skip
def test_what_changes_a_unet_is_refused_before_any_text_is_read(
    guided: Model, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("the prompt was read")

    monkeypatch.setattr(type(guided.text), "encode", encode)
    with pytest.raises(ValueError, match=message):
        cutdiff.generate(guided, "a house", num_steps=2, **options)
