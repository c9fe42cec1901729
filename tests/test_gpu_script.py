"""gpu.sh: whatever ends a stage or the script, the numbers that were known and the summary are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cutdiff_kernels import bench as operators
from cutdiff_kernels import bench_network
from cutdiff_kernels.lines import Lines

from cutdiff.bench import __main__ as bench
from cutdiff.bench import gpu, stages
from cutdiff.bench.gpu import Runner, Stage
from cutdiff.bench.stages import Where
from cutdiff.cli.ending import Failure

SCRIPT = Path(__file__).parents[1] / "cutdiff" / "bench" / "gpu.sh"
STAND_IN = """
import os, signal, subprocess, sys, time
from cutdiff_kernels.lines import Lines

what, (file, stage) = sys.argv[1], sys.argv[-2:]
lines = Lines(file, stage)
lines.add("a thing", {"took_s": 0.25})
if what == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lines.add("a child", {"id": child.pid})
    time.sleep(60)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fails":
    print("it went wrong", file=sys.stderr)
    sys.exit(1)
lines.add("a thing", {"took_s": 0.75, "end": "well"})
"""
"""A module that keeps a number, then ends in the way that its argument names, or keeps another one."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the module `stand_in`, from which stages are started."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(gpu, "GRACE", 1)
    return tmp_path


def stage(name: str, least: int = 0, most: int = 30) -> Stage:
    return Stage(name, least, most, "stand_in", (name,))


def values(path: Path) -> list[tuple[str, str, str, Any]]:
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [(line["stage"], line["of"], line["name"], line["value"]) for line in lines]


