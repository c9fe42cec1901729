"""Standard output and error that are closed, full, without a reader, or of an encoding that lacks a letter."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ENVIRONMENT

from cutdiff.parallel.lines import LONGEST, say, shown
from cutdiff.sample import main

QUICK = ["--method", "direct", "--steps", "1", "--width", "64", "--height", "64", "--num-images", "3"]


@pytest.fixture
def run(quick_folder: Path, tmp_path: Path) -> list[str]:
    return ["a", "--model", str(quick_folder), *QUICK, "--out", str(tmp_path / "out")]


@pytest.fixture
def without_reader() -> Iterator[io.TextIOWrapper]:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        yield file


def drawn(folder: Path) -> list[str]:
    """The names of the files of a folder, each picture with its record."""
    names = sorted(path.name for path in folder.iterdir())
    assert {name[:-4] for name in names if name.endswith("png")} == {name[:-5] for name in names if "json" in name}
    return [name for name in names if name.endswith("png")]


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
ALL = [f"direct-64x64-seed{seed}.png" for seed in range(3)]


@needs_full
def test_a_full_disk_loses_the_paths_and_no_picture(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(run) == 1
    told = "standard output cannot be written (No space left on device), so no more of it is"
    assert capsys.readouterr().err == f"cutdiff: {told}\n"
    assert drawn(tmp_path / "out") == ALL


def test_a_reader_that_has_ended_ends_the_run(
    run: list[str], tmp_path: Path, without_reader: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdout", without_reader)
    assert main(run) == 141
    assert capsys.readouterr().err == ""
    assert drawn(tmp_path / "out") == ALL[:1]


@pytest.mark.parametrize("arguments", [["--width", "63"], ["--width", "63", "--debug"], ["--help"]])
def test_what_is_told_to_nobody_ends_the_run(
    arguments: list[str], without_reader: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout" if "--help" in arguments else "stderr", without_reader)
    assert main(arguments) == 141


@needs_full
def test_standard_error_on_a_full_disk(run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main([*run, "-v"]) == 0
    assert drawn(tmp_path / "out") == ALL


LOST = "cutdiff: standard output cannot be written (Bad file descriptor), so no more of it is\n"


@pytest.mark.parametrize(
    ("closed", "status", "message"), [("<&- >&- 2>&-", 1, ""), (">&-", 1, LOST), ("<&- 2>&-", 0, "")]
)
def test_streams_that_are_closed(closed: str, status: int, message: str, run: list[str], tmp_path: Path) -> None:
    """Files that are opened later must not get their numbers, and paths that nobody gets are told of."""
    script = f'exec "$0" -m cutdiff.sample "$@" {closed}'
    command = ["sh", "-c", script, sys.executable, *run]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, message)
    assert drawn(tmp_path / "out") == ALL


def test_a_pipe_into_head(run: list[str], tmp_path: Path) -> None:
    script = '{ "$0" -m cutdiff.sample "$@"; echo "status $?" >&2; } | head -n 1'
    command = ["sh", "-c", script, sys.executable, *run, "--num-images", "40"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout == f"{tmp_path / 'out' / ALL[0]}\n"
    assert done.stderr == "status 141\n"
    assert len(drawn(tmp_path / "out")) < 40


@pytest.mark.parametrize(
    ("encoding", "name", "printed"),
    [
        ("ascii", "été", b"\\xe9t\\xe9"),
        ("utf-8", "été", "été".encode()),
        ("utf-8", "x\udcff", b"x\xff"),
        ("ascii", "x\udcff", b"x\xff"),
        ("latin-1", "夜", b"\\u591c"),
    ],
)
def test_a_folder_that_the_encoding_lacks(
    encoding: str, name: str, printed: bytes, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main([*run, "--out", str(tmp_path / name), "--num-images", "1"]) == 0
    assert written.getvalue() == os.fsencode(tmp_path) + b"/" + printed + f"/{ALL[0]}\n".encode()
    assert drawn(tmp_path / name) == ALL[:1]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\n b\t c", "a b c"),
        ("été 夜 ×", "été 夜 ×"),
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("a\x9b2J\x00\x7f", "a\\x9b2J\\x00\\x7f"),
        ("right\u202eto left\u2066", "right\\u202eto left\\u2066"),
        ("a byte \udcff", "a byte \\udcff"),
    ],
)
def test_a_message_is_a_line_that_a_terminal_can_show(
    message: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(message)
    assert capsys.readouterr().err == f"cutdiff: {line}\n"


def test_the_middle_of_a_long_message_is_left_out() -> None:
    line = shown("begins " + "\x1b" * 10**6 + " ends")
    assert LONGEST <= len(line) <= LONGEST + 3
    assert line.startswith("begins \\x1b\\x1b")
    assert line.endswith("\\x1b ends")
    assert shown("x" * LONGEST) == "x" * LONGEST


def test_control_characters_of_a_path(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run, "--model", str(tmp_path / "a\x1b[2J\udcff")]) == 2
    assert f"cutdiff: {tmp_path}/a\\x1b[2J\\udcff does not exist" in capsys.readouterr().err
