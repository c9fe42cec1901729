"""Bad input to the other command lines, and to torchrun's variables: one line, a status, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cutdiff import evaluate, plan, sample
from cutdiff.bench import __main__ as bench
from cutdiff.bench import scaling
from cutdiff.trace import __main__ as trace
from cutdiff.training import __main__ as training
from cutdiff.training import consistency, features

HUGE = str(10**18)
PAGE = Path(__file__).with_suffix(".html")
NO_NUMBER = "is no number of a process: start with torchrun, or unset the variable"
COUNTS = "must be a whole number in 1 … 1e+09 (see --help)"
Main = Callable[[list[str]], int]
COMMANDS: dict[str, tuple[Main, list[str], int, str]] = {
    "evaluate: many": (evaluate.main, ["--num", HUGE], 2, f"argument --num: {HUGE} must be a whole number in 2 … 1000"),
    "evaluate: many at once": (evaluate.main, ["--batch", HUGE], 2, f"argument --batch: {HUGE} must be a whole number"),
    "evaluate: many at a time": (
        evaluate.main,
        ["--set", f"view_batch_size=-{HUGE}"],
        2,
        f"argument --set: view_batch_size=-{HUGE} must be a whole number at least 1 or None",
    ),
    "evaluate: a large picture": (evaluate.main, ["--sizes", HUGE], 2, f"--sizes {HUGE} must be a positive multiple"),
    "evaluate: scenes": (evaluate.main, ["--caption-seed", "-1"], 2, "argument --caption-seed: -1 must be a whole num"),
    "evaluate: steps": (evaluate.main, ["--steps", HUGE], 2, "--steps 1000000000000000000 must be between 1 and the"),
    "evaluate: guidance": (evaluate.main, ["--guidance-scale", "nan"], 2, "--guidance-scale nan must be a finite num"),
    "evaluate: infinity": (evaluate.main, ["--guidance-scale", "1e400"], 2, "--guidance-scale inf must be a finite"),
    "evaluate: size": (evaluate.main, ["--sizes", "129"], 2, "--sizes 129 must be a multiple of 8; try 128"),
    "evaluate: option": (evaluate.main, ["--set", "eta=2", "--set", "solver=ddim"], 2, "--set eta=2 must be a finite"),
    "evaluate: option of a method": (
        evaluate.main,
        ["--methods", "cutdiffusion,structure_fraction=2"],
        2,
        "--methods: structure_fraction=2 must be a finite number in 0 … 1",
    ),
    "evaluate: variant": (evaluate.main, ["--variant", "bf16"], 2, "--variant 'bf16': "),
    "evaluate: place": (evaluate.main, ["--out", "/dev/null/x"], 2, "--out /dev/null/x cannot be written to (Not a di"),
    "evaluate: no method": (
        evaluate.main,
        ["--methods", "os:system"],
        2,
        "--methods <built-in function system> must",
    ),
    "plan: no method": (plan.main, ["--method", "os:system"], 2, "--method <built-in function system> must"),
    "sample: no method": (
        sample.main,
        ["--method", "os:system"],
        2,
        "--method <built-in function system> must",
    ),
    "sample: no guidance": (sample.main, ["--guidance", "os:system"], 2, "--guidance <built-in function system> must"),
    "sample: no LoRA": (sample.main, ["--lora", "/dev/zero"], 2, "argument --lora: /dev/zero is no file or folder: gi"),
    "trace: one run": (trace.main, ["a.html"], 2, "the following arguments are required: RUN_B (see --help"),
    "trace: no page": (
        trace.main,
        ["a.png", "b.png"],
        2,
        "RUN_A a.html does not exist: check the path; --trace writes a",
    ),
    "trace: another file": (trace.main, [__file__, __file__], 2, f"RUN_A {PAGE} does not exist: check the path"),
    "trace: a folder": (trace.main, ["/", "/"], 2, "RUN_A / is no file: name a page or a picture"),
    "training: place": (training.main, ["--work", "/dev/null/x"], 2, "--work /dev/null/x cannot be written to (Not a"),
    "evaluate: device": (evaluate.main, ["--device", "abacus"], 2, "--device abacus is not available here"),
    "evaluate: model": (evaluate.main, ["--model", "nowhere"], 2, "nowhere does not exist: pass a diffusers folder"),
    "plan: devices": (plan.main, ["--devices", HUGE], 2, f"argument --devices: {HUGE} must be a whole number in 1 … 4"),
    "plan: no device": (plan.main, ["--devices", "0"], 2, "argument --devices: 0 must be a whole number in 1 … 4096"),
    "plan: memory": (plan.main, ["--memory", "nan"], 2, "--memory nan must be above 0"),
    "plan: size": (plan.main, ["--width", HUGE], 2, f"--width {HUGE} must be a positive multiple of 8, at most 32768"),
    "bench: size": (bench.main, ["--small", "--only", "--size", HUGE], 2, f"--height {HUGE} must be a pos"),
    "bench: steps": (bench.main, ["--small", "--only", "--steps", HUGE], 2, "--steps 1000000000000000000 must be betw"),
    "scaling: repeats": (scaling.main, ["--repeats", "-1"], 2, "--repeats -1 must be at least 1"),
    "scaling: size": (scaling.main, ["--size", HUGE], 2, f"--height {HUGE} must be a positive multiple of 8"),
    "training: steps": (training.main, ["--vae-steps", "0"], 2, f"argument --vae-steps: 0 {COUNTS}"),
    "training: batch": (training.main, ["--unet-batch", "-5"], 2, f"argument --unet-batch: -5 {COUNTS}"),
    "training: pictures": (training.main, ["--num-scenes", HUGE], 2, f"argument --num-scenes: {HUGE} {COUNTS}"),
    "training: share": (
        training.main,
        ["--whole-scenes", "nan"],
        2,
        "argument --whole-scenes: 'nan' must be a finite number in 0 … 1",
    ),
    "training: VAE": (training.main, ["--work", "work", "--vae", "nowhere"], 1, "nowhere does not exist: pass a diffu"),
    "training: device": (training.main, ["--work", "work", "--device", "abacus"], 2, "--device abacus is not availabl"),
    "training: option": (training.main, ["--vea", "x"], 2, "--vea is no option: did you mean '--vae'?"),
    "features: steps": (features.main, ["--steps", "many"], 2, "argument --steps: 'many' must be a whole number in 1 "),
    "features: device": (features.main, ["--device", "abacus"], 2, "--device abacus is not available here"),
    "consistency: rank": (
        consistency.main,
        ["--rank", HUGE],
        2,
        f"argument --rank: {HUGE} must be a whole number in 1 … 512",
    ),
    "consistency: file": (consistency.main, ["--out", "lora.pt"], 2, "--out lora.pt must end in .safetensors"),
    "consistency: model": (consistency.main, ["--model", "nowhere"], 1, "nowhere does not exist: pass a diffusers fol"),
    "sample: pictures": (
        sample.main,
        ["--num-images", HUGE],
        2,
        f"argument --num-images: {HUGE} must be a whole number in 1 … 100000",
    ),
    "sample: a long wait": (
        sample.main,
        ["--rank-timeout", "1e300"],
        2,
        "argument --rank-timeout: '1e300' is no number of seconds above 0, at most 31536000, a year",
    ),
    "sample: groups": (sample.main, ["--data-parallel", HUGE], 2, f"--data-parallel {HUGE}"),
}
"""A command line, its arguments, the status and the message."""


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, status, expected = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    printed = capsys.readouterr()
    *_, line = printed.err.splitlines()
    assert line.startswith(f"cutdiff: {expected}")
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert [*tmp_path.iterdir()] == []


PLACES: dict[str, tuple[dict[str, str], str]] = {
    "a word": ({"WORLD_SIZE": "abc"}, f"WORLD_SIZE='abc' {NO_NUMBER}"),
    "nothing": ({"WORLD_SIZE": ""}, f"WORLD_SIZE='' {NO_NUMBER}"),
    "below 0": ({"WORLD_SIZE": "-1"}, f"WORLD_SIZE='-1' {NO_NUMBER}"),
    "huge": ({"WORLD_SIZE": HUGE}, f"WORLD_SIZE='{HUGE}' {NO_NUMBER}"),
    "none": ({"WORLD_SIZE": "0"}, "RANK=None, LOCAL_RANK=None, WORLD_SIZE=0 is no place among processes: start them"),
    "a word for a rank": ({"WORLD_SIZE": "2", "RANK": "x"}, f"RANK='x' {NO_NUMBER}"),
    "a word for a GPU": ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, f"LOCAL_RANK='x' {NO_NUMBER}"),
    "a rank too many": ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, LOCAL_RANK=None, WORLD_SIZE=2 is no place among"),
}


@pytest.mark.parametrize("main", [sample.main, evaluate.main, bench.main, scaling.main, training.main])
@pytest.mark.parametrize("name", PLACES)
def test_places_that_torchrun_never_gives(
    name: str, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, expected = PLACES[name]
    monkeypatch.chdir(tmp_path)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(["--small", "--only"] if main is bench.main else []) == 1
    assert capsys.readouterr().err.startswith(f"cutdiff: {expected}")
    assert [*tmp_path.iterdir()] == []


def test_a_file_of_very_many_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a\n" * 1_000_000)
    assert sample.main(["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "asks for 1000000 pictures, more than 100000: split the file" in capsys.readouterr().err
