"""The U-Net of SDXL, SD 1.5 and SD 2.1: resnets and transformer blocks on a few levels.

It is conditioned on time and text, in SDXL also on size and crop.

Sources: Rombach et al. 2022 (arXiv 2112.10752), appendix E; Podell et al. 2023 (arXiv 2307.01952), section 2. Attribute
names are the keys of diffusers checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.backbone import Backbone, Context, Stack
from cutdiff.models.config import UNetConfig
from cutdiff.models.layers import (
    Attention,
    Downsample,
    EmbeddingMLP,
    GroupNormSiLU,
    KeysAndValues,
    ResnetBlock,
    TextContext,
    guidance_embedding,
    sinusoidal_embedding,
)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer and a linear one: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The checkpoint's keys are net.0 and net.2; a dropout without effect stood between them in training.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention over the text and a feed-forward network, each with a norm and a residual."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | KeysAndValues) -> Tensor:
        """x (B, L, dim); context (B, M, context_dim), or what `attn2` made of it -> (B, L, dim)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class PixelwiseLinear(nn.Linear):
    """A linear layer that checkpoints hold as a 1×1 convolution: weight (C', C, 1, 1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.weight = nn.Parameter(self.weight[:, :, None, None])

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[:, :, 0, 0], self.bias)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, C, h, w), with a residual around all of them."""

    def __init__(self, config: UNetConfig, level: int, layers: int) -> None:
        super().__init__()
        channels = config.channels[level]
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        projection = nn.Linear if config.linear_projections else PixelwiseLinear
        self.proj_in = projection(channels, channels)
        blocks = [TransformerBlock(channels, config.num_heads[level], config.context_dim) for _ in range(layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, h·w, C)
        for block in cast(Sequence[TransformerBlock], self.transformer_blocks):
            tokens = block(tokens, context.of(block.attn2) if isinstance(context, TextContext) else context)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    """Repeat pixels (nearest) to twice the size, or to `size` if an odd level was halved, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """One resolution, on the way down or up: resnets, each followed by a transformer in a level with attention."""

    def __init__(self, config: UNetConfig, level: int, widths: list[tuple[int, int]], depths: Sequence[int]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in widths)
        self.attentions = nn.ModuleList(Transformer(config, level, depth) for depth in depths if depth)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layer(self, index: int, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """Apply the resnet `index` and its transformer."""
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if len(self.attentions) else x


class DownLevel(Level):
    """A level on the way down, which ends in a feature map of half the size, unless it is the last level."""

    def forward(self, x: Tensor, time: Tensor, context: Context) -> list[Tensor]:
        """All feature maps that the way up joins. The next level takes the last one."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]


class UpLevel(Level):
    """A level on the way up, which joins the feature maps of its counterpart on the way down."""

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Context, size: tuple[int, int] | None
    ) -> Tensor:
        """Join the skips, the last one first, and upsample to `size` if there is a level above."""
        for i, skip in enumerate(reversed(skips)):
            x = self.layer(i, torch.cat([x, skip], dim=1), time, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class MidBlock(nn.Module):
    """A transformer between two resnets, a single resnet, or nothing, at the coarsest resolution: (B, C, h, w) -> its
    like."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        level, depth = len(config.channels) - 1, config.mid_transformer_layers
        resnets = 0 if depth is None else 2 if depth else 1
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(resnets))
        self.attentions = nn.ModuleList([Transformer(config, level, depth)] if depth else [])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(self.attentions[i - 1](x, context) if i else x, time)
        return x


class Encoder(Backbone[UNetConfig]):
    """The way down, the middle, and the embedding of all that the network is conditioned on."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.channels, config.layers_per_block
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], config.time_dim, condition_dim=config.guidance_dim)
        if config.added_dim:
            self.add_embedding = EmbeddingMLP(config.added_dim, config.time_dim)

        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            widths = [(channels[max(i - 1, 0)] if j == 0 else width, width) for j in range(layers)]
            level = DownLevel(config, i, widths, config.down_layers[i])
            if i < last:
                level.downsamplers.append(Downsample(width))
            self.down_blocks.append(level)

        self.mid_block = MidBlock(config)

    def encode(self, x: Tensor, time: Tensor, context: Context) -> tuple[list[Tensor], Tensor]:
        """The feature maps of the way down, which the way up joins, and that of the middle, for the first one x."""
        skips = [x]
        for level in self.down_blocks:
            skips += level(skips[-1], time, context)
        return skips, self.mid_block(skips[-1], time, context)

    def read(self, states: Tensor) -> TextContext:
        """The keys and values that all layers make of text states (P, L, context_dim).

        Indexed by rows (B,), they are the context of B items. This saves work where many items read the same text, or
        the same items take many steps.
        """
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return TextContext({block.attn2: block.attn2.keys_and_values(states) for block in blocks})

    def stacks(self) -> Iterator[Stack]:
        """The blocks of each transformer."""
        for module in self.modules():
            if isinstance(module, Transformer):
                yield Stack(cast(Sequence[TransformerBlock], module.transformer_blocks), lambda x, context: x)

    def embed_conditions(self, timesteps: Tensor, pooled: Tensor, size_ids: Tensor) -> Tensor:
        """The time, and in SDXL pooled text and numbers of size and crop, as one vector an item: (B, time_dim)."""
        config, dtype = self.config, pooled.dtype
        scale = guidance_embedding(size_ids[:, 6], config.guidance_dim).to(dtype) if config.guidance_dim else None
        time = self.time_embedding(sinusoidal_embedding(timesteps, config.channels[0]).to(dtype), scale)
        if not config.added_dim:
            return time
        sizes = sinusoidal_embedding(size_ids[:, :6].flatten(), config.size_embedding_dim).to(dtype)  # (6B, dim)
        return time + self.add_embedding(torch.cat([pooled, sizes.view(len(size_ids), -1)], dim=-1))


