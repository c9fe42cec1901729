"""The KL autoencoder between images and latents. It owns its scaling factor: its latents have unit scale outside of it.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1; sizes of SDXL in `config.SDXL_VAE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.bands import Limits, in_bands
from cutdiff.models.config import VAEConfig
from cutdiff.models.layers import Attention, Downsample, GroupNormSiLU, KeysAndValues, ResnetBlock
from cutdiff.parallel.ranks import ALONE, Ranks

EPS = 1e-6
SCORE_BYTES = 1 << 30  # attention scores at once, in float32: all those of an image of 1024²
LARGE_BYTES = 256 << 20  # the widest activation from which on bands are used: an SDXL image of 512² in float32
CPU_LARGE_BYTES = 32 << 20  # the same limit in float32 on a CPU


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution with independent entries; `mean` and `logvar` have the same shape."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw once, on the generator's device, so that one seed gives one sample wherever the network runs."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return self.at(noise)

    def at(self, noise: Tensor) -> Tensor:
        """The sample that standard normal noise of the mean's shape makes."""
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """The divergence from the standard normal distribution for each item of the batch: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class SpatialAttention(Attention):
    """Single-head self-attention over pixels, with a norm and a residual: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__(channels, num_heads=1, bias=True)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=EPS)
        self.ranks = ALONE

    def forward(self, x: Tensor, context: Tensor | KeysAndValues | None = None) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h·w, C)
        return x + super().forward(tokens, context).transpose(1, 2).unflatten(2, x.shape[2:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in chunks of queries if all scores at once would be large, as no fused kernel is sure to take so wide
        a head. Ranks share the chunks."""
        num_queries, chunk = q.shape[2], SCORE_BYTES // (4 * q.shape[0] * k.shape[2])
        if chunk >= num_queries:
            return super().attend(q, k, v)
        wide, operands = torch.promote_types(q.dtype, torch.float32), _operands(q)
        queries, keys, values = (self.scale * q.to(wide)).to(operands), k.mT.to(operands), v.to(operands)
        edges = [*range(0, num_queries, max(chunk, 1)), num_queries]
        starts = self.ranks.starts(len(edges) - 1)
        out = torch.empty_like(q)
        for i in range(*starts[self.ranks.rank : self.ranks.rank + 2]):
            part = slice(edges[i], edges[i + 1])
            out[:, :, part] = _product(_product(queries[:, :, part], keys).softmax(3).to(operands), values)
        self.ranks.gather(out, [edges[start] for start in starts], dim=2)
        return out


def _operands(q: Tensor) -> torch.dtype:
    """The dtype of the operands of attention in chunks.

    In 16 bits on a GPU they stay as they are: SDXL's products at 2048² are 8.8 TFLOP, for which it has fast units in 16
    bits alone. Scores, softmax and sums are float32. Operands in bfloat16 in place of float32 change a picture of the
    embedded model at 512² by 2e-5 of its norm.
    """
    asks_for_gradients = torch.is_grad_enabled() and q.requires_grad
    if (
        q.is_cuda
        and torch.version.hip is None
        and not asks_for_gradients
        and q.dtype in (torch.bfloat16, torch.float16)
    ):
        return q.dtype
    return torch.promote_types(q.dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (B, heads, n, d) @ b (B, heads, d, m), with sums and result in float32, or in float64 where that is given."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


class MidBlock(nn.Module):
    """Attention between two resnets, at the coarsest resolution: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        resnets = [ResnetBlock(channels, channels, norm_groups=norm_groups, eps=EPS) for _ in range(2)]
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([SpatialAttention(channels, norm_groups=norm_groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample(nn.Module):
    """Repeat pixels to twice the size and convolve, in one transposed convolution: 4 products an output and not 9."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, doubling(self.conv.weight), self.conv.bias, 2, 1)


def doubling(weight: Tensor) -> Tensor:
    """The weight (C, C', 4, 4) of the transposed convolution, stride 2, that is the 3×3 one of repeated pixels.

    `weight` (C', C, 3, 3) is that of the 3×3 convolution. In one dimension the output 2i is
    w0·x[i - 1] + (w1 + w2)·x[i], and 2i + 1 is (w0 + w1)·x[i] + w2·x[i + 1].
    """
    taps = weight.flip(2, 3)
    taps = F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))
    return (F.pad(taps, (0, 0, 0, 1)) + F.pad(taps, (0, 0, 1, 0))).transpose(0, 1)


class Level(nn.Module):
    """The resnets of one resolution, and the step to the next one if there is one."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, *, norm_groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, norm_groups=norm_groups, eps=EPS) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> mean and log-variance stacked, (B, 2·latent_channels, H/factor, W/factor)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, config.layers_per_block, norm_groups=groups)
            if i < len(channels) - 1:
                level.downsamplers.append(Downsample(width, asymmetric=True))
            self.down_blocks.append(level)
        self.mid_block = MidBlock(channels[-1], norm_groups=groups)
        self.conv_norm_out = GroupNormSiLU(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, 3, h·factor, w·factor)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], norm_groups=groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, config.layers_per_block + 1, norm_groups=groups)
            if i < len(channels) - 1:
                level.upsamplers.append(Upsample(width))
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNormSiLU(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class VAE(nn.Module):
    """Encoder and decoder, with the scaling of the latents between them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        widths = (2 * config.latent_channels, config.latent_channels)
        self.quant_conv, self.post_quant_conv = (
            nn.Conv2d(width, width, 1) if config.quant_conv else nn.Identity() for width in widths
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, images: Tensor, *, banded: bool | None = None) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [-1, 1] -> the distribution of scaled latents (B, C, H/factor, W/factor).

        `banded` means what it means for `decode`.
        """
        pixels = images[:, 0].numel()
        mean, logvar = self._run(self._encode, images, pixels, banded).chunk(2, dim=1)
        centre, spread = self._statistics(mean)
        scale = self.config.scaling_factor
        scaled = (mean - centre) / spread * scale
        return DiagonalGaussian(scaled, logvar.clamp(-30, 20) + 2 * (math.log(scale) - spread.log()))

    def decode(self, latents: Tensor, *, banded: bool | None = None, ranks: Ranks = ALONE) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, h·factor, w·factor), about [-1, 1], not clamped.

        With `banded`, rows are computed in bands, in bounded memory, with the same result to rounding but without
        gradients (see `bands`). None: if the picture is large and nothing asks for gradients. `ranks` share the bands,
        and all get the images.
        """
        pixels = latents[:, 0].numel() * self.config.factor**2
        centre, spread = self._statistics(latents)
        unscaled = latents / self.config.scaling_factor * spread + centre
        return self._run(self._decode, unscaled, pixels, banded, ranks)

    def _encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def _run(
        self,
        network: Callable[[Tensor], Tensor],
        x: Tensor,
        pixels: int,
        banded: bool | None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Apply encoder or decoder to x, in bands or at once. `pixels` counts those of all images."""
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        activation = pixels * max(self.config.channels[:2]) * x.element_size()
        if banded is None:
            asked = x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
            large = activation >= (CPU_LARGE_BYTES if on_cpu else LARGE_BYTES)
            banded = large and not (torch.is_grad_enabled() and asked)
        attentions = [layer for layer in self.modules() if isinstance(layer, SpatialAttention)]
        try:
            for layer in attentions:
                layer.ranks = ranks
            if banded:
                return in_bands(network, x, Limits.on(x.device, ranks))
            # A CPU takes a fifth less time in channels_last, but its group norm then loses digits in large pictures.
            loses = on_cpu and activation >= CPU_LARGE_BYTES * len(x)
            layout = torch.contiguous_format if loses else torch.channels_last
            return network(x.contiguous(memory_format=layout))
        finally:
            for layer in attentions:
                layer.ranks = ALONE

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and deviation of each channel of unscaled latents, (C, 1, 1) each; if none are known, those of
        all."""
        channels = self.config.latent_channels
        mean = self.config.latents_mean or (self.config.shift_factor,) * channels
        std = self.config.latents_std or (1.0,) * channels
        return latents.new_tensor(mean)[:, None, None], latents.new_tensor(std)[:, None, None]
