"""Fingerprints: whatever changes a picture changes its fingerprint, and the same again is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own import METHODS, OwnModules
from tiny import edit_json
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.evaluation.cells import Cell, cost, draw
from cutdiff.output.record import LATER, changes, describe, fingerprint
from cutdiff.pipeline import canvas_and_schedule
from cutdiff.sample import main
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.settings import Settings
from cutdiff.sources import source_hash

SMALL = {"height": 64, "width": 64, "num_steps": 2}


def described(model: Model, draws: Draws | None = None, **options: Any) -> dict[str, Any]:
    settings = Settings(**SMALL | options)
    return describe(model, "a tent", settings, draws or Draws((0,)), canvas_and_schedule(model, settings)[1])


def of_guidance(model: Model, guidance: Any) -> str:
    return fingerprint(described(model, guidance=guidance))


# ---- Functions and objects of one's own


def scaled(scale: Any) -> Callable[[Tensor, Tensor, float, int], Tensor]:
    def guidance(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + scale * (conditional - unconditional)

    return guidance


def with_default(strength: float) -> Callable[..., Tensor]:
    def guidance(conditional: Tensor, unconditional: Tensor, sigma: float, step: int, at: float = strength) -> Tensor:
        return unconditional + at * (conditional - unconditional)

    return guidance


class Scaled:
    """A guidance that is no dataclass."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return self.guide(conditional, unconditional, sigma, step)

    def guide(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class Inner:
    value: float = 0.0


class Learned(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value]))

    def forward(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.weight * (conditional - unconditional)


def times(conditional: Tensor, unconditional: Tensor, sigma: float, step: int, *, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a closure of numbers": (lambda: scaled(1.0), lambda: scaled(2.0)),
    "a closure of lists": (lambda: scaled([1.0, 2.0]), lambda: scaled([1.0, 3.0])),
    "a closure of dictionaries": (lambda: scaled({"a": 1}), lambda: scaled({"a": 2})),
    "a closure of sets": (lambda: scaled({"a", "b", "c"}), lambda: scaled({"a", "b", "d"})),
    "a closure of tensors": (lambda: scaled(torch.ones(3)), lambda: scaled(torch.full((3,), 2.0))),
    "a closure of tensors of another dtype": (lambda: scaled(torch.ones(3)), lambda: scaled(torch.ones(3).half())),
    "a closure of bfloat16": (lambda: scaled(torch.ones(2).bfloat16()), lambda: scaled(torch.zeros(2).bfloat16())),
    "a closure of arrays": (lambda: scaled(np.ones(3)), lambda: scaled(np.zeros(3))),
    "a closure of functions": (lambda: scaled(scaled(1.0)), lambda: scaled(scaled(2.0))),
    "a closure of dataclasses": (lambda: scaled(Inner(1.0)), lambda: scaled(Inner(2.0))),
    "a closure of objects": (lambda: scaled(Scaled(1.0)), lambda: scaled(Scaled(2.0))),
    "a closure of types": (lambda: scaled(int), lambda: scaled(float)),
    "a closure of torch's modules": (
        lambda: scaled(torch.nn.Sequential(Learned(1.0))),
        lambda: scaled(torch.nn.Sequential(Learned(2.0))),
    ),
    "a default": (lambda: with_default(1.0), lambda: with_default(2.0)),
    "a partial": (lambda: partial(times, scale=1.0), lambda: partial(times, scale=2.0)),
    "an instance": (lambda: Scaled(1.0), lambda: Scaled(2.0)),
    "a method of an instance": (lambda: Scaled(1.0).guide, lambda: Scaled(2.0).guide),
    "a network": (lambda: Learned(1.0), lambda: Learned(2.0)),
    "another function": (lambda: scaled(1.0), lambda: with_default(1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_holds_other_values_is_another(name: str, tiny_model: Model) -> None:
    one, other = PAIRS[name]
    assert of_guidance(tiny_model, one()) == of_guidance(tiny_model, one())
    assert of_guidance(tiny_model, one()) != of_guidance(tiny_model, other())


def test_a_function_may_hold_itself_and_what_is_not_filled() -> None:
    def again(*args: Any) -> Any:
        return again, later, args

    first = source_hash(again)
    assert first is not None
    later = 3
    assert source_hash(again) not in (None, first)


def compiled(body: str) -> Any:
    """A function whose source no file keeps, as in an interactive session."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(f"def guidance(conditional, unconditional, sigma, step):\n    {body}", scope)
    return scope["guidance"]


def test_functions_without_a_file_differ_by_their_code(tiny_model: Model) -> None:
    bodies = ("return conditional", "return unconditional", "return 2 * conditional", "return 3 * conditional")
    prints = [of_guidance(tiny_model, compiled(body)) for body in bodies]
    assert len({*prints}) == len(bodies)
    assert of_guidance(tiny_model, compiled(bodies[0])) == prints[0]


def test_a_module_that_was_edited(own: OwnModules, tiny_model: Model) -> None:
    base = "from cutdiff.sampling.guidance import CFG\nclass Base(CFG):\n    pass\n"
    own.write("a_base", base)
    own.write("a_guidance", "from a_base import Base\nclass Mine(Base):\n    pass\n")
    first = of_guidance(tiny_model, "a_guidance:Mine")
    own.forget()
    assert of_guidance(tiny_model, "a_guidance:Mine") == first
    own.write("a_guidance", "from a_base import Base\nclass Mine(Base):\n    x = 3\n")
    edited = of_guidance(tiny_model, "a_guidance:Mine")
    own.write("a_base", base + "    x = 3\n")
    assert len({first, edited, of_guidance(tiny_model, "a_guidance:Mine")}) == 3


def test_what_ships_has_no_source() -> None:
    settings = Settings(method="magnify", solver="ddim", schedule="karras", guidance="rescale")
    assert settings.sources() == {}
    assert source_hash(Draws((0,))) is None
    assert Settings(method=cutdiff.Settings(method="direct").method).sources() == {}


def test_a_class_and_its_options(own: OwnModules, tiny_model: Model) -> None:
    own.write("mine_methods", METHODS)
    spec = "mine_methods:Mine"
    one, other = (described(tiny_model, method=method) for method in (spec, f"{spec},strength=2"))
    assert one["method"].startswith("Mine,strength=1.0,number=1,")
    assert [*changes(one, other)] == ["method"]
    assert [*one["sources"]] == ["method"]


# ---- Draws of one's own


@dataclass(frozen=True)
class Louder(Draws):
    loudness: float = 1.0

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return self.loudness * super().noise(shape, step)


def test_draws_of_ones_own(tiny_model: Model) -> None:
    ships, loud, louder = (
        described(tiny_model, draws) for draws in (Draws((0,)), Louder((0,), loudness=1), Louder((0,), loudness=2))
    )
    assert len({fingerprint(values) for values in (ships, loud, louder)}) == 3
    assert loud["draws"] == {"class": "Louder", "seeds": [0], "loudness": "1"}
    assert [*loud["sources"]] == ["draws"]
    assert fingerprint(described(tiny_model, Louder((0,), loudness=1))) == fingerprint(loud)
    assert fingerprint(described(tiny_model, Louder((1,), loudness=1))) != fingerprint(loud)


def test_a_record_is_of_what_the_run_began_with(tiny_model: Model) -> None:
    class Counting(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
            return super().noise(shape, step)

    class Guidance(Scaled):
        calls = 0

        def guide(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
            self.calls += 1
            return super().guide(conditional, unconditional, sigma, step)

    options = SMALL | {"method": "direct", "solver": "euler_ancestral"}
    runs = [
        cutdiff.generate(tiny_model, "a", guidance=Guidance(2.0), draws=Counting((0,)), **options) for _ in range(2)
    ]
    assert runs[0].record["fingerprint"] == runs[1].record["fingerprint"]
    assert torch.equal(runs[0].latents, runs[1].latents)


# ---- The noise of the model

NOISES: dict[str, Any] = {
    "use_karras_sigmas": True,
    "beta_start": 0.001,
    "beta_end": 0.013,
    "beta_schedule": "linear",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "rescale_betas_zero_snr": True,
    "num_train_timesteps": 900,
}


def test_every_noise_has_its_fingerprint(tiny_model: Model) -> None:
    models = [tiny_model, *(replace(tiny_model, noise=NoiseConfig(**{name: NOISES[name]})) for name in NOISES)]
    for solver in ("euler", "ddim"):
        records = [described(model, solver=solver) for model in models]
        assert len({fingerprint(record) for record in records}) == len(models)
        for name, record in zip(NOISES, records[1:], strict=True):
            before = None if name in LATER else getattr(NoiseConfig(), name)  # which old records do not know
            assert changes(records[0], record)[f"noise {name}"] == (NOISES[name], before)
    assert fingerprint(described(replace(tiny_model, noise=NoiseConfig()))) == fingerprint(described(tiny_model))


SCHEDULES: list[Any] = [
    "model",
    "karras",
    "karras,rho=6",
    "exponential",
    "beta",
    "beta,alpha=0.7",
    "sgm_uniform",
    "trailing",
    "align_your_steps",
    "align_your_steps,table=sd15",
    [5, 4, 3, 2, 1, 0],
    [5, 4, 3, 2.5, 1, 0],
]


def test_every_schedule_has_its_fingerprint(tiny_model: Model) -> None:
    records = [described(tiny_model, schedule=schedule, num_steps=5) for schedule in SCHEDULES]
    assert len({fingerprint(record) for record in records}) == len(SCHEDULES)
    assert len({record["noise"]["schedule"] for record in records}) == len(SCHEDULES)


# ---- A set that is drawn again


@pytest.fixture
def draw_set(quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Draw two pictures on the command line; the status and what is told."""

    def run(*arguments: str, model: Path = quick_folder) -> tuple[int, str]:
        options = ["--model", str(model), "--width", "64", "--height", "64", "--steps", "2", "--num-images", "2"]
        status = main(["a tent", *options, "--out", str(tmp_path / "out"), *arguments])
        return status, capsys.readouterr().err

    return run


FINISHED = (0, "cutdiff: 2 of 2 pictures are finished already\n")
GUIDANCE = "def guidance(conditional, unconditional, sigma, step):\n    return conditional\n"


def test_a_set_says_that_a_source_has_changed(draw_set: Callable[..., tuple[int, str]], own: OwnModules) -> None:
    own.write("one", GUIDANCE)
    arguments = ("--method", "direct", "--guidance", "one:guidance")
    assert draw_set(*arguments) == (0, "")
    own.forget()
    assert draw_set(*arguments) == FINISHED
    own.write("one", GUIDANCE.replace("return conditional", "return unconditional"))
    status, line = draw_set(*arguments)
    assert status == 2
    assert "direct-64x64-seed0.png was drawn with another source of its guidance: pass --overwrite" in line
    own.write("one", GUIDANCE)
    assert draw_set(*arguments) == FINISHED
    own.write("two", GUIDANCE.replace("return conditional", "return unconditional"))
    status, line = draw_set("--method", "direct", "--guidance", "two:guidance")
    assert status == 2, "a function of the same name in another module"
    assert "another source of its guidance" in line


def test_a_set_says_which_options_of_a_method_have_changed(draw_set: Callable[..., tuple[int, str]]) -> None:
    assert draw_set("--method", "magnify") == (0, "")
    assert draw_set("--method", "magnify,structure_fraction=0.3") == FINISHED
    status, line = draw_set("--method", "magnify", "--structure-fraction", "0.4", "--solver", "ddim")
    assert status == 2
    assert "was drawn with --structure-fraction 0.3 (now 0.4), --solver euler (now ddim): pass --overwrite" in line
    status, line = draw_set("--method", "magnify", "--guidance-scale", "3", "--schedule", "2,1,0")
    assert "was drawn with --schedule model (now list), --guidance-scale 7.5 (now 3.0): pass" in line
    status, line = draw_set("--method", "magnify", "--guidance", "rescale", "--steps", "3")
    assert "was drawn with --guidance cfg (now rescale), --steps 2 (now 3): pass" in line


@pytest.mark.parametrize("name", ["use_karras_sigmas", "beta_start", "steps_offset", "set_alpha_to_one"])
def test_a_set_says_that_the_noise_has_changed(
    name: str, draw_set: Callable[..., tuple[int, str]], quick_folder: Path, tmp_path: Path
) -> None:
    assert draw_set("--method", "direct") == (0, "")
    copy = Path(shutil.copytree(quick_folder, tmp_path / "copy"))
    assert draw_set("--method", "direct", model=copy) == FINISHED
    edit_json(copy / "scheduler" / "scheduler_config.json", **{name: NOISES[name]})
    status, line = draw_set("--method", "direct", model=copy)
    assert status == 2
    assert f"was drawn with noise {name} {getattr(NoiseConfig(), name)!r} (now {NOISES[name]!r}): pass" in line


# ---- The cell of an evaluation


def test_a_cell_refuses_pictures_that_were_drawn_otherwise(own: OwnModules, tiny_model: Model, tmp_path: Path) -> None:
    own.write("one", GUIDANCE)

    def again(model: Model = tiny_model, **options: Any) -> None:
        settings = Settings(method="direct", **SMALL | {"guidance": "one:guidance"} | options)
        draw(model, Cell("one", settings), ["a tent", "a house"], tmp_path / "cell", batch=2)

    again()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cell").iterdir()}
    own.forget()
    again()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cell").iterdir()} == times
    otherwise = pytest.raises(
        ValueError, match=r"cell holds pictures that were drawn otherwise: take another --out, or"
    )
    with otherwise:
        again(replace(tiny_model, noise=NoiseConfig(use_karras_sigmas=True)))
    with otherwise:
        again(schedule="karras")
    with otherwise:
        again(guidance=scaled(1.0))
    own.write("one", GUIDANCE.replace("return conditional", "return unconditional"))
    with otherwise:
        again()


def test_a_cell_draws_damaged_pictures_again(tiny_model: Model, tmp_path: Path) -> None:
    def again() -> None:
        draw(tiny_model, Cell("one", Settings(method="direct", **SMALL)), ["a", "b", "c", "d"], tmp_path, batch=2)

    again()
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    times = {path: path.stat().st_mtime_ns for path in whole}
    pictures, log = sorted(whole), tmp_path / "batches.jsonl"
    for change in (
        pictures[0].unlink,
        lambda: pictures[0].write_bytes(b""),
        lambda: pictures[1].write_bytes(whole[pictures[1]][:-1]),
        lambda: shutil.copy(pictures[2], pictures[1]),
    ):
        before = log.read_text()
        change()
        log.write_text(f'{before}{{"first": 4, "capt')  # a disk was full
        again()
        assert {path: path.read_bytes() for path in tmp_path.glob("*.png")} == whole
        assert {path for path in whole if path.stat().st_mtime_ns != times[path]} == {*pictures[:2]}
        after = log.read_text()
        assert after.startswith(before)
        assert json.loads(after.removeprefix(before))["first"] == 0
    assert cost(tmp_path)["evaluations"] == 4


def test_a_cell_of_an_earlier_version_is_finished(tiny_model: Model, tmp_path: Path) -> None:
    cell = Cell("one", Settings(method="direct", **SMALL))
    draw(tiny_model, cell, ["a", "b"], tmp_path, batch=2)
    line = json.loads((tmp_path / "batches.jsonl").read_text())
    del line["pixels_sha256"]
    (tmp_path / "batches.jsonl").write_text(json.dumps(line) + "\n")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    draw(tiny_model, cell, ["a", "b"], tmp_path, batch=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
