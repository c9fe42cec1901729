"""Linear layers in 8-bit floats (E4M3) with a scale for each row: once for each output row of a weight, and in every
pass for each token of an input.

Format: Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cutdiff.models.backbone import Backbone
from cutdiff.models.unet import Transformer

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of a row of zeros."""
MULTIPLE = 16
"""Both sides of a weight must be multiples of this for the product in hardware."""


class FP8Linear(nn.Module):
    """An 8-bit copy of a linear layer: (..., in) -> (..., out), in the dtype of the input.

    It does not keep the weight that it is a copy of, so a model with such layers cannot be saved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach().flatten(1))  # a PixelwiseLinear's is (out, in, 1, 1)
        self.weight = nn.Buffer(weight)  # (out, in)
        self.weight_scale = nn.Buffer(scale, persistent=False)  # (out, 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantize(x.flatten(0, -2))
        product = scaled_product if x.is_cuda else scaled_product_reference
        return product(rows, scale, self.weight, self.weight_scale, self.bias, x.dtype).unflatten(0, x.shape[:-1])


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) -> row-major E4M3 (M, K) and float32 scales (M, 1), whose product the rows are.

    The largest element of a row becomes the largest number of the format. Each element is off by at most 2^-4 of itself
    or 2^-10 of the scale. A row with NaN or infinity has a scale that is not finite, and so no finite product.
    """
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x / scale).to(FORMAT).contiguous(), scale


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (M, K) · weight (N, K) transposed + bias (N,) -> (M, N) by tensor cores; RuntimeError on a device without them.

    The fast accumulators hold some 14 bits; their error is small beside that of the format's 4. The most devices can
    give bfloat16.
    """
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def scaled_product_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of `scaled_product` on any device, in float32 and rounded once at the end."""
    product = x.float() @ (weight.float() * weight_scale).t() * x_scale
    return (product if bias is None else product + bias).to(dtype)


OF_TEXT = ("attn2.to_k", "attn2.to_v")
"""The ends of the names of a U-Net's layers that stay as they are, as they run once a prompt."""
OF_CONDITION = ("norm.linear", "norm1.linear", "norm1_context.linear")
"""Those of a transformer: a condition, of which they make shifts and scales, is one row for a picture."""


def quantize_transformers(network: Backbone[Any]) -> None:
    """Put an `FP8Linear` in the place of each linear layer of the network's transformers, under its name.

    The layers of `OF_TEXT` and `OF_CONDITION` stay, and so do layers whose sides are no multiples of 16.
    """
    parts, kept = [module for module in network.modules() if isinstance(module, Transformer)], OF_TEXT
    if not parts:
        parts, kept = [block for stack in network.stacks() for block in stack.blocks], OF_CONDITION
    for part in parts:
        for name, layer in list(part.named_modules()):
            if not isinstance(layer, nn.Linear) or name.endswith(kept):
                continue
            if layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
                part.set_submodule(name, FP8Linear(layer))


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Try a product on `device`; ValueError where a network of `dtype` there cannot have such layers."""
    if device.type == "cpu":
        raise ValueError("fp8=True needs a GPU (Ada, Hopper or later), and the device is cpu: leave it out")
    if dtype != torch.bfloat16:
        raise ValueError(f"fp8=True goes with bfloat16, not {dtype}: choose that dtype")
    rows = quantize(torch.ones(MULTIPLE, MULTIPLE, dtype=dtype, device=device))
    try:
        scaled_product(*rows, *rows, None, dtype)
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(f"fp8=True is not for {torch.cuda.get_device_name(device)}: leave it out ({cause})") from None
