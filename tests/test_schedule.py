"""Sigmas, timesteps and initial scale against the published schedulers, and the table of sigmas by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published import in_float64, published_ddim, published_edm, published_euler

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.models.inside import replaced
from cutdiff.pipeline import canvas_and_schedule
from cutdiff.sampling.edm import AnyNoise, EDMConfig
from cutdiff.sampling.noise import BETA_SCHEDULES, NoiseConfig, NoiseTable, alphas_cumprod
from cutdiff.sampling.schedules import ALIGNED, Karras, Schedule, ddim_schedule, euler_schedule, make_schedule
from cutdiff.sampling.solvers import DDIM, LCM, Euler
from cutdiff.settings import SPACINGS, Settings
from cutdiff.specs import SCHEDULES, SOLVERS, resolve

# The published Euler turns tensors into arrays in a way that numpy 2 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MAKERS = pytest.mark.parametrize("make", [euler_schedule, ddim_schedule])


@st.composite
def noise_configs(draw: st.DrawFn) -> NoiseConfig:
    """Draw any beta schedule and spacing, over 20 to 1000 training timesteps, with an offset that stays among them."""
    return NoiseConfig(
        num_train_timesteps=draw(st.integers(20, 1000)),
        beta_start=draw(st.floats(1e-4, 1e-3)),
        beta_end=draw(st.floats(5e-3, 2e-2)),
        beta_schedule=draw(st.sampled_from(BETA_SCHEDULES)),
        timestep_spacing=draw(st.sampled_from(SPACINGS)),
        steps_offset=draw(st.integers(0, 1)),
        use_karras_sigmas=draw(st.booleans()),
        rescale_betas_zero_snr=draw(st.booleans()),
        set_alpha_to_one=draw(st.booleans()),
    )


@settings(max_examples=50)
@given(noise_configs(), st.data())
def test_euler_schedule_is_the_published_one(config: NoiseConfig, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, config.num_train_timesteps // 2))
    with in_float64():
        published = published_euler(config)
        published.set_timesteps(num_steps)
    ours = euler_schedule(config, num_steps)
    assert ours.num_steps == num_steps
    # "trailing" gives them one timestep too many at some lengths, which is -1. Their "linspace" rounds fractional
    # timesteps to float32, between which sigma is steep where the signal-to-noise ratio goes to zero.
    np.testing.assert_allclose(ours.sigmas[:-1], published.sigmas[:num_steps].numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.timesteps, published.timesteps[:num_steps].numpy(), atol=1e-4)
    assert ours.init_scale == pytest.approx(float(published.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 300])
def test_karras_spacing_begins_at_the_last_timestep_where_its_sigma_is_capped(num_steps: int) -> None:
    """With a zero terminal SNR the sigma before the last can be above the cap of the last."""
    config = NoiseConfig(
        716, 0.0008318, 0.02, "linear", timestep_spacing="trailing", use_karras_sigmas=True, rescale_betas_zero_snr=True
    )
    assert euler_schedule(config, num_steps).timesteps[0] == 715


@settings(max_examples=50)
@given(noise_configs(), st.data())
def test_ddim_schedule_is_the_published_one(config: NoiseConfig, data: st.DataObject) -> None:
    n = config.num_train_timesteps
    num_steps = data.draw(st.integers(1, n // 2))
    with in_float64():
        published = published_ddim(config)
        published.set_timesteps(num_steps)
    ours = ddim_schedule(config, num_steps)
    timesteps = published.timesteps[:num_steps].numpy()
    np.testing.assert_array_equal(ours.timesteps, timesteps)

    alphas = published.alphas_cumprod.numpy()
    reached = timesteps - n // num_steps
    reached_alphas = np.where(reached >= 0, alphas[reached], float(published.final_alpha_cumprod))
    # We cap sigma where the alpha of a zero terminal SNR is 0.
    alphas = np.maximum(alphas, 2.0**-44)
    np.testing.assert_allclose(ours.sigmas[:-1], np.sqrt(1 / alphas[timesteps] - 1), rtol=1e-9)
    np.testing.assert_allclose(ours.targets, np.sqrt(1 / reached_alphas - 1), rtol=1e-9)
    assert ours.init_scale == pytest.approx(math.sqrt(1 + ours.sigmas[0] ** 2))


@pytest.mark.parametrize(
    ("spacing", "steps_offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_timesteps_are_the_published_ones_at_every_common_length(spacing: str, steps_offset: int) -> None:
    """Halves are rounded in the same way: at 48 steps, "trailing" lands on one."""
    config = NoiseConfig(timestep_spacing=spacing, steps_offset=steps_offset)
    euler, ddim = published_euler(config), published_ddim(config)
    for num_steps in (*range(1, 51), 61, 96, 100, 250, 999):
        euler.set_timesteps(num_steps)
        ddim.set_timesteps(num_steps)
        # At lengths such as 61 "trailing" gives them one timestep too many, which is -1.
        ours = euler_schedule(config, num_steps).timesteps
        np.testing.assert_allclose(ours, euler.timesteps[:num_steps].numpy(), atol=1e-4)
        np.testing.assert_array_equal(ddim_schedule(config, num_steps).timesteps, ddim.timesteps[:num_steps].numpy())


@MAKERS
def test_leading_never_leaves_the_trained_timesteps(make) -> None:
    """As many steps as timesteps, plus an offset, reach past the end: the published Euler then asks the network for
    timestep 1000, and the published DDIM fails. Ours stay at 999."""
    schedule = make(NoiseConfig(timestep_spacing="leading", steps_offset=1), 1000)
    assert schedule.timesteps[:3] == (999, 999, 998)
    assert schedule.timesteps[-1] == 1
    assert np.isfinite(schedule.sigmas).all()


@MAKERS
@given(config=noise_configs(), data=st.data())
def test_a_schedule_descends_to_zero(make, config: NoiseConfig, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, config.num_train_timesteps // 2))
    schedule = make(config, num_steps)
    assert schedule.num_steps == len(schedule.targets) == len(schedule.sigmas) - 1 == num_steps
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(schedule.sigmas))
    assert all(0 <= target <= sigma for sigma, target in zip(schedule.sigmas, schedule.targets, strict=False))
    if make is euler_schedule:
        assert schedule.targets == schedule.sigmas[1:]


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_are_the_published_ones(beta_schedule: str, zero_snr: bool) -> None:
    config = NoiseConfig(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    with in_float64():
        published = published_ddim(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), published, rtol=1e-9)


def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_without_signal() -> None:
    plain = alphas_cumprod(NoiseConfig())
    rescaled = alphas_cumprod(NoiseConfig(rescale_betas_zero_snr=True))
    assert rescaled[0] == pytest.approx(plain[0])
    assert rescaled[-1] == 0
    assert (np.diff(rescaled) < 0).all()
    trailing = NoiseConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert euler_schedule(trailing, 10).sigmas[0] == pytest.approx(4096)
    assert ddim_schedule(trailing, 10).sigmas[0] > 1e6


@settings(max_examples=20)
@given(noise_configs())
def test_the_timestep_of_the_sigma_of_a_timestep_is_that_timestep(config: NoiseConfig) -> None:
    table = euler_schedule(config, 1).noise
    assert len(table.sigmas) == config.num_train_timesteps
    for timestep in range(config.num_train_timesteps):
        assert table.timestep(table.sigma(timestep)) == timestep


@given(st.floats(0, 999))
def test_a_sigma_between_two_timesteps_lies_between_them(timestep: float) -> None:
    table = euler_schedule(NoiseConfig(), 1).noise
    assert math.floor(timestep) - 1e-9 <= table.timestep(table.sigma(timestep)) <= math.ceil(timestep) + 1e-9


def test_the_timestep_of_a_sigma_is_linear_in_its_logarithm() -> None:
    table = NoiseTable((0.1, 1.0, 10.0))
    assert table.timestep(math.sqrt(0.1)) == pytest.approx(0.5)
    assert table.timestep(10**0.25) == pytest.approx(1.25)
    assert table.sigma(1.25) == pytest.approx(3.25)


def test_the_table_is_constant_beyond_its_ends() -> None:
    table = euler_schedule(NoiseConfig(), 1).noise
    assert table.sigma(-5) == table.sigmas[0]
    assert table.sigma(5000) == table.sigmas[-1]
    assert table.timestep(0.0) == 0
    assert table.timestep(1e9) == 999


@MAKERS
@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_num_steps_must_fit_the_trained_timesteps(make, num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} must be between 1 and the 1000 timesteps"):
        make(NoiseConfig(), num_steps)


@pytest.mark.parametrize("name", ["beta_schedule", "prediction_type", "timestep_spacing"])
def test_an_unknown_choice_is_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}='other' is not one of \w+, "):
        NoiseConfig(**{name: "other"})


# ---- Schedules that are passed in

ON_SIGMAS = ("karras", "exponential", "beta")
"""The schedules that spread the steps over the model's own sigmas."""
EDM = EDMConfig(sigma_min=0.01, sigma_max=50.0)


