"""Runs of RectifiedHR on tiny networks; samples of their final latents by the published code lie beside this file.

published_rectifiedhr.npz was made by running `main` of run_sdxl.py in github.com/EnVision-Research/RectifiedHR (commit
e1331b7) on diffusers' networks and schedulers, with the weights and states of replayed.py. What was patched: the
settings; the noise, which is made here; states in the place of text encoders; no 16-bit floats (its refresh rounds the
networks and the pictures to bfloat16); the timestep handed to `add_noise` as a list of one, and the first noise scaled,
which only Euler's scheduler asks for. The VAE's tiles are larger than these pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from replayed import CONFIG, unit_noise
from tiny import QUICK_VAE
from torch import Tensor

UNET = replace(CONFIG, in_channels=4, out_channels=4)
VAE = replace(QUICK_VAE, scaling_factor=0.13025)
GUIDANCE = 5.0


@dataclass(frozen=True)
class Published:
    """The settings of a published run."""

    canvases: tuple[tuple[int, int], ...]
    """In latents."""
    num_steps: int
    first_refresh: int
    """Tmin."""
    max_guidance_scale: float
    solver: str = "ddim"
    refresh_power: float = 1.0
    guidance_power: float = 1.0


RUNS = {
    "2x2": Published(((8, 8), (16, 16)), 10, 6, 30.0),
    "2x2_euler": Published(((8, 8), (16, 16)), 10, 6, 30.0, "euler"),
    "3x2": Published(((8, 6), (24, 18)), 10, 6, 30.0),
    "3x3": Published(((8, 8), (16, 16), (24, 24)), 10, 7, 50.0, "euler", 0.5, 0.5),
    "4x4": Published(((8, 8), (20, 20), (32, 32)), 20, 16, 50.0, "ddim", 0.5, 0.5),
    "2x1": Published(((12, 6), (22, 11), (32, 16)), 10, 8, 50.0),
}


def sampled(latents: Tensor) -> Tensor:
    """The latents that are kept of a run."""
    return latents[..., ::2, ::2].clone()


def noises(run: Published) -> tuple[Tensor, ...]:
    """The first noise and that of every refresh."""
    return tuple(unit_noise(4000 + i, (1, 4, *size)) for i, size in enumerate(run.canvases))
