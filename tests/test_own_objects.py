"""Objects of a researcher's own, by `module:object` on the command line: they draw, and the picture says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own import METHODS, OwnModules
from PIL import Image
from refusal import CommandLine

from cutdiff import specs
from cutdiff.output.parameters import parameters_text
from cutdiff.sample import main

OWN = '''
from dataclasses import dataclass

import torch

from cutdiff.options import Options


@dataclass(frozen=True)
class Halfway(Options):
    """A solver that goes a share of the way."""

    share: float = 1.0
    words: str = "a, b: c"

    def start(self, schedule, noise):
        def step(x, denoised, i):
            ratio = schedule.sigmas[i + 1] / schedule.sigmas[i]
            return denoised + (1 - self.share * (1 - ratio)) * (x - denoised)

        return step


@dataclass(frozen=True)
class Even(Options):
    """A schedule of even steps."""

    first: float = 10.0

    def sigmas(self, model_noise, num_steps):
        return [self.first * (1 - i / num_steps) for i in range(num_steps + 1)]


@dataclass(frozen=True)
class Sharp(Options):
    """A guidance with a scale of its own."""

    guidance_scale: float = 2.0

    def __call__(self, conditional, unconditional, sigma, step):
        return unconditional + self.guidance_scale * (conditional - unconditional)


def alone(conditional, unconditional, sigma, step):
    return conditional
'''


@pytest.fixture
def draw(
    quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: OwnModules
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Draw a picture on the command line; its text and its record."""
    own.write("mine", OWN)
    own.write("mine_methods", METHODS)
    options = ["--model", str(quick_folder), "--width", "64", "--height", "64", "--steps", "2"]

    def run(*arguments: str, prompt: str = "a tent") -> tuple[str, dict[str, Any]]:
        assert main([*options, "--out", str(tmp_path / "out"), *arguments, "--", prompt]) == 0
        path = Path(capsys.readouterr().out.strip())
        with Image.open(path) as image:
            return image.info["parameters"], json.loads(path.with_suffix(".json").read_text())

    return run


