"""Runs of FreeScale on tiny networks; samples of their latents by the published code lie beside this file.

published_freescale.npz was made by running the pipeline of github.com/ali-vilab/FreeScale (commit d5a2256) on
diffusers' networks and schedulers (0.42), with the weights and states of replayed.py, and the noise and jitter made
here. What was patched: its imports of what diffusers no longer has; 1024 pixels and 128 latents, which are the native
size of these networks; the cast of encoded latents to 16 bits; and its random numbers. `dilate_tau` was 70% of the
steps, as 35 are of 50. FreeU, which its script adds, is off, and the VAE's tiles are larger than these pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from replayed import CONFIG, VAE_CONFIG, noise, uniform, unit_noise
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import view_grid

UNET_CONFIG = replace(CONFIG, transformer_layers=(0, 1, 2))
SHALLOW_VAE = replace(VAE_CONFIG, channels=(8, 8))
FACTOR = 2
GUIDANCE = 5.0


@dataclass(frozen=True)
class Published:
    """The settings of a published run."""

    native: int
    canvases: tuple[Size, ...]
    """The sizes in latents, the native one first."""
    solver: str = "euler"
    num_steps: int = 5
    options: tuple[tuple[str, Any], ...] = ()
    """Options of ours that differ from the defaults."""

    @property
    def restart(self) -> int:
        """The published first step of a larger size."""
        return int(self.num_steps * 0.3)


RUNS = {
    "2x2": Published(32, ((32, 32), (64, 64)), num_steps=10),
    "2x2_ddim": Published(32, ((32, 32), (64, 64)), "ddim"),
    "2x2_fast": Published(32, ((32, 32), (64, 64)), "ddim", options=(("fast_mode", True),)),
    "2x1": Published(64, ((64, 32), (128, 64)), "ddim"),
    "2x3": Published(48, ((32, 48), (96, 144)), num_steps=4, options=(("factors", ()),)),
    "3x3": Published(32, ((32, 32), (64, 64), (96, 96)), "ddim", num_steps=4),
    "4x4": Published(32, ((32, 32), (64, 64), (128, 128)), num_steps=4),
}


class Given(Draws):
    """Draws that no library's change of random streams can change."""

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return noise((shape[2], shape[3]))

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return unit_noise(5000 + phase, shape)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return unit_noise(6000 + phase, shape)

    def attention_origins(self, step: int, layer: int, size: Size, window: Size, stride: Size, jitter: Size) -> Tensor:
        grid = view_grid(size, window, stride)
        most = torch.tensor(jitter)
        low = torch.where(grid == torch.tensor(size) - torch.tensor(window), 0, -most)
        high = torch.where(grid == 0, 0, most)
        drawn = (uniform(10_000 + 100 * step + layer, tuple(grid.shape)) + 1) / 2
        return grid + torch.minimum(low + (drawn * (high - low + 1)).floor().long(), high)


def sampled(latents: Tensor) -> Tensor:
    """A few of the latents, from all rows and columns."""
    return latents.flatten()[::37]
