"""CutDiffusion against its published loop: state as a list of patches, diffusers' scheduler, averages after its step.

The loop below is written anew from what the published code computes (github.com/lmbxmu/CutDiffusion), with all views in
one batch; there the scheduler's step index is wrong for every further view batch. It shares nothing with cutdiff but
the network and the text states, and its draws are handed to cutdiff through `Draws`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from torch import Tensor

import cutdiff
from cutdiff.draws import Draws
from cutdiff.model import Model
from cutdiff.models.text import TextStates

WINDOW, STRIDE, GUIDANCE = 8, 4, 7.5


class PublishedRun:
    """Draws of a published run, made beforehand: noise by patch, an index for every step, jittered windows."""

    def __init__(self, grid: tuple[int, int], num_steps: int, seed: int) -> None:
        self.grid, self.num_steps = grid, num_steps
        generator = torch.Generator().manual_seed(seed)
        self.num_patches = grid[0] * grid[1]
        self.noise = torch.randn(self.num_patches, 4, WINDOW, WINDOW, generator=generator)
        shape = (num_steps, self.num_patches, 4, WINDOW, WINDOW)
        self.index = torch.rand(shape, generator=generator).argsort(dim=1)
        self.windows = [self._windows(generator) for _ in range(num_steps)]

    def _windows(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Tops and lefts on the padded canvas, so never negative."""
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


def published_latents(model: Model, run: PublishedRun, positive: TextStates, negative: TextStates) -> Tensor:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    scheduler.set_timesteps(run.num_steps)
    (rows, columns), reach = run.grid, (WINDOW - STRIDE) // 4
    height, width = rows * WINDOW, columns * WINDOW

    def predict(batch: Tensor, t: Tensor, crops: Tensor) -> Tensor:
        scheduler._step_index = None
        scaled = scheduler.scale_model_input(batch, t).repeat_interleave(2, dim=0)
        sizes = torch.tensor([8.0 * height, 8.0 * width])
        size_ids = torch.cat([sizes.expand(len(batch), 2), crops, sizes.expand(len(batch), 2)], dim=1)
        output = model.unet(
            scaled,
            t.expand(len(scaled)),
            torch.cat([negative.context, positive.context]).repeat(len(batch), 1, 1),
            torch.cat([negative.pooled, positive.pooled]).repeat(len(batch), 1),
            size_ids.repeat_interleave(2, dim=0),
        )
        unconditional, conditional = output[::2], output[1::2]
        return unconditional + GUIDANCE * (conditional - unconditional)

    def step(prediction: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        scheduler._step_index = None
        return scheduler.step(prediction, t, sample, return_dict=False)[0]

    state = run.noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        if i < run.num_steps / 2:
            index = run.index[i]
            prediction = predict(state.gather(0, index), t, torch.zeros(run.num_patches, 2))
            state = step(prediction.gather(0, index.argsort(0)), t, state)
            continue
        if len(state) > 1:
            canvas = torch.empty(1, 4, height, width)
            for patch, (r, c) in zip(state, ((r, c) for r in range(rows) for c in range(columns)), strict=True):
                canvas[0, :, r::rows, c::columns] = patch
            state = canvas
        padded = F.pad(state, (reach,) * 4)
        windows = run.windows[i]
        batch = torch.cat([padded[:, :, y : y + WINDOW, x : x + WINDOW] for y, x in windows])
        stepped = step(predict(batch, t, torch.tensor(windows) * 8.0), t, batch)
        value, count = torch.zeros_like(padded), torch.zeros_like(padded)
        for view, (y, x) in zip(stepped, windows, strict=True):
            value[0, :, y : y + WINDOW, x : x + WINDOW] += view
            count[0, :, y : y + WINDOW, x : x + WINDOW] += 1
        inner = (..., slice(reach, reach + height), slice(reach, reach + width))
        state = value[inner] / count[inner]
    return state


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


@pytest.mark.parametrize(("grid", "num_steps"), [((2, 2), 10), ((2, 3), 6), ((3, 3), 4)])
@torch.no_grad()
def test_the_published_run_is_repeated_draw_by_draw(tiny_model: Model, grid: tuple[int, int], num_steps: int) -> None:
    prompt = "a red house with mountains over a meadow at sunset"
    run = PublishedRun(grid, num_steps, seed=3)
    positive = tiny_model.text.encode([prompt])
    expected = published_latents(tiny_model, run, positive, TextStates.zeros_like(positive))
    steps = cutdiff.denoise(
        tiny_model,
        prompt,
        height=grid[0] * WINDOW * 8,
        width=grid[1] * WINDOW * 8,
        num_steps=num_steps,
        stride=STRIDE,
        guidance_scale=GUIDANCE,
        size_conditioning="target",
        draws=Replayed(run),
    )
    final = list(steps)[-1].latents
    assert math.isfinite(final.norm().item())
    assert ((final - expected).norm() / expected.norm()).item() < 1e-4
