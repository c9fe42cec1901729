"""Lines for the user. Each is written by one call: neither a signal nor another thread can come before its end."""

from __future__ import annotations

import sys
from typing import TextIO


def say(message: str) -> None:
    """Write a message for the user on standard error, as one line."""
    write_line(f"cutdiff: {' '.join(message.split())}", sys.stderr)


def write_line(line: str, file: TextIO) -> None:
    """Write a line and its end by one call; `print` makes two."""
    file.write(f"{line}\n")
    file.flush()
