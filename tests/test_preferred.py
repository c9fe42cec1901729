"""Defaults that follow the model: what a folder prefers is taken where nobody says otherwise, and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cutdiff
from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.folder import PREFERRED
from cutdiff.checkpoint.model import Model
from cutdiff.output.images import read_record
from cutdiff.plan import main as plan
from cutdiff.sample import main
from cutdiff.sampling.projected import APG
from cutdiff.settings import Settings, left_to_model

SAID = {"guidance_scale": 4.0, "num_steps": 2, "solver": "ddim", "schedule": "karras,rho=5"}


@pytest.fixture
def preferring(quick_folder: Path, tmp_path: Path) -> Path:
    """A folder that says what it prefers."""
    folder = Path(shutil.copytree(quick_folder, tmp_path / "preferring"))
    (folder / PREFERRED).write_text(json.dumps(SAID))
    return folder


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, SAID),
        ({"num_steps": 50, "solver": "euler"}, {"guidance_scale": 4.0, "schedule": "karras,rho=5"}),
        ({"guidance_scale": 7.5, "schedule": "model"}, {"num_steps": 2, "solver": "ddim"}),
        ({"guidance": "apg"}, SAID),
        ({"guidance": "cfg,guidance_scale=7.5"}, {n: v for n, v in SAID.items() if n != "guidance_scale"}),
        ({"guidance": "cfg_plus_plus"}, {n: v for n, v in SAID.items() if n != "guidance_scale"}),
        ({"guidance": APG()}, {n: v for n, v in SAID.items() if n != "guidance_scale"}),
        ({"guidance": lambda c, u, sigma, step: c}, {n: v for n, v in SAID.items() if n != "guidance_scale"}),
    ],
)
def test_what_options_leave_to_the_model(options: dict[str, Any], left: dict[str, Any]) -> None:
    assert left_to_model(options, SAID) == left
    assert left_to_model(options, {}) == {}


def test_python_takes_it_where_no_settings_are_given(preferring: Path, quick_folder: Path) -> None:
    model, silent = cutdiff.load(preferring), cutdiff.load(quick_folder)
    assert (model.preferred, silent.preferred) == (SAID, {})
    small = {"method": "direct", "height": 64, "width": 64}
    record = cutdiff.generate(model, "a tent", **small).record
    assert (record["num_steps"], record["solver"]) == (2, "ddim,eta=0.0")
    assert (record["guidance"], record["schedule"]) == ("cfg,guidance_scale=4.0", "karras,rho=5.0")
    record = cutdiff.generate(model, "a tent", **small, num_steps=1, guidance_scale=3.0).record
    assert (record["num_steps"], record["guidance"]) == (1, "cfg,guidance_scale=3.0")
    assert len([*cutdiff.denoise(model, "a tent", **small)]) == 2
    settings = Settings(**small, num_steps=3)  # of which nobody knows what was given
    record = cutdiff.generate(model, "a tent", settings).record
    assert (record["num_steps"], record["guidance"]) == (3, "cfg,guidance_scale=7.5")


def test_the_command_line_tells_in_one_line_what_it_took(
    preferring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "prompts"
    lines.write_text('a tent\n{"prompt": "a tree", "steps": 1, "guidance": "cfg_plus_plus"}\n')
    arguments = ["--model", str(preferring), "--prompts", str(lines), "--method", "direct", "--width", "64"]
    arguments += ["--height", "64", "--solver", "euler", "--out", str(tmp_path / "out")]
    line = "cutdiff: taken from the model: --guidance-scale 4.0, --steps 2, --schedule karras,rho=5\n"
    assert main(arguments) == 0
    assert capsys.readouterr().err == line
    first, second = (read_record(path) for path in sorted((tmp_path / "out").glob("*.png")))
    assert (first["num_steps"], first["guidance"], first["solver"]) == (2, "cfg,guidance_scale=4.0", "euler")
    assert (second["num_steps"], second["guidance"]) == (1, "cfg_plus_plus,lam=0.6")
    given = ["--steps", "1", "--guidance-scale", "2", "--schedule", "model", "--overwrite"]
    assert main([*arguments[:2], "a tent", *arguments[4:], *given]) == 0
    assert capsys.readouterr().err == ""
    assert plan(["--model", str(preferring), "--method", "direct", "--solver", "euler"]) == 0
    printed = capsys.readouterr()
    assert printed.err == line
    assert ", 2 steps, " in printed.out


def test_it_is_saved_and_diffusers_reads_the_folder(tiny_model: Model, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    parts = {name: getattr(tiny_model, name) for name in ("unet", "vae", "text", "noise")}
    save_folder(tmp_path / "saved", **parts, zeros_for_empty_negative=True, preferred=SAID)
    assert cutdiff.load(tmp_path / "saved").preferred == SAID
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", local_files_only=True) is not None
    with pytest.raises(ValueError, match=r"^seed=3 is not one of num_steps"):
        save_folder(tmp_path / "none", **parts, zeros_for_empty_negative=True, preferred={"seed": 3})
    assert not (tmp_path / "none").exists()


def test_the_embedded_model_prefers_the_scale_at_which_all_was_measured() -> None:
    from cutdiff.training import card

    assert cutdiff.load().preferred == card.PREFERRED == {"guidance_scale": 4.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seed": 3}', "seed=3 is not one of num_steps, guidance_scale, solver, schedule"),
        ('{"num_steps": 0}', "num_steps=0 must be a whole number at least 1"),
        ('{"guidance_scale": "4"}', "guidance_scale='4' must be a finite number"),
        ('{"solver": "os:system"}', "solver='os:system' is not one of euler, ddim"),
        ('{"solver": "eulerr"}', "solver='eulerr' is not one of euler, ddim"),
        ('{"schedule": [3, 0]}', r"schedule=\[3, 0\] is not one of model, karras"),
        ('{"solver": "ddim,eta=2"}', "eta=2.0 must be|eta='2' must be|eta=2 must be"),
        ("[4]", "[a-z]"),
        ("{", "[a-z]"),
    ],
)
def test_what_a_folder_cannot_prefer_is_one_line(preferring: Path, content: str, message: str) -> None:
    (preferring / PREFERRED).write_text(content)
    with pytest.raises(ValueError, match=rf"{PREFERRED}.*({message})") as error:
        cutdiff.load(preferring)
    assert "\n" not in str(error.value)
