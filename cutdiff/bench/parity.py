"""That what is timed computes the same: outputs on equal inputs, before any clock runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cutdiff.bench.measure import Contestant
from cutdiff.bench.report import FP8
from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.checkpoint.random_model import network_inputs

TOLERANCE = 1e-4
"""In float32 without TF32, where one wrong weight shows."""
TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""In the dtype of a run, with TF32 and compilers as they are there."""
FP8_TOLERANCE = 2e-1
"""Of linear layers in 8 bits, which differ by design; past it, they are wrong."""


class NotEqual(Exception):
    """Networks that should compute the same, and do not."""


def prove(model: Model, ours: Contestant, theirs: Contestant) -> dict[str, float]:
    """The relative difference of U-Net and VAE, both on the weights of `model` in float32; NotEqual past 1e-4."""
    with full_precision():
        unet = network_difference(model, ours, theirs, rows=2)
        check(unet, TOLERANCE, "unet in float32 differs from diffusers'")
        latents = network_inputs(model, 1)[0]
        vae = relative_difference(ours.decode(latents), theirs.decode(latents))
        check(vae, TOLERANCE, "vae in float32 differs from diffusers'")
    return {"unet": unet, "vae": vae}


def prove_again(model: Model, name: str, ours: Contestant, theirs: Contestant, rows: int) -> float:
    """The relative difference of the U-Nets in the dtype of the run, on a batch of `rows`; NotEqual where too large."""
    found = network_difference(model, ours, theirs, rows)
    tolerance = FP8_TOLERANCE if name == FP8 else TOLERANCES[model.dtype]
    check(found, tolerance, f"unet of {name} in {dtype_name(model.dtype)} differs from ours")
    return found


def network_difference(model: Model, ours: Contestant, theirs: Contestant, rows: int) -> float:
    inputs = network_inputs(model, rows)
    return relative_difference(ours.predict(*inputs), theirs.predict(*inputs))


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of `b`."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check(difference: float, tolerance: float, what: str) -> None:
    if not difference <= tolerance:  # NaN is no parity
        raise NotEqual(f"the {what} by {difference:.1e}, past {tolerance:.0e}: nothing was timed")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, neither in matrix products nor in convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
