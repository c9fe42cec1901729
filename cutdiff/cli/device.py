"""The device that a command line names."""

from __future__ import annotations

import torch

from cutdiff.cli.arguments import BadArgument
from cutdiff.parallel.process import num_processes, own_gpu


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
