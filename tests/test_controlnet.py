"""ControlNet against diffusers with the same random weights: the network, its files, and whole pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SEEDS, TOLERANCE, generator, shapes, unet_configs, unet_inputs
from tiny import relative_error

from cutdiff.bench.baselines import published_unet
from cutdiff.checkpoint.configs import control_config, control_to_diffusers
from cutdiff.checkpoint.keys import control_keys
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import SD15_UNET, SDXL_UNET, UNetConfig
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.models.unet import UNet

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
