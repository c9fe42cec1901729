"""This process among those that torchrun has started. A process that torchrun did not start is alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class Ended(Exception):
    """The run ends, and another process says why."""


class RankLost(Exception):
    """The processes of the run are not together: one has ended, does not answer, or was not told its place."""


def num_processes() -> int:
    """The number of processes in the run; 1 without torchrun. RankLost where torchrun's variables cannot be used."""
    size = _number("WORLD_SIZE", 1)
    if size < 1 or (size > 1 and not max(_number("RANK", 0), _number("LOCAL_RANK", 0)) < size):
        places = ", ".join(f"{name}={os.environ.get(name)}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        raise RankLost(f"{places} is no place among processes: start them with torchrun, or unset these variables")
    return size


def process() -> int:
    """The index of this process in the run; 0 too where torchrun's variables cannot be used."""
    try:
        return _number("RANK", 0) if num_processes() > 1 else 0
    except RankLost:
        return 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", text):
        raise RankLost(f"{name}={text!r} is no number of a process: start with torchrun, or unset the variable")
    return int(text)


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
