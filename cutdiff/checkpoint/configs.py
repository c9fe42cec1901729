"""Configuration files of diffusers to our dataclasses and back.

A field that would change what the network or the schedule computes, in a way that is not built here, is an error that
names it. A missing field has the value that diffusers gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.sampling.edm import AnyNoise, EDMConfig
from cutdiff.sampling.noise import NoiseConfig

DIFFUSERS_VERSION = "0.42.0"
"""The release whose fields and defaults are listed here."""

MAX_SIZE, MAX_DEPTH, MAX_LEVELS = 100_000, 1000, 16
"""Past all networks that exist: a small file must not ask for more memory than there is."""
MAX_FACTOR = 1e6
"""Of latents, as is its inverse; models have 0.13 to 1."""
ADDED = "text_time"
"""How a configuration says that pooled text and six numbers of size and crop are embedded beside the time: SDXL."""
ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")

UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
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
    "time_cond_proj_dim": None,
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
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
UNET_IGNORED = {"dropout", "addition_embed_type_num_heads", "upcast_attention"}
"""Without effect: here softmax is taken in float32 in any case, which is what `upcast_attention` of SD 2.1 asks for."""

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

NOISE_FIXED: dict[str, Any] = {
    "trained_betas": None,
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "sigma_min": None,
    "sigma_max": None,
    "lambda_min_clipped": float("-inf"),
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}
NOISE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
"""`set_alpha_to_one` is DDIM's own default: what a solver without that field becomes when it is turned into DDIM."""
_LEADING = {"timestep_spacing": "leading"}
_DENOISING = {**_LEADING, "clip_sample": True}
_SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CONSISTENCY = {**_LEADING, **_SDXL_BETAS, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DENOISING,
    "DDIMParallelScheduler": _DENOISING,
    "DDPMScheduler": _DENOISING,
    "DDPMParallelScheduler": _DENOISING,
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": _SDXL_BETAS,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _SDXL_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SDXL_BETAS,
    "KDPM2DiscreteScheduler": _SDXL_BETAS,
    "LCMScheduler": _CONSISTENCY,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {**_LEADING, "set_alpha_to_one": False},
    "SASolverScheduler": {},
    "TCDScheduler": _CONSISTENCY,
    "UniPCMultistepScheduler": {},
}
"""The schedulers that are read, and where their defaults differ from NOISE_DEFAULTS."""
CLIPPING = ("DDIM", "DDPM", "Heun", "LCM", "TCD")
"""How the names of schedulers begin that read `clip_sample`; in others it is a leftover without effect."""
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
"""Their defaults are those of `EDMConfig`."""
EDM_FIXED: dict[str, Any] = {"thresholding": False, "final_sigmas_type": "zero"}


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """The sizes in a UNet2DConditionModel's config.json. Raises ValueError naming a field that is not supported."""
    _require(config, UNET_FIXED)
    _refuse_unknown(config, {*UNET_FIXED, *UNET_DEFAULTS, *UNET_IGNORED})
    fields = {**UNET_DEFAULTS, **config}
    channels = _widths(fields)
    has_attention = _attention_levels(fields, len(channels))
    layers = _per_level(fields, "transformer_layers_per_block", len(channels))
    # diffusers reads `attention_head_dim` as the number of heads, a misnomer that its checkpoints keep.
    heads = "attention_head_dim" if fields["num_attention_heads"] is None else "num_attention_heads"
    pooled_dim, size_dim = _added_dims(fields)
    return UNetConfig(
        in_channels=_integer(fields, "in_channels"),
        out_channels=_integer(fields, "out_channels"),
        channels=channels,
        layers_per_block=_integer(fields, "layers_per_block"),
        transformer_layers=tuple(n if has else 0 for n, has in zip(layers, has_attention, strict=True)),
        mid_transformer_layers=layers[-1],
        num_heads=_per_level(fields, heads, len(channels)),
        context_dim=_integer(fields, "cross_attention_dim"),
        pooled_dim=pooled_dim,
        size_embedding_dim=size_dim,
        linear_projections=boolean(fields, "use_linear_projection"),
        norm_groups=_integer(fields, "norm_num_groups"),
        native_size=_integer(fields, "sample_size"),
    )


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The config.json with which diffusers builds the same U-Net.

    Raises ValueError where the last level and the middle block have different depths, which diffusers cannot say.
    """
    layers = list(config.transformer_layers)
    if layers[-1] not in (0, config.mid_transformer_layers):
        raise ValueError(
            f"mid_transformer_layers={config.mid_transformer_layers} must equal the last of transformer_layers="
            f"{config.transformer_layers} to be saved: the diffusers layout has one number for both"
        )
    layers[-1] = config.mid_transformer_layers
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
        "attention_head_dim": list(config.num_heads),
        "num_attention_heads": None,
        "use_linear_projection": config.linear_projections,
        **(added if config.added_dim else {}),
    }


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """The sizes in an AutoencoderKL's config.json. Raises ValueError naming a field that is not supported."""
    _require(config, VAE_FIXED)
    _refuse_unknown(config, {*VAE_FIXED, *VAE_DEFAULTS, *VAE_IGNORED})
    fields = {**VAE_DEFAULTS, **config}
    channels = _widths(fields)
    for name in ("down_block_types", "up_block_types"):
        if _list(fields, name) != [VAE_DEFAULTS[name][0]] * len(channels):
            _unsupported(name, fields[name], f"{VAE_DEFAULTS[name][0]!r} for each of {len(channels)} levels")
    return VAEConfig(
        in_channels=_integer(fields, "in_channels"),
        out_channels=_integer(fields, "out_channels"),
        channels=channels,
        layers_per_block=_integer(fields, "layers_per_block"),
        latent_channels=_integer(fields, "latent_channels"),
        norm_groups=_integer(fields, "norm_num_groups"),
        scaling_factor=_factor(fields, "scaling_factor"),
        force_upcast=boolean(fields, "force_upcast"),
        latents_mean=_per_channel(fields, "latents_mean"),
        latents_std=_per_channel(fields, "latents_std"),
    )


def vae_to_diffusers(config: VAEConfig, *, sample_size: int) -> dict[str, Any]:
    """The config.json with which diffusers builds the same VAE; `sample_size` is the pictures' side in pixels."""
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


def noise_config(config: Mapping[str, Any]) -> AnyNoise:
    """How noise was scheduled, from a scheduler_config.json; which solver it names makes no difference.

    Raises ValueError naming a scheduler of models of another kind, or a field that is not supported.
    """
    name = str(config.get("_class_name"))
    if name in EDM_SCHEDULERS:
        _require(config, EDM_FIXED)
        return EDMConfig(**{key: config[key] for key in asdict(EDMConfig()) if key in config})
    if name not in SCHEDULERS:
        _unsupported("_class_name", name, f"one of {', '.join(sorted([*SCHEDULERS, *EDM_SCHEDULERS]))}")
    _require(config, NOISE_FIXED)
    fields = {**NOISE_DEFAULTS, **SCHEDULERS[name], **config}
    fields |= {field: boolean(fields, field) for field, value in NOISE_DEFAULTS.items() if isinstance(value, bool)}
    if name.startswith(CLIPPING) and fields["clip_sample"]:
        _unsupported("clip_sample", True, "False (latent diffusion models are sampled without clipping)")
    return NoiseConfig(**{key: fields[key] for key in asdict(NoiseConfig())})


def noise_to_diffusers(noise: AnyNoise) -> dict[str, Any]:
    """A scheduler_config.json for Euler, with the fields that DDIM and PNDM read where a user turns it into those."""
    if isinstance(noise, EDMConfig):
        return {"_class_name": "EDMEulerScheduler", "_diffusers_version": DIFFUSERS_VERSION, **asdict(noise)}
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **asdict(noise),
        "clip_sample": False,
        "interpolation_type": "linear",
        "skip_prk_steps": True,
        "trained_betas": None,
    }


def _require(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Every field that is there must be as in `supported`."""
    for name, only in supported.items():
        value = _uniform(config.get(name, only))
        if (value or None) != (only or None):  # null, false and 0 are one to diffusers
            _unsupported(name, value, repr(only))


def _refuse_unknown(config: Mapping[str, Any], known: set[str]) -> None:
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            _unsupported(name, value, f"what diffusers {DIFFUSERS_VERSION} knows")


def _unsupported(name: str, value: object, supported: str) -> NoReturn:
    raise ValueError(f"{name}={value!r} is not supported, only {supported}")


def _uniform(value: Any) -> Any:
    """A list of equal entries as one entry."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return entries[0] if entries and all(entry == entries[0] for entry in entries) else value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(fields[name], list | tuple) or not 1 <= len(fields[name]) <= MAX_LEVELS:
        _unsupported(name, fields[name], f"a list of 1 to {MAX_LEVELS} entries")
    return list(fields[name])


def _widths(fields: Mapping[str, Any]) -> tuple[int, ...]:
    widths = _list(fields, "block_out_channels")
    if not all(type(width) is int and 1 <= width <= MAX_SIZE for width in widths):
        _unsupported("block_out_channels", widths, f"whole numbers from 1 to {MAX_SIZE}")
    return tuple(widths)


def boolean(fields: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; null is false. ValueError for anything else, a text for one."""
    if fields[name] not in (None, False, True):
        _unsupported(name, fields[name], "true or false")
    return bool(fields[name])


def _factor(fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
        _unsupported(name, value, f"a number from {1 / MAX_FACTOR:g} to {MAX_FACTOR:g}")
    return value


def _per_channel(fields: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(n) in (int, float) and math.isfinite(n) for n in value):
        _unsupported(name, value, "a list of finite numbers")
    return tuple(value)


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = _uniform(fields[name])
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        _unsupported(name, fields[name], f"one whole number from 1 to {MAX_SIZE}")
    return value


def _per_level(fields: Mapping[str, Any], name: str, levels: int) -> tuple[int, ...]:
    value = fields[name]
    entries = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(entries) != levels or not all(type(entry) is int and 1 <= entry <= MAX_DEPTH for entry in entries):
        _unsupported(name, value, f"a whole number from 1 to {MAX_DEPTH}, or one for each of the {levels} levels")
    return entries


def _added_dims(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Widths of the pooled text and of an embedded number of size or crop; 0 where neither is embedded."""
    kind = fields["addition_embed_type"]
    if kind is None:
        return 0, 0
    if kind != ADDED:
        _unsupported("addition_embed_type", kind, f"{ADDED!r} or none")
    size_dim = _integer(fields, "addition_time_embed_dim")
    return _integer(fields, "projection_class_embeddings_input_dim") - 6 * size_dim, size_dim


def _attention_levels(fields: Mapping[str, Any], levels: int) -> list[bool]:
    down, up = _list(fields, "down_block_types"), _list(fields, "up_block_types")
    has_attention = [block == ATTENTION[0] for block in down]
    if len(down) != levels or not {*down} <= {ATTENTION[0], PLAIN[0]}:
        _unsupported("down_block_types", down, f"{ATTENTION[0]!r} or {PLAIN[0]!r} for each of the {levels} levels")
    mirrored = [(ATTENTION if has else PLAIN)[1] for has in reversed(has_attention)]
    if up != mirrored:
        _unsupported("up_block_types", up, f"the mirror of down_block_types, {mirrored}")
    return has_attention
