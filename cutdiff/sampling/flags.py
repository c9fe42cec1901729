"""Notices estimates of x0 that are not finite while a GPU runs on: nothing is asked of it that the host waits for.

The kernels that write a canvas see every value in a register, and set a flag in memory that the host reads without a
copy. What no kernel has seen is reduced to a flag on the device. The host looks at the flag of a step when it has
launched the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Written(NamedTuple):
    """An estimate as a kernel wrote it, and the flag that it set where it had to."""

    estimate: Tensor
    version: int
    flag: Tensor


class _Pending(NamedTuple):
    """A step that a GPU may not be done with."""

    flag: Tensor
    done: torch.cuda.Event
    error: Callable[[], Exception]
    flags: list[Tensor]
    """All flags that its kernels may still write to, which must not be used again before."""


class Flags:
    """The flags of a run, one for each estimate; the error of a step on a GPU is raised one step late."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        """The device of the step under way; None: there is none, or it has sizes without values."""
        self._flags: list[Tensor] = []
        self._written: _Written | None = None
        self._pending: _Pending | None = None

    def begin(self, device: torch.device) -> None:
        """Begin a step on a canvas of this device."""
        self.device = None if device.type == "meta" else device
        self._flags, self._written = [], None

    def new(self) -> Tensor | None:
        """A flag for a kernel to set: one int32, in memory that host and device share; None outside of a step."""
        if self.device is None:
            return None
        self._flags.append(_new_flag(self.device))
        return self._flags[-1]

    def written(self, estimate: Tensor, flag: Tensor) -> None:
        """Take note that a kernel wrote the estimate, and the flag where it had to."""
        if not estimate.is_inference():  # such tensors count no changes
            self._written = _Written(estimate, estimate._version, flag)

    def check(self, estimate: Tensor, error: Callable[[], Exception]) -> None:
        """Raise `error()` where the estimate of this step is not finite, or on a GPU that of the step before."""
        if self.device is None:
            return
        flag = self._flag_of(estimate)
        if flag is None:
            flag = self.new()
            assert flag is not None
            flag.copy_((~estimate.isfinite().all()).int(), non_blocking=True)
        device, self.device = self.device, None
        if not _is_gpu(device):
            if flag.item():
                raise error()
            return
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        before, self._pending = self._pending, _Pending(flag, done, error, self._flags)
        _raise(before)

    def end(self) -> None:
        """Raise the error of the last step, once a GPU is done with it."""
        before, self._pending = self._pending, None
        _raise(before)

    def abandon(self) -> None:
        """Wait until no kernel can write to a flag of a run that was left."""
        if self.device is not None and _is_gpu(self.device) and self._flags:
            torch.cuda.current_stream(self.device).synchronize()
        if self._pending is not None:
            self._pending.done.synchronize()
        self.device, self._pending = None, None

    def _flag_of(self, estimate: Tensor) -> Tensor | None:
        """The flag of the kernel that wrote the estimate, all of it, where nobody has changed it since."""
        known = self._written
        if known is None or estimate.is_inference() or known.version != estimate._version:
            return None
        same = known.estimate.untyped_storage()._cdata == estimate.untyped_storage()._cdata
        return known.flag if same and known.estimate.shape == estimate.shape else None


def _raise(pending: _Pending | None) -> None:
    """Raise the error of a step whose flag is set, once the device is done with that step."""
    if pending is not None:
        pending.done.synchronize()  # the device has the next step to do meanwhile
        if pending.flag.item():
            raise pending.error()


def _new_flag(device: torch.device) -> Tensor:
    """A flag that is not set, where this host and the device both reach it."""
    return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=_is_gpu(device))


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
