"""Starts the sampler in one process or in several, as torchrun does; each is a fork of this process.

This process has done the imports and computes nothing, because threads do not survive a fork. `python processes.py
FOLDER SEEDS RANKS ARGUMENTS` kills starts at seeded moments, and starts them again.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cutdiff.checkpoint
import cutdiff.output.images
import cutdiff.pipeline
import cutdiff.scenes.vocabulary  # noqa: F401  an import is all it takes here

COST = ("seconds", "peak_memory_bytes", "ranks", "received_bytes_per_step")
"""The fields of a record that may differ when a picture is drawn again."""
PATIENCE = 120.0
"""The seconds that a start may take."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""The last is what a command line sets before it imports torch; here the forks of one process import it before."""


def contents(folder: Path) -> dict[str, Any]:
    """The contents of all files by name, hidden ones too; records are without the fields of `COST`."""
    files: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            files[path.name] = {name: value for name, value in record.items() if name not in COST}
        else:
            files[path.name] = path.read_bytes()
    return files


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(run: Callable[[], object], size: int = 1, prints_to: Path | None = None) -> list[int]:
    """Call `run` in `size` forks with the environment of torchrun's ranks, and return their ids.

    The output of rank r goes to `prints_to`/r.out and r.err.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if prints_to is not None:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(prints_to / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
            _run(run)
        children.append(child)
    return children


def _run(run: Callable[[], object]) -> None:
    status = 70
    try:
        run()
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        os._exit(status)


def sampler(arguments: Sequence[str]) -> Callable[[], object]:
    """A function that does what `python -m cutdiff.sample` does."""

    def run() -> None:
        sys.argv[1:] = arguments
        runpy.run_module("cutdiff.sample", run_name="__main__", alter_sys=True)

    return run


def statuses(children: list[int]) -> list[int]:
    """The exit statuses of processes. TimeoutError if they take longer than `PATIENCE`; then they are killed."""
    ended: dict[int, int] = {}
    last = time.monotonic() + PATIENCE
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            waited, status = os.waitpid(child, os.WNOHANG)
            if waited:
                ended[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > last:
                for left in set(children) - set(ended):
                    os.kill(left, signal.SIGKILL)
                raise TimeoutError(f"{len(children) - len(ended)} of {len(children)} processes do not end")
        time.sleep(0.01)
    return [ended[child] for child in children]


def kill_and_start_again(
    folder: Path, num_seeds: int, size: int, arguments: Sequence[str]
) -> list[tuple[list[int], list[str]]]:
    """Draw into `folder`/whole, and for each seed into `folder`/seed N, where one process is killed at the first start.

    It returns, for each seed, the statuses of that start and the names of the files that it left, without hidden ones.
    """
    for name in ("first", "whole"):  # the second takes as long as those to come
        began = time.monotonic()
        assert statuses(start(sampler([*arguments, "--out", str(folder / name)]), size)) == [0] * size
        seconds = time.monotonic() - began
    left = []
    for seed in range(num_seeds):
        out, rng = folder / f"seed {seed}", random.Random(seed)
        children = start(sampler([*arguments, "--out", str(out)]), size)
        time.sleep(rng.uniform(0.1, 1) * seconds)
        os.kill(children[rng.randrange(size)], signal.SIGKILL)
        left.append((statuses(children), sorted(path.name for path in out.glob("[!.]*"))))
        assert statuses(start(sampler([*arguments, "--out", str(out)]), size)) == [0] * size
    return left


if __name__ == "__main__":
    folder, num_seeds, size, *arguments = sys.argv[1:]
    left = kill_and_start_again(Path(folder), int(num_seeds), int(size), arguments)
    (Path(folder) / "left.json").write_text(json.dumps(left))
