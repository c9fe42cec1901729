"""The parts that launches share: checks of a device and of outputs, and a flag of values that are not finite."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROUNDING = {"enable_fp_fusion": False}
"""Launch options that round products and sums one by one, as torch does, for the same bits everywhere."""
FUSION = {"enable_fp_fusion": True}
"""Launch options of kernels that multiply matrices or whose results are bounded, not equal to the bit."""


@triton.jit
def store_flag(flag, values):
    """Store 1 to `flag`, an int32, where any of a tile's values is NaN or infinite, else nothing.

    Values of the tile that are not written must be finite, as those that are computed from zeros are. The flag may lie
    in pinned memory, which the host reads without a copy. All threads that store, store the same.
    """
    finite = tl.abs(values) < float("inf")  # false for NaN
    tl.store(flag + tl.zeros(values.shape, tl.int32), 1, mask=~finite)


def runs_on(device: torch.device) -> bool:
    """Tell if kernels can run: they do on a GPU, and under Triton's interpreter anywhere."""
    return device.type == "cuda" or knobs.runtime.interpret


def architecture() -> GPUTarget | None:
    """Return what kernels are compiled for on the current device, or None under the interpreter."""
    return None if knobs.runtime.interpret else driver.active.get_current_target()


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, or for a CPU, where kernels are interpreted, four."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check_device(device: torch.device) -> None:
    """Raise ValueError where no kernel can run."""
    if not runs_on(device):
        raise ValueError(
            f"backend='triton' does not run on {device.type}: take 'auto' or 'reference', or set TRITON_INTERPRET=1"
        )


def output(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: Tensor, *parameters: Tensor
) -> Tensor:
    """Return `out` if it fits, else a new contiguous tensor on the device of `source`.

    ValueError where no kernel can run, where `source` is float64, or where it or `parameters` need a gradient.
    """
    device = source.device
    check_device(device)
    if source.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32: for float64 take backend 'reference'")
    if torch.is_grad_enabled() and any(read.requires_grad for read in (source, *parameters)):
        raise ValueError("the Triton kernels have no backward pass: for gradients take backend 'reference'")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} of {out.dtype} on {out.device}, "
            f"needed is a contiguous {shape} of {dtype} on {device}"
        )
    return out
