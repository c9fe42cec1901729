"""The command line as a user calls it."""

from __future__ import annotations

import json
import os
import signal
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
    assert main([*arguments, "--out", str(tmp_path), "--method", "direct"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "direct-128x128-seed7.png"
    with Image.open(path) as image:
        lines = image.info["parameters"].splitlines()
    assert lines[:2] == [prompt, "Negative prompt: a tent"]
    assert lines[2].startswith("Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 128x128, Model hash: ")

    record = json.loads(path.with_suffix(".json").read_text())
    assert record["prompt"] == prompt
    assert (record["seed"], record["eta"], record["solver"], record["height"]) == (7, 0.5, "ddim", 128)
    assert record["network_evaluations"] == 2 * 2
    assert set(record["seconds"]) == {"direct", "decode"}
    assert record["peak_memory_bytes"] > 2**20
    assert all(len(digest) == 64 for digest in record["model"]["sha256"].values())
    assert {"cutdiff", "torch", "transformers", "python"} <= set(record["versions"])


def test_the_record_repeats_the_picture_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["a pink tent", *QUICK, "--num-images", "2", "--out", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [p.name for p in paths] == [
        "cutdiffusion-128x128-seed0.png",
        "cutdiffusion-128x128-seed1.png",
        "cutdiffusion-128x128-seed0-1.png",
        "cutdiffusion-128x128-seed1-1.png",
    ]
    pixels = [Image.open(p).tobytes() for p in paths]
    assert pixels[:2] == pixels[2:]
    assert pixels[0] != pixels[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--width", "100"], ["--width 100", "multiple of 8"]),
        (["--height", "0"], ["--height 0"]),
        (["--height", "-8"], ["--height -8"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--steps", "1001"], ["--steps 1001", "1000"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--stride", "0"], ["--stride 0"]),
        (["--stride", "17"], ["--stride 17", "16"]),
        (["--structure-fraction", "1.5"], ["--structure-fraction 1.5"]),
        (["--cosine-scales", "3", "1"], ["--cosine-scales", "3"]),
        (["--cosine-scales", "3", "1", "-1"], ["--cosine-scales (3.0, 1.0, -1.0)"]),
        (["--word-threshold", "2"], ["--word-threshold 2"]),
        (["--guidance-scale", "nan"], ["--guidance-scale nan"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", str(2**64)], ["--seed", str(2**64)]),
        (["--width", "1000000"], ["--width 1000000", "at most 32768"]),
        (["--steps", "1001"], ["--steps 1001", "1000 timesteps"]),
        (["--structure-fraction", "nan"], ["--structure-fraction nan"]),
        (["--view-batch-size", "0"], ["--view-batch-size 0"]),
        (["--stride", "17"], ["--stride 17", "window of 16"]),
        (["--method", "magic"], ["--method", "magic"]),
        (["--method", "cutdifusion"], ["--method", "did you mean 'cutdiffusion'?"]),
        (["--prompts", "/dev/zero"], ["--prompts /dev/zero cannot be read: it is no regular file"]),
        (["--lora", "x" * 5000], ["--lora", "is no file"]),
        (["--model", "a\nb"], ["a b does not exist"]),
        (["--metod", "direct"], ["--metod is no option: did you mean '--method'?"]),
        (["--solver", "heun"], ["--solver", "heun"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--device", "meta"], ["--device meta"]),
        (["--config", "nowhere"], ["config"]),
        (["a house \udcff"], ["UTF-8"]),
        (["--num-images", "0"], ["--num-images 0"]),
        (["--eta", "0.5"], ["--eta 0.5", "ddim"]),
        (["--model", "nowhere"], ["nowhere", "does not exist"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_arguments_that_cannot_be_used_get_one_line_and_status_2(
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cutdiff: ")
    assert captured.err.count("\n") == 1
    for words in named:
        assert words in captured.err
    assert list(tmp_path.rglob("*.png")) == []


def test_an_output_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws(dtype: str, tmp_path: Path) -> None:
    assert main([*QUICK, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["dtype"] == dtype


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_disk_that_is_full_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: writing fails in the same place, in the middle of a file."""
    code = (
        "import resource, signal, sys; from cutdiff.sample import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *QUICK, "--out", str(tmp_path / "pictures")]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode == 1, child.stderr
    assert child.stderr.count("\n") == 1
    assert "File too large" in child.stderr
    assert str(tmp_path / "pictures" / "cutdiffusion-128x128-seed0.png") in child.stderr
    assert [*(tmp_path / "pictures").iterdir()] == []


def test_killing_leaves_no_picture_and_the_next_run_is_fine(tmp_path: Path) -> None:
    """Killed in the middle of a write, which waits for ever here."""
    code = (
        "import os, sys, time; import cutdiff.images as images; from cutdiff.sample import main;"
        "images.os.replace = lambda *_: (print('writing', flush=True), time.sleep(600)); main(sys.argv[1:])"
    )
    arguments = [*QUICK, "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.kill()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".part"}
    assert main(arguments) == 0
    assert len([*tmp_path.glob("*.png")]) == len([*tmp_path.glob("*.json")]) == 1


def test_interrupting_leaves_no_half_written_file(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    command = [sys.executable, "-m", "cutdiff.sample", "--steps", "1000", "--width", "512", "--out", str(folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        while child.poll() is None and not folder.exists():  # it is made when the arguments have been checked
            time.sleep(0.1)
        time.sleep(5)
        assert child.poll() is None, "the run was to last longer"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors.strip().splitlines()[-1].startswith("cutdiff: interrupted")
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []
