"""The blocks that the U-Net and the VAE share. Attribute names are the keys of diffusers checkpoints.

Source: Rombach et al. 2022 (arXiv 2112.10752), Podell et al. 2023 (arXiv 2307.01952).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(values: Tensor, dim: int) -> Tensor:
    """Embed numbers (N,) as (N, dim), cosines first; frequencies fall from 1 to 1/10000. `dim` must be even."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scales: Tensor, dim: int) -> Tensor:
    """Embed guidance scales (N,) as (N, dim), sines first, as the networks of LCM read them. `dim` must be even."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=scales.device) / (half - 1)
    angles = 1000 * (scales.float()[:, None] - 1) * torch.exp(-math.log(10_000) * exponents)  # (N, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def channels_last(network: nn.Module) -> None:
    """Lay out the weights of convolutions with the channels of a position side by side, in place.

    A convolution whose weights or input have this layout gives it to its output. So all feature maps have the layout
    that tensor cores want, and their pixels become a transformer's tokens without a copy.
    """
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing from torch's stub)


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between them: (N, in_dim) -> (N, out_dim).

    A condition (N, condition_dim) may be added to the input by a linear layer of its own.
    """

    def __init__(self, in_dim: int, out_dim: int, *, condition_dim: int = 0) -> None:
        super().__init__()
        if condition_dim:
            self.cond_proj = nn.Linear(condition_dim, in_dim, bias=False)
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNormSiLU(nn.GroupNorm):
    """A group norm and the SiLU, x·sigmoid(x), that follows it before every convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input), inplace=True)


class ResnetBlock(nn.Module):
    """Two normalised 3×3 convolutions with a skip; the time embedding, where there is one, is added between them."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(norm_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNormSiLU(norm_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), time (B, time_dim) -> (B, C', h, w)."""
        h = self.conv1(self.norm1(x))
        if time is not None:
            h += self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + h


KeysAndValues = tuple[Tensor, Tensor]
"""The keys and values that an attention layer made of a context."""


class Attention(nn.Module):
    """Multi-head attention of x (B, L, dim) over context (B, M, context_dim), by default over x itself.

    The keys and values that the layer made of a context before can stand in its place.
    """

    def __init__(self, dim: int, num_heads: int, *, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1 / math.sqrt(dim // num_heads)  # the factor of the scores before the softmax
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | KeysAndValues | None = None) -> Tensor:
        q, (k, v) = self._split(self.to_q(x)), self.keys_and_values(x if context is None else context)
        out = self.attend(q, k, v)  # (B, heads, L, dim / heads)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)

    def keys_and_values(self, context: Tensor | KeysAndValues) -> KeysAndValues:
        """The keys and the values of all positions of the context, (B, heads, M, dim / heads) each."""
        if isinstance(context, tuple):
            return context
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def weights(self, x: Tensor, context: Tensor | KeysAndValues) -> Tensor:
        """The weights of each position of x (B, L, dim) on those of context (B, M, context_dim): (B, heads, L, M).

        `forward` attends with these weights. Here they are float32.
        """
        q, k = self._split(self.to_q(x)).float(), self.keys_and_values(context)[0].float()
        return (self.scale * (q @ k.mT)).softmax(dim=-1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, dim / heads)


@dataclass(frozen=True)
class TextContext:
    """The keys and values that each attention layer makes of the text, computed once for P texts that B items read.

    It can stand wherever the U-Net takes a context (B, M, context_dim), and is indexed in the same way. A later change
    of a layer's `to_k` and `to_v` has no effect on it.
    """

    kept: Mapping[Attention, KeysAndValues]
    """The keys and values of each layer, (P, heads, M, dim / heads) each."""
    rows: Tensor | None = None
    """The index, 0 to P - 1, of the text that each item reads: (B,); None: each reads its own."""

    def __getitem__(self, part: slice | Tensor) -> TextContext:
        if self.rows is not None:
            return TextContext(self.kept, self.rows[part])
        if isinstance(part, Tensor):
            return TextContext(self.kept, part)
        return TextContext({layer: (keys[part], values[part]) for layer, (keys, values) in self.kept.items()})

    def __len__(self) -> int:
        return len(next(iter(self.kept.values()))[0] if self.rows is None else self.rows)

    @property
    def row_bytes(self) -> int:
        """The bytes of the keys and values of one item."""
        return sum(each[0].nbytes for pair in self.kept.values() for each in pair)

    def of(self, layer: Attention) -> KeysAndValues:
        """The keys and values that the items have in one layer."""
        keys, values = self.kept[layer]
        return (keys, values) if self.rows is None else (keys[self.rows], values[self.rows])

    def gathered(self) -> TextContext:
        """The same context, with a row of its own for each item."""
        return TextContext({layer: self.of(layer) for layer in self.kept})


class Downsample(nn.Module):
    """Halve height and width with a strided 3×3 convolution.

    The U-Net pads all four sides; the VAE (`asymmetric`) pads only the right and the bottom.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
