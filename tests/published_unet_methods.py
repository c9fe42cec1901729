"""A tiny network of SDXL's layout and runs on it; their final latents by the published codes lie beside this file.

published_unet_methods.npz was made by running github.com/YingqingHe/ScaleCrafter (commit 9dc1185: its loop with eta = 0
and without FreeU; its processor of scaled attention over unfused attention) and github.com/megvii-research/HiDiffusion
(commit e9ec39a: its draws replaced by `Draws.window_shifts`, its thresholds for 4096 pixels where a canvas is four
times the native size) on diffusers' network and DDIM scheduler, with the weights, states and noise made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import QUICK_UNET
from torch import Tensor

from cutdiff.models.text import TextStates

CONFIG = replace(
    QUICK_UNET,
    in_channels=2,
    out_channels=2,
    channels=(8, 16, 32),
    layers_per_block=2,
    transformer_layers=(0, 2, 2),
    mid_transformer_layers=2,
    num_heads=(1, 2, 4),
    context_dim=12,
    pooled_dim=6,
)
STEPS, GUIDANCE = 10, 5.0

RUNS: dict[str, tuple[str, tuple[int, int], int]] = {
    "attention_scaling": ("attention_scaling", (16, 24), 8),
    "scalecrafter_2": ("scalecrafter", (16, 12), 8),
    "scalecrafter_2.5": ("scalecrafter", (20, 20), 8),
    "scalecrafter_4": ("scalecrafter", (16, 16), 4),
    "hidiffusion_2": ("hidiffusion", (16, 24), 8),
    "hidiffusion_4": ("hidiffusion", (16, 24), 4),
}
"""The method, the canvas and the native size in latents of each run."""


def published_latents(name: str) -> Tensor:
    with np.load(Path(__file__).with_suffix(".npz")) as stored:
        return torch.from_numpy(stored[name])


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for every parameter, by its name, that no library's change of random streams can change."""
    values = {}
    for stream, key in enumerate(sorted(state)):
        shape = state[key].shape
        value = _uniform(stream, tuple(shape))
        if len(shape) > 1:
            value *= math.sqrt(3 / math.prod(shape[1:]))
        else:
            value = 0.2 * value + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        values[key] = value
    return values


def states() -> tuple[TextStates, TextStates]:
    """The positive and the negative states."""
    return tuple(  # type: ignore[return-value]
        TextStates(_uniform(2000 + i, (1, 5, CONFIG.context_dim)), _uniform(3000 + i, (1, CONFIG.pooled_dim)))
        for i in range(2)
    )


def noise(size: tuple[int, int]) -> Tensor:
    return math.sqrt(3) * _uniform(4000, (1, CONFIG.in_channels, *size))


def _uniform(stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers between -1 and 1, from the raw bits of a counter."""
    raw = np.random.Philox(key=stream).random_raw(math.prod(shape))
    return torch.from_numpy((raw / 2.0**63 - 1).astype(np.float32)).view(shape)
