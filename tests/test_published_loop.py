"""CutDiffusion against its published loop, which lives with the bench: its state is a list of patches, its networks and
scheduler are diffusers', and it averages after the scheduler's step. It shares nothing with cutdiff but the weights and
the text states, and its draws are handed to cutdiff through `Draws`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cutdiff
from cutdiff.bench.baselines import PublishedDraws, VectorisedDraws, make_baselines
from cutdiff.checkpoint.model import Model
from cutdiff.sampling.draws import Draws

WINDOW, STRIDE, GUIDANCE = 8, 4, 7.5


class PublishedRun:
    """The draws of a published run, made beforehand: noise by patch, an index for every step, jittered windows."""

    def __init__(self, grid: tuple[int, int], num_steps: int, seed: int) -> None:
        self.grid, self.num_steps = grid, num_steps
        generator = torch.Generator().manual_seed(seed)
        self.num_patches = grid[0] * grid[1]
        self.noise = torch.randn(self.num_patches, 4, WINDOW, WINDOW, generator=generator)
        shape = (num_steps, self.num_patches, 4, WINDOW, WINDOW)
        self.index = torch.rand(shape, generator=generator).argsort(dim=1)
        self.windows = [self._windows(generator) for _ in range(num_steps)]

    def _windows(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """The tops and lefts of views on the padded canvas, which are never negative."""
        reach = (WINDOW - STRIDE) // 4
        starts = []
        for tiles in self.grid:
            size = tiles * WINDOW
            starts.append([(s, size) for s in range(0, size - WINDOW + 1, STRIDE)])

        def jitter(start: int, size: int) -> int:
            low = 0 if start + WINDOW == size else -reach
            high = 0 if start == 0 else reach
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        return [
            (y + jitter(y, height) + reach, x + jitter(x, width) + reach)
            for y, height in starts[0]
            for x, width in starts[1]
        ]


class Given(PublishedDraws):
    """A published run's draws, given to the loop."""

    def __init__(self, run: PublishedRun) -> None:
        super().__init__(torch.device("cpu"))
        self.run = run

    def noise(self, shape: Any) -> Tensor:
        return self.run.noise

    def permutation(self, step: int, shape: Any) -> tuple[Tensor, Tensor]:
        return self.run.index[step], self.run.index[step].argsort(0)

    def windows(self, step: int, size: Any, window: int, stride: int) -> list[tuple[int, int]]:
        return self.run.windows[step]


class Replayed(Draws):
    """A published run's draws in cutdiff's layouts."""

    def __init__(self, run: PublishedRun) -> None:
        super().__init__((0,))
        object.__setattr__(self, "run", run)

    run: PublishedRun

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        canvas = torch.empty(shape)
        for n, patch in enumerate(self.run.noise):
            r, c = divmod(n, self.run.grid[1])
            canvas[0, :, r :: self.run.grid[0], c :: self.run.grid[1]] = patch
        return canvas

    def permutation(self, step: int, grid: Any, shape: Any, grain: str) -> Tensor:
        return self.run.index[step]

    def view_origins(self, step: int, size: Any, window: Any, stride: Any, jitter: Any) -> Tensor:
        return torch.tensor(self.run.windows[step]) - (WINDOW - STRIDE) // 4


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize(("grid", "num_steps"), [((2, 2), 10), ((2, 3), 6), ((3, 3), 3)])
@torch.no_grad()
def test_the_published_run_is_repeated_draw_by_draw(
    tiny_model: Model, grid: tuple[int, int], num_steps: int, name: str
) -> None:
    run = PublishedRun(grid, num_steps, seed=3)
    size = (grid[0] * WINDOW, grid[1] * WINDOW)
    loop = replace(make_baselines(tiny_model, [name], size)[name], draws=lambda *_: Given(run))
    *_, (stage, expected) = loop.steps(num_steps)
    *_, last = cutdiff.denoise(
        tiny_model,
        "",
        height=size[0] * 8,
        width=size[1] * 8,
        num_steps=num_steps,
        stride=STRIDE,
        guidance_scale=GUIDANCE,
        size_conditioning="target",
        draws=Replayed(run),
    )
    assert last.stage == stage == "detail"
    assert math.isfinite(last.latents.norm().item())
    assert ((last.latents - expected).norm() / expected.norm()).item() < 1e-4
    pictures = loop.decode(expected), cutdiff.decode(tiny_model, expected)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 9), side=st.integers(1, 4))
@pytest.mark.parametrize("draws", [PublishedDraws, VectorisedDraws])
def test_its_permutations_are_permutations_with_their_inverses(
    draws: type[PublishedDraws], seed: int, count: int, side: int
) -> None:
    index, inverse = draws(torch.device("cpu"), seed).permutation(0, (count, 4, side, side))
    places = torch.arange(count)[:, None, None, None].expand(count, 4, side, side)
    assert torch.equal(index.sort(dim=0).values, places)
    assert torch.equal(index.gather(0, inverse), places)
    assert torch.equal(inverse.gather(0, index), places)


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_its_windows_cover_the_canvas_and_stay_on_what_is_padded(seed: int, rows: int, columns: int) -> None:
    size, reach = (rows * WINDOW, columns * WINDOW), (WINDOW - STRIDE) // 4
    windows = PublishedDraws(torch.device("cpu"), seed).windows(0, size, WINDOW, STRIDE)
    assert len(windows) == (2 * rows - 1) * (2 * columns - 1)
    count = torch.zeros(size[0] + 2 * reach, size[1] + 2 * reach)
    for y, x in windows:
        assert count[y : y + WINDOW, x : x + WINDOW].shape == (WINDOW, WINDOW)
        count[y : y + WINDOW, x : x + WINDOW] += 1
    assert count[reach : reach + size[0], reach : reach + size[1]].min() > 0
