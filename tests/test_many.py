"""A run of many pictures keeps what is finished and draws what is missing, whatever ended the run before."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import ENVIRONMENT, contents
from tiny import edit_tensors

import cutdiff
from cutdiff.sample import main

QUICK = ["--method", "direct", "--steps", "1", "--width", "64", "--height", "64"]


@pytest.fixture
def copy(quick_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(quick_folder, tmp_path / "copy"))


@pytest.fixture
def run(quick_folder: Path, tmp_path: Path) -> list[str]:
    """Three prompts, the last in two sizes: four pictures of a tiny model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a\n{"prompt": "red", "seed": 5}\n\nb\n{"prompt": "b", "width": 128}\n')
    return ["--model", str(quick_folder), "--prompts", str(prompts), *QUICK]


NAMES = ["0001-direct-64x64-seed0", "0002-direct-64x64-seed5", "0004-direct-64x64-seed0", "0005-direct-128x64-seed0"]


def test_started_again_it_draws_what_is_missing(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*run, "--out", str(out)]) == 0
    first, before = capsys.readouterr(), contents(out)
    assert sorted(before) == sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("png", "json"))
    kept = (out / f"{NAMES[0]}.png").stat().st_mtime_ns
    (out / f"{NAMES[1]}.png").unlink()
    (out / f"{NAMES[2]}.png").unlink()
    (out / f"{NAMES[2]}.json").unlink()
    (out / f".{NAMES[2]}.png.a1b2_c3d.part").write_text("half a pictu")
    (out / ".another.png.a1b2_c3d.part").write_text("not ours")
    assert main([*run, "--out", str(out), "--view-batch-size", "1"]) == 0, "how many at once does not matter"
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err == "cutdiff: 2 of 4 pictures are finished already\n"
    (out / ".another.png.a1b2_c3d.part").unlink()
    after = contents(out)
    assert after.keys() == before.keys()
    for name in NAMES:
        assert after[f"{name}.png"] == before[f"{name}.png"]
        assert after[f"{name}.json"]["fingerprint"] == before[f"{name}.json"]["fingerprint"]
    assert (out / f"{NAMES[0]}.png").stat().st_mtime_ns == kept


def edited(prompts: Path) -> list[str]:
    prompts.write_text(prompts.read_text().replace("red", "red red"))
    return []


def retrained(copy: Path) -> list[str]:
    edit_tensors(copy / "unet/diffusion_pytorch_model.safetensors", lambda tensors: tensors["conv_in.bias"].add_(1))
    return ["--model", str(copy)]


def rescaled(copy: Path) -> list[str]:
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.2}))
    return ["--model", str(copy)]


CHANGES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "an option": (
        lambda prompts, copy: ["--guidance-scale", "3"],
        f"{NAMES[0]}.png was drawn with --guidance-scale 7.5 (now 3.0): ",
    ),
    "two options": (
        lambda prompts, copy: ["--steps", "2", "--dtype", "bfloat16"],
        "--steps 1 (now 2), --dtype 'float32' (now 'bfloat16')",
    ),
    "a prompt": (
        lambda prompts, copy: edited(prompts),
        f"{NAMES[1]}.png was drawn with prompt 'red' (now 'red red'): ",
    ),
    "weights": (lambda prompts, copy: retrained(copy), f"{NAMES[0]}.png was drawn with another model: "),
    "configuration": (lambda prompts, copy: rescaled(copy), f"{NAMES[0]}.png was drawn with another model: "),
}
"""A function that changes the file of prompts or a copy of the model and returns arguments to add, and the message."""


