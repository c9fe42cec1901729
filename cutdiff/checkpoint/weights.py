"""Reading the weights of networks, after what tools did to their names and their bytes is undone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.read import read_tensors_and_metadata

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
"""The types of 8 bits that weights are read in: each number stands for itself, or times a scale beside the weight."""
SCALES, INPUT_SCALES = ("scale_weight", "weight_scale"), ("scale_input", "input_scale")
"""The names of the scale of a weight, and of its layer's input, which only counts where that is in 8 bits too."""
QUANTIZED = re.compile(r"(^|\.)(SCB|absmax|quant_map|nested_absmax|nested_quant_map|qweight|qzeros|weight_scale_2)$")
"""The ends of the keys beside weights of other formats: bitsandbytes, GPTQ and AWQ, and NVFP4."""
WRAPPER = re.compile(r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""The parts that torch.compile, parallel training and checkpointing add to the names of a network's weights."""
DOUBLED = re.compile(
    r"(?:^|(?<=\.))((?:model\.diffusion_model|diffusion_model|first_stage_model|cond_stage_model|conditioner|"
    r"text_model|unet|vae)\.)\1+|^(model\.)\2+"
)
"""A prefix that a tool wrote once too often."""


def read_weights(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in a safetensors file under plain names, and its metadata.

    Tensors stay memory-mapped, but weights with scales become numbers of `dtype`. Raises ValueError, in one line that
    names the file, where it is no complete safetensors file, or in a format of weights that is not read.
    """
    tensors, metadata = read_tensors_and_metadata(path)
    try:
        return _without_scales(_plainly_named(tensors), dtype), metadata
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _plainly_named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = DOUBLED.sub(lambda match: match[1] or match[2], WRAPPER.sub("", key))
        if name in names:
            raise ValueError(f"{names[name]} and {key} are two names of one weight: remove one of them")
        plain[name], names[name] = tensor, key
    return plain


def _without_scales(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with each scale multiplied into its weight."""
    if other := next((key for key in tensors if QUANTIZED.search(key)), None):
        raise ValueError(f"its weights are quantized, in a format that is not read (by {other}): take its fp16 file")
    rest, scales = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        if name in SCALES:
            scales[f"{module}.weight"] = tensor
        elif name == "comfy_quant":
            _check_format(key, tensor)
        elif name not in (*INPUT_SCALES, "scaled_fp8"):
            rest[key] = tensor
    for key, scale in scales.items():
        weight = rest.get(key)
        if weight is None or weight.dtype not in FP8:
            kind = "is missing" if weight is None else f"is {weight.dtype}"
            raise ValueError(f"its weights are quantized in a way that is not read: {key} {kind} beside its scale")
        if scale.numel() not in (1, *weight.shape[:1]) or not scale.is_floating_point():
            raise ValueError(
                f"the scale of {key} has the shape {tuple(scale.shape)}: only one number, or one for a row"
            )
        rows = scale.float().reshape(-1, *(1 for _ in weight.shape[1:]))
        rest[key] = (weight.float() * rows).to(dtype)
    return rest


def _check_format(key: str, tensor: Tensor) -> None:
    """Raise ValueError unless a description beside a weight, JSON in bytes, says that it is in 8-bit floats."""
    try:
        described = json.loads(bytes(tensor.flatten().tolist()[:1000])) if tensor.dtype == torch.uint8 else None
    except (ValueError, RecursionError):
        described = None
    form = described.get("format") if isinstance(described, dict) else described
    if not str(form).startswith("float8_"):
        raise ValueError(f"its weights are quantized, in a format that is not read ({key} is {quoted(form)})")
