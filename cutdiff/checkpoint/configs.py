"""The config.json of a U-Net or a VAE in diffusers' layout, to and from the dataclasses of `models.config`.

A field that would change what the network computes, in a way that is not built here, is a ValueError that names it. A
missing field has the value that diffusers gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutdiff.checkpoint.fields import (
    DIFFUSERS_VERSION,
    boolean,
    factor,
    integer,
    offset,
    per_channel,
    per_level,
    refuse_unknown,
    require,
    sequence,
    unsupported,
    widths,
)
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.models.controlnet import ControlNetConfig

ADDED = "text_time"
"""The `addition_embed_type` of SDXL: pooled text and six numbers of size and crop are embedded beside the time."""
ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
"""The blocks of a level with and without attention, on the way down and on the way up."""
MID = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
"""A middle block of a single resnet, and one with a transformer between two; null is none."""
DOWN, UP = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
"""The depths of transformers on the way down from the finest level on, and on the way up from the coarsest on."""

UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*[ATTENTION[0]] * 3, PLAIN[0]),
    "up_block_types": (PLAIN[1], *[ATTENTION[1]] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    DOWN: 1,
    UP: None,
    "mid_block_type": MID[1],
    "time_cond_proj_dim": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
UNET_IGNORED = {"dropout", "addition_embed_type_num_heads", "upcast_attention"}
"""Fields without effect. Softmax is always taken in float32, which is what `upcast_attention` of SD 2.1 asks for."""

CONTROL_FIXED: dict[str, Any] = {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
HINT_WIDTHS = "conditioning_embedding_out_channels"
NO_CONTROL = (
    "sample_size",
    "out_channels",
    "up_block_types",
    UP,
    "time_cond_proj_dim",
    "center_input_sample",
    "dual_cross_attention",
    "resnet_skip_time_act",
    "resnet_out_scale_factor",
    "time_embedding_type",
    "time_embedding_dim",
    "time_embedding_act_fn",
    "timestep_post_act",
    "conv_in_kernel",
    "conv_out_kernel",
    "attention_type",
    "class_embeddings_concat",
    "mid_block_only_cross_attention",
    "cross_attention_norm",
)
"""The fields of a U-Net that diffusers' ControlNetModel does not have."""

VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
}
VAE_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VAE_IGNORED = {"sample_size"}


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """The sizes in the config.json of a UNet2DConditionModel. Raises ValueError for a field that is not supported."""
    require(config, UNET_FIXED)
    refuse_unknown(config, {*UNET_FIXED, *UNET_DEFAULTS, *UNET_IGNORED})
    fields = {**UNET_DEFAULTS, **config}
    channels = widths(fields)
    has_attention = _attention_levels(fields, len(channels))
    mid = _mid_depth(fields, len(channels))
    layers = _down_depths(fields, has_attention)
    # diffusers reads `attention_head_dim` as the number of heads, a misnomer that its checkpoints keep.
    heads = "attention_head_dim" if fields["num_attention_heads"] is None else "num_attention_heads"
    pooled_dim, size_dim = _added_dims(fields)
    return UNetConfig(
        in_channels=integer(fields, "in_channels"),
        out_channels=integer(fields, "out_channels"),
        channels=channels,
        layers_per_block=integer(fields, "layers_per_block"),
        transformer_layers=layers,
        mid_transformer_layers=mid,
        up_transformer_layers=_up_depths(fields, layers),
        guidance_dim=_guidance_dim(fields),
        num_heads=per_level(fields, heads, len(channels)),
        context_dim=integer(fields, "cross_attention_dim"),
        pooled_dim=pooled_dim,
        size_embedding_dim=size_dim,
        linear_projections=boolean(fields, "use_linear_projection"),
        norm_groups=integer(fields, "norm_num_groups"),
        native_size=integer(fields, "sample_size"),
    )


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The config.json with which diffusers builds the same U-Net.

    Raises ValueError where the last level and the middle block have different depths, which diffusers cannot say.
    """
    layers, mid = [n or 1 for n in config.transformer_layers], config.mid_transformer_layers
    last = config.down_layers[-1][0]
    if mid and last not in (0, mid):
        raise ValueError(
            f"mid_transformer_layers={config.mid_transformer_layers} must equal the last of transformer_layers="
            f"{config.transformer_layers} to be saved: the diffusers layout has one number for both"
        )
    layers[-1] = layers[-1] if last else mid or 1
    up = config.up_transformer_layers
    added = {
        "addition_embed_type": ADDED,
        "addition_time_embed_dim": config.size_embedding_dim,
        "projection_class_embeddings_input_dim": config.added_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **UNET_FIXED,
        "sample_size": config.native_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [(ATTENTION if n else PLAIN)[0] for n in config.transformer_layers],
        "up_block_types": [(ATTENTION if n else PLAIN)[1] for n in reversed(config.transformer_layers)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "cross_attention_dim": config.context_dim,
        DOWN: layers,
        UP: up and [[n or 1 for n in level] for level in reversed(up)],
        "mid_block_type": None if mid is None else MID[mid > 0],
        "time_cond_proj_dim": config.guidance_dim or None,
        "attention_head_dim": list(config.num_heads),
        "num_attention_heads": None,
        "use_linear_projection": config.linear_projections,
        **(added if config.added_dim else {}),
    }


def control_config(config: Mapping[str, Any]) -> ControlNetConfig:
    """The sizes in the config.json of a ControlNetModel. Raises ValueError for a field that is not supported."""
    require(config, CONTROL_FIXED)
    blocks = sequence({**UNET_DEFAULTS, **config}, "down_block_types")
    up = [ATTENTION[1] if block == ATTENTION[0] else PLAIN[1] for block in reversed(blocks)]
    own = {name: value for name, value in config.items() if name not in {*CONTROL_FIXED, HINT_WIDTHS}}
    unet = unet_config({**own, "up_block_types": up, "sample_size": 1})
    hint = widths({"block_out_channels": config.get(HINT_WIDTHS) or ControlNetConfig.hint_widths})
    return ControlNetConfig(unet, hint)


def control_to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """The config.json with which diffusers builds the same ControlNet."""
    fields = {name: value for name, value in unet_to_diffusers(config.unet).items() if name not in NO_CONTROL}
    return {**fields, **CONTROL_FIXED, HINT_WIDTHS: list(config.hint_widths)}


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """The sizes in the config.json of an AutoencoderKL. Raises ValueError for a field that is not supported."""
    require(config, VAE_FIXED)
    refuse_unknown(config, {*VAE_FIXED, *VAE_DEFAULTS, *VAE_IGNORED})
    fields = {**VAE_DEFAULTS, **config}
    channels = widths(fields)
    for name in ("down_block_types", "up_block_types"):
        if sequence(fields, name) != [VAE_DEFAULTS[name][0]] * len(channels):
            unsupported(name, fields[name], f"{VAE_DEFAULTS[name][0]!r} for each of {len(channels)} levels")
    quant_conv = boolean(fields, "use_quant_conv")
    if boolean(fields, "use_post_quant_conv") != quant_conv:
        unsupported("use_post_quant_conv", fields["use_post_quant_conv"], f"{quant_conv}, as use_quant_conv is")
    return VAEConfig(
        in_channels=integer(fields, "in_channels"),
        out_channels=integer(fields, "out_channels"),
        channels=channels,
        layers_per_block=integer(fields, "layers_per_block"),
        latent_channels=integer(fields, "latent_channels"),
        norm_groups=integer(fields, "norm_num_groups"),
        scaling_factor=factor(fields, "scaling_factor"),
        force_upcast=boolean(fields, "force_upcast"),
        latents_mean=per_channel(fields, "latents_mean"),
        latents_std=per_channel(fields, "latents_std"),
        shift_factor=offset(fields, "shift_factor"),
        quant_conv=quant_conv,
    )


def vae_to_diffusers(config: VAEConfig, *, sample_size: int) -> dict[str, Any]:
    """The config.json with which diffusers builds the same VAE; `sample_size` is the side of a picture in pixels."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        **VAE_FIXED,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": sample_size,
        "scaling_factor": config.scaling_factor,
        "force_upcast": config.force_upcast,
        "latents_mean": config.latents_mean,
        "latents_std": config.latents_std,
        "shift_factor": config.shift_factor,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }


def _added_dims(fields: Mapping[str, Any]) -> tuple[int, int]:
    """The widths of the pooled text and of an embedded number of size or crop; 0 where neither is embedded."""
    kind = fields["addition_embed_type"]
    if kind is None:
        return 0, 0
    if kind != ADDED:
        unsupported("addition_embed_type", kind, f"{ADDED!r} or none")
    size_dim = integer(fields, "addition_time_embed_dim")
    return integer(fields, "projection_class_embeddings_input_dim") - 6 * size_dim, size_dim


def _guidance_dim(fields: Mapping[str, Any]) -> int:
    """The width of the embedded guidance scale; 0 where the network does not read it."""
    name = "time_cond_proj_dim"
    if not fields[name]:
        return 0
    if (dim := integer(fields, name)) % 2 or dim < 4:
        unsupported(name, dim, "an even number from 4")
    return dim


def _entries(fields: Mapping[str, Any], name: str, levels: int) -> list[Any]:
    """The entry of each level in the depths `name`."""
    value = fields[name]
    entries = [value] * levels if name == DOWN and type(value) is int else value
    if not isinstance(entries, list | tuple) or len(entries) != levels:
        unsupported(name, value, f"an entry for each of the {levels} levels")
    return list(entries)


def _mid_depth(fields: Mapping[str, Any], levels: int) -> int | None:
    """The depth of the transformer in the middle, 0 where there is none, or None where there is no middle block."""
    kind, name = fields["mid_block_type"], DOWN
    if kind not in (*MID, None):
        unsupported("mid_block_type", kind, f"{' or '.join(map(repr, MID))}, or null")
    if kind != MID[1]:
        return None if kind is None else 0
    last = _entries(fields, name, levels)[-1]  # the middle block takes the first number of the last level
    return per_level({name: last[:1] if isinstance(last, list | tuple) else last}, name, 1)[0]


def _down_depths(fields: Mapping[str, Any], has_attention: Sequence[bool]) -> tuple[int | tuple[int, ...], ...]:
    """The depths of each level on the way down, 0 without attention: one number, or one for each layer."""
    resnets = integer(fields, "layers_per_block")
    entries = _entries(fields, DOWN, len(has_attention))
    if fields[UP] is None and any(isinstance(entry, list | tuple) for entry in entries):
        unsupported(DOWN, fields[DOWN], f"a number for each level where there is no {UP}")
    depths = [
        per_level({DOWN: entry}, DOWN, resnets) if has else (0,)
        for entry, has in zip(entries, has_attention, strict=True)
    ]
    return tuple(level[0] if len({*level}) == 1 else level for level in depths)


def _up_depths(
    fields: Mapping[str, Any], layers: Sequence[int | tuple[int, ...]]
) -> tuple[tuple[int, ...], ...] | None:
    """The depth of each transformer on the way up, from the finest level on; None where that is as on the way down."""
    if fields[UP] is None:
        return None
    resnets = integer(fields, "layers_per_block") + 1
    depths = tuple(
        per_level({UP: entry}, UP, resnets) if down else (0,) * resnets
        for entry, down in zip(reversed(_entries(fields, UP, len(layers))), layers, strict=True)
    )
    return None if depths == tuple((down,) * resnets for down in layers) else depths


def _attention_levels(fields: Mapping[str, Any], levels: int) -> list[bool]:
    """True for each level that has attention, from the finest on. The way up must mirror the way down."""
    down, up = sequence(fields, "down_block_types"), sequence(fields, "up_block_types")
    has_attention = [block == ATTENTION[0] for block in down]
    if len(down) != levels or not {*down} <= {ATTENTION[0], PLAIN[0]}:
        unsupported("down_block_types", down, f"{ATTENTION[0]!r} or {PLAIN[0]!r} for each of the {levels} levels")
    mirrored = [(ATTENTION if has else PLAIN)[1] for has in reversed(has_attention)]
    if up != mirrored:
        unsupported("up_block_types", up, f"the mirror of down_block_types, {mirrored}")
    return has_attention
