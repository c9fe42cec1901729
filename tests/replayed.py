"""The parts that runs of published codes and ours share, on the same tiny networks: weights, text states and noise
that no library's change of random streams can change, models of them, and the latents that the published codes
ended in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import QUICK_UNET, QUICK_VAE
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import GivenText
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import NoiseConfig

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
"""A network of SDXL's layout."""
VAE_CONFIG = replace(QUICK_VAE, latent_channels=CONFIG.in_channels)


def published_latents(method: str, run: str) -> Tensor:
    """The latents that a run of a method's published code ended in, from the file that lies beside this one."""
    with np.load(Path(__file__).with_name(f"published_{method}.npz")) as stored:
        return torch.from_numpy(stored[run])


def model_of(unet: UNetConfig = CONFIG, vae: VAEConfig = VAE_CONFIG) -> Model:
    """A model of these shapes, whose text is `TwoTexts`."""
    networks = UNet(unet), VAE(vae)
    for network in networks:
        network.eval().requires_grad_(False).load_state_dict(weights(network.state_dict()))
    text: Any = TwoTexts(states()[0])
    return Model(*networks, text, NoiseConfig(), zeros_for_empty_negative=False, source="replayed", files={})


@dataclass(frozen=True)
class TwoTexts(GivenText):
    """A text that reads an empty prompt as the negative states, and any other as the positive ones."""

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        return states()[not prompts[0]].repeat(len(prompts))


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for every parameter, by its name."""
    values = {}
    for stream, key in enumerate(sorted(state)):
        shape = state[key].shape
        value = uniform(stream, tuple(shape))
        if len(shape) > 1:
            value *= math.sqrt(3 / math.prod(shape[1:]))
        else:
            value = 0.2 * value + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        values[key] = value
    return values


def states() -> tuple[TextStates, TextStates]:
    """The positive and the negative states."""
    return tuple(  # type: ignore[return-value]
        TextStates(uniform(2000 + i, (1, 5, CONFIG.context_dim)), uniform(3000 + i, (1, CONFIG.pooled_dim)))
        for i in range(2)
    )


def noise(size: tuple[int, int]) -> Tensor:
    """The first noise of a run on a canvas."""
    return unit_noise(4000, (1, CONFIG.in_channels, *size))


def unit_noise(stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers of unit variance."""
    return math.sqrt(3) * uniform(stream, shape)


def uniform(stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers between -1 and 1, from the raw bits of a counter."""
    raw = np.random.Philox(key=stream).random_raw(math.prod(shape))
    return torch.from_numpy((raw / 2.0**63 - 1).astype(np.float32)).view(shape)
