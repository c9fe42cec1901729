"""Opening files that may be anything. Only regular files are opened, and no more of one is read than it says it has: a
pipe would block, a device may never end, and some files of the kernel say that they are empty and are not.

This module imports no torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one, to read bytes.

    Raises FileNotFoundError where there is no file, and ValueError where it is something else or cannot be read.
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
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from None


def size_of(file: BufferedReader) -> int:
    """The number of bytes that an open file says it has."""
    return os.fstat(file.fileno()).st_size


def contents(path: Path, most: int, remedy: str = "which are all that is read: give a smaller file") -> bytes:
    """The bytes of a file that is opened as above. ValueError, which ends in `remedy`, for more than `most`."""
    with opened(path) as file:
        size = size_of(file)
        if size > most:
            raise ValueError(f"{path} has {size} bytes, more than {most}, {remedy}")
        return file.read(size)
