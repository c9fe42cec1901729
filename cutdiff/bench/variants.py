"""The variants of the sampler that stand beside it in the bench, by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from cutdiff.bench.measure import Ours
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import changed
from cutdiff.models.fp8 import check_fp8, quantize_transformers
from cutdiff.models.fused import check_fused, fuse
from cutdiff.models.unet import UNet
from cutdiff.settings import Settings

FP8, EAGER, DIRECT = "fp8", "eager", "direct"
VARIANTS = {
    "flash": "attention by FlashAttention where it can",
    "fused-norm": "norms by Triton kernels",
    "fused-gate": "gates by Triton kernels",
    "fused": "both",
    "contiguous": "a U-Net that is not in channels_last",
    FP8: "linear layers in 8 bits, on a CPU by the reference",
    "graphs": "compiled and recorded as CUDA graphs",
    EAGER: "not compiled, beside --compile",
    DIRECT: "the whole canvas at once, which draws another picture",
}
FLASH_FIRST = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""The order of attention backends with FlashAttention first. On Hopper torch's own has cuDNN first, from torch 2.11
and cuDNN 9.15 on."""


def contiguous(unet: UNet) -> None:
    """Lay out the weights of convolutions position by position, in place."""
    unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  (missing from torch's stub)


CHANGES: dict[str, Callable[[UNet], None]] = {
    FP8: quantize_transformers,
    "fused": fuse,
    "fused-norm": partial(fuse, gates=False),
    "fused-gate": partial(fuse, norms=False),
    "contiguous": contiguous,
}
OPTIONS = {
    "graphs": {"compile": True, "cuda_graphs": True},
    EAGER: {"compile": False},
    DIRECT: {"method": "direct"},
}


def variant(name: str, model: Model, settings: Settings) -> Ours:
    """The sampler with one of `VARIANTS`; with a copy of the network where the variant changes it."""
    return Ours(
        changed(model, CHANGES[name]) if name in CHANGES else model,
        replace(settings, **OPTIONS.get(name, {})),
        f"cutdiff, {name}",
        FLASH_FIRST if name == "flash" else (),
    )


def check_variant(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
    """Raise ValueError where a variant is not available, or is what it stands beside."""
    if name == FP8 and device.type == "cuda":
        check_fp8(device, dtype)
    if name.startswith("fused"):
        check_fused(device)
    if name in ("graphs", "flash", "contiguous") and device.type != "cuda":
        raise ValueError(f"only a GPU has it, and the device is {device}: leave it out")
    if name == EAGER and not compiled:
        raise ValueError("the sampler is not compiled anyway: add --compile")
    if name == "flash" and compiled:
        raise ValueError("a compiler keeps the attention that it saw first: leave --compile out")
