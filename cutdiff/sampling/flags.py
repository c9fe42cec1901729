"""Notices estimates of x0 that are not finite while a GPU runs on: nothing is asked of it that the host waits for.

The kernels that write a canvas see every value in a register, and set a flag in memory that the host reads without a
copy. What no kernel has seen is reduced to a flag on the device. The host looks at the flag of a step when it has
launched the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Flags:
    """The flags of a run, one for each step; the error of a step on a GPU is raised one step late."""

    def __init__(self) -> None:
        self.flag: Tensor | None = None
        """What a kernel sets in the step under way: one int32, in memory that host and device share; None: nothing."""
        self._written: tuple[Tensor, int] | None = None
        self._pending: tuple[Tensor, torch.cuda.Event, Callable[[], Exception]] | None = None

    def begin(self, device: torch.device) -> None:
        """Begin a step on a canvas of this device."""
        self.flag = None if device.type == "meta" else _new_flag(device)
        self._written = None

    def written(self, estimate: Tensor) -> None:
        """Take note that a kernel wrote the estimate, and the flag where it had to."""
        if not estimate.is_inference():  # such tensors count no changes
            self._written = estimate, estimate._version

    def check(self, estimate: Tensor, error: Callable[[], Exception]) -> None:
        """Raise `error()` where the estimate of this step is not finite, or on a GPU that of the step before."""
        flag, self.flag = self.flag, None
        if flag is None:  # sizes without values
            return
        if not self._covers(estimate):
            flag.copy_((~estimate.isfinite().all()).int(), non_blocking=True)
        if not _is_gpu(estimate.device):
            if flag.item():
                raise error()
            return
        before, event = self._pending, torch.cuda.Event()
        event.record(torch.cuda.current_stream(estimate.device))
        self._pending = flag, event, error
        _raise(before)

    def end(self) -> None:
        """Raise the error of the last step, once a GPU is done with it."""
        before, self._pending = self._pending, None
        _raise(before)

    def _covers(self, estimate: Tensor) -> bool:
        """True where the estimate is what a kernel wrote, or a view of it, and nobody has changed it."""
        if self._written is None or estimate.is_inference():
            return False
        written, version = self._written
        return version == estimate._version and written.untyped_storage()._cdata == estimate.untyped_storage()._cdata


def _raise(pending: tuple[Tensor, torch.cuda.Event, Callable[[], Exception]] | None) -> None:
    """Raise the error of a step whose flag is set, once the device is done with that step."""
    if pending is None:
        return
    flag, event, error = pending
    event.synchronize()  # the device has the next step to do meanwhile
    if flag.item():
        raise error()


def _new_flag(device: torch.device) -> Tensor:
    """A flag that is not set, where this host and the device both reach it."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=_is_gpu(device))


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
