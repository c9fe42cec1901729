"""Connected regions of masks: label them, count them, find the largest and describe its shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_blobs(mask: Tensor) -> Tensor:
    """Give each connected region (eight neighbours) a number of its own.

    (N, H, W) bool -> (N, H, W) int64: 0 outside, and inside the region's highest pixel number, counted by rows from 1.
    """
    n, height, width = mask.shape
    inside = mask.float()[:, None]
    numbers = torch.arange(height * width + 1, device=mask.device)
    labels = numbers[1:].view(1, 1, height, width) * mask[:, None]
    while True:
        # Every region takes the highest number that touches it, then all follow these links to their ends.
        touching = (F.max_pool2d(labels.float(), 3, stride=1, padding=1) * inside).long()
        if torch.equal(touching, labels):
            return labels[:, 0]
        links = numbers.repeat(n, 1).scatter_reduce_(1, labels.flatten(1), touching.flatten(1), "amax")
        while not torch.equal(links, ends := links.gather(1, links)):
            links = ends
        labels = links.gather(1, labels.flatten(1)).view_as(labels)


def blob_sizes(labels: Tensor) -> Tensor:
    """Count the pixels under each number of `label_blobs`, 0 for the background: (N, H, W) -> (N, H·W + 1) int64."""
    flat = labels.flatten(1)
    sizes = flat.new_zeros(len(flat), flat.shape[1] + 1).scatter_add_(1, flat, torch.ones_like(flat))
    sizes[:, 0] = 0
    return sizes


def count_blobs(mask: Tensor, smallest: float) -> Tensor:
    """Count the connected regions of at least `smallest` pixels: (N, H, W) bool -> (N,) int64."""
    return (blob_sizes(label_blobs(mask)) >= max(1, smallest)).sum(1)


def largest_blob(mask: Tensor) -> Tensor:
    """Keep the connected region that covers most: (N, H, W) bool -> (N, H, W) bool."""
    labels = label_blobs(mask)
    return mask & (labels == blob_sizes(labels).argmax(1)[:, None, None])


def opened(mask: Tensor) -> Tensor:
    """Remove what is thinner than three pixels, such as the blended rim of a shape: (N, H, W) bool -> the same."""
    eroded = F.max_pool2d((~mask).float()[:, None], 3, stride=1, padding=1) == 0
    return F.max_pool2d(eroded.float(), 3, stride=1, padding=1)[:, 0] > 0


def silhouettes(parts: Tensor, size: int = 24, reach: float = 1.1) -> Tensor:
    """Draw the parts of a shape around its centroid, in units of the square root of its area: free of place and scale.

    (N, C, H, W) bool, disjoint -> (N, C, size, size) in [0, 1], which spans ±`reach` units; zeros for an empty shape.
    """
    n, _, height, width = parts.shape
    shape = parts.sum(1).float()
    area = shape.sum((1, 2)).clamp(min=1)
    y = (shape.sum(2) * torch.arange(height, device=parts.device)).sum(1) / area
    x = (shape.sum(1) * torch.arange(width, device=parts.device)).sum(1) / area
    steps = torch.linspace(-reach, reach, size, device=parts.device) * area.sqrt()[:, None]  # (N, size)
    rows = ((y[:, None] + steps) * 2 + 1) / height - 1  # pixel numbers to [-1, 1] between the picture's borders
    columns = ((x[:, None] + steps) * 2 + 1) / width - 1
    grid = torch.stack([columns[:, None].expand(n, size, size), rows[:, :, None].expand(n, size, size)], dim=-1)
    return F.grid_sample(parts.float(), grid, align_corners=False)
