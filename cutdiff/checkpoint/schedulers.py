"""A scheduler_config.json of diffusers, to and from what `sampling` needs to know: how noise was scheduled in training.

A field that would change the schedule, in a way that is not built here, is a ValueError that names it. A missing field
has the value that diffusers gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cutdiff.checkpoint.fields import DIFFUSERS_VERSION, boolean, require, unsupported
from cutdiff.sampling.edm import AnyNoise, EDMConfig
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import NoiseConfig

NOISE_FIXED: dict[str, Any] = {
    "trained_betas": None,
    "thresholding": False,
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
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
"""The fields that are read and their defaults. `set_alpha_to_one` has the default of DDIM: a scheduler without that
field has this value when diffusers turns it into DDIM."""
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
"""The schedulers that are read, and the defaults in which each differs from NOISE_DEFAULTS."""
CLIPPING = ("DDIM", "DDPM", "Heun", "LCM", "TCD")
"""Schedulers whose names begin so read `clip_sample`; in others it is a leftover without effect."""
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
"""The schedulers of EDM models; their defaults are those of `EDMConfig`."""
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""The schedulers of flow matching; their defaults are those of `FlowConfig`."""
FLOW_FIXED: dict[str, Any] = {"invert_sigmas": False}
NOT_IN_FILES = ("timestep_spacing", "image_seq_len")
"""The fields of `FlowConfig` that stand in no file: pipelines say the first, and a run the second."""
EDM_FIXED: dict[str, Any] = {"thresholding": False, "final_sigmas_type": "zero"}


def noise_config(config: Mapping[str, Any]) -> AnyNoise:
    """The schedule of noise in a scheduler_config.json; which solver it names makes no difference.

    Raises ValueError for a scheduler of models of another kind and for a field that is not supported.
    """
    name = str(config.get("_class_name"))
    if name in EDM_SCHEDULERS:
        require(config, EDM_FIXED)
        return EDMConfig(**{key: config[key] for key in asdict(EDMConfig()) if key in config})
    if name in FLOW_SCHEDULERS:
        require(config, FLOW_FIXED)
        known = [key for key in asdict(FlowConfig()) if key not in NOT_IN_FILES]
        fields: dict[str, Any] = {key: config[key] for key in known if key in config}
        fields["shift_terminal"] = fields.get("shift_terminal") or None  # 0 and null are one to diffusers
        return FlowConfig(**fields)
    if name not in SCHEDULERS:
        known = sorted([*SCHEDULERS, *EDM_SCHEDULERS, *FLOW_SCHEDULERS])
        unsupported("_class_name", name, f"one of {', '.join(known)}")
    require(config, NOISE_FIXED)
    fields = {**NOISE_DEFAULTS, **SCHEDULERS[name], **config}
    fields |= {field: boolean(fields, field) for field, value in NOISE_DEFAULTS.items() if isinstance(value, bool)}
    if name.startswith(CLIPPING) and fields["clip_sample"]:
        unsupported("clip_sample", True, "False (latent diffusion models are sampled without clipping)")
    return NoiseConfig(**{key: fields[key] for key in asdict(NoiseConfig())})


def noise_to_diffusers(noise: AnyNoise) -> dict[str, Any]:
    """A scheduler_config.json for Euler, with the fields that DDIM and PNDM read when a user turns it into one."""
    if isinstance(noise, FlowConfig):
        fields = {key: value for key, value in asdict(noise).items() if key not in NOT_IN_FILES}
        return {"_class_name": FLOW_SCHEDULERS[0], "_diffusers_version": DIFFUSERS_VERSION, **fields}
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
