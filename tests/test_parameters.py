"""The text of a picture, as other tools read it: sd-parsers, and A1111's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager
from test_own_objects import record_of

from cutdiff.checkpoint.locate import name_of
from cutdiff.output.parameters import parameters_text
from cutdiff.sample import main
from cutdiff.sampling.edm import AnyNoise, EDMConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.specs import SCHEDULES, SOLVERS

NAMES = {
    "models/stable-diffusion-xl-base-1.0": "stable-diffusion-xl-base-1.0",
    "/cache/models--stabilityai--stable-diffusion-xl-base-1.0/snapshots/0123abcd": (
        "stabilityai/stable-diffusion-xl-base-1.0"
    ),
    "/cache/models--a--b/snapshots/0123abcd/sd_xl_1.0.safetensors": "a/b/sd_xl_1.0",
    "/cache/models--gpt2/snapshots/0123abcd/": "gpt2",
    "dreamshaper_8.v2.safetensors": "dreamshaper_8.v2",
    "models/../other/": "other",
    "a model (copy)": "a model (copy)",
}
"""Paths of models, and the names that a picture has for them."""
QUOTED = ("a,b", "a: b", 'a "b"', "a, Seed: 7", "a\\b,", "été, hiver", "a\nb")
"""Names that would break the line if they were not quoted."""


def fields(line: str) -> dict[str, str]:
    """The pairs of a line as A1111 reads them: a value reaches to the next comma, or is a JSON text in quotes."""
    pairs, decoder = {}, json.JSONDecoder()
    while line:
        name, _, rest = line.partition(": ")
        if rest.startswith('"'):
            value, end = decoder.raw_decode(rest)
            assert rest[end : end + 2] in ("", ", "), rest
            line = rest[end + 2 :]
        else:
            value, _, line = rest.partition(", ")
        pairs[name] = value
    return pairs


@pytest.mark.parametrize("source", NAMES)
def test_the_name_of_a_model(source: str, tmp_path: Path) -> None:
    record = record_of(model=record_of()["model"] | {"source": name_of(source)}, negative_prompt="fog, rain")
    text = parameters_text(record)
    assert fields(text.splitlines()[-1])["Model"] == NAMES[source]
    assert read_back(text, tmp_path)["model"] == (NAMES[source], "0123456789")


@pytest.mark.parametrize("name", QUOTED)
def test_names_that_would_break_the_line(name: str) -> None:
    record = record_of(
        model=record_of()["model"] | {"source": name, "loras": [{"path": f"{name}.safetensors", "scale": 0.5}]}
    )
    pairs = fields(parameters_text(record).partition("\n")[2])
    assert (pairs["Model"], pairs["Loras"], pairs["Seed"]) == (name, f"{name}: 0.5", "0")


def test_a_name_that_is_no_text() -> None:
    record = record_of(model=record_of()["model"] | {"source": name_of("/models/caf\udce9")})
    assert "Model: caf\\udce9," in parameters_text(record)


def read_back(text: str, folder: Path) -> dict[str, Any]:
    """The values that sd-parsers reads from a picture with this text."""
    path = folder / "text.png"
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return parsed(path)


def parsed(path: Path) -> dict[str, Any]:
    """The values that sd-parsers reads from a picture."""
    info = ParserManager().parse(path)
    assert info is not None
    (sampler,) = info.samplers
    assert sampler.model is not None
    return {
        "prompts": [prompt.value for prompt in sampler.prompts],
        "negative": [prompt.value for prompt in sampler.negative_prompts],
        "sampler": (sampler.name, sampler.parameters),
        "model": (sampler.model.name, sampler.model.hash),
        "size": info.metadata["Size"],
    }


def test_a_picture_that_was_drawn(quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "my-model-1.0"
    model.symlink_to(quick_folder)
    arguments = ["a (red:1.2) tent, at night", "--negative-prompt", "a moon, été", "--seed", "7", "--steps", "2"]
    arguments += ["--solver", "dpmpp_2m", "--schedule", "karras", "--width", "64", "--height", "64"]
    assert main([*arguments, "--method", "direct", "--model", str(model), "--out", str(tmp_path / "out")]) == 0
    path = Path(capsys.readouterr().out.strip())
    hashes = json.loads(path.with_suffix(".json").read_text())["model"]["sha256"]
    assert parsed(path) == {
        "prompts": ["a (red:1.2) tent, at night"],
        "negative": ["a moon, été"],
        "sampler": ("DPM++ 2M", {"cfg_scale": "7.5", "scheduler": "Karras", "seed": "7", "steps": "2"}),
        "model": ("my-model-1.0", hashes["unet/diffusion_pytorch_model.safetensors"][:10]),
        "size": "64x64",
    }


# A1111's names, as the lists of its samplers and schedulers have them (modules/sd_samplers_*.py, sd_schedulers.py)
NAMES_OF_SOLVERS = {
    "euler": "Euler",
    "ddim": "DDIM",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
NAMES_OF_SCHEDULES = {
    "model": None,
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "trailing": "SGM Uniform",
    "align_your_steps": "Align Your Steps",
    "list,values=(2,1,0)": None,
}
NAMES_OF_MODELS: list[tuple[AnyNoise, str | None]] = [
    (NoiseConfig(), None),
    (NoiseConfig(timestep_spacing="trailing"), "SGM Uniform"),
    (NoiseConfig(timestep_spacing="linspace"), "Uniform"),
    (NoiseConfig(use_karras_sigmas=True), "Karras"),
    (NoiseConfig(use_exponential_sigmas=True, timestep_spacing="trailing"), "Exponential"),
    (NoiseConfig(use_beta_sigmas=True), "Beta"),
    (EDMConfig(), "Karras"),
    (EDMConfig(sigma_schedule="exponential"), "Exponential"),
]
"""The names of the own schedules of models."""


def sampler_of(tmp_path: Path, solver: str, schedule: str, noise: AnyNoise) -> tuple[object, object]:
    """The sampler and the schedule that sd-parsers reads."""
    text = parameters_text(record_of(solver=solver, schedule=schedule, noise=vars(noise)))
    name, options = read_back(text, tmp_path)["sampler"]
    return name, options.get("scheduler")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_and_schedule_is_read_back_by_the_name_of_a1111(solver: str, tmp_path: Path) -> None:
    assert {schedule.partition(",")[0] for schedule in NAMES_OF_SCHEDULES} == {*SCHEDULES}
    for schedule, name in NAMES_OF_SCHEDULES.items():
        assert sampler_of(tmp_path, solver, schedule, NoiseConfig()) == (NAMES_OF_SOLVERS[solver], name)


@pytest.mark.parametrize(("noise", "name"), NAMES_OF_MODELS)
def test_a_models_own_schedule_has_the_name_of_its_spacing(noise: AnyNoise, name: str | None, tmp_path: Path) -> None:
    for solver in ("euler", "unipc"):
        assert sampler_of(tmp_path, solver, "model", noise)[1] == name
    for solver in ("ddim", "lcm"):
        assert sampler_of(tmp_path, solver, "model", noise) == (NAMES_OF_SOLVERS[solver], None)
