"""Ends this process when it waits for another one that hangs, and says which one and at which step.

torch's own timeouts end the waiting processes too, but no message of theirs has the step. Nothing is lost: pictures are
written whole or not at all, and a second start draws what is missing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from cutdiff.parallel.lines import say
from cutdiff.parallel.process import Ended, RankLost
from cutdiff.parallel.stopping import GRACE

PERIOD = 1.0
"""The seconds between two reports."""
GONE = "another process of the run is gone, or does not answer"


class Report(NamedTuple):
    """The progress of a process."""

    moves: float
    """The number of steps and meetings so far. Ranks of a group count the same ones; infinity when the run is over."""
    where: str


DONE = Report(float("inf"), "done")


class Watch:
    """A thread that reports the progress of this process to a store, and looks at the others' when it waits too long.

    It is a thread because torch's waiting lets neither signal handlers nor exceptions of Python through.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int], limit: float) -> None:
        """Watch over `rank` of the `ranks` that meet each other in the same order, waiting at most `limit` seconds.

        `store` is a store of torch.distributed that all processes of the run reach, not only these ranks.
        """
        self.store, self.rank, self.ranks, self.limit = store, rank, ranks, limit
        self.progress = Report(0, "before the first step")
        self.waiting_since: float | None = None
        self.changed: dict[int, tuple[Report, float]] = {}
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="cutdiff watch", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.thread.join(GRACE)

    def at(self, where: str) -> None:
        """Report the step at which this process is."""
        self.progress = Report(self.progress.moves + 1, where)
        with suppress(RuntimeError):  # without the store the thread ends this process
            self._send(self.progress)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Wait for other ranks in the block. If one is gone, it raises RankLost, or Ended if another rank says why."""
        self.progress = self.progress._replace(moves=self.progress.moves + 1)
        self.waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError:  # torch's, for a connection that is lost and for its own timeout
            long = time.monotonic() - self.waiting_since > self.limit / 2
            if long and not self._speaks():
                raise Ended from None
            raise RankLost(GONE) from None
        self.waiting_since = None

    def running(self, ranks: Sequence[int]) -> list[int]:
        """Those of the `ranks` that have not finished. It raises RankLost if reports of one stay the same too long.

        That is `limit` seconds from the first call that saw the report.
        """
        now = time.monotonic()
        for rank in ranks:
            report = self._report(rank)
            if rank not in self.changed or report != self.changed[rank][0]:
                self.changed[rank] = report, now
        running = {rank: self.changed[rank] for rank in ranks if self.changed[rank][0] != DONE}
        silent = {rank: report for rank, (report, since) in running.items() if now - since > self.limit}
        if silent:
            raise RankLost(self._hanging(silent))
        return list(running)

    def _send(self, report: Report) -> None:
        """Report to the store; RuntimeError if it is gone, together with the process that keeps it."""
        self.store.set(str(self.rank), f"{report.moves} {report.where}")

    def _report(self, rank: int) -> Report:
        """The last report of a rank."""
        if not self.store.check([str(rank)]):
            return Report(-1, "at its start")
        moves, where = self.store.get(str(rank)).decode().split(" ", 1)
        return Report(float(moves), where)

    def _watch(self) -> None:
        try:
            while not self.left.wait(min(PERIOD, self.limit / 4)):
                self._send(self.progress)
                since = self.waiting_since
                if since is not None and time.monotonic() - since > self.limit:
                    self._end_if_others_are_behind()
            self._send(DONE)
        except RuntimeError:  # the store is gone, and with it what one process could know of another
            if not self.left.wait(GRACE):
                os._exit(1)

    def _end_if_others_are_behind(self) -> None:
        """End this process if it waits for ranks that hang. The first that can name them does; the others are silent.

        Those with the fewest moves are behind: of two ranks that wait for them, one may have moved less than the other.
        """
        reports = {rank: self._report(rank) for rank in self.ranks}
        fewest = min(report.moves for report in reports.values())
        behind = {rank: report for rank, report in reports.items() if report.moves == fewest}
        if self.rank in behind or self.waiting_since is None:
            return
        first = next(rank for rank in self.ranks if rank not in behind)
        if self.rank != first and self.left.wait(GRACE):
            return
        if self._speaks():
            say(self._hanging(behind))
        os._exit(1)

    def _speaks(self) -> bool:
        """True for the first of the ranks that asks. Without a store another process has ended the run and said so."""
        try:
            return self.store.add(f"said by {self.ranks[0]}", 1) == 1
        except RuntimeError:
            return False

    def _hanging(self, reports: dict[int, Report]) -> str:
        names = ", ".join(f"rank {rank} hangs {report.where}" for rank, report in reports.items())
        return f"{names}: nothing for {self.limit:g} s (--rank-timeout); start again to draw what is missing"
