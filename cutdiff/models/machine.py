"""The machine's strengths: number formats that it multiplies in hardware, and memory that is used again."""

from __future__ import annotations

import torch

LARGEST_MAPPING = (32 << 20) - (64 << 10)
"""The bytes of the largest tensor whose release raises glibc's thresholds: 32 MB with its head and its page."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    return torch.bfloat16 if multiplies(device, torch.bfloat16) else torch.float32


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the device multiplies float32, bfloat16 or float16 in hardware; a CPU without emulates 16 bits.

    A CPU needs AVX512-BF16 or AMX for bfloat16 (AVX512 alone emulates it, too), and AVX512-FP16 for float16.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MB that were freed, so that a network's feature maps lie where those before them lay.

    Otherwise glibc gives them back to the system, and the next ones are faulted in anew, page by page. It raises its
    thresholds by itself where a mapping of at most 32 MB is freed: so one is made, never touched, and freed. Where the
    user has set a threshold (MALLOC_TRIM_THRESHOLD_), or malloc is not glibc's, nothing changes.
    """
    torch.empty(LARGEST_MAPPING, dtype=torch.uint8, device="cpu")
