"""Processes that share the work of a picture, each on a device of its own, as torchrun starts them.

Every rank has the networks, the canvas, the draws and the solver, and takes every step. What is large is divided: a
rank computes its part and all get all parts, each sent by the rank that has it. So nothing is summed across ranks, and
no result depends on their number but through the size of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from cutdiff.models.text import TextStates
from cutdiff.parallel.launch import Ended, RankLost

if TYPE_CHECKING:
    from cutdiff.models.text import TextEncoders
    from cutdiff.parallel.watch import Watch


@dataclass(eq=False)
class Ranks:
    """The ranks of a group, as one of them sees it; every method but `starts` is called by all in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Of torch.distributed; None: all of its ranks."""
    watch: Watch | None = None
    """What ends this process where others keep it waiting."""
    received_bytes: int = field(default=0, init=False)
    """What the others sent to this one."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what all have."""
        return self.rank == 0

    def starts(self, num: int) -> list[int]:
        """Where the part of each rank begins in `num` units, and where the last part ends; later ones may be larger."""
        return [rank * num // self.size for rank in range(self.size + 1)]

    def gather(self, whole: Tensor, starts: Sequence[int], dim: int = 0) -> None:
        """Fill in what other ranks have: of `whole`, along `dim`, rank r has those from starts[r] to starts[r + 1]."""
        if self.size == 1:
            return
        parts = [whole.narrow(dim, start, end - start) for start, end in pairwise(starts)]
        sent = [(part, part.contiguous()) for part in parts]
        _finish(whole)  # its part is done when the others are told so, and they have theirs afterwards
        try:
            with nullcontext() if self.watch is None else self.watch.meeting():
                works = [
                    dist.broadcast(buffer, group=self.group, group_src=rank, async_op=True)
                    for rank, (_, buffer) in enumerate(sent)
                    if buffer.numel()
                ]
                for work in works:
                    work.wait()  # pyright: ignore[reportOptionalMemberAccess]  None is for ranks outside of the group
                _finish(whole)
        except RuntimeError:
            if self.watch is not None and self.watch.others_told():
                raise Ended from None
            raise RankLost("another process of the run is gone, or does not answer") from None
        for rank, (part, buffer) in enumerate(sent):
            if rank != self.rank:
                self.received_bytes += buffer.nbytes
                if buffer.data_ptr() != part.data_ptr():
                    part.copy_(buffer)

    def share(self, tensor: Tensor) -> None:
        """Give all ranks what the first has; in the others, `tensor` has its shape only."""
        self.gather(tensor, [0, *[len(tensor)] * self.size])

    def values(self, value: int) -> list[int]:
        """What each rank has."""
        values = torch.zeros(self.size, dtype=torch.int64)
        values[self.rank] = value
        self.gather(values, range(self.size + 1))
        return values.tolist()


def _finish(tensor: Tensor) -> None:
    """Wait until the device has done what it was given: a GPU's collectives return at once."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


ALONE = Ranks()


@dataclass(frozen=True)
class SharedText:
    """In the place of a model's `TextEncoders`: the first rank encodes, and all have the states."""

    text: TextEncoders
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype

    def length(self, prompt: str) -> int:
        return self.text.length(prompt)

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return self.text.words(prompt)

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        """The arguments are those of `TextEncoders.encode`."""
        shape = torch.zeros(3, dtype=torch.int64)
        states = None
        if self.ranks.leads:
            states = self.text.encode(prompts, *args, **options)
            shape = torch.tensor([*states.context.shape[1:], states.pooled.shape[1]])
        self.ranks.share(shape)
        length, context_dim, pooled_dim = shape.tolist()
        if states is None:
            context = torch.empty(len(prompts), length, context_dim, dtype=self.dtype, device=self.device)
            states = TextStates(context, context.new_empty(len(prompts), pooled_dim))
        for tensor in (states.context, states.pooled):
            self.ranks.share(tensor)
        return states
