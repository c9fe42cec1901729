"""Frozen sizes of every network. The constants are SDXL-base's, SD 1.5's and SD 2.1's; smaller networks are other
values."""

from __future__ import annotations

from dataclasses import dataclass, replace

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net of the Stable Diffusion families. Levels are listed from the finest to the coarsest.

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
    """Of the pooled text, and below of each embedded number of size and crop: both 0 where a family knows neither."""
    size_embedding_dim: int = 256
    linear_projections: bool = True
    """Whether the projections into and out of transformers are linear layers, and not 1×1 convolutions."""
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
    def added_dim(self) -> int:
        """Width of what is embedded beside the time: the pooled text and six numbers of size and crop."""
        return self.pooled_dim + 6 * self.size_embedding_dim

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
    """Whether the network overflows in float16 and therefore decodes in float32 there."""
    latents_mean: tuple[float, ...] | None = None
    """With `latents_std`, statistics of each channel of unscaled latents; scaled ones then have the mean 0 and the
    deviation `scaling_factor`."""
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        mean, std = self.latents_mean, self.latents_std
        if (mean, std) != (None, None) and not len(mean or ()) == len(std or ()) == self.latent_channels:
            raise ValueError(
                f"latents_mean={mean} and latents_std={std} must have {self.latent_channels} numbers each, "
                "or be left out"
            )
        if min(std or (1,)) <= 0:
            raise ValueError(f"latents_std={std} must be positive")
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels do not divide into {self.norm_groups} norm groups")

    @property
    def factor(self) -> int:
        """Pixels of an image for one latent, on each axis."""
        return 2 ** (len(self.channels) - 1)


SDXL_UNET = UNetConfig()
SDXL_VAE = VAEConfig()
SD15_UNET = UNetConfig(
    channels=(320, 640, 1280, 1280),
    transformer_layers=(1, 1, 1, 0),
    mid_transformer_layers=1,
    num_heads=(8, 8, 8, 8),
    context_dim=768,
    pooled_dim=0,
    size_embedding_dim=0,
    linear_projections=False,
    native_size=64,
)
SD21_UNET = replace(SD15_UNET, num_heads=(5, 10, 20, 20), context_dim=1024, linear_projections=True, native_size=96)
"""Of the v-prediction model; SD 2.1 base, which predicts epsilon, differs in its native size of 64."""
SD_VAE = VAEConfig(scaling_factor=0.18215, force_upcast=False)
