"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the U-Net's way down that reads a hint beside the state.

The hint is a picture in pixels, such as the edges of what is to be drawn. What the copy makes of it is added, through
1×1 convolutions that begin as zeros, to the feature maps that the U-Net's way up joins. Attribute names are the keys of
diffusers checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from cutdiff.models.config import UNetConfig
from cutdiff.models.unet import Context, Encoder, UNet, skip_widths


@dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet: its copy of the way down, and the convolutions that embed its hint."""

    unet: UNetConfig
    """The U-Net whose way down it copies; what is said of the way up is not read."""
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    """The channels of the hint on its way from pixels to latents; between two of them its sides are halved."""
    hint_channels: int = 3

    @property
    def factor(self) -> int:
        """The pixels of the hint for one latent, on each axis."""
        return 2 ** (len(self.hint_widths) - 1)


class HintEmbedding(nn.Module):
    """Convolutions from a hint (B, hint_channels, H, W) to the first feature map: (B, channels, H / f, W / f)."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.hint_widths
        self.conv_in = nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = _zeroed(nn.Conv2d(widths[-1], config.unet.channels[0], 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """The U-Net's input and a hint -> residuals of its feature maps. A new one gives zeros."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.control = config
        self.controlnet_cond_embedding = HintEmbedding(config)
        self.controlnet_down_blocks = nn.ModuleList(
            _zeroed(nn.Conv2d(width, width, 1)) for width in skip_widths(config.unet)
        )
        last = config.unet.channels[-1]
        self.controlnet_mid_block = _zeroed(nn.Conv2d(last, last, 1))

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context, pooled: Tensor, size_ids: Tensor, hint: Tensor
    ) -> list[Tensor]:
        """The residuals of all feature maps of the way down, and of the middle.

        The first arguments are as in `UNet.forward`; of more channels than it was made for, x has the latents first.
        hint (B, hint_channels, f·h, f·w) in [0, 1], for f the `factor`.
        """
        time = self.embed_conditions(timesteps, pooled, size_ids).to(x.dtype)
        first = self.conv_in(x[:, : self.config.in_channels]) + self.controlnet_cond_embedding(hint)
        skips, middle = self.encode(first, time, context)
        skips = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*skips, self.controlnet_mid_block(middle)]

    def copy_down(self, unet: UNet) -> None:
        """Take the weights of a U-Net's way down and middle, as far as they are here too."""
        own = self.state_dict()
        self.load_state_dict({key: value for key, value in unet.state_dict().items() if key in own}, strict=False)


def _zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution
