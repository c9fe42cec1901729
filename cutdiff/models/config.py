"""The sizes of every network, as frozen dataclasses. The constants are those of SDXL-base, SD 1.5 and SD 2.1; smaller
networks have other values."""

from __future__ import annotations

from dataclasses import dataclass, replace

Size = tuple[int, int]
"""Height and width, in pixels, latents or tokens."""


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net of the Stable Diffusion families. Levels are listed from the finest to the coarsest.

    `transformer_layers[i]` is the number of transformer blocks after each resnet of level i, 0 for a level without
    attention; a tuple has a number for each resnet. The middle block takes `mid_transformer_layers`; with 0 it is a
    single resnet, as in SSD-1B, and with None there is none, as in KOALA-700M.
    `num_heads[i]` splits the channels of level i.
    """

    in_channels: int = 4
    """The channels of the latents, and in an inpainting model of what it is shown beside them."""
    out_channels: int = 4
    """The channels of the latents."""
    channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers: tuple[int | tuple[int, ...], ...] = (0, 2, 10)
    mid_transformer_layers: int | None = 10
    num_heads: tuple[int, ...] = (5, 10, 20)
    context_dim: int = 2048
    pooled_dim: int = 1280
    """The width of the pooled text; 0 in families that do not read it."""
    size_embedding_dim: int = 256
    """The width of each embedded number of size and crop; 0 in families that do not read them."""
    linear_projections: bool = True
    """True where linear layers lead into and out of transformers, and False where 1×1 convolutions do."""
    norm_groups: int = 32
    native_size: int = 128
    """The side of the square latents that the network was trained on."""
    up_transformer_layers: tuple[tuple[int, ...], ...] | None = None
    """The number of transformer blocks after each resnet on the way up, `layers_per_block` + 1 in a level; None where
    they are as on the way down."""
    guidance_dim: int = 0
    """The width of the embedded guidance scale, which the network reads in the place of a negative prompt, as those of
    LCM do (Luo et al. 2023, arXiv 2310.04378); 0 in networks that do not read it."""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        for name in ("transformer_layers", "num_heads", "up_layers"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name}={getattr(self, name)} must have one entry for each of the {levels} levels")
        if self.up_transformer_layers is None and any(isinstance(n, tuple) for n in self.transformer_layers):
            raise ValueError(f"transformer_layers={self.transformer_layers} needs up_transformer_layers: pass both")
        for level, (down, layers) in enumerate(zip(self.down_layers, self.up_layers, strict=True)):
            if len(down) != self.layers_per_block or len({*map(bool, down)}) > 1:
                raise ValueError(
                    f"transformer_layers={self.transformer_layers} must have one number for level {level}, or "
                    f"{self.layers_per_block}, of which all or none are 0"
                )
            attended = len({*map(bool, layers)}) < 2 and any(layers) == any(down)
            if len(layers) != self.layers_per_block + 1 or not attended:
                raise ValueError(
                    f"up_transformer_layers={self.up_transformer_layers} must have {self.layers_per_block + 1} numbers "
                    f"for level {level}, all 0 where transformer_layers={self.transformer_layers} has 0, and else none"
                )
        for channels, heads in zip(self.channels, self.num_heads, strict=True):
            if channels % self.norm_groups or channels % heads:
                raise ValueError(
                    f"{channels} channels must divide into {self.norm_groups} norm groups and {heads} heads"
                )

    @property
    def inpaints(self) -> bool:
        """True for an inpainting model, which is shown a mask and the masked picture's latents beside the state: nine
        channels where latents have four."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def down_layers(self) -> tuple[tuple[int, ...], ...]:
        """The number of transformer blocks after each resnet of each level on the way down."""
        layers = self.layers_per_block
        return tuple(depth if isinstance(depth, tuple) else (depth,) * layers for depth in self.transformer_layers)

    @property
    def up_layers(self) -> tuple[tuple[int, ...], ...]:
        """The number of transformer blocks after each resnet of each level on the way up, from the finest level on."""
        if self.up_transformer_layers is not None:
            return self.up_transformer_layers
        return tuple((*layers, layers[0]) for layers in self.down_layers)

    @property
    def added_dim(self) -> int:
        """The width of the pooled text and the six embedded numbers of size and crop, side by side."""
        return self.pooled_dim + 6 * self.size_embedding_dim

    @property
    def time_dim(self) -> int:
        """The width of the time embedding."""
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
    """True where the network overflows in float16, so that it decodes in float32 instead."""
    latents_mean: tuple[float, ...] | None = None
    """The mean of each channel of unscaled latents; scaled latents then have the mean 0."""
    latents_std: tuple[float, ...] | None = None
    """The standard deviation of each channel of unscaled latents; that of scaled latents is then `scaling_factor`."""
    shift_factor: float = 0.0
    """The mean of unscaled latents, for all channels; scaled latents then have the mean 0."""
    quant_conv: bool = True
    """True where a 1×1 convolution stands on the latents' side of encoder and decoder, as in U-Nets' families."""

    def __post_init__(self) -> None:
        mean, std = self.latents_mean, self.latents_std
        if mean and self.shift_factor:
            raise ValueError(f"latents_mean={mean} and shift_factor={self.shift_factor} are two means: leave one out")
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
        """The pixels of an image for one latent, on each axis."""
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
"""The U-Net of SD 2.1, which predicts v; that of SD 2.1 base, which predicts epsilon, has the native size 64."""
SD_VAE = VAEConfig(scaling_factor=0.18215, force_upcast=False)
SD3_VAE = VAEConfig(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False)
FLUX_VAE = replace(SD3_VAE, scaling_factor=0.3611, shift_factor=0.1159)
