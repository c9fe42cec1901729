"""SpotDiffusion on a tiny network of SD's layout; the final latents by the published code lie beside this file.

published_spotdiffusion.npz was made by running github.com/stanifrolov/spotdiffusion (commit 0504235: its
`text2panorama` without autocast, with windows of the small network's native size in the place of 64) on diffusers'
network and DDIM scheduler, with the weights, states and noise of replayed.py, and the shifts made here in the place of
its draws. Its canvas moves under the windows, so that its latents end shifted by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import replayed
import torch
from published_unet_methods import STEPS
from torch import Tensor

from cutdiff.sampling.draws import Draws

CONFIG = replace(replayed.CONFIG, pooled_dim=0, size_embedding_dim=0)

RUNS: dict[str, tuple[tuple[int, int], int]] = {
    "panorama": ((8, 32), 8),
    "two_rows": ((16, 24), 8),
    "one_window": ((8, 8), 8),
}
"""The canvas and the native size in latents of each run."""


def shifts(width: int) -> list[int]:
    """The columns that the published canvas moves to the left by after each step."""
    return [(7 * step + 3) % width for step in range(STEPS)]


def published_latents(name: str) -> Tensor:
    """The final latents, moved back to where they began."""
    latents = replayed.published_latents("spotdiffusion", name)
    return latents.roll(sum(shifts(latents.shape[3])), 3)


@dataclass(frozen=True)
class PublishedDraws(Draws):
    """The windows on a canvas that lies still: at first in its corner, and all moved along its width."""

    def torus_shifts(self, step: int, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        moved = [0, *accumulate(shifts(size[1]))][step]
        return torch.tensor([[0, moved % size[1]]] * len(self.seeds))
