"""Models with random weights: as fast as trained ones, of any size, and without a file or a download.

The bench, the planner and the tests use them where only shapes and speed matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cutdiff.checkpoint.kinds import kind_of
from cutdiff.checkpoint.model import Model
from cutdiff.models.backbone import Shape
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.models.layers import channels_last
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet, as_unet
from cutdiff.models.vae import VAE
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.noise import NoiseConfig

TOKENS = 77
"""The length of a prompt, as CLIP's encoders pad it."""


@dataclass(frozen=True)
class GivenText:
    """A stand-in for a model's `TextEncoders`: every prompt has the same states (1, L, D), at no cost."""

    states: TextStates
    encoders: tuple[nn.Module, ...] = ()
    layer: int = 1

    def skipping(self, clip_skip: int | None) -> GivenText:
        return self

    def length(self, prompt: str) -> int:
        return self.states.context.shape[1]

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return []

    def left_out(self, prompt: str, prompt_2: str | None = None) -> list[str]:
        return []

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        return self.states.repeat(len(prompts))


def random_model(config: Shape, vae: VAEConfig, device: torch.device, seed: int = 0) -> Model:
    """A model of these shapes in float32; seed and device determine its weights and the states of all its prompts."""
    with torch.device("meta"):
        networks = kind_of(config).network(config), VAE(vae)
    for network in networks:
        network.to_empty(device=device).requires_grad_(False)
        randomise(network, seed)
        for table in network.buffers():  # of positions, in SD3
            table.normal_(generator=torch.Generator(device).manual_seed(seed))
        if device.type != "cpu":  # a model that is loaded has this layout there
            channels_last(network)
    rng = torch.Generator(device).manual_seed(seed + 1)
    context = torch.randn(1, TOKENS, config.context_dim, generator=rng, device=device)
    pooled = torch.randn(1, config.pooled_dim, generator=rng, device=device)
    text: Any = GivenText(TextStates(context, pooled))
    is_unet = isinstance(config, UNetConfig)
    noise = NoiseConfig() if is_unet else FlowConfig()
    return Model(*networks, text, noise, zeros_for_empty_negative=is_unet, source="random weights", files={})


def cast(model: Model, dtype: torch.dtype) -> Model:
    """The model in another dtype. Its networks are converted in place."""
    states = model.text.encode([""])
    text: Any = GivenText(TextStates(states.context.to(dtype), states.pooled.to(dtype)))
    return replace(model, unet=model.unet.to(dtype), vae=model.vae.to(dtype), text=text)


def changed(model: Model, change: Callable[[UNet], None]) -> Model:
    """The model with a copy of its U-Net, to which `change` is applied."""
    unet = deepcopy(as_unet(model.unet))
    change(unet)
    return replace(model, unet=unet)


@torch.no_grad()
def randomise(network: nn.Module, seed: int) -> None:
    """Give every parameter random values, norms and biases too, so that a test notices when one is left out."""
    rng = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.normal_(generator=rng)
        if parameter.ndim > 1:
            parameter /= math.sqrt(parameter[0].numel())
        else:
            parameter *= 0.2
            parameter += 1.0 if name.endswith("weight") else 0.0  # the weight of a norm
    network.eval()


def network_inputs(model: Model, rows: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random arguments of the U-Net for so many `rows` at native size, in its dtype, with a single timestep ()."""
    config, device = model.unet.config, model.device
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(model.dtype)

    return (
        normal(rows, config.in_channels, config.native_size, config.native_size),
        torch.tensor(500.0, device=device),
        normal(rows, TOKENS, config.context_dim),
        normal(rows, config.pooled_dim),
        torch.tensor([[2048, 2048, 0, 512, 1024, 1024]], device=device, dtype=model.dtype).repeat(rows, 1),
    )
