"""EDM models in single files: the marker keys that identify them, and the noise and latents that those describe.

The markers of CosXL are read as in ComfyUI, which writes them, and those of Playground v2.5 as in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cutdiff.models.config import VAEConfig
from cutdiff.sampling.edm import AnyNoise, EDMConfig

LATENTS = ("edm_mean", "edm_std")
"""The markers of Playground v2.5, which hold the statistics of the latents' channels. It is EDM as in the paper."""
SIGMAS = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
"""The markers of CosXL, which hold the ends of its sigmas. Its network predicts v."""
COSXL = EDMConfig(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")


def marked_noise(tensors: Mapping[str, Tensor], scheduler: AnyNoise | None) -> tuple[EDMConfig, str] | None:
    """The noise of an EDM model and the markers that say so; None where the file has no such markers.

    No marker says how a run spaces its sigmas: it does as `scheduler` says if that is of an EDM model, else as Karras.
    """
    if not (marks := [key for key in (*LATENTS, *SIGMAS) if key in tensors]):
        return None
    if marks[0] in LATENTS:
        noise, marks = EDMConfig(), list(LATENTS)
    else:
        noise = replace(COSXL, **{key.rpartition(".")[2]: _numbers(tensors, key, 1)[0] for key in marks})
    if isinstance(scheduler, EDMConfig):
        noise = replace(noise, sigma_schedule=scheduler.sigma_schedule, rho=scheduler.rho)
    return noise, f"marker key{'s' if len(marks) > 1 else ''} {', '.join(marks)}"


def marked_latents(tensors: Mapping[str, Tensor], vae: VAEConfig) -> VAEConfig:
    """`vae` with the statistics of latents in a file's markers, scaled to the standard deviation of EDM's data."""
    if not any(key in tensors for key in LATENTS):
        return vae
    mean, std = (_numbers(tensors, key, vae.latent_channels) for key in LATENTS)
    return replace(vae, latents_mean=mean, latents_std=std, scaling_factor=EDMConfig().sigma_data)


def _numbers(tensors: Mapping[str, Tensor], key: str, count: int) -> tuple[float, ...]:
    """The numbers that a marker holds. Raises ValueError where it is missing or has not `count` finite numbers."""
    values = tuple(tensors[key].double().flatten().tolist()) if key in tensors else ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(
            f"marker key {key} holds {list(values[:9])}, not {count} finite numbers: download the file again"
        )
    return values
