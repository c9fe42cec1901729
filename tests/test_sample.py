"""The command line as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cutdiff.models.unet import UNet
from cutdiff.sample import main

QUICK = ["--steps", "2", "--width", "128", "--height", "128"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cutdiff.sample", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_answers_at_once_and_imports_no_torch(tmp_path: Path) -> None:
    run("--help", cwd=tmp_path)  # the first call may compile bytecode
    began = time.perf_counter()
    assert run("--help", cwd=tmp_path).returncode == 0
    assert time.perf_counter() - began < 1
    loaded = "import sys, cutdiff.sample; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_a_batch_that_was_halved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = UNet.forward

    def forward(self: UNet, x: Tensor, *args: Any) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return whole(self, x, *args)

    monkeypatch.setattr(UNet, "forward", forward)
    assert main(["--steps", "1", "--out", str(tmp_path)]) == 0
    told = "cutdiff: memory holds 2 patches or views at once: pass --view-batch-size 2"
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_with_no_arguments_it_draws_and_says_where(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip()
    assert path == tmp_path / "outputs" / "cutdiffusion-256x256-seed0.png"
    with Image.open(path) as image:
        assert image.size == (256, 256)


def test_the_picture_carries_its_parameters_and_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a blue tree over a lake"
    arguments = [prompt, "--negative-prompt", "a tent", "--seed", "7", "--solver", "ddim", "--eta", "0.5", *QUICK]
    arguments += ["--guidance-scale", "7.5"]
    assert main([*arguments, "--out", str(tmp_path), "--method", "direct"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "direct-128x128-seed7.png"
    with Image.open(path) as image:
        lines = image.info["parameters"].splitlines()
    assert lines[:2] == [prompt, "Negative prompt: a tent"]
    assert lines[2].startswith("Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 128x128, Model hash: ")

    record = json.loads(path.with_suffix(".json").read_text())
    assert record["prompt"] == prompt
    assert (record["seed"], record["solver"], record["height"]) == (7, "ddim,eta=0.5", 128)
    assert record["network_evaluations"] == 2 * 2
    assert set(record["seconds"]) == {"direct", "decode"}
    assert record["peak_memory_bytes"] > 2**20
    assert all(len(digest) == 64 for digest in record["model"]["sha256"].values())
    assert {"cutdiff", "torch", "transformers", "python"} <= set(record["versions"])


def test_same_arguments_same_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("first", "second"):
        assert main(["a pink tent", *QUICK, "--num-images", "2", "--out", str(tmp_path / folder)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [p.name for p in paths] == ["cutdiffusion-128x128-seed0.png", "cutdiffusion-128x128-seed1.png"] * 2
    pixels = [Image.open(p).tobytes() for p in paths]
    assert pixels[:2] == pixels[2:]
    assert pixels[0] != pixels[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws(dtype: str, tmp_path: Path) -> None:
    assert main([*QUICK, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["dtype"] == dtype