class UNet(Encoder):
    """The whole network: noisy latents, time, text and size conditioning -> its prediction."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, layers = config.channels, config.layers_per_block
        skips = skip_widths(config)
        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for i in reversed(range(len(channels))):
            widths = []
            for _ in range(layers + 1):
                widths.append((below + skips.pop(), channels[i]))
                below = channels[i]
            level = UpLevel(config, i, widths, config.up_layers[i])
            if i > 0:
                level.upsamplers.append(Upsample(channels[i]))
            self.up_blocks.append(level)

        self.conv_norm_out = GroupNormSiLU(config.norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context,
        pooled: Tensor,
        size_ids: Tensor,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predict the noise (or v) in scaled latents.

        x (B, in_channels, h, w) · timesteps (B,) · context (B, L, context_dim) · pooled (B, pooled_dim) ·
        size_ids (B, 6): original height and width, crop top and left, target height and width, in pixels. A family
        without an embedding of pooled text or sizes does not read them. A network that reads the guidance scale finds
        it behind them, (B, 7). `residuals`, where there are any, are a ControlNet's, which are added to the feature
        maps of the way down and of the middle as the way up reads them; where a method has changed the size of a map,
        they are resized to it.
        Returns (B, out_channels, h, w). Any h and w work; odd ones are restored on the way up.
        """
        time = self.embed_conditions(timesteps, pooled, size_ids).to(x.dtype)
        skips, x = self.encode(self.conv_in(x), time, context)
        if residuals:
            *skips, x = (_added(a, b) for a, b in zip([*skips, x], residuals, strict=True))

        joined = self.config.layers_per_block + 1
        for level in self.up_blocks:
            skips, own = skips[:-joined], skips[-joined:]
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else None
            x = level(x, own, time, context, size)
        return self.conv_out(self.conv_norm_out(x))


def as_unet(network: Backbone[Any]) -> UNet:
    """The network, if it is a U-Net. ValueError where it is not."""
    if not isinstance(network, UNet):
        raise ValueError(f"needs a U-Net, and this model's network is a {type(network).__name__}: choose another model")
    return network


def skip_widths(config: UNetConfig) -> list[int]:
    """The channels of each feature map that the way up joins, in the order of `Encoder.encode`."""
    last = len(config.channels) - 1
    levels = ([width] * (config.layers_per_block + (i < last)) for i, width in enumerate(config.channels))
    return [config.channels[0], *(width for level in levels for width in level)]


def _added(x: Tensor, residual: Tensor) -> Tensor:
    if residual.shape[2:] != x.shape[2:]:
        residual = F.interpolate(residual, size=x.shape[2:], mode="bilinear", antialias=True)
    return x + residual


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, norm_groups=config.norm_groups, eps=1e-5, time_dim=config.time_dim)