def runs(process: int) -> bool:
    """True while a process runs: one that has ended and waits for its parent does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_numbers_have_the_units_of_their_names_and_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    Lines(path, "a").add(
        "x", {"call_us": 250, "bytes": 8, "rate_flops_per_s": 2e12, "call_s": None, "why": ""}, round=1
    )
    Lines(path, "a").add("x", {"call_us": 750})
    Lines().add("x", {"call_us": 1})
    first = {"stage": "a", "of": "x", "name": "call", "value": 0.00025, "unit": "s", "round": 1}
    assert json.loads(path.read_text().partition("\n")[0]) == first
    with open(path, "a") as file:
        file.write('{"stage": "a", "of": "x", "na')  # as a process leaves it that is killed
    assert gpu.summary(path) == "a: running\n  x: call 500 µs (2), bytes 8 B, rate 2 TFLOP/s\n"


def test_the_operators_bench_keeps_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = {"published_s": 2.0, "reference_s": 1.0}
    for name, value in (("SIZES", (256,)), ("WINDOW", 16), ("STRIDE", 8), ("draw_seconds", lambda: draw)):
        monkeypatch.setattr(operators, name, value)
    path, file = tmp_path / "numbers.jsonl", tmp_path / "bench.json"
    arguments = ["--sizes", "256", "--lines", str(path), "operators", "--json", str(file)]
    assert operators.main(arguments) == 0
    kept = {(of, name): value for _, of, name, value in values(path)}
    assert kept["permutations of a step on one CPU thread", "published"] == 2.0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert kept[f"{row['name']}, 256²", "reference"] == pytest.approx(row["reference_us"] / 1e6)


def test_a_stage_that_hangs_dies_or_fails_keeps_its_numbers_and_lets_the_others_run(stand_in: Path) -> None:
    """A stage at its limit is ended with its children, though it does not heed SIGTERM."""
    runner = Runner(stand_in, 60)
    runner.run([stage("hangs", most=2), stage("dies"), stage("fails"), stage("ends"), stage("long", least=90)])
    kept = values(runner.numbers)
    for name in ("hangs", "dies", "fails", "ends"):
        assert (name, "a thing", "took", 0.25) in kept
    assert ("ends", "a thing", "took", 0.75) in kept
    ends = {name: value for name, of, what, value in kept if (of, what) == ("stage", "ended")}
    assert ends == runner.ends
    assert ends["hangs"] == "ended at its limit of 2 s"
    assert ends["dies"] == "failed with SIGKILL: it printed nothing"
    assert ends["fails"] == "failed with status 1: it went wrong"
    assert ends["ends"] == "done"
    assert ends["long"].startswith("skipped: it takes 90 s, and 5")
    (child,) = (value for _, of, _, value in kept if of == "a child")
    assert not runs(child)
    text = (stand_in / "summary.txt").read_text(encoding="utf-8")
    assert "hangs: ended at its limit of 2 s, 3 s\n  a thing: took 250 ms\n" in text
    assert "ends: done" in text
    assert "  a thing: took 500 ms (2), end well\n" in text
    assert len([path for path in stand_in.iterdir() if path.name not in ("stand_in.py", "__pycache__")]) == 3


def test_a_stage_stands_in_for_one_that_failed(stand_in: Path) -> None:
    runner = Runner(stand_in, 30)
    another = [replace(stage("ends"), name=f"instead of {name}", instead_of=name) for name in ("fails", "ends", "none")]
    runner.run([stage("fails"), stage("ends"), *another])
    assert list(runner.ends) == ["fails", "ends", "instead of fails"]


def test_no_stage_outlasts_the_deadline(stand_in: Path) -> None:
    runner, began = Runner(stand_in, 4), time.monotonic()
    runner.run([stage("hangs"), stage("ends", least=1)])
    assert time.monotonic() - began < 5
    assert runner.ends["hangs"].startswith("ended at its limit of")
    assert runner.ends["ends"].startswith("skipped: it takes 1 s, and 0 s are left")


def test_a_signal_ends_the_stage_and_the_script_and_leaves_the_summary(tmp_path: Path) -> None:
    """The whole script, ended with SIGTERM in its first stage."""
    out = tmp_path / "out"
    process = subprocess.Popen([SCRIPT, out, "--small"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    numbers = out / "numbers.jsonl"
    while not numbers.exists() or "torch's order" not in numbers.read_text(encoding="utf-8"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error == "cutdiff: terminated\n"
    assert printed == (out / "summary.txt").read_text(encoding="utf-8")
    assert "machine: ended by a signal" in printed
    assert "attention: torch's order" in printed
    assert "tests: skipped: a signal ended the run" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0"], "SECONDS 0 must be at least 1"),
        (["soon"], "argument SECONDS: invalid int value: 'soon' (see --help)"),
        (["--third"], "--third is no option"),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert gpu.main([str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"cutdiff: {message}")
    assert not (tmp_path / "out").exists()


def test_results_are_not_mixed_with_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "numbers.jsonl").touch()
    assert gpu.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"cutdiff: OUT {tmp_path} has results already: choose a new folder\n"


@pytest.mark.parametrize("second", [False, True])
def test_without_diffusers_all_but_the_loops_is_left(second: bool) -> None:
    for small in (False, True):
        with_loops, without = (gpu.stages(second, small, loops) for loops in (True, False))
        loops = {"a", "c", "d"}
        assert all(loops.isdisjoint(stage.arguments) for stage in without)
        assert any(not loops.isdisjoint(stage.arguments) for stage in with_loops)
        own = {"loop compiled", "pictures beside the loops"}
        assert [s.name for s in with_loops if s.name not in own] == [s.name for s in without]


def test_every_stage_has_a_command_line_that_can_be_read() -> None:
    """Only the devices of the large sizes are not here."""
    readers = {"cutdiff.bench": bench._parse, "cutdiff_kernels.bench": operators._parser().parse_args}
    for second in (False, True):
        for small in (False, True):
            for one in gpu.stages(second, small, loops=True):
                arguments = one.command(Path("numbers.jsonl"))[3:]
                if one.module == "cutdiff.bench.stages":
                    assert one.arguments[0] in stages.STAGES
                elif one.module in readers:
                    assert readers[one.module](arguments).lines == ["numbers.jsonl", one.name]


def where(path: Path) -> Where:
    return Where(torch.device("cpu"), Lines(path, "stage"), small=True)


def test_a_wrong_kernel_is_named_and_the_others_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run under the interpreter and at a small native size, and one of them is given another scale."""
    for name, value in (("SIZES", (256,)), ("WINDOW", 16), ("STRIDE", 8)):
        monkeypatch.setattr(operators, name, value)
    kernels = operators.Inputs.kernels

    def broken(inputs: Any) -> dict[str, Any]:
        right = kernels(inputs)
        return right | {"gather views": lambda i: (right["gather views"](i)[0] * 1.01,)}

    path = tmp_path / "numbers.jsonl"
    stages.correct(where(path))
    right = {of for _, of, name, value in values(path) if name == "right" and value}
    assert "average views, 256², float32" in right
    path.unlink()
    monkeypatch.setattr(operators.Inputs, "kernels", broken)
    with pytest.raises(Failure, match="1 kernels are wrong, the first: gather views, 256², float32 differs from its"):
        stages.correct(where(path))
    kept = {of: value for _, of, name, value in values(path) if name == "right"}
    assert kept == dict.fromkeys(right, True) | {"gather views, 256², float32": False}


