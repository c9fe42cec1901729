"""The trainings beside a finished model, of a ControlNet and of a LoRA: they go on, write a card, and refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import cutdiff
from cutdiff.checkpoint.control import load_control
from cutdiff.scenes import world
from cutdiff.training import consistency, controlnet
from cutdiff.training.fit import Plan


class Training(NamedTuple):
    """A training, and its options."""

    module: ModuleType
    options: list[str]
    changes: Callable[[Path, Path], bool]
    """Tells of a model and of the file that was trained for it whether that changes anything."""

    def run(self, folder: Path, model: Path, steps: int, *more: str) -> bytes:
        """Train from the command line; returns the file's bytes, which are none where the training failed."""
        out = folder / "trained.safetensors"
        arguments = ["--model", str(model), "--work", str(folder / "work"), "--out", str(out), "--device", "cpu"]
        arguments += ["--dtype", "float32", "--num-scenes", "64", "--batch", "3", "--steps", str(steps)]
        return b"" if self.module.main([*arguments, *self.options, *more]) else out.read_bytes()


def control_adds(model: Path, path: Path) -> bool:
    return any(p.any() for p in load_control(path, cutdiff.load(model)).controlnet_down_blocks.parameters())


def lora_changes(model: Path, path: Path) -> bool:
    plain, changed = cutdiff.load(model).unet, cutdiff.load(model, loras=[(path, 1.0)]).unet
    return any((p - q).any() for p, q in zip(changed.parameters(), plain.parameters(), strict=True))


TRAININGS = {
    "control": Training(controlnet, [], control_adds),
    "lora": Training(consistency, ["--rank", "2"], lora_changes),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_one_that_was_stopped_goes_on_as_if_it_had_not_been(
    name: str, tmp_path: Path, quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAININGS[name]
    frequent = lambda *steps, **rates: Plan(*steps, **{**rates, "checkpoint_every": 2})  # noqa: E731
    monkeypatch.setattr(training.module, "Plan", frequent)
    whole = training.run(tmp_path / "whole", quick_folder, 5)
    captions, calls = world.captions, []

    def stopping(*arguments: Any) -> list[str]:
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError("stopped")
        return captions(*arguments)

    monkeypatch.setattr(world, "captions", stopping)
    assert training.run(tmp_path / "stopped", quick_folder, 5) == b""
    assert training.run(tmp_path / "stopped", quick_folder, 5) == whole
    assert len(calls) == 4 + 3, "the first two steps are not taken again"


@pytest.mark.parametrize("name", TRAININGS)
def test_one_writes_what_is_loaded_and_a_card_that_fits(
    name: str, tmp_path: Path, quick_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TRAININGS[name]
    written = training.run(tmp_path, quick_folder, 2)
    assert training.changes(quick_folder, tmp_path / "trained.safetensors")
    card = (tmp_path / "trained.md").read_text(encoding="utf-8")
    assert "2 steps of 3 of 64 pictures" in card
    assert f"{hashlib.sha256(written).hexdigest()}  trained.safetensors" in card
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert f"{cutdiff.load(quick_folder).hashes[weights]}  quick/{weights}" in card
    capsys.readouterr()
    assert training.run(tmp_path, quick_folder, 2, "--num-scenes", "32") == b""
    assert "holds another training" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAININGS)
def test_a_network_that_does_not_predict_the_noise_is_refused(
    name: str, tmp_path: Path, quick_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(quick_folder, tmp_path / "velocity"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    assert TRAININGS[name].run(tmp_path, folder, 2) == b""
    assert "velocity does not predict the noise (epsilon): distil a model that does" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [folder]
