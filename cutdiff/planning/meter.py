"""The FLOPs of a computation and the bytes of the tensors that live at once, counted while it runs.

On the meta device, where tensors have sizes but no values, nothing is computed and the counts are the same. The
workspace that kernels allocate for themselves is not counted.
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


class Usage(NamedTuple):
    """The resources that a computation needs."""

    flops: int
    peak_bytes: int
    """The most bytes that live at once, without those that lived before."""


class Meter(TorchDispatchMode):
    """A mode that counts what is computed inside it.

    A multiply-add counts as 2 FLOPs, as in torch's FlopCounterMode; unlike there, attention is counted on every device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live_bytes = 0
        """The bytes of the tensors that were made inside the mode and still live."""
        self.peak_bytes = 0
        """The largest value that `live_bytes` has had."""
        self._storages: set[int] = set()
        self._modes = ExitStack()

    def __enter__(self) -> Meter:
        self._modes.enter_context(_FusedAttention(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.close()

    def aside(self, run: Callable[[], object]) -> Usage:
        """Call `run` and return its usage, which is not added to the counts, except for the tensors it leaves alive."""
        flops, peak, live = self.flops, self.peak_bytes, self.live_bytes
        self.peak_bytes = live
        run()
        usage = Usage(self.flops - flops, self.peak_bytes - live)
        self.flops, self.peak_bytes = flops, peak
        return usage

    def add(self, usage: Usage) -> None:
        """Count a computation of this usage as if it had just run."""
        self.flops += usage.flops
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + usage.peak_bytes)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            # torch's formulas know of no dtype, which a product may have as its last argument.
            shaped = (value for value in args if not isinstance(value, torch.dtype))
            self.flops += formula(*shaped, **kwargs, out_val=out)
        inputs = {storage._cdata for storage in _storages((args, kwargs))}  # a view of a weight is not made inside
        for storage in _storages(out):
            if storage._cdata not in inputs:
                self._follow(storage)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
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
    """A mode that counts attention as fused kernels compute it, which never have all scores in memory.

    Without it, torch would compute attention on the meta device by the formula, with all scores; and on a CPU its
    counter does not know the kernel.
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