def test_a_picture_is_the_sum_of_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of 650 rows from made up times of a call."""
    monkeypatch.setattr(stages, "call_seconds", lambda contestant, rows: rows / 100)
    path = tmp_path / "numbers.jsonl"
    stages.call(where(path))
    kept = {(of, name): value for _, of, name, value in values(path)}
    assert kept["650 rows, by these calls", "calls"] == pytest.approx(6.5)
    assert kept["18 rows", "call"] == 0.18
    rate = kept["18 rows", "rate"]
    assert kept["650 rows, by these calls", "rate"] == pytest.approx(rate)
    assert kept["operator aten::addmm", "total"] > 0


def test_a_variant_that_fails_does_not_keep_others_from_being_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stages.variant

    def variant(name: str, *rest: Any) -> Any:
        if name == "fused-norm":
            raise RuntimeError("it does not compile")
        return made(name, *rest)

    def call_seconds(contestant: Any, rows: int, repeats: int) -> float:
        return 2.0 if "fp8" in contestant.what else 1.0

    monkeypatch.setattr(stages, "variant", variant)
    monkeypatch.setattr(stages, "call_seconds", call_seconds)
    monkeypatch.setattr(stages, "prove_again", lambda *_: 0.0)
    path = tmp_path / "numbers.jsonl"
    with pytest.raises(Failure, match="1 variants failed, the first: fused-norm: RuntimeError: it does not compile"):
        stages.variants(where(path))
    kept = {(of, name): value for _, of, name, value in values(path)}
    assert kept["fp8", "times cutdiff"] == 2.0
    assert kept["fused-norm", "failed"] == "RuntimeError: it does not compile"
    assert kept["fused-gate", "times cutdiff"] == 1.0
    assert kept["flash", "skipped"].startswith("only a GPU has it")


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")  # as every cache, so that a first call compiles
def test_blocks_and_the_whole_are_compiled_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled as dynamo captures them, whatever a backend makes of that."""
    torch.compiler.reset()
    monkeypatch.setattr("cutdiff.models.compiled.BACKEND", "aot_eager")
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", False)
    monkeypatch.setattr(stages, "ROWS", (2,))
    path = tmp_path / "numbers.jsonl"
    stages.parts(where(path))
    numbers = {(of, name): value for _, of, name, value in values(path)}
    assert numbers["2 rows, not compiled", "call"] > 0
    for name in ("blocks", "whole"):
        assert numbers[f"2 rows, compiled: {name}", "difference"] < 1e-4
        assert numbers[f"2 rows, compiled: {name}", "first"] > numbers[f"2 rows, compiled: {name}", "call"] > 0


def test_the_outcome_of_each_test_is_kept(tmp_path: Path) -> None:
    text = "def test_right(): pass\n\ndef test_wrong(): assert False\n"
    file, path = tmp_path / "test_some.py", tmp_path / "numbers.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(Failure, match="pytest ended with TESTS_FAILED"):
        stages.run_tests(Lines(path, "tests"), [str(file), "--rootdir", str(tmp_path), "-p", "no:xdist"])
    kept = [(of.rpartition("::")[2], name, value) for _, of, name, value in values(path) if name != "test"]
    assert kept == [("tests", "passed", f"{file.name}::test_right"), ("test_wrong", "outcome", "failed")]


def test_every_file_with_a_test_for_a_gpu_is_run() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    collected = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, check=True).stdout
    files = {line.partition("::")[0] for line in collected.splitlines() if "::" in line}
    assert files == {f"tests/{name}" for name in stages.GPU_TESTS}


def test_the_variants_of_a_layer_are_numbers_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    row = bench_network.Row("gate", 18, 1, 1, kernel_s=0.5, variants={"tma": 0.25, "persistent": "does not compile"})
    bench_network.keep(Lines(path, "layers"), row, rate=1e9)
    assert {(name, value) for _, _, name, value in values(path)} >= {
        ("kernel", 0.5),
        ("tma", 0.25),
        ("persistent failed", "does not compile"),
    }
    assert "tma 250 ms" in gpu.summary(path)
