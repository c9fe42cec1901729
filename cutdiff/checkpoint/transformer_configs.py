"""The config.json of a transformer in diffusers' layout, to and from the dataclasses of `models`.

The rules are those of `configs`. The file of FLUX.1 does not say the size of pictures that it was trained on: it is
1024 px where the file has no `_native_size`, in latents, a field of ours that diffusers passes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutdiff.checkpoint.fields import (
    DIFFUSERS_VERSION,
    boolean,
    integer,
    per_level,
    refuse_unknown,
    require,
    sequence,
    unsupported,
)
from cutdiff.models.flux import FluxConfig
from cutdiff.models.sd3 import SD3Config

NATIVE = "_native_size"
PACKED = 2
"""The side, in latents, of a token of FLUX.1, which its pipelines pack into channels."""
FLUX_FIXED: dict[str, Any] = {"patch_size": 1}
FLUX_DEFAULTS: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
    NATIVE: FluxConfig.native_size,
}
SD3_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
FLUX_TOOLS = "a FLUX.1 that is shown a picture too, as Fill, Canny, Depth and Kontext are: pass the text-to-image model"


def flux_config(config: Mapping[str, Any]) -> FluxConfig:
    """The sizes in the config.json of a FluxTransformer2DModel. Raises ValueError for a field that is not supported."""
    require(config, FLUX_FIXED)
    refuse_unknown(config, {*FLUX_FIXED, *FLUX_DEFAULTS})
    fields = {**FLUX_DEFAULTS, **config}
    width = integer(fields, "in_channels")
    check_flux_channels(width, width if fields["out_channels"] is None else integer(fields, "out_channels"))
    axes = tuple(per_level(fields, "axes_dims_rope", len(sequence(fields, "axes_dims_rope"))))
    if (head_dim := integer(fields, "attention_head_dim")) != sum(axes):
        unsupported("attention_head_dim", head_dim, f"{sum(axes)}, the sum of axes_dims_rope={list(axes)}")
    return FluxConfig(
        latent_channels=width // PACKED**2,
        patch=PACKED,
        num_layers=per_level(fields, "num_layers", 1)[0],
        num_single_layers=per_level(fields, "num_single_layers", 1)[0],
        num_heads=integer(fields, "num_attention_heads"),
        axes=axes,
        context_dim=integer(fields, "joint_attention_dim"),
        pooled_dim=integer(fields, "pooled_projection_dim"),
        reads_guidance=boolean(fields, "guidance_embeds"),
        native_size=integer(fields, NATIVE),
    )


def check_flux_channels(inputs: int, outputs: int) -> None:
    """Raise ValueError where these numbers of channels are not those of tokens of latents alone."""
    if inputs != outputs:
        raise ValueError(f"its transformer reads {inputs} channels and gives {outputs}: {FLUX_TOOLS}")
    if inputs % PACKED**2:
        unsupported("in_channels", inputs, f"a multiple of {PACKED**2}, the latents of a token")


def flux_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """The config.json with which diffusers builds the same transformer. Raises ValueError where a token has another
    number of latents than in FLUX.1, which diffusers cannot say."""
    if config.patch != PACKED:
        raise ValueError(f"patch={config.patch} cannot be saved: diffusers' pipeline of FLUX.1 has {PACKED}")
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **FLUX_FIXED,
        "in_channels": config.latent_channels * config.patch**2,
        "out_channels": None,
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.reads_guidance,
        "axes_dims_rope": list(config.axes),
        **native(config.native_size),
    }


def sd3_config(config: Mapping[str, Any]) -> SD3Config:
    """The sizes in the config.json of an SD3Transformer2DModel. Raises ValueError for a field that is not supported."""
    refuse_unknown(config, {*SD3_DEFAULTS})
    fields = {**SD3_DEFAULTS, **config}
    channels = integer(fields, "in_channels")
    if fields["out_channels"] not in (None, channels):
        unsupported("out_channels", fields["out_channels"], f"{channels}, as in_channels is")
    heads, head_dim = integer(fields, "num_attention_heads"), integer(fields, "attention_head_dim")
    if fields["caption_projection_dim"] != heads * head_dim:
        unsupported("caption_projection_dim", fields["caption_projection_dim"], f"{heads * head_dim}, the heads' width")
    dual = fields["dual_attention_layers"] or ()
    if not isinstance(dual, list | tuple) or not all(type(layer) is int for layer in dual):
        unsupported("dual_attention_layers", dual, "a list of whole numbers")
    if fields["qk_norm"] not in (None, "rms_norm"):
        unsupported("qk_norm", fields["qk_norm"], "'rms_norm' or null")
    return SD3Config(
        latent_channels=channels,
        patch=integer(fields, "patch_size"),
        num_layers=per_level(fields, "num_layers", 1)[0],
        num_heads=heads,
        head_dim=head_dim,
        context_dim=integer(fields, "joint_attention_dim"),
        pooled_dim=integer(fields, "pooled_projection_dim"),
        table_size=per_level(fields, "pos_embed_max_size", 1)[0],
        dual_layers=tuple(dual),
        qk_norm=fields["qk_norm"] is not None,
        native_size=integer(fields, "sample_size"),
    )


def sd3_to_diffusers(config: SD3Config) -> dict[str, Any]:
    """The config.json with which diffusers builds the same transformer."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": config.native_size,
        "patch_size": config.patch,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.num_layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.dim,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.table_size,
        "dual_attention_layers": list(config.dual_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def native(size: int) -> dict[str, int]:
    """The field for the native size, where it is not that of all published models."""
    return {} if size == FluxConfig.native_size else {NATIVE: size}
