"""An evaluation of variants: specs side by side, options of all cells, and what a first look at arguments costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own import METHODS, OwnModules

from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.model import Model
from cutdiff.evaluate import main
from cutdiff.models.unet import UNet

Run = Callable[..., int]


@pytest.fixture(scope="module")
def of_scenes(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with the native size of the scenes, 128 px."""
    folder = tmp_path_factory.mktemp("models") / "scenes"
    with torch.random.fork_rng(devices=[]):
        unet = UNet(replace(tiny_model.unet.config, native_size=16))
    parts = {"vae": tiny_model.vae, "text": tiny_model.text, "noise": tiny_model.noise}
    save_folder(folder, unet=unet.requires_grad_(False), **parts, zeros_for_empty_negative=True)
    return folder


@pytest.fixture
def run(of_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Measure two pictures of a tiny model, at twice its native size; intervals, which take long, are coarse."""
    monkeypatch.setattr("cutdiff.evaluation.score.ROUNDS", 10)
    options = ["--model", str(of_scenes), "--sizes", "256", "--steps", "2", "--num", "2", "--batch", "2"]
    return lambda *arguments: main([*options, "--out", str(tmp_path / "out"), *arguments])


def drawn(folder: Path) -> dict[str, list[int]]:
    """The folders of cells, and when each of their pictures was written."""
    folders = sorted(path for path in (folder / "out").iterdir() if path.is_dir())
    return {path.name: [file.stat().st_mtime_ns for file in sorted(path.glob("*.png"))] for path in folders}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_variants_are_rows(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--methods", "cutdiffusion", "cutdiffusion,structure_fraction=0.3") == 0
    printed = capsys.readouterr()
    assert "| 256 px | cutdiffusion | 2 |" in printed.out
    assert "| 256 px | cutdiffusion,structure_fraction=0.3 | 2 |" in printed.out
    cells = [cell for cell in results(tmp_path)["cells"] if cell["name"].startswith("cutdiffusion")]
    specs = [cell["settings"]["method"].split(",") for cell in cells]
    assert ["structure_fraction=0.5" in spec for spec in specs] == [True, False]
    assert ["structure_fraction=0.3" in spec for spec in specs] == [False, True]
    assert [*drawn(tmp_path)] == ["cutdiffusion,structure_fraction=0.3-256", "cutdiffusion-256", "native-128"]
    dtype, *lines = printed.err.splitlines()
    assert re.fullmatch(r"cutdiff: --dtype auto is (bfloat16|float32) on this machine", dtype)
    assert lines.pop().startswith(
        "cutdiff: Fréchet whole is fitted to 2 pictures, no more than the 32 features of each"
    )
    assert [line.partition(" pictures in ")[0] for line in lines] == [
        "cutdiff: 1 of 3: native 128 px, 2",
        "cutdiff: 2 of 3: cutdiffusion 256 px, 2",
        "cutdiff: 3 of 3: cutdiffusion,structure_fraction=0.3 256 px, 2",
    ]


def test_scores_of_single_pictures_are_in_the_results(run: Run, tmp_path: Path) -> None:
    assert run("--methods", "multidiffusion") == 0
    (cell,) = (cell for cell in results(tmp_path)["cells"] if cell["name"] == "multidiffusion")
    for name in ("one of each", "right caption", "seams", "detail", "agreement"):
        score = cell["scores"][name]
        assert len(score["values"]) == 2
        assert score["value"] == pytest.approx(sum(score["values"]) / 2, rel=1e-4, abs=1e-6)
    assert cell["scores"]["Fréchet whole"]["values"] is None


def test_an_option_that_is_set_names_the_cells_that_have_it(run: Run, tmp_path: Path) -> None:
    arguments = ("--methods", "multidiffusion")
    assert run(*arguments, "--set", "stride=4") == 0
    first = drawn(tmp_path)
    assert [*first] == ["multidiffusion,stride=4-256", "native-128"]
    assert run(*arguments, "--set", "stride=2") == 0
    second = drawn(tmp_path)
    assert [*second] == ["multidiffusion,stride=2-256", "multidiffusion,stride=4-256", "native-128"]
    assert {name: second[name] for name in first} == first, (
        "the native pictures have no stride, and are not drawn again"
    )
    assert run(*arguments, "--set", "stride=2", "--set", "solver=ddim") == 0
    assert {*drawn(tmp_path)} - {*second} == {"multidiffusion,stride=2,solver=ddim-256", "native,solver=ddim-128"}
    names = [cell["name"] for cell in results(tmp_path)["cells"]]
    assert names == ["other truth", "native,solver=ddim", "other truth", "multidiffusion,stride=2,solver=ddim"]
    assert run(*arguments, "--set", "stride=2", "--set", "solver=ddim", "--set", "eta=0.5") == 0
    assert "native,solver=ddim,eta=0.5-128" in drawn(tmp_path)


def test_a_method_of_ones_own_is_measured(run: Run, tmp_path: Path, own: OwnModules) -> None:
    own.write("mine_methods", METHODS)
    assert run("--methods", "mine_methods:Mine,strength=2", "mine_methods:plain") == 0
    cells = {cell["name"]: cell for cell in results(tmp_path)["cells"]}
    assert cells["mine_methods:Mine,strength=2"]["settings"]["method"].startswith("Mine,strength=2.0,")
    assert cells["mine_methods:plain"]["cost"]["evaluations"] == 2 * 2


FAILING = "def method(run):\n    raise {error}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("KeyError('scale')", "cutdiff: the run failed: KeyError: 'scale'"),
        ("RuntimeError('a\\nb')", "cutdiff: the run failed: RuntimeError: a b"),
        ("ZeroDivisionError()", "cutdiff: the run failed: ZeroDivisionError:"),
    ],
)
def test_what_nobody_expects_is_one_line(
    error: str, line: str, run: Run, own: OwnModules, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write("failing", FAILING.format(error=error))
    arguments = ("--methods", "failing:method")
    assert run(*arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].strip() == line
    assert run(*arguments, "--debug") == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "failing.py" in told
    assert told.splitlines()[-1].strip() == line


BAD: dict[str, tuple[list[str], str]] = {
    "a method": (["--methods", "direct", "cutdifusion"], "--methods 'cutdifusion' is not one of direct, "),
    "a method, near": (["--methods", "direct", "cutdifusion"], "did you mean 'cutdiffusion'? (see --help)"),
    "no spec": (["--methods", "magnify,4"], "--methods 'magnify,4' is no spec, for '4': give NAME,option=value"),
    "an option without a value": (["--set", "solver"], "argument --set: 'solver' is not NAME=VALUE"),
    "an option with an argument": (["--set", "seed=3"], "argument --set: 'seed=3': seed has an argument of its own"),
    "a type": (["--set", "view_batch_size=1.5"], "argument --set: view_batch_size=1.5 must be a whole number"),
    "a number": (["--set", "clip_skip=two"], "argument --set: clip_skip='two' must be a whole number"),
    "a name": (["--set", "backend=tritn"], "backend='tritn' is not one of auto, triton, reference: did you mean 'tri"),
    "a pair": (["--set", "guidance_interval=1"], "argument --set: guidance_interval=1 must be 2 values"),
    "a flag": (["--metods", "direct"], "--metods is no option: did you mean '--methods'?"),
    "a count": (["--num", "1"], "argument --num: 1 must be a whole number in 2 … 100000"),
    "a choice": (["--dtype", "float23"], "'float23' is not one of auto, float32, "),
}  # fmt: skip
"""Bad arguments that are found before torch is imported."""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_imports_no_torch(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module that measures imports torch first of all; it must not be asked for."""
    monkeypatch.setitem(sys.modules, "cutdiff.evaluation.measure", None)
    arguments, message = BAD[name]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("cutdiff: ")
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--methods", "cutdifusion"], ["--set", "view_batch_size=1.5"], ["--sizes", "many"]],
    ids=["help", "method", "option", "number"],
)
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys; from cutdiff.evaluate import main\n"
        f"try:\n    status = main({arguments!r})\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print(status, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if '--help' in arguments else 2} []"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magnify", "--set", "stride=1.5"], "stride=1.5 must be a whole number at least 1"),
        (["--methods", "magnify", "--set", "strid=4"], "did you mean 'stride'?"),
        (["--methods", "magnify", "--set", "stride=99"], "stride=99 must not exceed the window of 16 latents"),
        (["--methods", "magnify,stride=1.5"], "stride=1.5 must be a whole number at least 1"),
        (["--methods", "direct", "--set", "solver=eulr"], "solver='eulr' is not one of euler, "),
        (["--methods", "direct", "--set", "eta=0.5"], "but of ddim, euler_ancestral"),
        (["--methods", "direct", "--sizes", "120"], "--sizes 120: a picture smaller than the crops of 128 px has no"),
        (["--methods", "nowhere:method"], "there is no module 'nowhere' where Python looks for it"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line(
    arguments: list[str], message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("cutdiff: ")
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_too_small_to_measure_is_told_before_it_draws(
    quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(quick_folder), "--methods", "direct", "--out", str(tmp_path / "out")]) == 2
    assert "has a native size of 64 px: pictures are measured in crops of 128 px" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
