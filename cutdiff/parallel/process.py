"""This process among those that torchrun has started. A process that torchrun did not start is alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class Ended(Exception):
    """The run ends, and another process says why."""


class RankLost(Exception):
    """Another process of the run has ended or does not answer."""


def num_processes() -> int:
    """The number of processes in the run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process() -> int:
    """The index of this process in the run."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def own_gpu() -> str:
    """The GPU of this process on its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def alike() -> Iterator[None]:
    """Let only the first process raise an error that the block raises in all of them; the others raise Ended."""
    try:
        yield
    except Exception:
        if process() > 0:
            raise Ended from None
        raise
