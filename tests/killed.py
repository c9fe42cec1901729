"""Starts of the sampler that are killed at seeded moments and started again: `python killed.py FOLDER SEEDS ARGUMENTS`.

Each start is a fork of this process, which has done the imports and computed nothing: threads do not survive a fork.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import cutdiff.checkpoint
import cutdiff.images
import cutdiff.pipeline
import cutdiff.scenes.vocabulary  # noqa: F401  an import is all it takes here


def start(arguments: list[str]) -> int:
    """`python -m cutdiff.sample` in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        sys.argv[1:] = arguments
        try:
            runpy.run_module("cutdiff.sample", run_name="__main__", alter_sys=True)
        except SystemExit as error:
            os._exit(int(error.code or 0))
        os._exit(70)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, num_seeds: int, arguments: list[str]) -> None:
    began = time.monotonic()
    assert status_of(start([*arguments, "--out", str(folder / "whole")])) == 0
    seconds = time.monotonic() - began
    for seed in range(num_seeds):
        out = folder / f"seed {seed}"
        child = start([*arguments, "--out", str(out)])
        time.sleep(random.Random(seed).uniform(0.1, 1) * seconds)
        os.kill(child, signal.SIGKILL)
        print(seed, status_of(child), *sorted(path.name for path in out.glob("[!.]*")), flush=True)
        assert status_of(start([*arguments, "--out", str(out)])) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
