"""Read simple facts off a picture of a scene: how many sky bodies, how many subjects, and in which colour.

By colour and connected blobs only, so that the same measure holds for true renders and for generated pictures of any
size. Thresholds are fractions of the picture; they are proven on true renders by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.scenes import world
from cutdiff.scenes.render import SUBJECT

SMALLEST_BLOB = 0.003
"""Share of a picture below which a blob is not counted; the smallest body covers 0.0095, the smallest subject 0.03."""
RESOLUTION = 128
"""Blobs are counted at about this size; finer than that they would only take longer."""
SHADES = torch.linspace(0.6, 1.0, 9)
"""A subject is painted in its colour and in a darker shade of it (roof, band)."""
COLOR_TOLERANCE = 0.14
"""Distance in RGB within which a pixel counts as a shade of a colour."""


@dataclass(frozen=True)
class Reading:
    """What was read of N pictures, three (N,) int64 tensors."""

    bodies: Tensor
    """Number of suns and moons."""
    subjects: Tensor
    """Number of blobs in the colour that covers most."""
    color: Tensor
    """Index of that colour in `world.COLORS`, -1 where no colour covers enough."""

    def matches(self, choices: Tensor) -> Tensor:
        """Whether each picture has one body and one subject in the colour of its caption: (N,) bool.

        `choices` (N, 5) as `Scenes.choices` has them.
        """
        return (self.bodies == 1) & (self.subjects == 1) & (self.color == choices[:, 0])


def read(images: Tensor) -> Reading:
    """Read pictures (N, 3, H, W) in [0, 1]; large ones are averaged down to `RESOLUTION` on their shorter side."""
    shrink = min(images.shape[2:]) // RESOLUTION
    images = F.avg_pool2d(images, shrink) if shrink > 1 else images
    colors = torch.tensor([SUBJECT[name] for name in world.COLORS], device=images.device)
    shades = colors[:, None] * SHADES.to(images.device)[:, None]  # (5, 9, 3)
    pixels = images.permute(0, 2, 3, 1)  # (N, H, W, 3)
    distances = torch.stack([torch.cdist(pixels.flatten(1, 2), shade[None]).amin(-1) for shade in shades], dim=1)
    masks = (distances < COLOR_TOLERANCE).unflatten(2, images.shape[2:])  # (N, 5, H, W)
    area = masks.float().mean((2, 3))
    largest = area.max(dim=1)
    color = torch.where(largest.values >= SMALLEST_BLOB, largest.indices, -1)
    chosen = masks[torch.arange(len(images)), largest.indices]
    return Reading(count_blobs(_body_mask(images)), count_blobs(chosen), color)


def count_blobs(mask: Tensor, smallest: float = SMALLEST_BLOB) -> Tensor:
    """How many connected regions (eight neighbours) of at least `smallest` of the area: (N, H, W) bool -> (N,)."""
    n, height, width = mask.shape
    inside = mask.float()[:, None]
    # Every pixel starts with a number of its own; the largest number spreads through its region.
    labels = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(1, 1, height, width)
    labels = labels * inside
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    counts = torch.zeros(n, height * width + 1, device=mask.device)
    counts.scatter_add_(1, labels.flatten(1).long(), torch.ones_like(labels).flatten(1))
    return (counts[:, 1:] >= smallest * height * width).sum(1)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over a batch (N, 3, H, W) in [0, 1], from the mean of the squared errors."""
    return -10 * torch.log10((images - truth).square().mean())


def _body_mask(images: Tensor) -> Tensor:
    """Bodies are bright and pale, and unlike snow and sky not bluish: (N, H, W) bool."""
    red, blue = images[:, 0], images[:, 2]
    return (images.amax(1) > 0.85) & (images.amin(1) > 0.6) & (red - blue > -0.04)
