"""The processes of a run, as torchrun starts them: which one this is, which draw a picture together, and which picture.

`--data-parallel D` makes D groups of them; each takes the next picture that no other has taken, and its ranks share the
work (`cutdiff.parallel.ranks`). A process that torchrun did not start is alone, and nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutdiff.parallel.ranks import Ranks
    from cutdiff.parallel.watch import Watch

POLL = 0.5
"""Seconds."""


class Ended(Exception):
    """The run ends, and another process says why."""


class RankLost(Exception):
    """Another process of the run ended or does not answer."""


def num_processes() -> int:
    """How many torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def own_gpu() -> str:
    """The device of this process on its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def alike() -> Iterator[None]:
    """What fails in the block fails in all processes: the first raises it, the others Ended."""
    try:
        yield
    except Exception:
        if process() > 0:
            raise Ended from None
        raise


@dataclass(frozen=True)
class Launch:
    """All processes of the run, as one of them sees it."""

    world: Ranks
    group: Ranks
    """Those that draw pictures together with this one."""
    num_groups: int = 1
    store: Any = None
    """Of torch.distributed, which all reach; None for a process that is alone."""
    watch: Watch | None = None

    def at(self, where: str) -> None:
        """Where this process is, should the others ask."""
        if self.watch is not None:
            self.watch.at(where)

    def others(self, what: object) -> list[int]:
        """The processes in which this is something else."""
        digest = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])
        return [rank for rank, value in enumerate(self.world.values(digest)) if value != digest]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All go on, or none: where the block fails in some, the first of these raises its error, the others Ended."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, value in enumerate(self.world.values(int(error is not None))) if value]
        if error is not None and failed[0] == self.world.rank:
            raise error
        if failed:
            raise Ended

    def any(self, flags: list[bool]) -> list[bool]:
        """Which flags are set in any process, of as many in each."""
        import torch

        told = torch.zeros(self.world.size, len(flags), dtype=torch.uint8)
        told[self.world.rank] = torch.tensor(flags)
        self.world.gather(told, range(self.world.size + 1))
        return told.bool().any(dim=0).tolist()

    def turns(self, num: int) -> Iterator[int]:
        """Which of `num` pictures this group draws: each in turn that no other group has taken."""
        import torch

        if self.num_groups == 1:
            yield from range(num)
            return
        while True:
            turn = torch.zeros(1, dtype=torch.int64)
            if self.group.leads:
                turn[0] = self.store.add("turn", 1) - 1
            self.group.share(turn)
            if turn >= num:
                return
            yield int(turn)

    def drawn(self, more: int = 0) -> int:
        """How many pictures all groups have drawn, `more` of which it is told now. Of a single group, none."""
        return self.store.add("drawn", more) if self.num_groups > 1 else 0

    def wait_for(self, num: int) -> Iterator[None]:
        """Until `num` pictures are drawn, now and again.

        RankLost where the processes of other groups hang, and Ended where all have left without theirs.
        """
        from cutdiff.parallel.watch import DONE, hanging

        last: dict[int, tuple[str, float]] = {}
        while self.watch is not None and self.num_groups > 1 and self.drawn() < num:
            yield
            time.sleep(POLL)
            for rank in range(self.group.size, self.world.size):
                told = self.watch.told(rank)
                if told != last.get(rank, ("",))[0]:
                    last[rank] = told, time.monotonic()
            waited = {rank: time.monotonic() - since for rank, (told, since) in last.items() if told != DONE}
            silent = [(rank, last[rank][0]) for rank, seconds in waited.items() if seconds > self.watch.limit]
            if silent:
                raise RankLost(hanging(silent, self.watch.limit))
            if not waited and self.drawn() < num:
                raise Ended


@contextmanager
def joined(device: str | None, num_groups: int, rank_timeout: float) -> Iterator[Launch]:
    """Meet the other processes, which are on a `device` each; `num_groups` divides their number.

    A rank that does nothing for `rank_timeout` seconds while others wait for it ends the run.
    """
    from cutdiff.parallel.ranks import ALONE

    if num_processes() == 1:
        yield Launch(ALONE, ALONE)
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    from cutdiff.parallel.ranks import Ranks
    from cutdiff.parallel.watch import Watch

    with Watch(rank_timeout) as watch:
        cpu = device == "cpu" or not torch.cuda.is_available()
        per_group = num_processes() // num_groups
        members = [range(first, first + per_group) for first in range(0, num_processes(), per_group)]
        timeout = timedelta(seconds=2 * rank_timeout)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            groups = [dist.new_group(ranks, timeout=timeout) for ranks in members]
        except RuntimeError:
            waited = f"{2 * rank_timeout:g} s (twice --rank-timeout)"
            raise RankLost(f"not all of {num_processes()} processes met within {waited}: start all of them") from None
        index = rank // per_group
        own: Any = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  a connection for its thread
        watch.meet(PrefixStore("cutdiff watch", own), rank, members[index])
        world = Ranks(rank, size, watch=watch)
        group = Ranks(rank % per_group, per_group, groups[index], watch)
        yield Launch(world, group, num_groups, PrefixStore("cutdiff", store), watch)
    dist.destroy_process_group()
