"""The refusal of bad input by the command line: one line, a status, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz_read import limits

from cutdiff.sample import main

SECONDS = 5
"""A limit in processor time, because the clock also depends on what else the machine does."""
MEMORY = 512 * 2**20
"""The number of bytes by which the process may grow."""


@dataclass(frozen=True)
class CommandLine:
    """`python -m cutdiff.sample`, which writes to `out`."""

    out: Path
    capsys: pytest.CaptureFixture[str]

    def refuses(self, arguments: Sequence[object], status: int, *words: str, apart: bool = False) -> str:
        """Assert that `arguments` are refused with all `words`; returns the line without the program's name.

        No file or folder beside or below `out` is made, and no file changed. The refusal comes within the bounds above
        in this process, whose imports are done, or with `apart` in a process of its own, as a user calls it.
        """
        before = self._files()
        given = ["--out", str(self.out), "--device", "cpu", *map(str, arguments)]
        found, printed, line = (_apart if apart else self._here)(given)
        assert (found, printed) == (status, ""), line
        assert line.startswith("cutdiff: "), line
        assert line.removesuffix("\n").isprintable(), f"not one line: {line}"
        for expected in words:
            assert expected in line, line
        assert self._files() == before, "something was written"
        return line.removeprefix("cutdiff: ").removesuffix("\n")

    def _here(self, arguments: list[str]) -> tuple[int, str, str]:
        self.capsys.readouterr()  # what was printed before is none of it
        with limits(MEMORY, SECONDS):
            status = main(arguments)
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    def _files(self) -> dict[Path, int]:
        return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in self.out.parent.rglob("*")}


def _apart(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command in a process of its own, without a bound on the time, most of which imports take."""
    command = [sys.executable, "-m", "cutdiff.sample", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr
