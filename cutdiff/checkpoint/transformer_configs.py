"""The config.json of a transformer in diffusers' layout, to and from the dataclasses of `models`.

The rules are those of `configs`. A transformer's file does not say the size of pictures that it was trained on: it is
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
FLUX_TOOLS = "a FLUX.1 that is shown a picture too, as Fill, Canny and Depth are: pass the text-to-image model"


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


def native(size: int) -> dict[str, int]:
    """The field for the native size, where it is not that of all published models."""
    return {} if size == FluxConfig.native_size else {NATIVE: size}
