"""Threads beside one of several processes, for when it waits for the others inside of torch, where neither Python's
signal handlers nor its exceptions come through.

One ends the process some time after a signal that its main thread could not answer. The other tells, through a store
that all reach, how far the process is; where it has waited for `limit` seconds, it looks who is behind, says so, and
ends the process. Nothing is lost: pictures are written whole or not at all, and a second start draws what is missing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cutdiff.parallel.launch import process
from cutdiff.parallel.stopping import ENDS

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 5.0
"""Seconds that a process has to end by itself after a signal, or where another has ended the run."""
DONE = "done"
"""What a process tells last."""


class Watch:
    """Watches over this process until it is left; enter it in the main thread, and `meet` when there are others."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.moves = 0
        self.where = "before the first step"
        self.waiting_since: float | None = None
        self.left = threading.Event()
        self.threads = [threading.Thread(target=self._answer_signals, name="cutdiff.signals", daemon=True)]

    def __enter__(self) -> Watch:
        self.signals, self.sent = socket.socketpair()
        self.sent.setblocking(False)
        self.before = signal.set_wakeup_fd(self.sent.fileno(), warn_on_full_buffer=False)
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.before)
        self.left.set()
        self.sent.close()  # which ends the thread's reading
        for thread in self.threads:
            thread.join(GRACE)
        self.signals.close()

    def meet(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        """From now on this is one of those `ranks`, which meet each other in the same order and tell the `store`."""
        self.store, self.rank, self.ranks = store, rank, ranks
        self.threads.append(threading.Thread(target=self._watch, name="cutdiff.parallel.watch", daemon=True))
        self.threads[-1].start()

    def at(self, where: str) -> None:
        """What the process does now."""
        self.where = where
        self.moves += 1
        self._tell()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """This process has done its part, and may have to wait for the others."""
        self.moves += 1
        self.waiting_since = time.monotonic()
        yield
        self.waiting_since = None

    def others_told(self) -> bool:
        """Whether this process has waited so long that one which waited with it said who hangs, and ended."""
        since = self.waiting_since
        return since is not None and time.monotonic() - since > self.limit / 2 and not self._speaks()

    def told(self, rank: int) -> str:
        """How often a process has moved and where it is, as it told last."""
        return self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else "-1 at its start"

    def _tell(self, last: str | None = None) -> bool:
        """Whether the store has heard: it may be the first rank's, and gone with it."""
        try:
            self.store.set(str(self.rank), last or f"{self.moves} {self.where}")
        except RuntimeError:
            return False
        return True

    def _answer_signals(self) -> None:
        while not self.left.is_set():
            caught = set(self.signals.recv(64))
            ends = [end for number, end in ENDS.items() if number in caught]
            if ends and not self.left.wait(GRACE):
                status, told = ends[0]
                if process() == 0:
                    print(f"cutdiff: {told}", file=sys.stderr, flush=True)
                os._exit(status)

    def _watch(self) -> None:
        while self._tell():
            if self.left.wait(min(PERIOD, self.limit / 4)):
                self._tell(DONE)
                return
            since = self.waiting_since
            if since is not None and time.monotonic() - since > self.limit:
                self._look_who_is_behind()
        if not self.left.wait(GRACE):  # without the store nobody could be told of
            os._exit(1)

    def _look_who_is_behind(self) -> None:
        """Where some are, one of those that wait for them says so, and these end: the first where it can.

        Behind are those that moved least: of two that wait for them, one may have moved less than the other.
        """
        told = {rank: self.told(rank) for rank in self.ranks}
        moves = {rank: _moves(line) for rank, line in told.items()}
        behind = [rank for rank in self.ranks if moves[rank] == min(moves.values())]
        if self.rank in behind or self.waiting_since is None:
            return
        first = next(rank for rank in self.ranks if rank not in behind)
        if self.rank != first and self.left.wait(GRACE):
            return
        if self._speaks():
            lost = hanging([(rank, told[rank]) for rank in behind], self.limit)
            print(f"cutdiff: {lost}", file=sys.stderr, flush=True)
        os._exit(1)

    def _speaks(self) -> bool:
        """Whether no other rank of these has said who is behind; without the store, another has ended the run."""
        try:
            return self.store.add(f"said by {self.ranks[0]}", 1) == 1
        except RuntimeError:
            return False


def hanging(told: Sequence[tuple[int, str]], limit: float) -> str:
    """What is said of ranks that others wait for, with what each told last."""
    names = ", ".join(f"rank {rank} hangs {line.partition(' ')[2]}" for rank, line in told)
    return f"{names}: nothing for {limit:g} s (--rank-timeout); start again to draw what is missing"


def _moves(told: str) -> float:
    return float("inf") if told == DONE else int(told.partition(" ")[0])
