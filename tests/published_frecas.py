"""A tiny network of SDXL's layout, a VAE and draws for FreCaS; what its published code ends with lies beside this file.

published_frecas.npz was made by running github.com/xtudbxk/FreCaS (commit f9c0c46: its wrappers of attention, guidance
and DDIM scheduler, as its main.py puts them on) on diffusers' SDXL pipeline with the weights, states and draws made
here. Patched: the noise of each stage and of the encoder's samples is that made here; its logger does nothing. Its
wrappers end with an error on an Euler scheduler, so there are no such runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from published_unet_methods import CONFIG, states, weights
from tiny import QUICK_VAE
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig

VAE_CONFIG = replace(QUICK_VAE, latent_channels=CONFIG.in_channels)
GUIDANCE, HIGH_GUIDANCE, WEIGHT = 7.5, 35.0, 0.6


class Published(NamedTuple):
    """The arguments of a run, in the words of its command line."""

    sizes: tuple[tuple[int, int], ...]
    """The canvas of each stage in latents."""
    steps: tuple[int, ...]
    ends: tuple[int, ...]
    gamma: float


RUNS = {
    "2x2": Published(((8, 8), (16, 16)), (16, 4), (200, 0), 1.5),
    "not_square": Published(((8, 12), (16, 24)), (16, 4), (200, 0), 1.5),
    "3x3": Published(((8, 8), (24, 24)), (13, 9), (300, 0), 1.5),
    "4x4": Published(((8, 8), (16, 16), (32, 32)), (12, 3, 6), (400, 200, 0), 2.0),
    "defaults_2x2": Published(((8, 8), (16, 16)), (40, 10), (200, 0), 1.5),
    "defaults_4x4": Published(((8, 8), (16, 16), (32, 32)), (30, 5, 15), (400, 200, 0), 2.0),
}


def published_latents(name: str) -> Tensor:
    with np.load(Path(__file__).with_suffix(".npz")) as stored:
        return torch.from_numpy(stored[name])


def make_model() -> Model:
    """The networks; the text encoders are a stand-in that knows the prompt and the negative one, which is empty."""
    unet, vae = UNet(CONFIG), VAE(VAE_CONFIG)
    for network in (unet, vae):
        network.eval().requires_grad_(False).load_state_dict(weights(network.state_dict()), strict=True)
    text: Any = Words()
    return Model(unet, vae, text, NoiseConfig(), zeros_for_empty_negative=False, source="", files={})


class Words:
    """A stand-in for text encoders."""

    encoders = ()

    def skipping(self, clip_skip: int | None) -> Words:
        return self

    def length(self, prompt: str) -> int:
        return states()[0].context.shape[1]

    def encode(self, prompts: list[str], prompt_2: str | None = None, **_: int) -> TextStates:
        return states()[0 if prompts[0] else 1].repeat(len(prompts))


def noise(kind: int, stage: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers of unit variance from the raw bits of a counter."""
    raw = np.random.Philox(key=5000 + 10 * kind + stage).random_raw(math.prod(shape))
    return math.sqrt(3) * torch.from_numpy((raw / 2.0**63 - 1).astype(np.float32)).view(shape)


@dataclass(frozen=True)
class Replayed(Draws):
    """The draws of the published runs."""

    seeds: tuple[int, ...] = (0,)

    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return noise(0, 1, shape)

    def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return noise(0, phase, shape)

    def encoder_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
        return noise(1, phase, shape)
