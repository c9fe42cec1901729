"""Runs of FreCaS on tiny networks, and their draws; what its published code ended with lies beside this file.

published_frecas.npz was made by running github.com/xtudbxk/FreCaS (commit f9c0c46: its wrappers of attention, guidance
and DDIM scheduler, as its main.py puts them on) on diffusers' SDXL pipeline with the weights and states of replayed.py.
Patched: the noise of each stage and of the encoder's samples is that made here; its logger does nothing. Its wrappers
end with an error on an Euler scheduler, so there are no such runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from replayed import unit_noise
from torch import Tensor

from cutdiff.sampling.draws import Draws

GUIDANCE, HIGH_GUIDANCE, WEIGHT = 7.5, 35.0, 0.6


class Published(NamedTuple):
    """The arguments of a run, in the words of its command line."""

    sizes: tuple[tuple[int, int], ...]
    """The canvas of each stage in latents."""
    steps: tuple[int, ...]
    ends: tuple[int, ...]
    gamma: float


RUNS = {
    "2x2": Published(((8, 8), (16, 16)), (16, 4), (200, 0), 1.5),
    "not_square": Published(((8, 12), (16, 24)), (16, 4), (200, 0), 1.5),
    "3x3": Published(((8, 8), (24, 24)), (13, 9), (300, 0), 1.5),
    "4x4": Published(((8, 8), (16, 16), (32, 32)), (12, 3, 6), (400, 200, 0), 2.0),
    "defaults_2x2": Published(((8, 8), (16, 16)), (40, 10), (200, 0), 1.5),
    "defaults_4x4": Published(((8, 8), (16, 16), (32, 32)), (30, 5, 15), (400, 200, 0), 2.0),
}


@dataclass(frozen=True)
class Replayed(Draws):
    """The draws of the published runs."""

    seeds: tuple[int, ...] = (0,)

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return self.phase_noise(shape, 1)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return unit_noise(5000 + phase, shape)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return unit_noise(5010 + phase, shape)
