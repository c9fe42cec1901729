"""SIGINT and SIGTERM drop the picture that is being drawn and end the run."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from cutdiff.parallel.lines import say
from cutdiff.parallel.process import process

ENDS = {signal.SIGTERM: (128 + signal.SIGTERM, "terminated"), signal.SIGINT: (1, "interrupted")}
"""The exit status and the message for each signal."""
GRACE = 5.0
"""The seconds that a process has to end by itself when a signal or another process has ended the run."""


class Terminated(BaseException):
    """SIGTERM has arrived; like KeyboardInterrupt, this drops the picture that is being drawn."""


_raised: list[BaseException] = []


def install() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM raise Terminated."""
    for number in ENDS:
        signal.signal(number, _stop)


def check() -> None:
    """Raise again what a signal raised: Python drops an exception that a handler raises inside a finaliser."""
    if _raised:
        raise _raised[-1]


def _stop(number: int, _: object) -> NoReturn:
    _raised.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
    raise _raised[-1]


@contextmanager
def answered() -> Iterator[None]:
    """End the process `GRACE` seconds after a signal if the block has not ended by then.

    While torch waits for other processes, no handler runs, and torch can't be made to give up: the destructor of a
    gloo group waits for pending operations. So a thread reads the signals too, and ends the process at once.
    """
    received, sent = socket.socketpair()
    sent.setblocking(False)
    left = threading.Event()
    before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(received, left), name="cutdiff signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        sent.close()  # the thread reads an end, and ends


def _answer(received: socket.socket, left: threading.Event) -> None:
    with received:
        while numbers := received.recv(64):
            ends = [end for number, end in ENDS.items() if number in numbers]
            if ends and not left.wait(GRACE):
                status, message = ends[0]
                try:
                    if process() == 0:
                        say(message)
                finally:
                    os._exit(status)
