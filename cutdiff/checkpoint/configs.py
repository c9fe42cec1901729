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
    per_channel,
    per_level,
    refuse_unknown,
    require,
    sequence,
    uniform,
    unsupported,
    widths,
)
from cutdiff.models.config import UNetConfig, VAEConfig

ADDED = "text_time"
"""The `addition_embed_type` of SDXL: pooled text and six numbers of size and crop are embedded beside the time."""
ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
"""The blocks of a level with and without attention, on the way down and on the way up."""
MID = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
"""A middle block of a single resnet, and one with a transformer between two."""

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
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
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

VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
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
}
VAE_IGNORED = {"sample_size"}


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """The sizes in the config.json of a UNet2DConditionModel. Raises ValueError for a field that is not supported."""
    require(config, UNET_FIXED)
    refuse_unknown(config, {*UNET_FIXED, *UNET_DEFAULTS, *UNET_IGNORED})
    fields = {**UNET_DEFAULTS, **config}
    channels = widths(fields)
    has_attention = _attention_levels(fields, len(channels))
    layers = _depths(fields, has_attention)
    if fields["mid_block_type"] not in MID:
        unsupported("mid_block_type", fields["mid_block_type"], " or ".join(map(repr, MID)))
    # diffusers reads `attention_head_dim` as the number of heads, a misnomer that its checkpoints keep.
    heads = "attention_head_dim" if fields["num_attention_heads"] is None else "num_attention_heads"
    pooled_dim, size_dim = _added_dims(fields)
    return UNetConfig(
        in_channels=integer(fields, "in_channels"),
        out_channels=integer(fields, "out_channels"),
        channels=channels,
        layers_per_block=integer(fields, "layers_per_block"),
        transformer_layers=tuple(n if has else 0 for n, has in zip(layers, has_attention, strict=True)),
        mid_transformer_layers=layers[-1] if fields["mid_block_type"] == MID[1] else 0,
        up_transformer_layers=_up_depths(fields, has_attention, layers),
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
    layers, mid = list(config.transformer_layers), config.mid_transformer_layers
    if mid and layers[-1] not in (0, mid):
        raise ValueError(
            f"mid_transformer_layers={config.mid_transformer_layers} must equal the last of transformer_layers="
            f"{config.transformer_layers} to be saved: the diffusers layout has one number for both"
        )
    layers[-1] = mid or layers[-1]
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
        "transformer_layers_per_block": [n or 1 for n in layers],
        "reverse_transformer_layers_per_block": up and [[n or 1 for n in level] for level in reversed(up)],
        "mid_block_type": MID[mid > 0],
        "time_cond_proj_dim": config.guidance_dim or None,
        "attention_head_dim": list(config.num_heads),
        "num_attention_heads": None,
        "use_linear_projection": config.linear_projections,
        **(added if config.added_dim else {}),
    }


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """The sizes in the config.json of an AutoencoderKL. Raises ValueError for a field that is not supported."""
    require(config, VAE_FIXED)
    refuse_unknown(config, {*VAE_FIXED, *VAE_DEFAULTS, *VAE_IGNORED})
    fields = {**VAE_DEFAULTS, **config}
    channels = widths(fields)
    for name in ("down_block_types", "up_block_types"):
        if sequence(fields, name) != [VAE_DEFAULTS[name][0]] * len(channels):
            unsupported(name, fields[name], f"{VAE_DEFAULTS[name][0]!r} for each of {len(channels)} levels")
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


def _depths(fields: Mapping[str, Any], has_attention: Sequence[bool]) -> tuple[int, ...]:
    """The depth of the transformers of each level on the way down; a level's layers have one depth."""
    name, levels = "transformer_layers_per_block", len(has_attention)
    entries = sequence(fields, name) if isinstance(fields[name], list | tuple) else [fields[name]] * levels
    if len(entries) == levels:
        # An entry that no transformer takes may be 0; the middle block takes the last one.
        taken = [*has_attention[:-1], has_attention[-1] or fields["mid_block_type"] == MID[1]]
        entries = [uniform(entry) if is_taken else 1 for entry, is_taken in zip(entries, taken, strict=True)]
    return per_level({name: entries}, name, levels)


def _up_depths(
    fields: Mapping[str, Any], has_attention: Sequence[bool], layers: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """The depth of each transformer on the way up, from the finest level on; None where that is as on the way down."""
    name, resnets = "reverse_transformer_layers_per_block", integer(fields, "layers_per_block") + 1
    entries = fields[name]
    if entries is None:
        return None
    if not isinstance(entries, list | tuple) or len(entries) != len(has_attention):
        unsupported(name, entries, f"an entry for each of the {len(has_attention)} levels, from the coarsest on")
    depths = tuple(
        per_level({name: entry}, name, resnets) if has else (0,) * resnets
        for entry, has in zip(reversed(entries), has_attention, strict=True)
    )
    mirrored = tuple((n * has,) * resnets for n, has in zip(layers, has_attention, strict=True))
    return None if depths == mirrored else depths


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
