"""The device that a command line names, and the dtype of the networks on it."""

from __future__ import annotations

import torch

from cutdiff.checkpoint.model import dtype_name
from cutdiff.cli.arguments import AUTO, BadArgument
from cutdiff.models.machine import fast_dtype, multiplies
from cutdiff.parallel.lines import say
from cutdiff.parallel.process import num_processes, own_gpu, process


def device_of(name: str | None) -> torch.device:
    """The device for --device `name`; without a name it is a GPU where there is one.

    Of several processes each gets a GPU of its own. BadArgument if the device is not available.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if num_processes() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise BadArgument(f"--device {device} is one for all processes: give --device cuda, and each takes its own")
        device = own_gpu()
    try:
        available = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        raise BadArgument(f"--device {device} is not available here: use --device cpu") from None
    if available.type not in ("cpu", "cuda"):
        raise BadArgument(f"--device {device} is not cpu or cuda")
    return available


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype for --dtype `name`; AUTO is bfloat16 where the device multiplies it in hardware, else float32."""
    return fast_dtype(device) if name == AUTO else getattr(torch, name)


def tell_dtype(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say, in the first process, which dtype AUTO is here, or that this CPU emulates the one that was named."""
    if process() > 0:
        return
    if name == AUTO:
        say(f"--dtype auto is {dtype_name(dtype)} on this machine")
    elif device.type == "cpu" and not multiplies(device, dtype):
        say(f"--dtype {name} is emulated by this CPU, which takes several times as long as --dtype float32")
