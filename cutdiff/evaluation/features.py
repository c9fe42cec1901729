"""Features of pictures for distances between sets: a small network that was trained to say what a scene shows.

It takes pictures of 128 px. A larger picture is given to it in two ways, for two separate distances: whole and averaged
down, which compares compositions, and as crops at full resolution, which compares what native-size windows look like.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.checkpoint.locate import embedded
from cutdiff.checkpoint.read import read_tensors
from cutdiff.scenes import world

PIXELS = 128
DIM = 32
WEIGHTS = "weights/features"
CHOICES = tuple(len(v) for v in (world.COLORS, world.SUBJECTS, world.RIDGES, world.GROUNDS, world.TIMES))
"""Numbers of colours, subjects, ridges, grounds and times that are told apart."""
NUM_VISIBLE, NUM_MEASURES = 2, 9
"""Numbers of the other answers: the presence of subject and body, and measures such as their places, which
`cutdiff.training.features.Targets` lists."""


class FeatureNet(nn.Module):
    """A network of five halvings by 3×3 convolutions, a linear layer to the features, and one to the answers."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 96, 64)) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, stride=2, padding=1)
        self.halvings = nn.ModuleList(_Halving(a, b) for a, b in pairwise(channels))
        side = PIXELS // 2 ** len(channels)
        self.embed = nn.Linear(channels[-1] * side**2, DIM)
        self.heads = nn.Linear(DIM, sum(CHOICES) + NUM_VISIBLE + NUM_MEASURES)
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("std", torch.ones(DIM))

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 32) of pictures (N, 3, 128, 128) in [0, 1], of mean 0 and deviation 1 on true renders."""
        return (self.raw_features(images) - self.mean) / self.std

    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """The answers that the network was trained to give, for pictures (N, 3, 128, 128) in [0, 1].

        They are the logits (N, K) of each of the five choices in the order of `Scenes.choices`, the logits (N, 2) that
        subject and body are visible, and the measures (N, 9).
        """
        answers = self.heads(F.silu(self.raw_features(images)))
        return answers.split([*CHOICES, NUM_VISIBLE, NUM_MEASURES], dim=1)

    def raw_features(self, images: Tensor) -> Tensor:
        """Features (N, 32) of pictures (N, 3, 128, 128) in [0, 1], as the linear layer gives them."""
        if images.shape[1:] != (3, PIXELS, PIXELS):
            raise ValueError(f"pictures are (N, 3, {PIXELS}, {PIXELS}), not {tuple(images.shape)}")
        h = self.conv_in(images * 2 - 1)
        for halving in self.halvings:
            h = halving(h)
        return self.embed(F.silu(h).flatten(1))


class _Halving(nn.Module):
    """A convolution to half the resolution, then a residual one."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/2, w/2)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return h + self.conv2(F.silu(self.norm2(h)))


def load_features(path: Path | None = None, device: str | torch.device = "cpu") -> FeatureNet:
    """Load the network in the folder `path`, by default the embedded one. FileNotFoundError where there is none."""
    tensors = read_tensors((embedded(WEIGHTS) if path is None else path) / "model.safetensors")
    network = FeatureNet()
    network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def whole_features(network: FeatureNet, images: Tensor, part: int = 64) -> Tensor:
    """Features of whole pictures, averaged down to 128 px: (N, 3, H, W) in [0, 1] -> (N, 32)."""
    shrunk = F.adaptive_avg_pool2d(images.float(), PIXELS)
    return torch.cat([network(some) for some in shrunk.split(part)])


@torch.no_grad()
def crop_features(network: FeatureNet, images: Tensor, part: int = 64) -> Tensor:
    """Features of the crops of each picture: (N, 3, H, W) in [0, 1] -> (N, K, 32).

    A picture's K crops belong together: resample pictures, and only then flatten to (N·K, 32).
    """
    crops = grid_crops(images.float())
    features = torch.cat([network(some) for some in crops.flatten(0, 1).split(part)])
    return features.unflatten(0, crops.shape[:2])


def grid_crops(images: Tensor, size: int = PIXELS) -> Tensor:
    """Cut square windows on a regular grid that covers the picture, row by row: (N, 3, H, W) -> (N, K, 3, size, size).

    There are ceil(H / size) × ceil(W / size) windows, which overlap evenly where a side is no multiple of `size`.
    Raises ValueError for a picture smaller than a window.
    """
    starts = [_window_starts(length, size) for length in images.shape[2:]]
    windows = [images[:, :, top : top + size, left : left + size] for top in starts[0] for left in starts[1]]
    return torch.stack(windows, dim=1)


def blur(images: Tensor, factor: int) -> Tensor:
    """Blur pictures (N, 3, H, W): shrink them by `factor` and enlarge them again."""
    return F.interpolate(F.avg_pool2d(images, factor), size=images.shape[2:], mode="bilinear")


def _window_starts(length: int, size: int) -> list[int]:
    if length < size:
        raise ValueError(f"a side of {length} px is smaller than a window of {size} px")
    count = math.ceil(length / size)
    return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
