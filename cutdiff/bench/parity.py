"""The proof, before any clock runs, that all contestants compute the same outputs on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cutdiff.bench.measure import Contestant
from cutdiff.bench.variants import FP8
from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.checkpoint.random_model import network_inputs

TOLERANCE = 1e-4
"""The largest relative difference in float32 without TF32, in which one wrong weight shows."""
TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest relative difference in the dtype of a run, with its TF32 and its compilers."""
FP8_TOLERANCE = 2e-1
"""The largest relative difference of linear layers in 8 bits, which differ by design."""


class NotEqual(Exception):
    """Networks that should compute the same do not."""


def prove(model: Model, ours: Contestant, theirs: Contestant) -> dict[str, float]:
    """The relative differences of U-Net and VAE on the weights of `model` in float32; NotEqual if one is above 1e-4."""
    with full_precision():
        unet = network_difference(model, ours, theirs, rows=2)
        check(unet, TOLERANCE, "unet in float32 differs from diffusers'")
        latents = network_inputs(model, 1)[0]
        vae = relative_difference(ours.decode(latents), theirs.decode(latents))
        check(vae, TOLERANCE, "vae in float32 differs from diffusers'")
    return {"unet": unet, "vae": vae}


def prove_again(model: Model, name: str, ours: Contestant, theirs: Contestant, rows: int) -> float:
    """The relative difference of the U-Nets in the dtype of the run, on `rows` rows; NotEqual if it is too large."""
    difference = network_difference(model, ours, theirs, rows)
    tolerance = FP8_TOLERANCE if name == FP8 else TOLERANCES[model.dtype]
    check(difference, tolerance, f"unet of {name} in {dtype_name(model.dtype)} differs from ours")
    return difference


def network_difference(model: Model, ours: Contestant, theirs: Contestant, rows: int) -> float:
    """The relative difference of the U-Nets' predictions for `rows` random rows."""
    inputs = network_inputs(model, rows)
    return relative_difference(ours.predict(*inputs), theirs.predict(*inputs))


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference divided by the norm of `b`."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check(difference: float, tolerance: float, what: str) -> None:
    """Raise NotEqual, whose message begins with `what`, if the difference is too large."""
    if not difference <= tolerance:  # true of NaN, too
        raise NotEqual(f"the {what} by {difference:.1e}, past {tolerance:.0e}: nothing was timed")


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute without TF32, in matrix products and in convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