def test_a_solver_a_guidance_and_a_schedule(draw: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    own = ["--solver", "mine:Halfway,share=0.5", "--schedule", "mine:Even", "--guidance", "mine:Sharp"]
    text, record = draw(*own, "--guidance-scale", "3", "--first", "5", "--method", "mine_methods:plain")
    assert text.startswith("a tent\nSteps: 2, Sampler: Halfway, CFG scale: 3.0, Seed: 0, Size: 64x64, Model hash: ")
    assert record["solver"] == "Halfway,share=0.5,words='a, b: c'"
    assert (record["method"], record["schedule"]) == ("plain", "Even,first=5.0")
    assert record["guidance"] == "Sharp,guidance_scale=3.0"
    assert {*record["sources"]} == {"method", "solver", "schedule", "guidance"}
    assert ', Method: plain, Solver: "Halfway,share=0.5,words=\'a, b: c\'", Schedule: "Even,first=5.0", ' in text
    assert 'Guidance: "Sharp,guidance_scale=3.0", Version: ' in text
    text, record = draw("--guidance", "mine:alone", "--method", "mine_methods:Mine")
    assert "Sampler: Euler, Seed: 0, " in text
    assert "CFG scale" not in text
    assert record["guidance"] == "alone"
    assert record["network_evaluations"] == 2 * 2


SAMPLERS = {
    ("euler", "model"): ("Euler", None),
    ("euler", "karras"): ("Euler", "Karras"),
    ("euler_ancestral", "exponential"): ("Euler a", "Exponential"),
    ("ddim", "model"): ("DDIM", None),
    ("heun", "sgm_uniform"): ("Heun", "SGM Uniform"),
    ("dpmpp_2m", "karras,rho=6"): ("DPM++ 2M", "Karras"),
    ("dpmpp_2m", "beta"): ("DPM++ 2M", "Beta"),
    ("dpmpp_2m", "2,1,0"): ("DPM++ 2M", None),
    ("dpmpp_2m", "mine:Even"): ("DPM++ 2M", None),
    ("dpmpp_2m_sde", "model"): ("DPM++ 2M SDE", None),
    ("dpmpp_sde", "align_your_steps,table=sdxl"): ("DPM++ SDE", "Align Your Steps"),
    ("unipc", "trailing"): ("UniPC", "SGM Uniform"),
    ("lcm", "model"): ("LCM", None),
    ("mine:Halfway", "karras"): ("Halfway", "Karras"),
}
"""A1111's names of solvers and schedules."""


@pytest.mark.parametrize(("solver", "schedule"), SAMPLERS)
def test_samplers_have_the_names_of_a1111(
    solver: str, schedule: str, draw: Callable[..., tuple[str, dict[str, Any]]]
) -> None:
    text, record = draw("--solver", solver, "--schedule", schedule, "--method", "direct")
    sampler, kind = SAMPLERS[solver, schedule]
    type_of = "" if kind is None else f"Schedule type: {kind}, "
    assert f"Steps: 2, Sampler: {sampler}, {type_of}CFG scale: 7.5, " in text
    if ":" not in solver + schedule:
        assert specs.resolve("solver", record["solver"]) == specs.resolve("solver", solver)
        assert specs.resolve("schedule", record["schedule"]) == specs.resolve("schedule", schedule)


def record_of(**values: Any) -> dict[str, Any]:
    """The least that a record holds for the text of a picture."""
    return {
        "prompt": "a tent",
        "negative_prompt": "",
        "num_steps": 2,
        "method": "direct",
        "solver": "euler",
        "schedule": "model",
        "guidance": "cfg,guidance_scale=7.5",
        "seed": 0,
        "width": 64,
        "height": 64,
        "noise": {"use_karras_sigmas": False},
        "model": {"sha256": {"unet": "0123456789abcdef"}, "source": "name", "loras": []},
        "versions": {"cutdiff": "1"},
        "clip_skip": None,
    } | values


def test_the_text_of_a_record() -> None:
    assert parameters_text(record_of()) == (
        "a tent\nSteps: 2, Sampler: Euler, CFG scale: 7.5, Seed: 0, Size: 64x64, Model hash: 0123456789, Model: name, "
        'Method: direct, Solver: euler, Schedule: model, Guidance: "cfg,guidance_scale=7.5", Version: cutdiff 1'
    )
    noise = {"use_karras_sigmas": True}
    assert "Sampler: Euler, Schedule type: Karras, " in parameters_text(record_of(noise=noise))
    assert "Sampler: DDIM, " in parameters_text(record_of(noise=noise, solver="ddim,eta=0.0"))
    assert "Sampler: Euler, " in parameters_text(record_of(noise={"sigma_max": 80}))
    assert parameters_text(record_of(clip_skip=2)).endswith(", Version: cutdiff 1, Clip skip: 2")


@pytest.mark.parametrize("name", ["a,b", "a:b", 'a"b', "a\nb", 'a\\b: "c"', "été, hiver"])
def test_a_value_that_would_break_the_line_is_in_quotes(name: str) -> None:
    loras = [{"path": f"{name}.safetensors", "scale": 0.5}]
    model = record_of()["model"] | {"source": name, "loras": loras}
    line = parameters_text(record_of(model=model)).splitlines()[-1]
    assert f", Model: {json.dumps(name, ensure_ascii=False)}, " in line
    assert f", Loras: {json.dumps(f'{name}: 0.5', ensure_ascii=False)}, " in line
    plain = record_of()["model"] | {"source": "a b (c)=d"}
    assert ", Model: a b (c)=d, " in parameters_text(record_of(model=plain))


def test_objects_of_ones_own_that_fail_are_one_line(own: OwnModules, command_line: CommandLine) -> None:
    own.write("mine", "import torch\n\n\nclass Solver:\n    def start(self, schedule, noise):\n        return 1 / 0\n")
    arguments = ["--solver", "mine:Solver", "--steps", "1", "--width", "128", "--height", "128", "--method", "direct"]
    arguments += ["--guidance-scale", "4"]  # not to be told that it is the model's
    command_line.refuses(arguments, 1, "the run failed: ZeroDivisionError: division by zero")


def test_debug_prints_the_traceback(own: OwnModules, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write("mine", "def method(run):\n    return [][1]\n")
    assert main(["--method", "mine:method", "--debug", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "in method" in told
    assert told.splitlines()[-1] == "cutdiff: the run failed: IndexError: list index out of range"
