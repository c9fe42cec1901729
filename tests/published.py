"""The published schedulers (diffusers), set up as our configuration says: the oracle for schedules and solvers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_dpmsolver_multistep,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_unipc_multistep,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from cutdiff.sampling.edm import EDMConfig
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import Schedule

MODULES = (
    scheduling_euler_discrete,
    scheduling_ddim,
    scheduling_edm_euler,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_unipc_multistep,
)


def published_euler(config: NoiseConfig, **options: Any) -> EulerDiscreteScheduler:
    options = {"use_karras_sigmas": config.use_karras_sigmas, **options}
    return EulerDiscreteScheduler(**_shared_options(config), **options)


def published_ddim(config: NoiseConfig) -> DDIMScheduler:
    return DDIMScheduler(**_shared_options(config), set_alpha_to_one=config.set_alpha_to_one, clip_sample=False)


def published_edm(config: EDMConfig) -> EDMEulerScheduler:
    return EDMEulerScheduler(**asdict(config))


def published_dpmpp_2m(
    config: NoiseConfig, schedule: Schedule, kind: str = "dpmsolver++"
) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) on the sigmas and timesteps of `schedule`: its own of equal names are other ones."""
    options = {"algorithm_type": kind, "solver_order": 2, "solver_type": "midpoint"}
    return _visiting(schedule, DPMSolverMultistepScheduler(**_shared_options(config), **options))


def published_unipc(config: NoiseConfig, schedule: Schedule) -> UniPCMultistepScheduler:
    """UniPC as it ships, on the sigmas and timesteps of `schedule`."""
    return _visiting(schedule, UniPCMultistepScheduler(**_shared_options(config), final_sigmas_type="zero"))


def published_lcm(config: NoiseConfig) -> LCMScheduler:
    return LCMScheduler(**_shared_options(config), clip_sample=False)


def published_heun(config: NoiseConfig, schedule: Schedule) -> HeunDiscreteScheduler:
    """Heun's solver on the sigmas and timesteps of `schedule`, each but the first of which it reads twice."""
    options = _shared_options(config)
    del options["rescale_betas_zero_snr"]  # the only difference that makes are the sigmas, which are replaced
    scheduler = _visiting(schedule, HeunDiscreteScheduler(**options))
    first, *twice = scheduler.timesteps
    scheduler.timesteps = torch.stack([first, *(t for t in twice for _ in range(2))])
    first, *twice, last = scheduler.sigmas
    scheduler.sigmas = torch.stack([first, *(sigma for sigma in twice for _ in range(2)), last])
    return scheduler


def published_ancestral(config: NoiseConfig, schedule: Schedule) -> EulerAncestralDiscreteScheduler:
    """Euler's ancestral solver on the sigmas and timesteps of `schedule`: it has none of Karras et al. itself."""
    return _visiting(schedule, EulerAncestralDiscreteScheduler(**_shared_options(config)))


def _visiting(schedule: Schedule, scheduler: Any) -> Any:
    scheduler.set_timesteps(schedule.num_steps)
    scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.tensor(schedule.timesteps, dtype=torch.float64)
    scheduler.set_begin_index(0)
    return scheduler


@contextmanager
def drawing(fresh: Tensor) -> Iterator[None]:
    """Let the schedulers with fresh noise draw the rows of `fresh` one after another."""
    rows = iter(fresh)

    def randn_tensor(*_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
        return next(rows).to(dtype)

    modules = (
        scheduling_euler_ancestral_discrete,
        scheduling_dpmsolver_multistep,
        scheduling_lcm,
        scheduling_flow_match_euler_discrete,
    )
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(patch.object(module, "randn_tensor", randn_tensor))
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """Let schedulers that are made and run in the block compute in float64 where their code says float32.

    Their own float32 loses more than the 1e-5 that we ask for, in four places. Cumulative products of alphas near 0
    or 1 are rounded before sigma is taken from them: 1e-5 of SDXL's smallest sigma, 2e-3 of the cosine schedule's
    largest. Euler forms x + dx·dt, which cancels at a last step from sigma 4096 to 0, and casts its input to float32.
    DDIM's direction is the root of 1 - alpha - variance, which cancels where eta is near 1. Euler's ancestral solver
    forms sqrt(target² - up²), which cancels where one sigma is far below the one before.
    """
    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(patch.object(module, "torch", _Float64Torch()))
        yield


class _Float64Torch:
    """The torch module, whose `float32` is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _shared_options(config: NoiseConfig) -> dict[str, Any]:
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
        "rescale_betas_zero_snr",
    )
    return {name: getattr(config, name) for name in names}