NOT_FOR_EDM = {
    "trailing": "^schedule=trailing goes by timesteps, which an EDM model has not: choose sgm_uniform$",
    "align_your_steps": "^schedule=align_your_steps has no table for EDM models: choose karras or sgm_uniform$",
}
"""The schedules that EDM models have not, and what is said of them."""


def made(spec: Any, noise: AnyNoise, num_steps: int) -> Schedule:
    return make_schedule(resolve("schedule", spec), Euler(), noise, num_steps)


@pytest.mark.parametrize("name", ON_SIGMAS)
@settings(max_examples=40)
@given(config=noise_configs(), data=st.data())
def test_a_schedule_by_name_is_the_published_one(name: str, config: NoiseConfig, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, config.num_train_timesteps // 2))
    with in_float64():
        published = published_euler(config, **{"use_karras_sigmas": False, f"use_{name}_sigmas": True})
        published.set_timesteps(num_steps)
    if config.timestep_spacing == "trailing":  # at some lengths they spread the steps down to a timestep too many
        n = config.num_train_timesteps
        assume(len(np.arange(n, 0, -n / num_steps)) == num_steps)
    ours = made(name, config, num_steps)
    np.testing.assert_allclose(ours.sigmas[:-1], published.sigmas[:-1].numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.timesteps, published.timesteps.numpy(), rtol=1e-5, atol=1e-4)
    assert ours.sigmas[-1] == 0
    assert ours.targets == ours.sigmas[1:]
    assert ours.init_scale == pytest.approx(float(published.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_karras_by_name_is_the_karras_of_the_model(spacing: str, num_steps: int) -> None:
    config = NoiseConfig(timestep_spacing=spacing)
    own = euler_schedule(NoiseConfig(timestep_spacing=spacing, use_karras_sigmas=True), num_steps)
    assert made("karras", config, num_steps).digest == own.digest


@pytest.mark.parametrize("config", [NoiseConfig(), NoiseConfig(timestep_spacing="trailing")])
def test_a_list_of_sigmas_is_the_published_one(config: NoiseConfig) -> None:
    sigmas = [14.0, 9.5, 3.0, 0.7, 0.031, 0.0]
    with in_float64():
        published = published_euler(config)
        published.set_timesteps(sigmas=sigmas)
    for given_as in (sigmas, tuple(sigmas), "14,9.5,3,0.7,0.031,0", f"list,values={sigmas}"):
        ours = made(given_as, config, 5)
        assert ours.sigmas == tuple(sigmas)
        np.testing.assert_allclose(ours.timesteps, published.timesteps.numpy(), atol=1e-4)
        assert ours.init_scale == pytest.approx(float(published.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("num_steps", [2, 3, 30])
def test_on_an_edm_model_a_schedule_is_the_published_one(name: str, num_steps: int) -> None:
    """The published exponential schedule is another one at a single step."""
    published = published_edm(replace(EDM, sigma_schedule=name))
    published.set_timesteps(num_steps)
    ours = made(name, EDM, num_steps)
    np.testing.assert_allclose(ours.sigmas, published.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.timesteps, published.timesteps.numpy(), atol=1e-5)
    assert ours.init_scale == pytest.approx(published.init_noise_sigma)


def test_on_an_edm_model_beta_spreads_the_steps_between_its_sigmas() -> None:
    ours, symmetric = made("beta", EDM, 9), (EDM.sigma_max + EDM.sigma_min) / 2
    assert (ours.sigmas[0], ours.sigmas[4], ours.sigmas[8]) == pytest.approx((EDM.sigma_max, symmetric, EDM.sigma_min))
    assert ours.timesteps == pytest.approx([math.log(sigma) / 4 for sigma in ours.sigmas[:-1]])


@pytest.mark.parametrize("noise", [NoiseConfig(), NoiseConfig(rescale_betas_zero_snr=True), EDM])
@pytest.mark.parametrize("name", ON_SIGMAS)
def test_one_step_goes_from_the_models_first_sigma_to_0(noise: AnyNoise, name: str) -> None:
    first = made("model", noise, 1).sigmas[0]
    assert made(name, noise, 1).sigmas == (pytest.approx(first), 0)


@pytest.mark.parametrize("noise", [NoiseConfig(), EDM], ids=["betas", "edm"])
@pytest.mark.parametrize("schedule", [*(name for name in SCHEDULES if name != "list"), "14,2,0.5,0"])
def test_every_solver_draws_on_every_schedule(tiny_model: Model, noise: AnyNoise, schedule: str) -> None:
    model = replace(tiny_model, noise=noise)
    for solver in SOLVERS:
        options = {"method": "direct", "num_steps": 3, "height": 64, "width": 64}
        if noise == EDM and schedule in NOT_FOR_EDM:
            with pytest.raises(ValueError, match=NOT_FOR_EDM[schedule]):
                cutdiff.denoise(model, "a red house", schedule=schedule, solver=solver, **options)
            continue
        steps = list(cutdiff.denoise(model, "a red house", schedule=schedule, solver=solver, **options))
        assert [step.sigma for step in steps][1:] == sorted([step.sigma for step in steps][1:], reverse=True)
        assert steps[-1].latents.isfinite().all()


@pytest.mark.parametrize("name", ON_SIGMAS)
@settings(max_examples=10)
@given(config=noise_configs(), data=st.data())
def test_a_model_may_ask_for_the_schedule_of_a_name(name: str, config: NoiseConfig, data: st.DataObject) -> None:
    """With DDIM and LCM it has none, as there."""
    num_steps = data.draw(st.integers(1, min(50, config.num_train_timesteps // 2)))
    plain = replace(config, use_karras_sigmas=False)
    asked = replace(plain, **{f"use_{name}_sigmas": True})
    assert euler_schedule(asked, num_steps).sigmas == pytest.approx(made(name, plain, num_steps).sigmas, rel=1e-12)
    assert made("karras", asked, num_steps) == made("karras", plain, num_steps)
    for solver in (DDIM(), LCM()):
        if solver == DDIM() or config.num_train_timesteps >= 50:
            own, without = (make_schedule(resolve("schedule", "model"), solver, c, num_steps) for c in (asked, plain))
            assert own == without


@pytest.mark.parametrize("base", [NoiseConfig(), NoiseConfig(timestep_spacing="linspace", use_beta_sigmas=True)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_trailing_is_the_published_spacing(base: NoiseConfig, zero_snr: bool) -> None:
    config = replace(base, rescale_betas_zero_snr=zero_snr)
    for num_steps in (1, 2, 3, 4, 7, 8, 30, 48):
        with in_float64():
            published = published_euler(replace(config, timestep_spacing="trailing"))
            published.set_timesteps(num_steps)
        ours = made("trailing", config, num_steps)
        np.testing.assert_allclose(ours.sigmas, published.sigmas.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(ours.timesteps, published.timesteps.numpy())
        assert ours.init_scale == pytest.approx(float(published.init_noise_sigma))


def test_sgm_uniform_is_that_of_k_diffusion() -> None:
    """Even timesteps down to where another step would be at 0, by k-diffusion's t_to_sigma."""
    logs = torch.tensor(euler_schedule(NoiseConfig(), 1).noise.sigmas, dtype=torch.float64).log()
    for num_steps in (1, 2, 4, 7, 30):
        timesteps = torch.linspace(999, 0, num_steps + 1, dtype=torch.float64)[:-1]
        low, high, share = timesteps.floor().long(), timesteps.ceil().long(), timesteps.frac()
        expected = ((1 - share) * logs[low] + share * logs[high]).exp()
        ours, trailing = (made(name, NoiseConfig(), num_steps) for name in ("sgm_uniform", "trailing"))
        np.testing.assert_allclose(ours.sigmas[:-1], expected.numpy(), rtol=1e-12)
        np.testing.assert_allclose(ours.timesteps, timesteps.numpy(), atol=1e-9)
        assert all(abs(a - b) < 2 for a, b in zip(ours.timesteps, trailing.timesteps, strict=True))
    edm = made("sgm_uniform", EDM, 4)
    steps = np.diff(np.log([*edm.sigmas[:-1], EDM.sigma_min]))
    np.testing.assert_allclose(steps, math.log(EDM.sigma_min / EDM.sigma_max) / 4)


@pytest.mark.parametrize(("table", "published"), [("sdxl", "StableDiffusionXL"), ("sd15", "StableDiffusion")])
def test_align_your_steps_is_as_published(table: str, published: str) -> None:
    """In ten steps; in others, as ComfyUI, which halves and doubles the steps of log sigma."""
    ours = made(f"align_your_steps,table={table}", NoiseConfig(), 10)
    np.testing.assert_allclose(ours.sigmas, AysSchedules[f"{published}Sigmas"], rtol=1e-12)
    np.testing.assert_allclose(ours.timesteps, AysSchedules[f"{published}Timesteps"], atol=2)
    double, half = (made(f"align_your_steps,table={table}", NoiseConfig(), n) for n in (20, 5))
    assert double.sigmas[:-1:2] == pytest.approx(ours.sigmas[:-1])
    assert half.sigmas[:-1] == pytest.approx(ours.sigmas[:-1:2])
    assert double.sigmas[1] == pytest.approx(math.sqrt(ours.sigmas[0] * ours.sigmas[1]))
    assert double.sigmas[-2] == pytest.approx(math.sqrt(ours.sigmas[-2] * 0.029))


def test_the_table_is_that_of_the_models_family(tiny_model: Model) -> None:
    options: Any = {"schedule": "align_your_steps", "num_steps": 10, "method": "direct"}

    def sigmas(context_dim: int, pooled_dim: int, **more: Any) -> list[float]:
        unet = replace(tiny_model.unet.config, context_dim=context_dim, pooled_dim=pooled_dim)
        with replaced(tiny_model.unet, config=unet):
            return [*canvas_and_schedule(tiny_model, Settings(**options, **more))[1].sigmas[:-1]]

    sdxl, sd15 = (pytest.approx(ALIGNED[table][:-1]) for table in ("sdxl", "sd15"))
    assert sigmas(2048, 1280) == sdxl
    assert sigmas(768, 0, table="sdxl") == sdxl
    assert sigmas(768, 0) == sd15
    assert sigmas(2048, 1280, table="sd15") == sd15
    assert sigmas(1024, 0, table="sd15") == sd15
    with pytest.raises(ValueError, match=r"^schedule=align_your_steps has tables for SD 1\.5 and SDXL, and this"):
        sigmas(1024, 0)
    with pytest.raises(ValueError, match=r"^schedule=align_your_steps needs a table: give"):
        made("align_your_steps", NoiseConfig(), 10)


def test_the_shapes_of_a_schedule_are_its_options() -> None:
    assert Settings(schedule="karras", rho=3).schedule == Settings(schedule="karras,rho=3").schedule == Karras(3.0)
    assert made("karras,rho=1", NoiseConfig(), 3).sigmas[1] == pytest.approx(
        sum(made("model", NoiseConfig(), 3).sigmas[:3:2]) / 2
    )
    assert made("beta,alpha=1,beta=1", NoiseConfig(), 5).digest != made("beta", NoiseConfig(), 5).digest


class Given:
    """A schedule of one's own."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def sigmas(self, model_noise: AnyNoise, num_steps: int) -> Sequence[float]:
        return self.values


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([1.0, 2.0, 3.0, 0.0], r"schedule=\w+ gives the sigmas \[1.0, 2.0, 3.0, 0.0\]: they must fall at every step"),
        ([3.0, 2.0, 2.0, 0.0], ".*they must fall at every step, and end with 0"),
        ([3.0, 0.0, 2.0, 0.0], ".*they must fall at every step, and end with 0"),
        ([3.0, 0.0, 0.0, 0.0], ".*they must fall at every step, and end with 0"),
        ([3.0, 2.0, 1.0, 0.5], ".*they must fall at every step, and end with 0"),
        ([3.0, 2.0, 0.0], r"schedule=\w+ gives 3 sigmas, which is no run of 3 steps: give num_steps=2, or 4 sigmas"),
        ([3.0, 2.0, 1.0, 0.5, 0.0], r"schedule=\w+ gives 5 sigmas, which is no run of 3 steps: give num_steps=4"),
        ([], r"schedule=\(\) must hold two sigmas or more"),
        ([0.0], r"schedule=\(0.0,\) must hold two sigmas or more"),
        ([3.0, math.nan, 1.0, 0.0], r"values=.*nan.* must be a list, each a finite number"),
        ([math.inf, 2.0, 1.0, 0.0], r"values=.*inf.* must be a list, each a finite number"),
        ([3.0, 2.0, -1.0, 0.0], r"values=.*-1.0.* must be a list, each a finite number"),
        ([3.0, "2", 1.0, 0.0], r"values=.*'2'.* must be a list, each a finite number"),
        ("3,2,one,0", "schedule='3,2,one,0' must be numbers with commas between them"),
        (Given(3.0, math.nan, 1.0, 0.0), r"schedule=\w+ gives the sigmas \[3.0, nan, 1.0, 0.0\]: they must fall"),
        (Given(math.inf, 2.0, 1.0, 0.0), r"schedule=\w+ gives the sigmas \[inf, 2.0, 1.0, 0.0\]: they must fall"),
        (Given(), r"schedule=\w+ gives 0 sigmas, which is no run of 3 steps: give num_steps=1, or 4 sigmas"),
        ("karras,rho=0.5", "rho=0.5 must be a finite number in 1 … 1000"),
        ("align_your_steps,table=sd3", "table='sd3' must be one of sd15, sdxl or None"),
        ("beta,alpha=0", "alpha=0 must be a finite number in 0.001 … 1000"),
        ("karas", "schedule='karas' is not one of model, karras, .*did you mean 'karras'"),
        (5, "schedule=5 must be an object with `sigmas"),
    ],
)
def test_sigmas_that_cannot_be_are_one_error_before_any_work(tiny_model: Model, schedule: Any, message: str) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done")

    with replaced(tiny_model.unet, forward=work), replaced(tiny_model.text.text_encoder, forward=work):
        for solver in SOLVERS:
            with pytest.raises(ValueError, match=f"^{message}") as error:
                cutdiff.denoise(tiny_model, "a red house", schedule=schedule, solver=solver, num_steps=3)
            assert "\n" not in str(error.value)