@pytest.mark.parametrize("name", CHANGES)
def test_changed_options_are_told(
    name: str, run: list[str], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run draws nothing, not even what is missing, without --overwrite."""
    out, (change, message) = tmp_path / "out", CHANGES[name]
    assert main([*run, "--out", str(out)]) == 0
    (out / f"{NAMES[3]}.png").unlink()
    before = contents(out)
    changed = [*run, *change(tmp_path / "prompts.txt", copy), "--out", str(out)]
    capsys.readouterr()
    assert main(changed) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err
    assert printed.err.endswith("pass --overwrite to draw over it, or choose another --out\n")
    assert contents(out) == before
    assert main([*changed, "--overwrite"]) == 0
    (out / f"{NAMES[2]}.png").unlink()
    capsys.readouterr()
    assert main([*changed, "--overwrite"]) == 0, "what is drawn over goes on, too"
    assert main(changed) == 0
    finished = [f"cutdiff: {number} of 4 pictures are finished already" for number in (3, 4)]
    assert capsys.readouterr().err.splitlines() == finished
    assert contents(out).keys() == {*before, f"{NAMES[3]}.png"}


def test_the_same_weights_elsewhere_are_the_same_model(run: list[str], copy: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main([*run, *out]) == 0
    assert main([*run, *out, "--model", str(copy)]) == 0


def test_a_damaged_picture_is_drawn_again_and_a_replaced_one_is_kept(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*run, "--out", str(out)]) == 0
    first, before = capsys.readouterr(), contents(out)
    paths = [out / f"{name}.png" for name in NAMES]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    assert main([*run, "--out", str(out)]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (first.out, "cutdiff: 2 of 4 pictures are finished already\n")
    assert contents(out) == before
    shutil.copy(paths[1], paths[2])
    assert main([*run, "--out", str(out)]) == 2
    told = f"{paths[2]} is not the picture that its record tells of: pass --overwrite to draw over it"
    assert told in capsys.readouterr().err
    assert paths[2].read_bytes() == paths[1].read_bytes()
    assert main([*run, "--out", str(out), "--overwrite"]) == 0
    assert contents(out) == before


def test_another_picture_of_the_name_that_came_meanwhile_is_kept(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, generate = tmp_path / "out", cutdiff.generate

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        assert main([*run, "--steps", "2", "--out", str(out)]) == 0
        return generate(*args, **options)

    monkeypatch.setattr(cutdiff, "generate", meanwhile)
    assert main([*run, "--out", str(out)]) == 1
    told = f"{out / NAMES[0]}.png is another picture, drawn by another run meanwhile: choose another --out"
    assert capsys.readouterr().err == f"cutdiff: {told}\n"
    assert {json.loads(path.read_text())["num_steps"] for path in out.glob("*.json")} == {2}


def test_what_is_no_picture_of_ours_is_kept(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "out" / f"{NAMES[1]}.png"
    own.parent.mkdir()
    for record in (None, "[]", "{", "{}"):
        own.write_bytes(b"mine")
        if record is not None:
            own.with_suffix(".json").write_text(record)
        assert main([*run, "--out", str(own.parent)]) == 2
        assert f"{own} has no record of how it was drawn: pass --overwrite" in capsys.readouterr().err
        assert own.read_bytes() == b"mine"


def test_one_prompt_keeps_what_is_there(quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number is added to a name that another picture has; the same picture is drawn once."""

    def drawn(prompt: str, *options: str) -> tuple[str, str]:
        assert main([prompt, "--model", str(quick_folder), *QUICK, *options, "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        return Path(printed.out.strip()).name, printed.err

    finished = "cutdiff: 1 of 1 pictures are finished already\n"
    assert drawn("a") == ("direct-64x64-seed0.png", "")
    assert drawn("b") == ("direct-64x64-seed0-1.png", "")
    assert drawn("c") == ("direct-64x64-seed0-2.png", "")
    assert drawn("b") == ("direct-64x64-seed0-1.png", finished)
    assert drawn("a") == ("direct-64x64-seed0.png", finished)
    assert drawn("c", "--overwrite") == ("direct-64x64-seed0.png", "")
    prompts = [json.loads(path.read_text())["prompt"] for path in sorted(tmp_path.glob("*.json"))]
    assert prompts == ["b", "c", "c"]
    set_of_two = ["a", "--model", str(quick_folder), *QUICK, "--num-images", "2", "--out", str(tmp_path)]
    assert main(set_of_two) == 2, "pictures of a set take no other names"


def test_a_line_for_each_picture(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("{}\n")
    assert main([*run, "--out", str(out)]) == 1
    (out / f"{NAMES[2]}.png").unlink()
    capsys.readouterr()
    assert main([*run, "--out", str(out), "--log-json"]) == 1
    bad, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    error = f'{tmp_path / "prompts.txt"}, line 6: an object needs "prompt", a text'
    assert bad == {"line": 6, "state": "left out", "error": error}
    assert [line["state"] for line in lines] == ["finished", "finished", "drawn", "finished"]
    assert [line["path"] for line in lines] == [str(out / f"{name}.png") for name in NAMES]
    assert [(line["line"], line["seed"]) for line in lines] == [(1, 0), (2, 5), (4, 0), (5, 0)]
    assert lines[2]["network_evaluations"] == 2
    assert lines[2]["seconds"] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_bar_for_the_run(run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([*run, "--steps", "4", "--out", str(tmp_path / "out")]) == 0
    shown = re.findall(
        r"(\d) of 4, direct: +(\d+)%\|.*?\| \d\d:\d\d<(\d\d:\d\d), (\S+) pictures/h", terminal.getvalue()
    )
    assert {number for number, *_ in shown} >= {"1", "4"}
    shares = [int(share) for _, share, *_ in shown]
    assert shares == sorted(shares)
    assert all(float(rate) > 0 for *_, rate in shown)


@pytest.mark.large
def test_a_bad_line_of_a_thousand_and_flat_memory(quick_folder: Path, tmp_path: Path) -> None:
    """The others are drawn, and the process does not grow with them."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines = [b"a b c"] * 1005
    lines[499] = b"a \xff"
    prompts.write_bytes(b"\n".join(lines))
    command = [sys.executable, "-m", "cutdiff.sample", "--model", str(quick_folder), "--prompts", str(prompts), *QUICK]
    command += ["--out", str(out), "--guidance-scale", "1"]
    resident, number = {}, 0
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for number, _ in enumerate(child.stdout, start=1):
            if number in (50, 1000):
                resident[number] = resident_bytes(child.pid)
        errors = child.stderr.read()
    assert child.returncode == 1, errors
    cause = "byte 3 is not UTF-8: save the file as UTF-8"
    assert errors.splitlines() == [
        f"cutdiff: {prompts}, line 500: {cause}; the other lines are drawn",
        f"cutdiff: {prompts}, left out: 500; correct these lines and start again",
    ]
    assert number == len([*out.glob("*.png")]) == len([*out.glob("*.json")]) == 1004
    assert resident[1000] <= 1.05 * resident[50]


def resident_bytes(process: int) -> int:
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def test_a_line_that_the_model_cannot_draw(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('{"prompt": "a", "width": 99}\na\n{\n')
    assert main([*run, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out' / '0002-direct-64x64-seed0.png'}\n"
    errors = printed.err.splitlines()
    assert [re.sub(r": .*", "", line[9:]) for line in errors] == [
        f"{prompts}, line 3",
        f"{prompts}, line 1",
        f"{prompts}, left out",
    ]
    assert errors[2].endswith(": 1, 3; correct these lines and start again")


def test_killed_anywhere_and_started_again(run: list[str], tmp_path: Path) -> None:
    """A run is killed at twenty seeded moments. No file that has a name is half written, and after a second start the
    folder is that of an undisturbed run."""
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), str(tmp_path), "20", "1", *run, "--steps", "2"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = json.loads((tmp_path / "left.json").read_text())
    assert len(left) == 20
    assert len({len(names) for _, names in left}) > 1, "all were killed at the same picture"
    assert sum(status == [-signal.SIGKILL] for status, _ in left) >= 10
    for _, names in left:
        pictures, records = ({name for name in names if name.endswith(end)} for end in (".png", ".json"))
        assert pictures | records == set(names)
        assert {name.replace(".png", ".json") for name in pictures} <= records
    whole = contents(tmp_path / "whole")
    assert len(whole) == 2 * len(NAMES)
    for seed in range(20):
        assert contents(tmp_path / f"seed {seed}") == whole


def test_terminated(run: list[str], tmp_path: Path) -> None:
    arguments = [*run, "--num-images", "400", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "cutdiff.sample", *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        printed, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (143, "cutdiff: terminated\n")
    assert time.monotonic() - began < 10
    finished = [*(tmp_path / "out").glob("*.png")]
    assert len(finished) - printed.count("\n") in (1, 2), "the last may be drawn and not yet told"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".json"}
    for path in finished:
        with Image.open(path) as image:
            image.load()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process has one thread, as the others have: then their pictures are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_full_disk_in_the_middle(run: list[str], tmp_path: Path) -> None:
    """A limit on the size of files, which the last picture exceeds, stands for a full disk."""
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    limit = len(whole[f"{NAMES[0]}.png"]) * 3 // 2
    assert limit < len(whole[f"{NAMES[3]}.png"])
    code = (
        "import resource, signal, sys; from cutdiff.sample import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = [*run, "--out", str(out)]
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert child.returncode == 1, child.stderr
    assert (
        child.stderr
        == f"cutdiff: {out / NAMES[3]}.png cannot be written (File too large): free space, or change --out\n"
    )
    assert contents(out) == {name: value for name, value in whole.items() if NAMES[3] not in name}
    assert main(arguments) == 0
    assert contents(out) == whole
