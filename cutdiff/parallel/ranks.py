"""Processes that share the work of a picture, each on a device of its own.

Every rank has the networks, the canvas, the draws and the solver, and takes every step. Large work is divided: a rank
computes its part, and sends it to all others. So nothing is summed across ranks, and their number changes a result only
through the size of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cutdiff.parallel.watch import Watch

T = TypeVar("T")


@dataclass(eq=False)
class Ranks:
    """The ranks of a group, as one of them sees it. All call every method but `starts`, in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of torch.distributed; None means all processes."""
    watch: Watch | None = None
    """The watch over this process; every rank that is not alone has one."""
    received_bytes: int = field(default=0, init=False)
    """The bytes of tensors that other ranks sent to this one."""

    @property
    def leads(self) -> bool:
        """True for the rank that writes what all have."""
        return self.rank == 0

    def starts(self, num: int) -> list[int]:
        """The first unit of each rank's part in `num` units, and the end of the last; later parts may be larger."""
        return [rank * num // self.size for rank in range(self.size + 1)]

    def gather(self, whole: Tensor, starts: Sequence[int], dim: int = 0) -> None:
        """Fill in the parts of other ranks: along `dim` of `whole`, rank r has starts[r] to starts[r + 1].

        Each part is a broadcast, because gloo's `all_gather` takes parts of one size only.
        """
        if self.size == 1:
            return
        assert self.watch is not None
        parts = [whole.narrow(dim, start, end - start) for start, end in pairwise(starts)]
        buffers = [part.contiguous() for part in parts]
        _finish(whole)  # a rank whose device hangs over its own part does not wait for others
        with self.watch.meeting():
            works = [
                dist.broadcast(buffer, group=self.group, group_src=rank, async_op=True)
                for rank, buffer in enumerate(buffers)
                if buffer.numel()
            ]
            for work in works:
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]  None is for ranks outside of the group
            _finish(whole)
        for rank, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
            if rank != self.rank:
                self.received_bytes += buffer.nbytes
                if buffer.data_ptr() != part.data_ptr():
                    part.copy_(buffer)

    def share(self, tensor: Tensor) -> None:
        """Give all ranks the first rank's values of `tensor`, which has the same shape everywhere."""
        self.gather(tensor, [0, *[len(tensor)] * self.size])

    def values(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They are pickled: use `gather` for tensors."""
        if self.size == 1:
            return [value]
        assert self.watch is not None
        values: list[Any] = [None] * self.size
        with self.watch.meeting():
            dist.all_gather_object(values, value, group=self.group)
        return values


def _finish(tensor: Tensor) -> None:
    """Wait until the tensor's device has done its work: a GPU's collectives return at once."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


ALONE = Ranks()
