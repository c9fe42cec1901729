"""Every random draw of a run. One object makes them all and is passed in; nothing touches a global generator.

A researcher replaces any of the methods, for instance to repeat a run of other code draw by draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cutdiff.sampling.operators import Permutation, SeededPermutation, view_grid

NOISE, ORIGINS, SHIFTS, PHASE_NOISE, ENCODER_NOISE, TORUS_SHIFTS, BLURS, SECOND_NOISE = 1, 2, 3, 4, 5, 6, 7, 8
BACKGROUND_COLORS = 9
"""The purposes of streams of random numbers: no two of them share numbers of a seed."""
LAYER_STEPS = 1 << 20
"""The steps between the origins of one layer and those of the next."""


@dataclass(frozen=True)
class Draws:
    """Draws by seed: `seeds` has one entry for each image, so that an image does not depend on its neighbours."""

    seeds: tuple[int, ...]
    device: torch.device | str = "cpu"
    """The device that noise goes to. It is made on the CPU, so that every device gets the same; origins stay there."""

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed={seed} must lie in 0 … 2⁶⁴ − 1")

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        """Standard normal noise (B, C, H, W) in canvas layout: the initial noise, or that which a solver adds at
        `step`. A phase that diffuses its start takes `phase_noise`."""
        return self._normal(shape, NOISE, 0 if step is None else 1 + step)

    def second_noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        """Standard normal noise (B, C, H, W) for a solver that adds noise twice at `step`."""
        return self._normal(shape, SECOND_NOISE, 1 + step)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        """Standard normal noise (B, C, H, W) that a phase of a cascade, counted from 1, diffuses its start with."""
        return self._normal(shape, PHASE_NOISE, phase)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        """Standard normal noise (B, C, H, W) by which the VAE's encoder samples the latents that a phase, counted from
        1, starts from."""
        return self._normal(shape, ENCODER_NOISE, phase)

    def permutation(self, step: int, grid: tuple[int, int], shape: tuple[int, ...], grain: str) -> Permutation:
        """The permutation by which `step` exchanges pixels of patches of `shape` (B, C, h, w) on `grid` (s_h, s_w).

        `grain` is "channel", "pixel" or "none". An explicit index is int64 (N, C or 1, h, w), or one for each image.
        """
        return SeededPermutation(self.seeds, step, grain)

    def view_origins(
        self,
        step: int,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        jitter: tuple[int, int],
    ) -> Tensor:
        """The corners of the views of `step`: (B, V, 2) of (top, left), which may reach past the canvas by the jitter.

        Every axis moves by up to its `jitter`. Views at a border move outwards only, and an axis with a single view
        does not move, so that the views cover the canvas wherever they covered it without jitter.
        """
        grid = view_grid(size, window, stride)  # (V, 2)
        last = torch.tensor([side - inner for side, inner in zip(size, window, strict=True)], device="cpu")
        most = torch.tensor(jitter, device="cpu")
        low = torch.where(grid == last, 0, -most)
        high = torch.where(grid == 0, 0, most)
        draws = []
        for seed in self.seeds:
            offsets = _generator(seed, ORIGINS, step).integers(low.numpy(), high.numpy(), endpoint=True)
            draws.append(grid + torch.from_numpy(offsets))
        return torch.stack(draws)

    def attention_origins(
        self,
        step: int,
        layer: int,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        jitter: tuple[int, int],
    ) -> Tensor:
        """The corners of the windows that a `layer`, counted from 0, attends within at `step`: as `view_origins`, on
        the layer's feature map. Each layer draws as if it were a step of its own."""
        return self.view_origins((layer + 1) * LAYER_STEPS + step, size, window, stride, jitter)

    def window_shifts(self, step: int) -> Tensor:
        """The quarters of a window by which `step` shifts windowed attention: (B,), 0 to 3, on the CPU."""
        return torch.tensor([int(_generator(seed, SHIFTS, step).integers(4)) for seed in self.seeds], device="cpu")

    def torus_shifts(self, step: int, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        """The (down, right) by which `step` shifts the windows of a `Torus`: (B, 2), int64, on the CPU.

        All shifts of an axis are alike probable (SpotDiffusion, arXiv 2407.15507); one that a single window spans does
        not move, as there the borders of the picture would meet inside of it.
        """
        high = [side if side > inner else 1 for side, inner in zip(size, window, strict=True)]
        shifts = [_generator(seed, TORUS_SHIFTS, step).integers(high) for seed in self.seeds]
        return torch.from_numpy(np.stack(shifts))

    def blurs(self, phase: int, least: float, most: float) -> Tensor:
        """The deviations of the blurs by which the pictures that a phase, counted from 1, starts from are sharpened:
        (B,), float64, on the CPU, all between `least` and `most` alike probable (DiffuseHigh, arXiv 2406.18459)."""
        blurs = [_generator(seed, BLURS, phase).uniform(least, most) for seed in self.seeds]
        return torch.tensor(blurs, dtype=torch.float64, device="cpu")

    def background_colors(self, step: int) -> Tensor:
        """The plain colours that regions are shown around themselves at `step`: RGB (B, 3) in [0, 1], float32, on the
        CPU, all colours alike probable (MultiDiffusion, arXiv 2302.08113)."""
        colors = [_generator(seed, BACKGROUND_COLORS, step).random(3, np.float32) for seed in self.seeds]
        return torch.from_numpy(np.stack(colors))

    def _normal(self, shape: tuple[int, ...], purpose: int, stream: int) -> Tensor:
        images = [_generator(seed, purpose, stream).standard_normal(shape[1:], np.float32) for seed in self.seeds]
        return torch.from_numpy(np.stack(images)).to(self.device)


def solver_noise(draws: Draws, shape: tuple[int, ...], step: int, part: int = 0) -> Tensor:
    """The noise (B, C, H, W) that a solver adds at `step`, the first time or, as `part` 1, the second."""
    return draws.second_noise(shape, step) if part else draws.noise(shape, step)


def checked(draws: Any, num_images: int) -> Draws:
    """The same draws, of any class; ValueError, which names the draw, where one has not the shape that a run needs."""
    return cast(Draws, _Checked(draws, num_images))


class _Checked:
    def __init__(self, draws: Any, num_images: int) -> None:
        self.draws, self.num_images = draws, num_images

    def __getattr__(self, name: str) -> Any:
        return getattr(self.draws, name)

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return _shaped("noise", self.draws.noise(shape, step), shape)

    def second_noise(self, shape: tuple[int, ...], step: int) -> Tensor:
        return _shaped("second_noise", self.draws.second_noise(shape, step), shape)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return _shaped("phase_noise", self.draws.phase_noise(shape, phase), shape)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return _shaped("encoder_noise", self.draws.encoder_noise(shape, phase), shape)

    def permutation(self, step: int, grid: tuple[int, int], shape: tuple[int, ...], grain: str) -> Permutation:
        index = self.draws.permutation(step, grid, shape, grain)
        if index is not None and not isinstance(index, SeededPermutation):
            shapes = [(grid[0] * grid[1], channels, *shape[2:]) for channels in (shape[1], 1)]
            shapes += [(self.num_images, *shape) for shape in shapes]
            _shaped("permutation", index, *shapes, dtype=torch.int64)
        elif index is not None and len(index.seeds) != self.num_images:
            raise ValueError(
                f"draws.permutation gave seeds for {len(index.seeds)} images where {self.num_images} are drawn"
            )
        return index

    def view_origins(
        self,
        step: int,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        jitter: tuple[int, int],
    ) -> Tensor:
        return self._origins("view_origins", step, size, window, stride, jitter)

    def attention_origins(
        self,
        step: int,
        layer: int,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        jitter: tuple[int, int],
    ) -> Tensor:
        return self._origins("attention_origins", step, layer, size, window, stride, jitter)

    def _origins(self, name: str, *of: Any) -> Tensor:
        origins = getattr(self.draws, name)(*of)
        num_views = origins.shape[-2] if isinstance(origins, Tensor) and origins.ndim > 1 else 1
        return _shaped(name, origins, (self.num_images, num_views, 2), (num_views, 2), dtype=torch.int64)

    def window_shifts(self, step: int) -> Tensor:
        return _shaped("window_shifts", self.draws.window_shifts(step), (self.num_images,))

    def torus_shifts(self, step: int, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        shifts = self.draws.torus_shifts(step, size, window)
        return _shaped("torus_shifts", shifts, (self.num_images, 2), dtype=torch.int64)

    def blurs(self, phase: int, least: float, most: float) -> Tensor:
        return _shaped("blurs", self.draws.blurs(phase, least, most), (self.num_images,))

    def background_colors(self, step: int) -> Tensor:
        return _shaped("background_colors", self.draws.background_colors(step), (self.num_images, 3))


def _shaped(name: str, value: Any, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """The value where it is a tensor of one of the shapes."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in shapes or value.dtype != (dtype or value.dtype):
        what = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        needed = " or ".join(map(str, shapes)) + (f" of {dtype}" if dtype else "")
        raise ValueError(f"draws.{name} gave {what} where {needed} is needed")
    return value


def _generator(seed: int, purpose: int, stream: int) -> np.random.Generator:
    """Numbers of their own for each seed, purpose and stream: Philox keyed by all 128 bits of them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose << 32 | stream], dtype=np.uint64)))
