"""The transformer of FLUX.1: blocks with two streams, for text and picture, and then blocks with one stream of both.

It is conditioned on time and on a pooled text, and in its distilled variant on a guidance scale. Its prediction is the
velocity, noise − x0, of the state (1 − t)·x0 + t·noise. Attribute names are the keys of diffusers checkpoints.

Sources: Black Forest Labs 2024, FLUX.1; Esser et al. 2024 (arXiv 2403.03206) for the two streams; Dehghani et al. 2023
(arXiv 2302.05442) for norms of queries and keys, and for attention beside the feed-forward network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.backbone import Backbone, Stack
from cutdiff.models.layers import EmbeddingMLP, sinusoidal_embedding
from cutdiff.models.positions import AsTrained, Positions, Rotation

EMBEDDED = 256
"""The width of the embedded numbers, time and guidance scale."""
EPS = 1e-6


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a transformer of the FLUX.1 family; the defaults are those of FLUX.1-dev."""

    latent_channels: int = 16
    patch: int = 2
    """The side, in latents, of the square that is a token."""
    num_layers: int = 19
    """The number of blocks with two streams."""
    num_single_layers: int = 38
    """The number of blocks with one stream."""
    num_heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    """The features of a head that turn with the position on each axis: one that a picture does not use, rows,
    columns."""
    context_dim: int = 4096
    pooled_dim: int = 768
    reads_guidance: bool = True
    """True for a distilled network, which reads the guidance scale in the place of a negative prompt."""
    native_size: int = 128
    """The side of the square latents that the network was trained on."""

    def __post_init__(self) -> None:
        if len(self.axes) != 3 or any(dim < 0 or dim % 2 for dim in self.axes) or not sum(self.axes):
            raise ValueError(f"axes={self.axes} must be three even numbers: the features of a head for each axis")
        for name in ("latent_channels", "patch", "num_heads", "context_dim", "pooled_dim", "native_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def head_dim(self) -> int:
        """The features of a head."""
        return sum(self.axes)

    @property
    def dim(self) -> int:
        """The features of a token."""
        return self.num_heads * self.head_dim

    @property
    def in_channels(self) -> int:
        """The channels of what the network reads."""
        return self.latent_channels

    @property
    def out_channels(self) -> int:
        """The channels of the prediction."""
        return self.latent_channels

    @property
    def guidance_dim(self) -> int:
        """The width of the embedded guidance scale; 0 in networks that do not read it."""
        return EMBEDDED if self.reads_guidance else 0

    @property
    def inpaints(self) -> bool:
        """False: no network of this shape is shown a mask."""
        return False


class Conditions(nn.Module):
    """The time, the pooled text and the guidance scale, embedded and added up: (B, dim)."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(EMBEDDED, config.dim)
        self.text_embedder = EmbeddingMLP(config.pooled_dim, config.dim)
        if config.reads_guidance:
            self.guidance_embedder = EmbeddingMLP(EMBEDDED, config.dim)

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        embedded = self.timestep_embedder(sinusoidal_embedding(timestep, EMBEDDED).to(pooled.dtype))
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(
                sinusoidal_embedding(1000 * guidance, EMBEDDED).to(pooled.dtype)
            )
        return embedded + self.text_embedder(pooled)


class Modulation(nn.Module):
    """The shifts, scales and gates (B, 1, dim) that a condition (B, dim) gives to a block."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, count * dim)
        self.count = count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition))[:, None].chunk(self.count, dim=-1)


class GELU(nn.Module):
    """A linear layer and the GELU, in its approximation by tanh."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The checkpoint's keys are net.0 and net.2; a dropout without effect stood between them in training.
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class JointAttention(nn.Module):
    """Attention of a sequence over itself, whose queries and keys are normed and turned by their positions.

    A layer with `two_streams` makes queries, keys and values of the text by layers of their own.
    """

    def __init__(self, config: FluxConfig, *, two_streams: bool) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        self.num_heads = config.num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=EPS) for _ in range(2))
        if two_streams:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=EPS) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(dim, dim)]), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation, text: Tensor | None = None) -> Tensor:
        """x (B, L, dim), text (B, M, dim) -> what the tokens gather, (B, M + L, dim), before any layer at the end."""
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(x)), self._split(self.to_v(x))
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            added = [self._split(layer(text)) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)]
            q = torch.cat([self.norm_added_q(added[0]), q], dim=2)
            k = torch.cat([self.norm_added_k(added[1]), k], dim=2)
            v = torch.cat([added[2], v], dim=2)
        scale = rotation.sharpness / math.sqrt(q.shape[-1])
        out = F.scaled_dot_product_attention(rotation.turned(q), rotation.turned(k), v, scale=scale)
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, dim / heads)


class DoubleBlock(nn.Module):
    """Two streams, text and picture, that attend to both together and have layers of their own."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(config.dim, 6), Modulation(config.dim, 6)
        self.attn = JointAttention(config, two_streams=True)
        self.ff, self.ff_context = FeedForward(config.dim), FeedForward(config.dim)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """x (B, L, dim), text (B, M, dim), condition (B, dim) -> x, text."""
        of_x, of_text = self.norm1(condition), self.norm1_context(condition)
        joint = self.attn(modulated(x, *of_x[:2]), rotation, modulated(text, *of_text[:2]))
        from_text, from_x = joint.split([text.shape[1], x.shape[1]], dim=1)
        x = x + of_x[2] * self.attn.to_out[0](from_x)
        x = x + of_x[5] * self.ff(modulated(x, *of_x[3:5]))
        text = text + of_text[2] * self.attn.to_add_out(from_text)
        return x, text + of_text[5] * self.ff_context(modulated(text, *of_text[3:5]))


class SingleBlock(nn.Module):
    """One stream, whose attention and feed-forward network stand side by side."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm = Modulation(config.dim, 3)
        self.proj_mlp = nn.Linear(config.dim, 4 * config.dim)
        self.proj_out = nn.Linear(5 * config.dim, config.dim)
        self.attn = JointAttention(config, two_streams=False)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation) -> Tensor:
        """x (B, M + L, dim), condition (B, dim) -> (B, M + L, dim)."""
        shift, scale, gate = self.norm(condition)
        normed = modulated(x, shift, scale)
        hidden = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(normed, rotation), hidden], dim=2))


class Flux(Backbone[FluxConfig]):
    """The transformer (latents, timestep, context, pooled, guidance) -> prediction; see `forward`."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.positions: Positions = AsTrained()
        """The way in which the network is told where the tokens lie."""
        width = config.latent_channels * config.patch**2
        self.time_text_embed = Conditions(config)
        self.context_embedder = nn.Linear(config.context_dim, config.dim)
        self.x_embedder = nn.Linear(width, config.dim)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, width)

    def stacks(self) -> Iterator[Stack]:
        """The blocks with two streams, and those with one."""
        yield Stack(cast(Sequence[DoubleBlock], self.transformer_blocks), lambda x, text, *_: (x, text))
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
        x = F.pad(latents, (0, -w % p, 0, -h % p), mode="replicate")
        x = F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)  # (B, L, C·p·p)
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
        for block in cast(Sequence[DoubleBlock], self.transformer_blocks):
            x, text = block(x, text, condition, rotation)
        both = torch.cat([text, x], dim=1)
        for block in cast(Sequence[SingleBlock], self.single_transformer_blocks):
            both = block(both, condition, rotation)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulated(both[:, text.shape[1] :], shift, scale))
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, size), p)
        return x[:, :, :h, :w]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm of x (B, L, dim), scaled and shifted by (B, 1, dim)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
