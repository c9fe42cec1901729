"""A thread beside each of several processes that ends the run where one of them hangs, or a signal finds it waiting.

A rank that waits for others is inside of torch, where neither Python's signal handlers nor its exceptions come through.
So this thread tells the others, through the store that they all reach, how far its process is; where it has not moved
for `limit` seconds, the thread looks who is behind, and ends the process. Nothing is lost: pictures are written whole
or not at all, and a second start draws what is missing.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 5.0
"""Seconds that a process has to end by itself after a signal, or where another has ended the run."""


class Watch:
    """Watches over the process of one `rank` of `size`, until it is left; enter it in the main thread."""

    def __init__(self, store: Any, rank: int, size: int, limit: float) -> None:
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.moves = 0
        self.where = "before the first step"
        self.since = time.monotonic()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="cutdiff.watch", daemon=True)

    def __enter__(self) -> Watch:
        self.signals, sent = socket.socketpair()
        for end in (self.signals, sent):
            end.setblocking(False)
        self.sent = sent
        signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self.left.set()
        self.sent.send(b"\0")  # wakes the thread
        self.thread.join()
        for end in (self.signals, self.sent):
            end.close()

    def moved(self, where: str | None = None) -> None:
        """The process has come a step further, all ranks in the same steps; `where` says what it does now."""
        self.moves += 1
        self.since = time.monotonic()
        if where is not None:
            self.where = where
            self._tell()

    def _watch(self) -> None:
        while not self.left.is_set() and self._tell():
            if select.select([self.signals], [], [], min(PERIOD, self.limit / 4))[0]:
                self._end_by(set(self.signals.recv(64)))
            if time.monotonic() - self.since > self.limit:
                self._end_the_run()

    def _tell(self) -> bool:
        """Whether the store has heard: it may be the first rank's, and gone with it, as this one will find."""
        try:
            self.store.set(str(self.rank), f"{self.moves} {self.where}")
        except RuntimeError:
            return False
        return True

    def _end_by(self, signals: set[int]) -> None:
        """After the grace, end a process that a signal did not reach."""
        if signals & {signal.SIGINT, signal.SIGTERM} and not self.left.wait(GRACE):
            os._exit(128 + signal.SIGTERM if signal.SIGTERM in signals else 1)

    def _end_the_run(self) -> None:
        """Where some are behind, the first of those that wait for them says so, and all end."""
        told = [self._told(rank) for rank in range(self.size)]
        behind = [rank for rank, (moves, _) in enumerate(told) if moves == min(told)[0]]
        ahead = [rank for rank in range(self.size) if rank not in behind]
        if not ahead:
            return
        if self.rank == ahead[0]:
            names = ", ".join(f"rank {rank} hangs {told[rank][1]}" for rank in behind)
            told_why = f"nothing for {self.limit:g} s (--rank-timeout); start again to draw what is missing"
            print(f"cutdiff: {names}: {told_why}", file=sys.stderr, flush=True)
        elif self.left.wait(GRACE):
            return
        os._exit(1)

    def _told(self, rank: int) -> tuple[int, str]:
        """How often a rank has moved, and where it is."""
        if not self.store.check([str(rank)]):
            return -1, "at its start"
        moves, _, where = self.store.get(str(rank)).decode().partition(" ")
        return int(moves), where
