"""True pictures of the scenes world, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from cutdiff.scenes import world
from cutdiff.scenes.render import render
from cutdiff.scenes.world import Scenes


def scenes(n: int, seed: int = 0) -> Scenes:
    """N random scenes."""
    return world.sample(n, torch.Generator().manual_seed(seed))


def pictures(drawn: Scenes, size: int = 128) -> Tensor:
    """True renders of scenes, (N, 3, size, size) in [0, 1]."""
    parts = [drawn[index] for index in torch.arange(len(drawn)).split(20)]  # to bound memory
    return torch.cat([render(part, size) for part in parts]) / 2 + 0.5


def random_pictures(n: int, size: int, seed: int) -> Tensor:
    """True renders of N random scenes, (N, 3, size, size) in [0, 1]."""
    return pictures(scenes(n, seed), size)
