"""The kinds of networks that are sampled with, a U-Net or a transformer, and what stands beside each in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cutdiff.checkpoint.configs import unet_config, unet_to_diffusers
from cutdiff.checkpoint.transformer_configs import flux_config, flux_to_diffusers, sd3_config, sd3_to_diffusers
from cutdiff.models.backbone import Backbone, Shape
from cutdiff.models.config import UNetConfig
from cutdiff.models.flux import Flux, FluxConfig
from cutdiff.models.joint_text import FluxText, SD3Text
from cutdiff.models.sd3 import SD3 as SD3Network
from cutdiff.models.sd3 import SD3Config
from cutdiff.models.text import TextEncoders
from cutdiff.models.unet import UNet
from cutdiff.sampling.edm import AnyNoise

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""The sub-folders of text encoders: CLIP's one or two, and then T5's."""


@dataclass(frozen=True)
class Kind:
    """A kind of network, in diffusers' layout."""

    network: Callable[[Any], Backbone[Any]]
    folder: str
    """The name of its sub-folder, and of the network in records and errors."""
    class_name: str
    parse: Callable[[Mapping[str, Any]], Any]
    """config.json -> configuration."""
    write: Callable[[Any], dict[str, Any]]
    """Configuration -> config.json."""
    text: type[TextEncoders]
    family: str = ""
    """The name of the family, where there is one family of the kind."""
    encoders: int = 0
    """The number of text encoders, where all models of the kind have as many."""


UNET = Kind(UNet, "unet", "UNet2DConditionModel", unet_config, unet_to_diffusers, TextEncoders)
FLUX = Kind(Flux, "transformer", "FluxTransformer2DModel", flux_config, flux_to_diffusers, FluxText, "FLUX.1", 2)
SD3 = Kind(SD3Network, "transformer", "SD3Transformer2DModel", sd3_config, sd3_to_diffusers, SD3Text, "SD3", 3)
KINDS: dict[type, Kind] = {UNetConfig: UNET, FluxConfig: FLUX, SD3Config: SD3}
"""The kind of each configuration."""


def kind_of(config: object) -> Kind:
    """The kind of network that has this configuration."""
    return KINDS[type(config)]


def published_preferences(config: Shape, noise: AnyNoise) -> dict[str, Any]:
    """The options of a run with which diffusers' pipeline of a transformer draws where nobody says otherwise; none for
    a U-Net. FLUX.1-schnell, which was distilled to four steps without guidance, is told from the others by its times,
    whose shift does not depend on the size."""
    kind = kind_of(config)
    if kind is UNET:
        return {}
    is_schnell = kind is FLUX and not config.guidance_dim and not getattr(noise, "use_dynamic_shifting", False)
    if is_schnell:
        return {"guidance_scale": 1.0, "num_steps": 4}
    return {"guidance_scale": 3.5 if kind is FLUX else 7.0, "num_steps": 28}


def t5_length(config: Shape) -> int:
    """The number of tokens that T5 reads for a transformer: FLUX.1-dev and the others like it, which read the guidance
    scale, were trained with 512, and the rest with 256."""
    return 512 if config.guidance_dim else 256


def networks_of(network: Backbone[Any], vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The networks of a model by the names of their sub-folders."""
    texts = dict(zip(TEXT_ENCODERS, encoders, strict=False))
    return {kind_of(network.config).folder: network, "vae": vae, **texts}
