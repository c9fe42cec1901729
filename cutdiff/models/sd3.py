"""The transformer of Stable Diffusion 3 and 3.5: blocks with two streams, and positions that are added to the tokens.

It is conditioned on time and on a pooled text. Its prediction is the velocity, noise − x0, of the state
(1 − t)·x0 + t·noise. Attribute names are the keys of diffusers checkpoints.

Source: Esser et al. 2024 (arXiv 2403.03206); Stability AI 2024, Stable Diffusion 3.5, for norms of queries and keys and
for blocks in which the picture also attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from cutdiff.models.backbone import Backbone, Stack
from cutdiff.models.config import Size
from cutdiff.models.joint import Conditions, JointBlock, JointConfig, Modulation, continued, modulated
from cutdiff.models.positions import AsTrained, Places, Positions, frequencies


@dataclass(frozen=True)
class SD3Config(JointConfig):
    """The shape of a transformer of the SD3 family; the defaults are those of SD3-medium."""

    head_dim: int = 64
    """The features of a head."""
    table_size: int = 192
    """The side, in tokens, of the table of positions."""
    dual_layers: tuple[int, ...] = ()
    """The blocks in which the picture also attends to itself alone, counted from 0."""
    qk_norm: bool = False
    """True where queries and keys are normed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "head_dim", "table_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % 4:
            raise ValueError(
                f"num_heads={self.num_heads} and head_dim={self.head_dim} must have a product that 4 divides: a "
                "position has sines and cosines of two axes"
            )
        if not {*self.dual_layers} <= {*range(self.num_layers)}:
            raise ValueError(f"dual_layers={self.dual_layers} must be among the {self.num_layers} blocks, from 0 on")

    @property
    def dim(self) -> int:
        """The features of a token."""
        return self.num_heads * self.head_dim


SD3_MEDIUM = SD3Config()
SD35_MEDIUM = replace(SD3_MEDIUM, table_size=384, dual_layers=tuple(range(13)), qk_norm=True)
SD35_LARGE = replace(SD3_MEDIUM, num_layers=38, num_heads=38, qk_norm=True)


class PlacedPatches(nn.Module):
    """Latents (B, C, h, w) as tokens (B, L, dim), each of which knows its position from a table.

    The table, (1, table_size², dim), has the sines and cosines of the column and then those of the row. The middle of a
    picture stands in its middle. Where `positions` have other angles than those of training, or lead beyond the table,
    its entries are turned by the difference: that of a sine and cosine is exact. Positions are asked for angles as if
    the fastest feature turned by 1 from token to token, as in RoPE; in the table it turns by less.
    """

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.table_size = config.table_size
        self.native = config.native_size // config.patch
        self.proj = nn.Conv2d(config.latent_channels, config.dim, config.patch, stride=config.patch)
        steps = torch.arange(self.table_size, dtype=torch.float64) * (self.native / self.table_size)
        angles = steps[:, None] * frequencies(config.dim // 2, steps.device)  # (table_size, dim / 4)
        axis = torch.cat([angles.sin(), angles.cos()], dim=1)
        columns, rows = axis.expand(len(axis), -1, -1), axis[:, None].expand(-1, len(axis), -1)
        self.register_buffer("pos_embed", torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float())

    def forward(self, latents: Tensor, positions: Positions, time: Tensor) -> Tensor:
        x = self.proj(latents)
        return (x + self.table(x.shape[2:], positions, time).movedim(2, 0)).flatten(2).transpose(1, 2)

    def table(self, size: Size, positions: Positions, time: Tensor) -> Tensor:
        """The positions of a picture of `size` tokens: (h, w, dim)."""
        table = self.pos_embed.unflatten(1, (self.table_size, self.table_size))[0]
        (rows, down), (columns, right) = (self._entries(table, length, positions, time) for length in size)
        x_sin, x_cos, y_sin, y_cos = table[rows][:, columns].chunk(4, dim=2)
        return torch.cat([*_turned(x_sin, x_cos, right), *_turned(y_sin, y_cos, down[:, None])], dim=2)

    def _entries(self, table: Tensor, length: int, positions: Positions, time: Tensor) -> tuple[Tensor, Tensor]:
        """The table's entries (length,) for the tokens on an axis, and the angles (length, dim / 4) to turn them by."""
        half, start = table.shape[2] // 2, (self.table_size - length) // 2
        entries = (start + torch.arange(length, device=table.device)).clamp(0, self.table_size - 1)
        angles = positions.angles(length, self.native, half, time)
        angles = angles - (angles[:1] + angles[-1:]) / 2
        own = (entries - start - (length - 1) / 2).double()[:, None] * frequencies(half, table.device)
        return entries, self._spacing(table) * (angles - own)

    def _spacing(self, table: Tensor) -> Tensor:
        """The angle between neighbours in the table, of the feature that turns fastest: a scalar, float64."""
        sin, cos = table[0, :, 0].double(), table[0, :, table.shape[2] // 4].double()
        return torch.atan2(
            (sin[1:] * cos[:-1] - cos[1:] * sin[:-1]).sum(), (cos[1:] * cos[:-1] + sin[1:] * sin[:-1]).sum()
        )


def _turned(sin: Tensor, cos: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The sines and cosines (h, w, n) of angles that grow by `angles`."""
    c, s = angles.cos().float(), angles.sin().float()
    return (sin * c + cos * s).to(sin.dtype), (cos * c - sin * s).to(sin.dtype)


class SD3(Backbone[SD3Config]):
    """The transformer (latents, timestep, context, pooled) -> prediction; see `forward`."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        self.positions: Positions = AsTrained()
        """The way in which the network is told where the tokens lie."""
        self.pos_embed = PlacedPatches(config)
        self.time_text_embed = Conditions(config.pooled_dim, config.dim, reads_guidance=False)
        self.context_embedder = nn.Linear(config.context_dim, config.dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                config.dim,
                config.num_heads,
                normed=config.qk_norm,
                dual=i in config.dual_layers,
                last=i == config.num_layers - 1,
            )
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, config.latent_channels * config.patch**2)

    def stacks(self) -> Iterator[Stack]:
        """The dual blocks, those between, and the last one, which leaves the text as it is."""
        blocks = cast(Sequence[JointBlock], self.transformer_blocks)
        for _, alike in groupby(blocks, key=lambda block: (block.dual, block.last)):
            yield Stack([*alike], lambda x, text, *_: (x, text))

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, numbers: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity.

        latents (B, C, h, w) of the state (1 − t)·x0 + t·noise, timestep (B,) of 1000·t, the same for all, context
        (B, M, context_dim), pooled (B, pooled_dim) -> (B, C, h, w). The network reads no `numbers`. Where a side is no
        multiple of the patch, it is continued by its last latents.
        """
        *_, h, w = latents.shape
        p = self.config.patch
        size = (-(-h // p), -(-w // p))
        x = self.pos_embed(continued(latents, p), self.positions, timestep[0].double() / 1000)
        places = Places(self.positions.sharpness(size, self.config.native_size // p, context.shape[1]))
        condition = self.time_text_embed(timestep, pooled, None)
        text = self.context_embedder(context)
        for block in cast(Sequence[JointBlock], self.transformer_blocks):
            x, text = block(x, text, condition, places)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulated(x, shift, scale)).unflatten(2, (p, p, -1)).unflatten(1, size)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h, p, w, p) before
        return x[:, :, :h, :w]
