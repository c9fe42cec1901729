"""ControlNet against diffusers with the same random weights: the network, its files, and whole pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_models import SEEDS, TOLERANCE, generator, shapes, unet_configs, unet_inputs
from tiny import Tiny, edit_json, random_model, relative_error
from torch import Tensor

import cutdiff
from cutdiff.bench.baselines import published_unet
from cutdiff.checkpoint.configs import control_config, control_to_diffusers
from cutdiff.checkpoint.control import load_control, save_control
from cutdiff.checkpoint.families import SD15, SDXL, Family
from cutdiff.checkpoint.keys import control_keys
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import SD15_UNET, SDXL_UNET, UNetConfig
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.models.unet import UNet
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig

HINT_WIDTHS = (4, 6, 8)


def published(config: ControlNetConfig) -> ControlNetModel:
    fields = {name: value for name, value in control_to_diffusers(config).items() if not name.startswith("_")}
    return ControlNetModel(**fields)


@settings(max_examples=20)
@given(unet_configs(), SEEDS, st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.floats(0, 2))
@torch.no_grad()
def test_the_network_and_what_the_unet_makes_of_it_are_the_published_ones(
    unet: UNetConfig, seed: int, batch: int, height: int, width: int, scale: float
) -> None:
    config = ControlNetConfig(unet, HINT_WIDTHS)
    theirs, ours = published(config).eval(), ControlNet(config).eval()
    randomise(theirs, seed)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, timesteps, context, pooled, size_ids = inputs = unet_inputs(unet, seed, batch, height, width, 5)
    hint = torch.rand(batch, 3, 4 * height, 4 * width, generator=generator(seed))
    added = {"text_embeds": pooled, "time_ids": size_ids}
    down, mid = theirs(x, timesteps, context, hint, scale, added_cond_kwargs=added, return_dict=False)
    residuals = [scale * each for each in ours(*inputs, hint)]
    for one, other in zip(residuals, [*down, mid], strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * float(other.abs().max()))

    whole, own = published_unet(unet), UNet(unet).eval()
    randomise(whole, seed + 1)
    own.load_state_dict(whole.state_dict())
    expected = whole(
        x,
        timesteps,
        context,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    assert relative_error(own(*inputs, residuals), expected) <= TOLERANCE
    assert scale < 0.01 or relative_error(own(*inputs), expected) > TOLERANCE


def test_every_key_of_full_size_networks_is_the_published_one() -> None:
    """The configurations of diffusers/controlnet-canny-sdxl-1.0 and lllyasviel/sd-controlnet-canny are written out."""
    sdxl: dict[str, Any] = {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }
    for fields, unet, count in (
        (sdxl, SDXL_UNET, 1_251_014_160),
        ({"cross_attention_dim": 768}, SD15_UNET, 361_279_120),
    ):
        config = control_config({"_class_name": "ControlNetModel", "in_channels": 4, **fields})
        assert replace(config.unet, native_size=unet.native_size) == unet
        with torch.device("meta"):
            theirs, ours = ControlNetModel(**fields), ControlNet(config)
        assert shapes(ours) == shapes(theirs)
        assert sum(p.numel() for p in ours.parameters()) == count
        assert control_config(control_to_diffusers(config)) == config
        assert len(control_keys(ours)) == len(ours.state_dict())


def random_control(unet: UNetConfig, hint_widths: tuple[int, ...], seed: int = 0) -> ControlNet:
    network = ControlNet(ControlNetConfig(unet, hint_widths))
    randomise(network, seed)
    return network.eval().requires_grad_(False)


def save_published(folder: Path, network: ControlNet) -> ControlNetModel:
    theirs = published(network.control)
    theirs.load_state_dict(network.state_dict())
    theirs.save_pretrained(folder)
    return theirs.eval()


def as_original(network: ControlNet, prefix: str = "control_model.") -> dict[str, Tensor]:
    state = network.state_dict()
    return {prefix + original: state[key].contiguous() for original, key in control_keys(network).items()}


@pytest.fixture(scope="module", params=[SDXL, SD15], ids=["SDXL", "SD 1.5"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path, ControlNet]:
    """A random model of a family, its folder, and a ControlNet for it."""
    family: Family = request.param
    tiny = random_model(family)
    folder = tiny.save(tmp_path_factory.mktemp("models") / "model", noise=NoiseConfig())
    return tiny, folder, random_control(tiny.unet.config, HINT_WIDTHS)


Kind = tuple[Tiny, Path, ControlNet]


@pytest.mark.parametrize("controls", [1, 2])
@torch.no_grad()
def test_a_picture_is_that_of_the_published_pipeline(kind: Kind, controls: int, tmp_path: Path) -> None:
    tiny, folder, network = kind
    networks = [network, random_control(network.config, HINT_WIDTHS, seed=1)][:controls]
    theirs = [save_published(tmp_path / str(i), each) for i, each in enumerate(networks)]
    rng = np.random.default_rng(0)
    hints = [PIL.Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)) for _ in networks]
    scales, starts, ends = [0.7, 1.3][:controls], [0.0, 0.4][:controls], [0.6, 1.0][:controls]
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(3))

    one = len(networks) == 1
    published_kind = StableDiffusionXLControlNetPipeline if tiny.family is SDXL else StableDiffusionControlNetPipeline
    pipeline: Any = published_kind.from_pretrained(folder, controlnet=theirs[0] if one else theirs)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red house",
        image=hints[0] if one else hints,
        height=48,
        width=64,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=noise.clone(),
        controlnet_conditioning_scale=scales[0] if one else scales,
        control_guidance_start=starts[0] if one else starts,
        control_guidance_end=ends[0] if one else ends,
        output_type="latent",
    )[0]

    class Given(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            return noise

    options = {"method": "direct", "num_steps": 5, "guidance_scale": 4.0, "draws": Given((0,))}
    controlled = {
        "control": [str(tmp_path / str(i)) for i in range(controls)],
        "control_image": hints,
        "control_scale": scales,
        "control_interval": [*zip(starts, ends, strict=True)],
    }
    model = cutdiff.load(folder)
    ours = cutdiff.generate(model, "a red house", **options, **controlled).latents
    assert relative_error(ours, expected) <= TOLERANCE
    plain = cutdiff.generate(model, "a red house", height=48, width=64, **options).latents
    assert relative_error(plain, expected) > 1e-2


def test_every_layout_is_read(kind: Kind, tmp_path: Path) -> None:
    _, folder, network = kind
    model = cutdiff.load(folder)
    save_published(tmp_path / "folder", network)
    lone = tmp_path / "lone.safetensors"
    save_file(network.state_dict(), lone)
    prefixed, bare = tmp_path / "prefixed.safetensors", tmp_path / "bare.safetensors"
    save_file({**as_original(network), "model.diffusion_model.out.2.weight": torch.zeros(1)}, prefixed)
    save_file(as_original(network, ""), bare)
    for path in (tmp_path / "folder", lone, prefixed, bare):
        read = load_control(path, model)
        assert replace(read.control, unet=replace(read.config, native_size=1)) == replace(
            network.control, unet=replace(network.config, native_size=1)
        )
        assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in read.state_dict().items())
    save_control(tmp_path / "half.safetensors", network)
    assert load_control(tmp_path / "half.safetensors", model).control.hint_widths == HINT_WIDTHS
    fields = json.loads((tmp_path / "half.json").read_text())
    assert shapes(ControlNetModel.from_config(fields)) == shapes(network)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("controlnet_conditioning_channel_order", "bgr"),
        ("global_pool_conditions", True),
        ("conditioning_channels", 4),
        ("encoder_hid_dim_type", "text_proj"),
        ("num_control_type", 6),
    ],
)
def test_a_configuration_that_is_not_built(kind: Kind, tmp_path: Path, field: str, value: object) -> None:
    _, folder, network = kind
    save_published(tmp_path / "net", network)
    edit_json(tmp_path / "net" / "config.json", **{field: value})
    with pytest.raises(ValueError, match=re.escape(f"config.json: {field}={value!r} is not supported")):
        load_control(tmp_path / "net", cutdiff.load(folder))
    edit_json(tmp_path / "net" / "config.json", _class_name="ControlNetUnionModel")
    with pytest.raises(ValueError, match=r"net: no ControlNet: it is of 'ControlNetUnionModel': pass a ControlNet$"):
        load_control(tmp_path / "net", cutdiff.load(folder))
