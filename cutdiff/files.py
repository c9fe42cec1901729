"""Opening files that may be anything. Only regular files are opened, and no more of one is read than it says it has: a
pipe would block, a device may never end, and some files of the kernel say that they are empty and are not.

This module imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_LOG = 1 << 28
"""The most bytes of a log, of which a long run writes some megabytes."""


class BadFile(ValueError):
    """The error of a file that is there and is no good, where other errors of the kind are of what names it."""


def reworded(error: Exception, message: str) -> ValueError:
    """An error with another message, of the same of the two kinds."""
    return BadFile(message) if isinstance(error, BadFile) else ValueError(message)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one, to read bytes.

    Raises FileNotFoundError where there is no file, ValueError where it is something else, and BadFile where it cannot
    be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a folder where a file belongs: name a file inside it")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is a device, a pipe or a socket: only regular files are read, so copy it to one")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from None


def size_of(file: BufferedReader) -> int:
    """The number of bytes that an open file says it has."""
    return os.fstat(file.fileno()).st_size


def contents(path: Path, most: int, remedy: str = "which are all that is read: give a smaller file") -> bytes:
    """The bytes of a file that is opened as above. BadFile, which ends in `remedy`, for more than `most`."""
    with opened(path) as file:
        size = size_of(file)
        if size > most:
            raise BadFile(f"{path} has {size} bytes, more than {most}, {remedy}")
        return file.read(size)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs, as an `object_pairs_hook`. ValueError where two have the same name."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r:.60} is given twice in one object")
    return dict(pairs)


def json_of(path: Path, most: int = MAX_LOG) -> Any:
    """The JSON value in a file that this package wrote. The errors are those of `contents`, and ValueError where the
    file is no JSON."""
    return _parsed(path, contents(path, most), "")


def json_lines(path: Path, most: int = MAX_LOG) -> list[dict[str, Any]]:
    """The JSON objects in a log, one on each line that has an end. The errors are those of `json_of`."""
    lines = [
        _parsed(path, line, f", line {number}")
        for number, line in enumerate(contents(path, most).split(b"\n")[:-1], start=1)
    ]
    if any(not isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} is no log: a line of it is no JSON object: remove it")
    return lines


def _parsed(path: Path, text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{place} is damaged ({error}): remove it") from None
