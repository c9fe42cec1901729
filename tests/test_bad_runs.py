"""Bad input: places where pictures cannot go, and runs cut off. Nothing half done is left; the next run works."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from refusal import CommandLine

from cutdiff.cli.drawing import print_line, tell
from cutdiff.parallel.lines import say
from cutdiff.sample import main

QUICK = ["--steps", "1", "--width", "128", "--height", "128", "--method", "direct", "--guidance-scale", "4"]
NAME = "direct-128x128-seed0"


@pytest.mark.parametrize("limit", [0, 3000])
def test_full_disk(limit: int, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in the middle of a file, as there."""
    code = (
        "import resource, signal, sys; from cutdiff.sample import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *QUICK, "--out", str(tmp_path / "pictures")]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode == 1, child.stderr
    assert child.stderr.count("\n") == 1
    assert f"{tmp_path / 'pictures' / NAME}.png cannot be written (File too large): free space" in child.stderr
    assert [*(tmp_path / "pictures").iterdir()] == []


def on_tmpfs(folder: Path, options: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a file system of its own at `folder`, of which a list of files is printed at the end."""
    script = 'mount -t tmpfs -o "$0" none "$1" || exit 99; out=$1; shift; "$@"; status=$?; ls -A "$out"; exit $status'
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    inside = ["unshare", "-rm", "sh", "-c", script, options, str(folder)]
    probe = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()}")
    return subprocess.run([*inside, *command], capture_output=True, text=True, check=False)


def test_full_disk_that_is_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutdiff.sample", *QUICK, "--out", str(tmp_path)]
    done = on_tmpfs(tmp_path, "size=16k", command)
    cause = "No space left on device"
    expected = f"cutdiff: {tmp_path / NAME}.png cannot be written ({cause}): free space, or change --out\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_disk_that_is_only_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutdiff.sample", *QUICK, "--out", str(tmp_path)]
    done = on_tmpfs(tmp_path, "ro", command)
    expected = f"cutdiff: --out {tmp_path} cannot be written to (Read-only file system): choose another folder\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("link", "No such file or directory"),
        ("x" * 300, "File name too long"),
    ],
    ids=["a file", "below a file", "a link to nowhere", "an endless name"],
)
def test_output_path(place: str, cause: str, tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = tmp_path / place
    command_line.refuses(["--out", out], 2, f"--out {out} cannot be written to ({cause}): choose another folder")


def test_output_path_not_writable(tmp_path: Path, command_line: CommandLine) -> None:
    out = tmp_path / "closed"
    out.mkdir(mode=0o500)
    if os.access(out, os.W_OK):
        out = Path("/proc")  # which is closed to root, too, whatever its mode
        if not out.exists():
            pytest.skip("there is no folder that root cannot write to")
    command_line.refuses(["--out", out], 2, f"--out {out} cannot be written to (", "): choose another folder")


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The write waits until the process is killed."""
    code = (
        "import os, sys, time; import cutdiff.output.images as images; from cutdiff.sample import main;"
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


@pytest.mark.parametrize(("write", "name"), [(say, "stderr"), (tell, "stderr"), (print_line, "stdout")])
def test_lines_are_written_whole(write: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, or another thread, comes between two calls of `write`."""
    file = Mock(wraps=io.StringIO())
    monkeypatch.setattr(sys, name, file)
    write("a message")
    assert [call.args[0][-10:] for call in file.write.call_args_list] == ["a message\n"]


def test_interrupted_in_the_middle_of_a_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cutdiff.sample",
        "--steps",
        "1000",
        "--width",
        "512",
        "-v",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert "native size" in child.stderr.readline(), "what is told once the model is read"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors.splitlines()[-1] == "cutdiff: interrupted"
    assert "Traceback" not in errors
    assert [*tmp_path.iterdir()] == []


def test_interrupted_in_an_import(tmp_path: Path) -> None:
    """The import executes text, as dataclasses do: Python would end by the signal although it was caught."""
    (tmp_path / "torch.py").write_text("exec('raise KeyboardInterrupt')")
    command = [sys.executable, "-m", "cutdiff.sample"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (child.returncode, child.stdout, child.stderr) == (1, "", "cutdiff: interrupted\n")
