"""The transformer of FLUX.1: blocks with two streams, for text and picture, and then blocks with one stream of both.

It is conditioned on time and on a pooled text, and in its distilled variant on a guidance scale. Its prediction is the
velocity, noise − x0, of the state (1 − t)·x0 + t·noise. Attribute names are the keys of diffusers checkpoints.

Sources: Black Forest Labs 2024, FLUX.1; Dehghani et al. 2023 (arXiv 2302.05442) for attention beside the feed-forward
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.backbone import Backbone, Stack
from cutdiff.models.joint import (
    EMBEDDED,
    Conditions,
    JointAttention,
    JointBlock,
    JointConfig,
    Modulation,
    continued,
    modulated,
)
from cutdiff.models.positions import AsTrained, Positions, Rotation


@dataclass(frozen=True)
class FluxConfig(JointConfig):
    """The shape of a transformer of the FLUX.1 family; the defaults are those of FLUX.1-dev."""

    num_layers: int = 19
    num_single_layers: int = 38
    """The number of blocks with one stream."""
    axes: tuple[int, ...] = (16, 56, 56)
    """The features of a head that turn with the position on each axis: one that a picture does not use, rows,
    columns."""
    pooled_dim: int = 768
    reads_guidance: bool = True
    """True for a distilled network, which reads the guidance scale in the place of a negative prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.axes) != 3 or any(dim < 0 or dim % 2 for dim in self.axes) or not sum(self.axes):
            raise ValueError(f"axes={self.axes} must be three even numbers: the features of a head for each axis")

    @property
    def head_dim(self) -> int:
        """The features of a head."""
        return sum(self.axes)

    @property
    def dim(self) -> int:
        """The features of a token."""
        return self.num_heads * self.head_dim

    @property
    def guidance_dim(self) -> int:
        """The width of the embedded guidance scale; 0 in networks that do not read it."""
        return EMBEDDED if self.reads_guidance else 0


class SingleBlock(nn.Module):
    """One stream, whose attention and feed-forward network stand side by side."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm = Modulation(config.dim, 3)
        self.proj_mlp = nn.Linear(config.dim, 4 * config.dim)
        self.proj_out = nn.Linear(5 * config.dim, config.dim)
        self.attn = JointAttention(config.dim, config.num_heads, reads_text=False, outputs=0)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation) -> Tensor:
        """x (B, M + L, dim), condition (B, dim) -> (B, M + L, dim)."""
        shift, scale, gate = self.norm(condition)
        normed = modulated(x, shift, scale)
        gathered = self.attn(normed, rotation)
        hidden = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([gathered, hidden], dim=2))


class Flux(Backbone[FluxConfig]):
    """The transformer (latents, timestep, context, pooled, guidance) -> prediction; see `forward`."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.positions: Positions = AsTrained()
        """The way in which the network is told where the tokens lie."""
        width = config.latent_channels * config.patch**2
        self.time_text_embed = Conditions(config.pooled_dim, config.dim, reads_guidance=config.reads_guidance)
        self.context_embedder = nn.Linear(config.context_dim, config.dim)
        self.x_embedder = nn.Linear(width, config.dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config.dim, config.num_heads) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, width)

    def stacks(self) -> Iterator[Stack]:
        """The blocks with two streams, and those with one."""
        yield Stack(cast(Sequence[JointBlock], self.transformer_blocks), lambda x, text, *_: (x, text))
        yield Stack(cast(Sequence[SingleBlock], self.single_transformer_blocks), lambda both, *_: both)

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, numbers: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity.

        latents (B, C, h, w) of the state (1 − t)·x0 + t·noise, timestep (B,) of 1000·t, the same for all, context
        (B, M, context_dim), pooled (B, pooled_dim) -> (B, C, h, w). A network that reads the guidance scale takes it
        from the last column of `numbers` (B, n), and nothing else from there. Where a side is no multiple of the patch,
        it is continued by its last latents.
        """
        *_, h, w = latents.shape
        p = self.config.patch
        x = F.pixel_unshuffle(continued(latents, p), p).flatten(2).transpose(1, 2)  # (B, L, C·p·p)
        size = (-(-h // p), -(-w // p))
        guidance = None
        if self.config.reads_guidance:
            if numbers is None:
                raise ValueError("the network reads the guidance scale: give it as the last column of numbers")
            guidance = numbers[:, -1]
        native = self.config.native_size // p
        rotation = Rotation.of(
            self.positions, self.config.axes, size, native, context.shape[1], timestep[0].double() / 1000
        )
        condition = self.time_text_embed(timestep, pooled, guidance)
        x, text = self.x_embedder(x), self.context_embedder(context)
        for block in cast(Sequence[JointBlock], self.transformer_blocks):
            x, text = block(x, text, condition, rotation)
        both = torch.cat([text, x], dim=1)
        for block in cast(Sequence[SingleBlock], self.single_transformer_blocks):
            both = block(both, condition, rotation)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulated(both[:, text.shape[1] :], shift, scale))
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, size), p)
        return x[:, :, :h, :w]
