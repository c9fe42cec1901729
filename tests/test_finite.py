"""A value that is not finite ends the run with a message that says where it came from; no picture is made of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.models.inside import replaced
from cutdiff.models.vae import VAE

PROMPT = "a red house"
RUN = {"num_steps": 4, "height": 128, "width": 128, "guidance_scale": 2.0}
"""The picture is twice the native size: 4 patches, then 4 views at a stride of 8 latents."""


@pytest.mark.parametrize(
    ("step", "row", "method", "expected"),
    [
        (0, 5, "cutdiffusion", r"^step 0 \(structure, .* first in patch or view 3 of 4 of picture 1"),
        (3, 5, "cutdiffusion", r"^step 3 \(detail, .* first in patch or view 3 of 4 of picture 1"),
        (1, 2, "direct", r"^step 1 \(direct, .* first in patch or view 1 of 1 of picture 2"),
    ],
)
def test_the_step_the_stage_and_the_view_are_named(
    tiny_model: Model, step: int, row: int, method: str, expected: str
) -> None:
    unet, timesteps_seen = tiny_model.unet, []

    def forward(x: Tensor, timesteps: Tensor, *conditions: Tensor) -> Tensor:
        out = type(unet).forward(unet, x, timesteps, *conditions)
        if float(timesteps[0]) not in timesteps_seen:
            timesteps_seen.append(float(timesteps[0]))
        if timesteps_seen.index(float(timesteps[0])) == step:
            out[row] = float("inf")  # of a guidance pair, rows 2k and 2k + 1 are one item
        return out

    prompts, views = ([PROMPT, PROMPT], {}) if method == "direct" else (PROMPT, {"stride": 8})
    with replaced(unet, forward=forward), pytest.raises(FloatingPointError, match=expected) as error:
        cutdiff.generate(tiny_model, prompts, method=method, **views, **RUN)
    assert str(error.value).endswith("; all weights are finite")


def test_weights_are_named_by_a_run_and_by_the_check(folder: Path, copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["mid_block.resnets.1.conv2.bias"][3] = float("nan")
    save_file(tensors, path)
    named = r"weights hold NaN or infinity, unet: mid_block\.resnets\.1\.conv2\.bias: download them again"
    model = cutdiff.load(copy)
    with pytest.raises(FloatingPointError, match=named):
        cutdiff.generate(model, PROMPT, method="direct", num_steps=1, height=64, width=64)
    with pytest.raises(ValueError, match=named):
        cutdiff.load(copy, check_weights=True)
    cutdiff.load(folder, check_weights=True)


def half(vae: VAE) -> VAE:
    """Copy the VAE in float16, with a configuration that says that this type fits."""
    copy = deepcopy(vae).half()
    copy.config = replace(copy.config, force_upcast=False)
    return copy


class TestVAE:
    def test_decodes_again_in_float32(self, tiny_model: Model) -> None:
        vae = half(tiny_model.vae)
        vae.decoder.conv_in.weight.mul_(6e4)  # what follows is normalised, so float32 bears it
        result = cutdiff.generate(replace(tiny_model, vae=vae), PROMPT, method="direct", **RUN)
        assert result.images.isfinite().all()
        assert (result.record["vae_dtype"], result.record["decoded_in"]) == ("float16", "float32")
        assert vae.dtype == torch.float16, "the model is as it was"

    def test_decodes_in_float32_where_the_configuration_says_so(self, tiny_model: Model) -> None:
        model = replace(tiny_model, vae=deepcopy(tiny_model.vae).half())
        result = cutdiff.generate(model, PROMPT, method="direct", **RUN)
        assert (result.record["vae_dtype"], result.record["decoded_in"]) == ("float32", "float32")
        rounded = replace(tiny_model, vae=deepcopy(model.vae).float())
        torch.testing.assert_close(result.images, cutdiff.decode(rounded, result.latents))

    def test_decodes_once_where_nothing_overflows(self, tiny_model: Model) -> None:
        model = replace(tiny_model, vae=half(tiny_model.vae))
        record = cutdiff.generate(model, PROMPT, method="direct", **RUN).record
        assert (record["vae_dtype"], record["decoded_in"]) == ("float16", "float16")

    def test_fails_where_float32_overflows_too(self, tiny_model: Model) -> None:
        vae = deepcopy(tiny_model.vae)
        vae.decoder.conv_out.weight.fill_(float("inf"))
        with pytest.raises(
            FloatingPointError, match=r"^the VAE gave NaN or infinity; .* vae: decoder\.conv_out\.weight"
        ):
            cutdiff.generate(replace(tiny_model, vae=vae), PROMPT, method="direct", **RUN)
