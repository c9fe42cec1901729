"""EDM models among single files: the marks that tell them, and what those say of noise and of latents.

ComfyUI, which writes the marks of CosXL, reads them likewise; so does diffusers those of Playground v2.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cutdiff.models.config import VAEConfig
from cutdiff.sampling.edm import AnyNoise, EDMConfig

LATENTS = ("edm_mean", "edm_std")
"""Playground v2.5: statistics of the latents' channels. It has EDM's own formulation, with the paper's defaults."""
SIGMAS = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
"""CosXL: the ends of its sigmas. Its network says v."""
COSXL = EDMConfig(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")


def marked_noise(tensors: Mapping[str, Tensor], scheduler: AnyNoise | None) -> tuple[EDMConfig, str] | None:
    """The noise of an EDM model and the marks that say so; None where the file has no such marks.

    How a run spaces its sigmas no mark says: it is as in `scheduler`, where that is of an EDM model, else Karras'.
    """
    if not (found := [key for key in (*LATENTS, *SIGMAS) if key in tensors]):
        return None
    if found[0] in LATENTS:
        noise, found = EDMConfig(), list(LATENTS)
    else:
        noise = replace(COSXL, **{key.rpartition(".")[2]: _numbers(tensors, key, 1)[0] for key in found})
    if isinstance(scheduler, EDMConfig):
        noise = replace(noise, sigma_schedule=scheduler.sigma_schedule, rho=scheduler.rho)
    return noise, f"marker key{'s' if len(found) > 1 else ''} {', '.join(found)}"


def marked_latents(tensors: Mapping[str, Tensor], vae: VAEConfig) -> VAEConfig:
    """`vae` with the statistics of latents that a file's marks tell, scaled to the deviation of EDM's data."""
    if not any(key in tensors for key in LATENTS):
        return vae
    mean, std = (_numbers(tensors, key, vae.latent_channels) for key in LATENTS)
    return replace(vae, latents_mean=mean, latents_std=std, scaling_factor=EDMConfig().sigma_data)


def _numbers(tensors: Mapping[str, Tensor], key: str, count: int) -> tuple[float, ...]:
    """What a mark holds. Raises ValueError where it is missing, or no `count` finite numbers."""
    values = tuple(tensors[key].double().flatten().tolist()) if key in tensors else ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(
            f"marker key {key} holds {list(values[:9])}, not {count} finite numbers: download the file again"
        )
    return values
