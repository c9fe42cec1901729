"""The names of each tensor in the original (Stability) layout and in the diffusers layout.

A map lists modules, from our name to the original one; a key belongs to the longest module name that it begins with.
The maps are made for a network of any size, and cover all of its keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cutdiff.models.config import UNetConfig
from cutdiff.models.controlnet import ControlNet
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
HINT, MIDDLE = "input_hint_block", "middle_block_out.0"
"""The modules of a ControlNet in the original layout that embed its hint, and that its middle ends with."""
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_keys(unet: UNet) -> dict[str, str]:
    """The diffusers key of every original key of the U-Net, one to one."""
    config = unet.config
    modules = _down_modules(config) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
    stride = config.layers_per_block + 1  # the blocks of a level on the way up
    for i in range(len(config.channels)):
        for j in range(stride):
            block = f"output_blocks.{i * stride + j}"
            modules |= _resnet_modules(f"up_blocks.{i}.resnets.{j}", f"{block}.0")
            modules[f"up_blocks.{i}.attentions.{j}"] = f"{block}.1"
        has_attention = any(config.up_layers[-1 - i])
        modules[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{(i + 1) * stride - 1}.{2 if has_attention else 1}"
    return _keys(unet, modules)


def control_keys(network: ControlNet) -> dict[str, str]:
    """The diffusers key of every original key of a ControlNet, one to one."""
    blocks, hint = len(network.controlnet_cond_embedding.blocks), "controlnet_cond_embedding"
    modules = _down_modules(network.config) | {f"{hint}.conv_in": f"{HINT}.0", "controlnet_mid_block": MIDDLE}
    modules |= {f"{hint}.blocks.{i}": f"{HINT}.{2 * i + 2}" for i in range(blocks)}
    modules[f"{hint}.conv_out"] = f"{HINT}.{2 * blocks + 2}"
    zeros = range(len(network.controlnet_down_blocks))
    return _keys(network, modules | {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in zeros})


def _down_modules(config: UNetConfig) -> dict[str, str]:
    """The modules of the embeddings, the way down and the middle."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",  # of a U-Net alone, in diffusers' layout
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    modules |= _resnet_modules("mid_block.resnets.0", "middle_block.0")
    modules |= _resnet_modules("mid_block.resnets.1", "middle_block.2")
    stride = config.layers_per_block + 1  # the layers of a level and the one that halves it
    for i in range(len(config.channels)):
        for j in range(stride):
            block = f"input_blocks.{i * stride + j + 1}"
            modules |= _resnet_modules(f"down_blocks.{i}.resnets.{j}", f"{block}.0")
            modules[f"down_blocks.{i}.attentions.{j}"] = f"{block}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * stride}.0.op"
    return modules


def _resnet_modules(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{original}" for part, original in UNET_RESNET.items()}


def vae_keys(vae: VAE) -> dict[str, str]:
    """The diffusers key of every original key of the VAE, one to one.

    Shapes are the same except for attention weights, (C, C, 1, 1) in the original and (C, C) in diffusers.
    """
    config = vae.config
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    resnets: dict[str, str] = {}
    levels = len(config.channels)
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        attention = {f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}" for a, b in VAE_ATTENTION.items()}
        modules |= attention
        resnets |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in range(2)}
    for i in range(levels):
        # The original layout counts the decoder's levels from the finest.
        down, up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"{down}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"{up}.upsample"
        for j in range(config.layers_per_block + 1):
            resnets[f"encoder.down_blocks.{i}.resnets.{j}"] = f"{down}.block.{j}"
            resnets[f"decoder.up_blocks.{i}.resnets.{j}"] = f"{up}.block.{j}"
    for ours, theirs in resnets.items():
        modules |= {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}
    return _keys(vae, modules)


def modern_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a VAE in the diffusers layout under today's names: before release 0.13 attention had others."""
    renamed = {f".attentions.0.{old}.": f".attentions.0.{new}." for old, new in OLD_VAE_ATTENTION.items()}

    def modern(key: str) -> str:
        for old, new in renamed.items():
            key = key.replace(old, new)
        return key

    return {modern(key): tensor for key, tensor in tensors.items()}


def original_attention(key: str) -> str:
    """The key in the original layout of one that is half in that of diffusers, as some converters write attention."""
    for name, original in VAE_ATTENTION.items():
        key = key.replace(f".mid.attn_1.{name}.", f".mid.attn_1.{original}.")
    return key


def _keys(network: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    keys = {_original(key, modules): key for key in network.state_dict()}
    assert len(keys) == len(network.state_dict()), "two keys have one original name"
    return keys


def _original(key: str, modules: Mapping[str, str]) -> str:
    module, rest = key, ""
    while module not in modules:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
        assert module, f"{key} belongs to no module of the map"
    return modules[module] + rest
