"""The processes of a run: how they meet, which of them draw a picture together, and which picture.

`--data-parallel D` makes D groups of them. Each group takes the next picture that no other group has taken, and its
ranks share the work. A process that torchrun did not start is alone, and nothing here does anything.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from cutdiff.parallel import stopping
from cutdiff.parallel.process import Ended, RankLost, num_processes, process
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.parallel.watch import GONE, Watch

POLL = 0.5
"""The seconds between two looks at other groups."""


@dataclass(frozen=True)
class Launch:
    """All processes of the run, as one of them sees it."""

    world: Ranks
    group: Ranks
    """The ranks that draw pictures together with this one."""
    num_groups: int = 1
    store: Any = None
    """A store of torch.distributed that all processes reach; None for a process that is alone."""

    def at(self, where: str) -> None:
        """Report the step at which this process is, for a message about it should it hang."""
        if self.world.watch is not None:
            self.world.watch.at(where)

    def others(self, what: object) -> list[int]:
        """The processes that called this with something else, compared by its `repr`."""
        digest = hashlib.sha256(repr(what).encode()).digest()
        return [rank for rank, value in enumerate(self.world.values(digest)) if value != digest]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Go on in all processes or in none: if the block fails in some, the first of these raises its error, and
        all others raise Ended."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, value in enumerate(self.world.values(error is not None)) if value]
        if error is not None and failed[0] == self.world.rank:
            raise error
        if failed:
            raise Ended

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, True if it is set in any process."""
        return [any(values) for values in zip(*self.world.values(flags), strict=True)]

    def turns(self, num: int) -> Iterator[int]:
        """The indices of the pictures, of `num`, that this group draws: the next one that no group has taken."""
        if self.num_groups == 1:
            yield from range(num)
            return
        while True:
            turn = self.group.values(self._add("turn", 1) - 1 if self.group.leads else -1)[0]
            if turn >= num:
                return
            yield turn

    def drawn(self, more: int = 0) -> int:
        """The number of pictures that all groups have drawn, after adding `more`; 0 where there is one group."""
        return self._add("drawn", more) if self.num_groups > 1 else 0

    def failed(self, line: int) -> None:
        """Report a line that this group could not draw."""
        if self.num_groups > 1:
            self.store.set(f"failed {self._add('failed', 1)}", str(line))

    def failures(self) -> set[int]:
        """The lines that groups have reported as failed; none if a single group draws all."""
        if self.num_groups == 1:
            return set()
        return {int(self.store.get(f"failed {number + 1}")) for number in range(self._add("failed", 0))}

    def wait_for(self, num: int) -> Iterator[None]:
        """Yield now and again until all groups have drawn `num` pictures.

        It raises RankLost if a process of another group hangs, and Ended if all have left without their pictures.
        """
        watch, others = self.world.watch, range(self.group.size, self.world.size)
        while watch is not None and self.num_groups > 1 and self.drawn() < num:
            yield
            time.sleep(POLL)
            if not watch.running(others) and self.drawn() < num:
                raise Ended

    def _add(self, key: str, more: int) -> int:
        """Add to a number that all processes share, and return the sum."""
        try:
            return self.store.add(key, more)
        except RuntimeError:
            raise RankLost(GONE) from None


@contextmanager
def joined(device: str | None, num_groups: int, rank_timeout: float) -> Iterator[Launch]:
    """Meet the other processes, each on a `device` of its own; `num_groups` divides their number.

    A rank that does nothing for `rank_timeout` seconds while others wait for it ends the run.
    """
    if num_processes() == 1:
        yield Launch(ALONE, ALONE)
        return
    size, rank, per_group = num_processes(), process(), num_processes() // num_groups
    with stopping.answered():
        store, group = _meet(device, per_group, 2 * rank_timeout)
        own = store.clone()  # a connection for the watch alone, which never waits for this one
        first = rank - rank % per_group
        with Watch(PrefixStore("cutdiff watch", own), rank, range(first, first + per_group), rank_timeout) as watch:
            ranks = Ranks(rank - first, per_group, group, watch)
            yield Launch(Ranks(rank, size, watch=watch), ranks, num_groups, PrefixStore("cutdiff", store))
    dist.destroy_process_group()


def _meet(device: str | None, per_group: int, seconds: float) -> tuple[Any, Any]:
    """The store that all processes reach, and the group of this one; RankLost if some do not come in time.

    The same `seconds` are torch's own limit for everything that follows: the watch, which says more, comes before it.
    """
    timeout = timedelta(seconds=seconds)
    backend = "gloo" if device == "cpu" or not torch.cuda.is_available() else "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        group, _ = dist.new_subgroups(per_group, timeout=timeout)
    except RuntimeError:
        waited = f"{seconds:g} s (twice --rank-timeout)"
        raise RankLost(f"not all of {num_processes()} processes met within {waited}: start all of them") from None
    return store, group
