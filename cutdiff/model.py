"""A loaded model: the networks, how their noise was scheduled, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.schedule import NoiseConfig

if TYPE_CHECKING:
    from cutdiff.models.text import TextEncoders


@dataclass(frozen=True)
class Model:
    """What `cutdiff.load` returns and every run reads: networks in evaluation mode, in which a run leaves no trace."""

    unet: UNet
    vae: VAE
    text: TextEncoders
    noise: NoiseConfig
    zeros_for_empty_negative: bool
    """Whether an empty negative prompt is zeros (as SDXL was trained) and not the encoding of an empty string."""
    source: str
    """The folder or file that the weights were read from."""
    hashes: dict[str, str]
    """SHA-256 of every weight file, by its path relative to `source`."""
    decided_by: dict[str, str] = field(default_factory=dict)
    """Which source decided what of `noise`: "option", "marker key …", "metadata …", "scheduler" or "default"."""

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> int:
        """Side, in latents, of the pictures that the model was trained on."""
        return self.unet.config.native_size

    @property
    def factor(self) -> int:
        """Pixels of an image for one latent, on each axis."""
        return self.vae.config.factor
