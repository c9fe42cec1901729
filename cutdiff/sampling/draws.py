"""Every random draw of a run. One object makes them all and is passed in; nothing touches a global generator.

A researcher replaces any of the methods, for instance to repeat a run of other code draw by draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutdiff.sampling.operators import Permutation, SeededPermutation, view_grid

NOISE, ORIGINS, SHIFTS, PHASE_NOISE = 1, 2, 3, 4
"""What a stream of random numbers is for: no two of them share numbers of a seed."""


@dataclass(frozen=True)
class Draws:
    """Draws by seed: `seeds` has one entry for each image, so that an image does not depend on its neighbours."""

    seeds: tuple[int, ...]
    device: torch.device | str = "cpu"
    """Where noise goes. It is made on the CPU, so that every device sees the same; origins stay there."""

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed={seed} must lie in 0 … 2⁶⁴ − 1")

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        """Standard normal noise (B, C, H, W) in canvas layout: the initial noise, or that which `step` adds."""
        return self._normal(shape, NOISE, 0 if step is None else 1 + step)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        """Standard normal noise (B, C, H, W) that a phase of a cascade, counted from 1, diffuses its start with."""
        return self._normal(shape, PHASE_NOISE, phase)

    def permutation(self, step: int, grid: tuple[int, int], shape: tuple[int, ...], grain: str) -> Permutation:
        """How `step` exchanges pixels between the patches of `shape` (B, C, h, w) on `grid` (s_h, s_w)."""
        return SeededPermutation(self.seeds, step, grain)

    def view_origins(
        self,
        step: int,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        jitter: tuple[int, int],
    ) -> Tensor:
        """Where the views of `step` stand: (B, V, 2) of (top, left), which may reach past the canvas by the jitter.

        Every axis moves by up to its `jitter`. Views at a border move outwards only, and an axis with a single view
        does not move, so that the views cover the canvas wherever they covered it without jitter.
        """
        grid = view_grid(size, window, stride)  # (V, 2)
        last = torch.tensor(size) - torch.tensor(window)
        low = torch.where(grid == last, 0, -torch.tensor(jitter))
        high = torch.where(grid == 0, 0, torch.tensor(jitter))
        draws = []
        for seed in self.seeds:
            offsets = _generator(seed, ORIGINS, step).integers(low.numpy(), high.numpy(), endpoint=True)
            draws.append(grid + torch.from_numpy(offsets))
        return torch.stack(draws)

    def window_shifts(self, step: int) -> Tensor:
        """By how many quarters of a window `step` shifts windowed attention: (B,), 0 to 3, on the CPU."""
        return torch.tensor([int(_generator(seed, SHIFTS, step).integers(4)) for seed in self.seeds])

    def _normal(self, shape: tuple[int, ...], purpose: int, stream: int) -> Tensor:
        images = [_generator(seed, purpose, stream).standard_normal(shape[1:], np.float32) for seed in self.seeds]
        return torch.from_numpy(np.stack(images)).to(self.device)


def _generator(seed: int, purpose: int, stream: int) -> np.random.Generator:
    """Numbers of their own for each seed, purpose and stream: Philox keyed by all 128 bits of them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose << 32 | stream], dtype=np.uint64)))
