"""Lines for the user. Each is written by one call: neither a signal nor another thread can come before its end."""

from __future__ import annotations

import codecs
import os
import sys
from typing import TextIO

LONGEST = 1000
"""The most characters of a message."""
_lost: list[OSError] = []


class NoReader(Exception):
    """Whatever read the output of this process has ended, as `head` does after its last line."""


def open_streams() -> None:
    """Let the standard streams take every line: one that is closed leads nowhere, and what an encoding does not have is
    escaped, but for the bytes of a file's name that are no text, which are written as they are."""
    _lost.clear()
    codecs.register_error("cutdiff", _as_bytes_or_escaped)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else the next file that is opened would get its number
            # What is written to standard output fails, as on a full disk.
            flags = os.O_RDONLY if name == "stdout" else os.O_RDWR
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
    if callable(reconfigure := getattr(sys.stdout, "reconfigure", None)):
        reconfigure(errors="cutdiff")


def _as_bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def say(message: str) -> None:
    """Write a message for the user on standard error, as one line."""
    write_line(f"cutdiff: {shown(message)}", sys.stderr)


def shown(message: str) -> str:
    """A message as one line that a terminal can show: control characters, which may be in any file and could move its
    cursor, are escaped, and the middle of a long one is left out, as its end says what to do."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def write_line(line: str, file: TextIO) -> None:
    """Write a line and its end by one call; `print` makes two. The errors are those of `write`."""
    write(f"{line}\n", file)


def write(text: str, file: TextIO) -> None:
    """Write a text, and all that the stream still has.

    NoReader where nothing reads what is written. If standard output fails otherwise, as on a full disk, the user is
    told so once, `output_lost` knows, and later lines are dropped.
    """
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        # What the stream still has would be written as the process ends, and fail again.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())
        if isinstance(error, BrokenPipeError):
            raise NoReader from None
        if file is not sys.stderr:
            _lost.append(error)
            say(f"standard output cannot be written ({error.strerror}), so no more of it is")


def output_lost() -> bool:
    """True if lines of this run could not be written to standard output."""
    return bool(_lost)
