"""EDM models: their schedule and solvers against the published ones, and how each kind of file is read and saved."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import PLAYGROUND_VAE_SCALING_FACTOR
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from published import in_float64, published_edm
from safetensors.torch import save_file
from tiny import VAE_TINY, Tiny, assert_bit_equal, edit_json
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.configs import vae_config, vae_to_diffusers
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.noise import NoiseOptions, decide_noise
from cutdiff.checkpoint.schedulers import EDM_SCHEDULERS, noise_config, noise_to_diffusers
from cutdiff.methods import METHODS
from cutdiff.models.config import VAEConfig
from cutdiff.models.vae import VAE
from cutdiff.sample import main
from cutdiff.sampling.edm import EDMConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import ModelSchedule, make_schedule
from cutdiff.sampling.schedules import only_schedule as edm_schedule
from cutdiff.sampling.stages import Stage, solve
from cutdiff.specs import SOLVERS, resolve

PROMPT = "a red house"
PLAYGROUND = EDMConfig()
COSXL = EDMConfig(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
SHAPE = (2, 4, 5, 3)
SAME = ("euler", "ddim")
"""The solvers that are one on an EDM model."""
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2


@st.composite
def configs(draw: st.DrawFn) -> EDMConfig:
    return EDMConfig(
        sigma_min=draw(st.floats(1e-3, 0.1)),
        sigma_max=draw(st.floats(10, 700)),
        sigma_data=draw(st.floats(0.1, 2)),
        sigma_schedule=draw(st.sampled_from(["karras", "exponential"])),
        rho=draw(st.floats(3, 10)),
        prediction_type=draw(st.sampled_from(["epsilon", "v_prediction"])),
    )


def network(x: Tensor, timestep: float) -> Tensor:
    """A stand-in for a U-Net: smooth, not linear, mixing channels, and depending on the timestep."""
    return torch.einsum("ij,bjhw->bihw", MIX.to(x), torch.tanh(x)) + 0.3 * x + math.sin(3 * timestep)


def ours(config: EDMConfig, num_steps: int, solver: str) -> list[Tensor]:
    chosen = resolve("solver", solver)
    schedule = make_schedule(ModelSchedule(), chosen, config, num_steps)

    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        c_in, c_skip, c_out = config.coefficients(sigma)
        return c_skip * x + c_out * network(c_in * x, schedule.timestep(sigma))

    start = NOISE * schedule.init_scale
    stages = [Stage("all", range(num_steps), denoise)]
    return [start, *(step.latents for step in solve(stages, start, schedule, chosen, lambda shape, step: NOISE))]


def theirs(config: EDMConfig, num_steps: int) -> list[Tensor]:
    with in_float64():
        scheduler = published_edm(config)
        scheduler.set_timesteps(num_steps)
        states = [NOISE.double() * scheduler.init_noise_sigma]
        for t in scheduler.timesteps:
            prediction = network(scheduler.scale_model_input(states[-1], t), float(t))
            states.append(scheduler.step(prediction, t, states[-1], return_dict=False)[0])
    return states


@settings(max_examples=40)
@given(configs(), st.integers(2, 100))
def test_the_schedule_is_the_published_one(config: EDMConfig, num_steps: int) -> None:
    published = published_edm(config)
    published.set_timesteps(num_steps)
    schedule = edm_schedule(config, num_steps)
    np.testing.assert_allclose(schedule.sigmas, published.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(schedule.timesteps, published.timesteps.numpy(), atol=1e-5)
    assert schedule.init_scale == pytest.approx(published.init_noise_sigma)
    assert schedule.targets == schedule.sigmas[1:]


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
def test_one_step_begins_at_the_noisiest_sigma(sigma_schedule: str) -> None:
    """The published exponential schedule begins a single step at sigma_min, with noise of sigma_max."""
    assert edm_schedule(EDMConfig(sigma_schedule=sigma_schedule), 1).sigmas == (pytest.approx(80), 0)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"num_steps={num_steps} must be between 1 and 1000"):
            edm_schedule(EDMConfig(), num_steps)


@given(configs(), st.integers(2, 50))
def test_the_fraction_of_a_sigma_falls_evenly_over_the_steps(config: EDMConfig, num_steps: int) -> None:
    schedule = edm_schedule(config, num_steps)
    fractions = [schedule.fraction(sigma) for sigma in schedule.sigmas[:-1]]
    np.testing.assert_allclose(fractions, np.linspace(1, 0, num_steps), atol=1e-9)
    between = math.sqrt(schedule.sigmas[0] * schedule.sigmas[1])
    assert fractions[1] < schedule.fraction(between) < fractions[0]
    assert schedule.timestep(between) == pytest.approx((schedule.timesteps[0] + schedule.timesteps[1]) / 2)


@pytest.mark.parametrize("solver", SAME)
@pytest.mark.parametrize("config", [PLAYGROUND, COSXL, replace(COSXL, sigma_schedule="exponential"), EDMConfig(0.03)])
def test_solvers_go_where_the_published_one_goes(solver: str, config: EDMConfig) -> None:
    """DDIM without eta is Euler: the state is in sigma space."""
    for num_steps in (1, 2, 7, 30)[config.sigma_schedule == "exponential" :]:
        for step, (a, b) in enumerate(zip(ours(config, num_steps, solver), theirs(config, num_steps), strict=True)):
            assert ((a.double() - b).norm() / b.norm()).item() < 1e-5, f"{num_steps} steps, after {step}"


@given(st.floats(1e-3, 200), st.floats(0.1, 2))
def test_the_network_is_shown_unit_variance_and_must_say_unit_variance(sigma: float, sigma_data: float) -> None:
    """In the paper's equations 117 and 131, c_in is one over the state's deviation, c_out the best estimate's."""
    for kind, sign in (("epsilon", 1), ("v_prediction", -1)):
        c_in, c_skip, c_out = EDMConfig(sigma_data=sigma_data, prediction_type=kind).coefficients(sigma)
        assert c_in**2 * (sigma**2 + sigma_data**2) == pytest.approx(1)
        assert c_out**2 == pytest.approx((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2)
        assert c_out * sign > 0


@given(st.floats(1e-3, 200))
def test_cosxl_says_what_other_v_predictions_say(sigma: float) -> None:
    assert COSXL.coefficients(sigma) == NoiseConfig(prediction_type="v_prediction").coefficients(sigma)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma_min": 0.0}, "sigma_min=0.0 must be a number from 1e-06"),
        ({"sigma_max": math.nan}, "sigma_max=nan must be a number"),
        ({"rho": 0.5}, "rho=0.5 must be a number from 1 to"),
        ({"sigma_data": "1"}, "sigma_data='1' must be a number"),
        ({"sigma_min": 90}, "sigma_min=90 must be below sigma_max=80.0"),
        ({"sigma_schedule": "linear"}, "sigma_schedule='linear' is not one of karras, exponential"),
        ({"prediction_type": "sample"}, "prediction_type='sample' is not one of"),
    ],
)
def test_what_a_schedule_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_config(noise_to_diffusers(PLAYGROUND) | fields)


