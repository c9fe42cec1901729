"""The examples that tests of kernels draw, and the layouts of tensors in memory."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
few = settings(
    max_examples=12 if torch.cuda.is_available() else 40,  # on a GPU every new combination of constants is compiled
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values (A, B, C, D) with other strides."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([values, values], dim=-1)[..., 1]
    return values


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
