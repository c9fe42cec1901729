"""Bad input: weights that do not fit their network, or are no weights. LoRAs have a table of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import CommandLine
from tiny import edit_tensors
from torch import Tensor

from cutdiff.checkpoint import load
from cutdiff.sample import main

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
"""Changes to a U-Net's tensors, and the messages about them."""


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


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "drawn with"])
def test_float16_that_does_not_hold_the_weights(
    checked: bool, copy: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutdiff.cli.device.multiplies", lambda *_: True)  # a CPU that says nothing of float16
    edit_tensors(copy / "unet/diffusion_pytorch_model.safetensors", put(BIAS, lambda bias: torch.full_like(bias, 1e5)))
    arguments = ["--model", copy, "--dtype", "float16", "--steps", "1", "--width", "64", "--height", "64"]
    cause = f"weights do not fit float16, unet: {BIAS}: use bfloat16 or float32"
    command_line.refuses([*arguments, "--check-weights"] if checked else arguments, 1, cause)


def test_a_model_says_why_a_value_is_not_finite(copy: Path) -> None:
    assert load(copy).why_not_finite() == "all weights are finite"
    cause = "all weights are finite, so float16 overflowed: use float32 or bfloat16"
    assert load(copy, dtype=torch.float16).why_not_finite() == cause
    edit_tensors(copy / "vae/diffusion_pytorch_model.safetensors", put("quant_conv.bias", lambda bias: bias / 0))
    cause = "weights hold NaN or infinity, vae: quant_conv.bias: download them again"
    assert load(copy).why_not_finite() == cause
    assert load(copy, dtype=torch.bfloat16).why_not_finite() == cause


ZEROS: dict[str, tuple[Callable[[list[str], Tensors], list[str]], str | None]] = {
    "the end": (lambda keys, _: keys[-30:], "tensors of zeros: up_blocks."),
    "everything": (lambda keys, _: keys, "tensors of zeros: up_blocks.2.resnets.1.time_emb_proj.weight, "),
    "a bias at the end": (lambda keys, tensors: [key for key in keys[-5:] if tensors[key].ndim == 1], None),
    "the middle": (lambda keys, _: keys[20:60], None),
}
"""The tensors of a U-Net that are zero, in the order of the file, and the message with --check-weights."""


@pytest.mark.parametrize("name", ZEROS)
def test_zeros(name: str, copy: Path, command_line: CommandLine) -> None:
    choose, expected = ZEROS[name]
    file = copy / "unet/diffusion_pytorch_model.safetensors"

    def edit(tensors: Tensors) -> None:
        for key in choose(sorted(tensors), tensors):
            tensors[key].zero_()

    edit_tensors(file, edit)
    if expected is None:
        load(copy, check_weights=True)
    else:
        command_line.refuses(
            ["--model", copy, "--check-weights"], 1, f"{file} ends in ", expected, ": download it again"
        )


def test_a_picture_of_one_value_is_told_of(
    quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(quick_folder, tmp_path / "model")
    arguments = ["--model", str(model), "--steps", "1", "--width", "64", "--height", "64", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    edit_tensors(
        model / "vae/diffusion_pytorch_model.safetensors",
        lambda tensors: [tensor.zero_() for tensor in tensors.values()],
    )
    assert main([*arguments, "--overwrite"]) == 0
    told = "a picture has one value throughout: its weights may be zeros, which --check-weights would find"
    assert capsys.readouterr().err == f"cutdiff: {told}\n"
    several = [*arguments, "--num-images", "2", "--out", str(tmp_path / "set")]
    names = [tmp_path / "set" / f"cutdiffusion-64x64-seed{seed}.png" for seed in (0, 1)]
    end = f"one value throughout: {names[0]}, {names[1]}; --check-weights would find zeros in the weights"
    for first in (told, "2 of 2 pictures are finished already"):
        assert main(several) == 1
        assert capsys.readouterr().err == f"cutdiff: {first}\ncutdiff: {end}\n"