class TestMethods:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_draws_with_either_solver(self, tiny_model: Model, method: str) -> None:
        model = replace(tiny_model, noise=PLAYGROUND)
        options = {"method": method, "num_steps": 3, "height": 128, "width": 96}
        drawn, same = (cutdiff.generate(model, PROMPT, solver=solver, **options) for solver in SAME)
        assert drawn.latents.isfinite().all()
        assert torch.equal(drawn.latents, same.latents)
        for solver in ("ddim,eta=1", *(name for name in SOLVERS if name not in SAME)):
            other = cutdiff.generate(model, PROMPT, solver=solver, **options).latents
            assert other.isfinite().all()
            # A second step that goes to sigma 0, as that of a short stage, is of first order.
            assert solver in ("dpmpp_2m", "unipc") or not torch.allclose(other, drawn.latents, rtol=0.1)

    @pytest.mark.parametrize("method", METHODS)
    def test_at_native_size_they_are_direct(self, tiny_model: Model, method: str) -> None:
        model, options = replace(tiny_model, noise=PLAYGROUND), {"num_steps": 3, "height": 64, "width": 64}
        drawn, direct = (cutdiff.generate(model, PROMPT, method=m, **options).latents for m in (method, "direct"))
        torch.testing.assert_close(drawn, direct, rtol=1e-5, atol=1e-5 * float(direct.abs().max()))


def with_statistics(tiny: Tiny) -> Tiny:
    """Give the model's VAE the statistics of Playground's configuration."""
    vae = VAE(replace(VAE_TINY, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)).eval().requires_grad_(False)
    vae.load_state_dict(tiny.vae.state_dict())
    return replace(tiny, vae=vae)


