"""Frozen sizes of every network. `SDXL_UNET` and `SDXL_VAE` are SDXL-base; any smaller network is another value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """The shape of an SDXL U-Net. Levels are listed from the finest to the coarsest.

    `transformer_layers[i]` is the number of transformer blocks after each resnet of level i, 0 for a level without
    attention. The middle block takes `mid_transformer_layers`. `num_heads[i]` splits the channels of level i.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers: tuple[int, ...] = (0, 2, 10)
    mid_transformer_layers: int = 10
    num_heads: tuple[int, ...] = (5, 10, 20)
    context_dim: int = 2048
    pooled_dim: int = 1280
    size_embedding_dim: int = 256
    norm_groups: int = 32
    native_size: int = 128
    """Side of the square latents that the network was trained on."""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        for name in ("transformer_layers", "num_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name}={getattr(self, name)} must have one entry for each of the {levels} levels")
        for channels, heads in zip(self.channels, self.num_heads, strict=True):
            if channels % self.norm_groups or channels % heads:
                raise ValueError(
                    f"{channels} channels must divide into {self.norm_groups} norm groups and {heads} heads"
                )

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a KL autoencoder; the spatial factor is 2 ** (levels - 1)."""

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.13025
    force_upcast: bool = True
    """Whether the network overflows in float16 and therefore runs in float32 there."""

    def __post_init__(self) -> None:
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels do not divide into {self.norm_groups} norm groups")

    @property
    def factor(self) -> int:
        """Pixels of an image for one latent, on each axis."""
        return 2 ** (len(self.channels) - 1)


SDXL_UNET = UNetConfig()
SDXL_VAE = VAEConfig()
