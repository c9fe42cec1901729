"""The parts of transformers with joint attention: text and picture are streams of tokens that attend to both.

Attribute names are the keys of diffusers checkpoints. Sources: Esser et al. 2024 (arXiv 2403.03206) for the two streams
and what modulates them; Dehghani et al. 2023 (arXiv 2302.05442) for norms of queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.layers import EmbeddingMLP, sinusoidal_embedding
from cutdiff.models.positions import Places

EMBEDDED = 256
"""The width of the embedded numbers, time and guidance scale."""
EPS = 1e-6


@dataclass(frozen=True)
class JointConfig:
    """The part of a transformer's shape that every family has; the defaults are those of SD3-medium."""

    latent_channels: int = 16
    patch: int = 2
    """The side, in latents, of the square that is a token."""
    num_layers: int = 24
    """The number of blocks with two streams."""
    num_heads: int = 24
    context_dim: int = 4096
    pooled_dim: int = 2048
    native_size: int = 128
    """The side of the square latents that the network was trained on."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "patch", "num_heads", "context_dim", "pooled_dim", "native_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

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
        return 0

    @property
    def inpaints(self) -> bool:
        """False: no network of this shape is shown a mask."""
        return False


class Conditions(nn.Module):
    """The time, the pooled text and in some networks the guidance scale, embedded and added up: (B, dim)."""

    def __init__(self, pooled_dim: int, dim: int, *, reads_guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(EMBEDDED, dim)
        self.text_embedder = EmbeddingMLP(pooled_dim, dim)
        if reads_guidance:
            self.guidance_embedder = EmbeddingMLP(EMBEDDED, dim)

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        embedded = self.timestep_embedder(sinusoidal_embedding(timestep, EMBEDDED).to(pooled.dtype))
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(
                sinusoidal_embedding(1000 * guidance.float(), EMBEDDED).to(pooled.dtype)
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
    """Attention of tokens over themselves, in their `places`, with or without norms of queries and keys.

    A layer that `reads_text` makes queries, keys and values of the text by layers of their own. `outputs` is the number
    of layers that are to follow: none, one for the picture, or another one for the text.
    """

    def __init__(
        self, dim: int, num_heads: int, *, reads_text: bool, outputs: Literal[0, 1, 2], normed: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads

        def norm() -> nn.Module:
            return nn.RMSNorm(dim // num_heads, eps=EPS) if normed else nn.Identity()

        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = norm(), norm()
        if reads_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = norm(), norm()
        if outputs:
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if outputs == 2:
            self.to_add_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, places: Places, text: Tensor | None = None) -> Tensor:
        """x (B, L, dim), text (B, M, dim) -> what the tokens gather, (B, M + L, dim), before any layer at the end."""
        q = self.norm_q(self._split(self.to_q(x)))
        k = self.norm_k(self._split(self.to_k(x)))
        v = self._split(self.to_v(x))
        if text is not None:
            q = torch.cat([self.norm_added_q(self._split(self.add_q_proj(text))), q], dim=2)
            k = torch.cat([self.norm_added_k(self._split(self.add_k_proj(text))), k], dim=2)
            v = torch.cat([self._split(self.add_v_proj(text)), v], dim=2)
        q = places.turned(q)
        k = places.turned(k)
        scale = places.sharpness / math.sqrt(q.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, dim / heads)


class JointBlock(nn.Module):
    """Two streams, text and picture, that attend to both together and have layers of their own.

    In a `dual` block the picture also attends to itself alone. The `last` block leaves the text as it is.
    """

    def __init__(
        self, dim: int, num_heads: int, *, normed: bool = True, dual: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.dual, self.last = dual, last
        self.norm1, self.norm1_context = Modulation(dim, 9 if dual else 6), Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, num_heads, reads_text=True, outputs=1 if last else 2, normed=normed)
        if dual:
            self.attn2 = JointAttention(dim, num_heads, reads_text=False, outputs=1, normed=normed)
        self.ff = FeedForward(dim)
        if not last:
            self.ff_context = FeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """x (B, L, dim), text (B, M, dim), condition (B, dim) -> x, text."""
        of_x, of_text = self.norm1(condition), self.norm1_context(condition)
        shift, scale = reversed(of_text) if self.last else of_text[:2]
        joint = self.attn(modulated(x, *of_x[:2]), places, modulated(text, shift, scale))
        from_text, from_x = joint.split([text.shape[1], x.shape[1]], dim=1)
        gathered = of_x[2] * self.attn.to_out[0](from_x)
        if self.dual:
            gathered = gathered + of_x[8] * self.attn2.to_out[0](self.attn2(modulated(x, *of_x[6:8]), places))
        x = x + gathered
        x = x + of_x[5] * self.ff(modulated(x, *of_x[3:5]))
        if self.last:
            return x, text
        text = text + of_text[2] * self.attn.to_add_out(from_text)
        return x, text + of_text[5] * self.ff_context(modulated(text, *of_text[3:5]))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm of x (B, L, dim), scaled and shifted by (B, 1, dim)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def continued(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, C, h, w) whose sides are multiples of the patch: the last ones of a side are repeated."""
    h, w = latents.shape[2:]
    height, width = (-(-n // patch) * patch for n in (h, w))  # without %, which torch.compile cannot do with symbols
    return F.pad(latents, (0, width - w, 0, height - h), mode="replicate")