class TestFolders:
    @pytest.mark.parametrize("noise", [PLAYGROUND, COSXL, EDMConfig(0.01, 50, 0.7, "exponential", 5)])
    def test_what_was_saved_is_loaded(self, tiny: Tiny, tmp_path: Path, noise: EDMConfig) -> None:
        saved = with_statistics(tiny)
        model = cutdiff.load(saved.save(tmp_path, noise=noise))
        assert_bit_equal(model, saved)
        assert (model.noise, model.vae.config) == (noise, saved.vae.config)
        assert model.decided_by == {"prediction_type": "scheduler", "edm": "scheduler"}

    @pytest.mark.parametrize("noise", [PLAYGROUND, COSXL])
    @torch.no_grad()
    def test_a_picture_is_diffusers(self, tiny: Tiny, tmp_path: Path, noise: EDMConfig) -> None:
        model = cutdiff.load(with_statistics(tiny).save(tmp_path, noise=noise))
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        assert isinstance(pipeline.scheduler, EDMEulerScheduler)
        assert noise_config(pipeline.scheduler.config) == noise
        told = {"negative_prompt": "a tent", "guidance_scale": 3.0, "height": 64, "width": 64}
        start = cutdiff.Draws((3,)).noise((1, 4, 16, 16))
        latents = pipeline(PROMPT, num_inference_steps=5, latents=start, output_type="latent", **told).images
        drawn = cutdiff.generate(model, PROMPT, method="direct", num_steps=5, seed=3, **told)
        torch.testing.assert_close(drawn.latents, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
        images = pipeline(PROMPT, num_inference_steps=5, latents=start, output_type="pt", **told).images
        torch.testing.assert_close(drawn.images, images, rtol=0, atol=1e-4)
        plain = cutdiff.decode(replace(model, vae=tiny.vae), drawn.latents)
        assert not torch.allclose(drawn.images, plain, rtol=0, atol=1e-2), "the statistics matter"

    def test_as_playground_is_published(self, tiny: Tiny, tmp_path: Path) -> None:
        """Playground's scheduler_config.json names the multistep solver."""
        folder = with_statistics(tiny).save(tmp_path)
        fields = {
            "_class_name": "EDMDPMSolverMultistepScheduler", "_diffusers_version": "0.27.0.dev0",
            "algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
            "final_sigmas_type": "zero", "lower_order_final": True, "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "rho": 7.0, "sample_max_value": 1.0, "sigma_data": 0.5, "sigma_max": 80.0,
            "sigma_min": 0.002, "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
        }  # fmt: skip
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(fields))
        assert cutdiff.load(folder).noise == PLAYGROUND
        edit_json(folder / "scheduler" / "scheduler_config.json", final_sigmas_type="sigma_min")
        with pytest.raises(ValueError, match=r"scheduler_config\.json: final_sigmas_type='sigma_min' is not supported"):
            cutdiff.load(folder)

    @pytest.mark.parametrize("name", EDM_SCHEDULERS)
    def test_defaults_are_those_of_the_scheduler(self, name: str) -> None:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert {field: parameters[field].default for field in asdict(PLAYGROUND)} == asdict(PLAYGROUND)
        assert noise_config({"_class_name": name}) == PLAYGROUND


