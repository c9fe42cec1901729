"""How methods change the inside of the U-Net: for the time of a step, leaving no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from cutdiff.models.unet import DownLevel, MidBlock, UNet, UpLevel
from cutdiff.sampling.denoiser import Size


@contextmanager
def replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes or methods inside the block; what was there comes back, also after an error."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def blocks(unet: UNet) -> Iterator[tuple[int, DownLevel | MidBlock | UpLevel]]:
    """Every block in the order of execution with its level, 0 for the finest."""
    last = len(unet.down_blocks) - 1
    for level, block in enumerate(unet.down_blocks):
        yield level, cast(DownLevel, block)
    yield last, unet.mid_block
    for depth, block in enumerate(unet.up_blocks):
        yield last - depth, cast(UpLevel, block)


def size_at(size: Size, level: int) -> Size:
    """Of the feature maps of a level on a canvas of `size` latents: every level above it halves, rounding up."""
    return math.ceil(size[0] / 2**level), math.ceil(size[1] / 2**level)
