"""What a computation takes, counted while it runs: FLOPs, and the bytes of all tensors that live at once.

On the meta device, where tensors have sizes only, nothing is computed and the counts are the same. Not counted is what
kernels hold for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class Taken(NamedTuple):
    flops: int
    peak_bytes: int
    """Beyond what lived before."""


class Meter(TorchDispatchMode):
    """Counts from where it is entered; 2 FLOPs a multiply-add, as in torch's FlopCounterMode, but attention always."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live_bytes = 0
        """Of the tensors that were made inside and still live."""
        self.peak_bytes = 0
        """The most that they were."""
        self._storages: set[int] = set()
        self._modes = ExitStack()

    def __enter__(self) -> Meter:
        self._modes.enter_context(_FusedAttention(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.close()

    def aside(self, run: Callable[[], object]) -> Taken:
        """What `run` takes, which then does not count, but for what it leaves alive."""
        flops, peak, live = self.flops, self.peak_bytes, self.live_bytes
        self.peak_bytes = live
        run()
        taken = Taken(self.flops - flops, self.peak_bytes - live)
        self.flops, self.peak_bytes = flops, peak
        return taken

    def add(self, taken: Taken) -> None:
        """Count as if that had run now."""
        self.flops += taken.flops
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + taken.peak_bytes)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view of a weight is not made inside
        for storage in _storages(out):
            if storage._cdata not in given:
                self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _release(self, storage: int, num_bytes: int) -> None:
        self._storages.remove(storage)
        self.live_bytes -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _FusedAttention(TorchFunctionMode):
    """Counts attention as the fused kernels take it, whose scores are never in memory, and computes it as it is.

    On the meta device torch takes the formula for it, with all scores; on a CPU its counter does not know the kernel.
    """

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = args[:3]
        flops = self.meter.flops + sdpa_flop_count(query.shape, key.shape, value.shape)
        out = torch.empty_like(query) if query.is_meta else function(*args, **kwargs)
        self.meter.flops = flops  # also where the kernel was counted by its own formula
        return out