class TestStatistics:
    @torch.no_grad()
    def test_encoding_undoes_decoding(self) -> None:
        """Latents whose unscaled moments are `MEAN` and `STD` get mean 0 and the deviation `scaling_factor`."""
        plain = VAE(replace(VAE_TINY, scaling_factor=1.0))
        marked = VAE(replace(VAE_TINY, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5))
        marked.load_state_dict(plain.state_dict())
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
        torch.testing.assert_close(marked.decode(latents), plain.decode(latents * std / 0.5 + mean))
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        ours, unscaled = marked.encode(images), plain.encode(images)
        torch.testing.assert_close(ours.mean, (unscaled.mean - mean) * 0.5 / std)
        torch.testing.assert_close(ours.std, unscaled.std * 0.5 / std)

    @pytest.mark.parametrize(
        "fields",
        [
            {"latents_mean": MEAN},
            {"latents_mean": MEAN[:3], "latents_std": STD},
            {"latents_mean": MEAN, "latents_std": (0.0, *STD[1:])},
            {"latents_mean": MEAN, "latents_std": "1234"},
            {"latents_mean": (math.inf, *MEAN[1:]), "latents_std": STD},
        ],
    )
    def test_that_are_none(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^latents_(mean|std)=.* (must|is not supported)"):
            vae_config(vae_to_diffusers(VAEConfig(), sample_size=64) | fields)


def playground(shape: tuple[int, ...] = (1, 4, 1, 1)) -> dict[str, Tensor]:
    return {"edm_mean": torch.tensor(MEAN).view(shape), "edm_std": torch.tensor(STD).view(shape)}


def cosxl(**sigmas: float) -> dict[str, Tensor]:
    return {f"edm_vpred.{name}": torch.tensor(value) for name, value in sigmas.items()}


class TestSingleFiles:
    @pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4,)])
    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_playground(self, tiny: Tiny, tmp_path: Path, shape: tuple[int, ...]) -> None:
        save_file({**tiny.original(), **playground(shape)}, tmp_path / "model.safetensors")
        model = cutdiff.load(tmp_path / "model.safetensors")
        assert model.noise == PLAYGROUND
        assert model.vae.config.latents_mean == pytest.approx(MEAN)
        assert model.vae.config.latents_std == pytest.approx(STD)
        assert model.vae.config.scaling_factor == PLAYGROUND_VAE_SCALING_FACTOR
        source = "marker keys edm_mean, edm_std"
        assert model.decided_by == {"prediction_type": source, "edm": source}
        record = cutdiff.generate(model, PROMPT, method="direct", num_steps=1, height=16, width=16).record
        assert record["model"]["decided_by"]["edm"] == source
        assert record["edm"] | {"prediction_type": record["prediction_type"]} == asdict(PLAYGROUND)
        assert "timestep_spacing" not in record

    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_cosxl_and_its_folder(self, tiny: Tiny, tmp_path: Path) -> None:
        save_file({**tiny.original(), **cosxl(sigma_max=120.0, sigma_min=0.002)}, tmp_path / "model.safetensors")
        model = cutdiff.load(tmp_path / "model.safetensors")
        assert model.noise == replace(COSXL, sigma_min=torch.tensor(0.002).item())
        assert model.vae.config == VAE_TINY
        again = cutdiff.load(Tiny(model.unet, model.vae, model.text).save(tmp_path / "folder", noise=model.noise))
        assert (again.noise, again.vae.config) == (model.noise, model.vae.config)

    def test_what_no_mark_says_is_the_folders(self, tiny: Tiny, tmp_path: Path) -> None:
        """The folder gives the spacing of the sigmas, and all of a VAE's configuration but the latents' statistics."""
        save_file({**tiny.original(), **playground()}, tmp_path / "model.safetensors")
        noise = EDMConfig(sigma_max=50, sigma_schedule="exponential", rho=3)
        model = cutdiff.load(tmp_path / "model.safetensors", config=tiny.save(tmp_path / "folder", noise=noise))
        assert model.noise == replace(PLAYGROUND, sigma_schedule="exponential", rho=3)
        assert model.vae.config.latents_std == pytest.approx(STD)

    @pytest.mark.parametrize("layout", ["file", "folder"])
    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_another_vae_leaves_the_latents_as_the_network_knows_them(
        self, tiny: Tiny, folder: Path, tmp_path: Path, layout: str
    ) -> None:
        save_file({**tiny.original(), **playground()}, tmp_path / "model.safetensors")
        other = tmp_path / "vae.safetensors"
        save_file(tiny.vae.state_dict(), other)
        other = folder / "vae" if layout == "folder" else other
        config = cutdiff.load(tmp_path / "model.safetensors", vae=other).vae.config
        assert config.scaling_factor == 0.5
        assert config.latents_mean == pytest.approx(MEAN)

    def test_the_vae_of_a_model_with_statistics_brings_none_of_them(
        self, tiny: Tiny, folder: Path, tmp_path: Path
    ) -> None:
        vae = VAE(replace(VAE_TINY, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5))
        other = Tiny(tiny.unet, vae, tiny.text).save(tmp_path / "folder", noise=PLAYGROUND)
        assert cutdiff.load(folder, vae=other).vae.config == cutdiff.load(folder).vae.config

    @pytest.mark.parametrize(
        ("marks", "message"),
        [
            ({"edm_mean": torch.zeros(4)}, r"marker key edm_std holds \[\], not 4 finite numbers"),
            ({**playground(), "edm_std": torch.ones(3)}, r"marker key edm_std holds \[1.0, 1.0, 1.0\], not 4"),
            ({**playground(), "edm_std": torch.full((4,), math.nan)}, "marker key edm_std holds .*, not 4 finite"),
            ({**playground(), "edm_std": torch.zeros(4)}, "latents_std=.* must be positive"),
            (cosxl(sigma_min=0.5, sigma_max=0.1), "sigma_min=0.5 must be below sigma_max=0.1"),
            ({"edm_vpred.sigma_max": torch.zeros(0)}, r"marker key edm_vpred.sigma_max holds \[\], not 1"),
            ({"edm_vpred.sigma_data": torch.ones(1)}, "keys belong to no network of SDXL: edm_vpred.sigma_data"),
        ],
    )
    @pytest.mark.usefixtures("tokenizer_in_cache")
    def test_marks_that_say_nothing(self, tiny: Tiny, tmp_path: Path, marks: dict[str, Tensor], message: str) -> None:
        save_file({**tiny.original(), **marks}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            cutdiff.load(tmp_path / "model.safetensors")


class TestDecision:
    @pytest.mark.parametrize(
        ("option", "scheduler", "marks", "metadata", "kind", "sources"),
        [
            (None, None, cosxl(sigma_max=9.0), {}, "v_prediction", ["marker key edm_vpred.sigma_max"] * 2),
            (None, None, playground() | {"v_pred": NOISE}, {}, "epsilon", ["marker keys edm_mean, edm_std"] * 2),
            (None, None, playground() | cosxl(sigma_max=9.0), {}, "epsilon", ["marker keys edm_mean, edm_std"] * 2),
            (None, NoiseConfig(), playground(), {"modelspec.predict_key": "v"}, "epsilon",
             ["marker keys edm_mean, edm_std"] * 2),
            ("v_prediction", None, playground(), {}, "v_prediction", ["option", "marker keys edm_mean, edm_std"]),
            (None, PLAYGROUND, {}, {}, "epsilon", ["scheduler"] * 2),
            (None, PLAYGROUND, {}, {"modelspec.predict_key": "v"}, "v_prediction",
             ["metadata modelspec.predict_key", "scheduler"]),
        ],
    )  # fmt: skip
    def test_option_then_mark_then_metadata_then_scheduler(
        self,
        option: str | None,
        scheduler: EDMConfig | NoiseConfig | None,
        marks: dict[str, Tensor],
        metadata: dict[str, str],
        kind: str,
        sources: list[str],
    ) -> None:
        noise, decided_by = decide_noise(NoiseOptions(option), scheduler, tensors=marks, metadata=metadata)
        assert isinstance(noise, EDMConfig)
        assert noise.prediction_type == kind
        assert [decided_by["prediction_type"], decided_by["edm"]] == sources

    def test_a_missing_sigma_is_cosxls(self) -> None:
        assert decide_noise(NoiseOptions(), None, tensors=cosxl(sigma_min=0.25))[0] == replace(COSXL, sigma_min=0.25)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--timestep-spacing", "trailing"], "--timestep-spacing trailing is not for an EDM model"),
            (["--zero-terminal-snr"], "--zero-terminal-snr is not for an EDM model"),
            (["--no-zero-terminal-snr"], "--zero-terminal-snr False is not for an EDM model"),
        ],
    )
    def test_options_that_an_edm_model_has_no_use_for(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
    ) -> None:
        folder = tiny.save(tmp_path / "model", noise=COSXL)
        assert main(["red", "--model", str(folder), "--out", str(tmp_path), *flags]) == 2
        assert capsys.readouterr().err.startswith(f"cutdiff: {message}, whose sigmas go from 120 to 0.002")

    def test_the_command_line_tells_who_decided(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tiny.save(tmp_path / "model", noise=COSXL)
        quick = ["--steps", "1", "--width", "64", "--height", "64", "--method", "direct", "--out", str(tmp_path)]
        assert main(["red", "--model", str(folder), "--prediction-type", "epsilon", "-v", *quick]) == 0
        told = capsys.readouterr().err
        assert "prediction_type=epsilon, decided by: option" in told
        assert "edm={'sigma_min': 0.002, 'sigma_max': 120.0, 'sigma_data': 1.0" in told
        assert "decided by: scheduler" in told
