"""Bad input: weights that do not fit their network, or are no weights. LoRAs have a table of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import CommandLine
from tiny import edit_tensors
from torch import Tensor

Tensors = dict[str, Tensor]
FIT = "unet: the weights do not fit the network: take both from one model. Keys "
QUANTIZED = "where torch.float16, bfloat16 or float32 belongs"
BIAS, KERNEL, MATRIX = "conv_in.bias", "conv_in.weight", "time_embedding.linear_1.weight"


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[key] = change(tensors[key]).contiguous()

    return edit


def everything(tensors: Tensors) -> None:
    del tensors[BIAS]
    tensors[KERNEL] = torch.zeros(32, 4, 1, 1)
    tensors["strange"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.zeros(4, dtype=torch.int8)


KEYS: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "missing key": (lambda tensors: tensors.pop(BIAS), [f"{FIT}1 missing: {BIAS}"]),
    "all keys missing": (lambda tensors: tensors.clear(), [f"{FIT}", " missing: ", " more"]),
    "extra key": (lambda tensors: tensors.update(strange=torch.zeros(1)), [f"{FIT}1 unexpected: strange"]),
    "transposed key": (
        put(MATRIX, lambda weight: weight.T),
        [f"{FIT}1 of another shape: {MATRIX} (32, 128) where (128, 32) belongs"],
    ),
    "int8 tensor": (put(KERNEL, Tensor.char), [f"{FIT}1 quantized: {KERNEL} torch.int8 {QUANTIZED}"]),
    "fp8 tensor": (
        put(KERNEL, lambda weight: weight.to(torch.float8_e4m3fn)),
        [f"{FIT}1 quantized: {KERNEL} torch.float8_e4m3fn {QUANTIZED}"],
    ),
    "all kinds at once": (
        everything,
        [
            f"{FIT}1 missing: {BIAS}; 1 unexpected: strange; ",
            f"1 of another shape: {KERNEL} (32, 4, 1, 1) where (32, 4, 3, 3) belongs; ",
            f"1 quantized: conv_out.bias torch.int8 {QUANTIZED}",
        ],
    ),
}
"""How a U-Net's tensors are changed, and what is said of it."""


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str, copy: Path, command_line: CommandLine) -> None:
    edit, expected = KEYS[name]
    edit_tensors(copy / "unet/diffusion_pytorch_model.safetensors", edit)
    line = command_line.refuses(["--model", copy], 1, *expected)
    assert line.startswith(f"{copy}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "drawn with"])
def test_values(value: float, checked: bool, copy: Path, command_line: CommandLine) -> None:
    edit_tensors(
        copy / "unet/diffusion_pytorch_model.safetensors", put(BIAS, lambda bias: torch.full_like(bias, value))
    )
    arguments = ["--model", copy, "--steps", "1", "--width", "64", "--height", "64"]
    cause = f"weights hold NaN or infinity, unet: {BIAS}: download them again"
    if checked:
        command_line.refuses([*arguments, "--check-weights"], 1, f"{copy}: {cause}")
    else:
        command_line.refuses(arguments, 1, "step 0 (structure", cause)
