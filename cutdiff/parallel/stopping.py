"""SIGINT and SIGTERM: the picture that is being drawn is dropped, and the run ends."""

from __future__ import annotations

import signal
from typing import NoReturn

ENDS = {signal.SIGTERM: (128 + signal.SIGTERM, "terminated"), signal.SIGINT: (1, "interrupted")}
"""Exit status, and what is said."""


class Terminated(BaseException):
    """SIGTERM, which drops the picture that is being drawn, as an interrupt does."""


_caught: list[BaseException] = []


def install() -> None:
    """Let both signals raise KeyboardInterrupt and Terminated."""
    for number in ENDS:
        signal.signal(number, _stop)


def check() -> None:
    """Raise again what a signal raised: Python drops what a handler raises inside of a finaliser."""
    if _caught:
        raise _caught[-1]


def _stop(number: int, _: object) -> NoReturn:
    _caught.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
    raise _caught[-1]
