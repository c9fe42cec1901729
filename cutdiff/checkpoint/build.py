"""Building networks: from their configurations on the meta device, then from memory-mapped tensors, strictly."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.kinds import TEXT_ENCODERS, Kind, kind_of, networks_of, t5_length
from cutdiff.checkpoint.model import MergedLora, Model
from cutdiff.checkpoint.t5 import TABLE, TIED, T5Part, tie
from cutdiff.checkpoint.weights import FP8
from cutdiff.models.backbone import Backbone, Shape
from cutdiff.models.config import VAEConfig
from cutdiff.models.joint_text import T5, NoT5
from cutdiff.models.layers import channels_last
from cutdiff.models.text import TextEncoders
from cutdiff.models.vae import VAE
from cutdiff.sampling.edm import AnyNoise
from cutdiff.sampling.flow import FlowConfig

if TYPE_CHECKING:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5EncoderModel,
    )

OTHER_INPUTS = {
    5: "one that also reads a depth map",
    7: "an upscaler",
    8: "one that edits pictures, as InstructPix2Pix does",
}
"""The purpose of a U-Net whose input has more channels than its output, by the number of its input's channels."""

MAX_PARAMETERS = 5000
"""The most tensors of a network; SDXL's U-Net has 1,680."""
FAR_MORE = 2
"""The multiple of its file's tensors beyond which a configuration is of another network, and not a file incomplete."""
FIRST = {
    "unet": ("conv_in.weight", "input_blocks.0.0.weight"),
    "transformer": ("proj_out.weight", "final_layer.linear.weight"),
    "vae": ("encoder.conv_in.weight",),
    **dict.fromkeys(
        TEXT_ENCODERS,
        (f"{clip.PREFIX}embeddings.token_embedding.weight", "embeddings.token_embedding.weight", TABLE, TIED),
    ),
}
"""Names of which the weights of a network have one; other files than a network's do not have them."""


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: configurations, tokenizers and the schedule of noise."""

    unet: Shape
    """The configuration of the network that is sampled with, a U-Net or a transformer."""
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig | None
    """The second text encoder of SDXL; SD 1.5 and SD 2.1 have none, and no second tokenizer."""
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer | None
    text_layer: int
    """The layer of the text encoders that is read, counted from the end: 1 is the last."""
    noise: AnyNoise
    zeros_for_empty_negative: bool
    t5: T5Part | None = None
    """The T5 encoder of a transformer; SD3 runs without one too."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model's networks, those of a diffusers folder's sub-folders."""
        count = sum(part is not None for part in (self.text_encoder, self.text_encoder_2, self.t5))
        return kind_of(self.unet).folder, "vae", *TEXT_ENCODERS[:count]

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not fit each other, naming both numbers."""
        first, second = self.text_encoder, self.text_encoder_2
        t5, kind = self.t5.config if self.t5 else None, kind_of(self.unet)
        network = "U-Net" if kind.folder == "unet" else kind.folder
        context_dim, pooled_dim = kind.text.widths(first, second, t5)
        check_inputs(self.unet.in_channels, self.unet.out_channels)
        for ours, theirs, what in (
            (
                self.unet.out_channels if self.unet.inpaints else self.unet.in_channels,
                self.vae.latent_channels,
                f"channels of the {network}'s input and of the VAE's latents",
            ),
            (
                self.unet.out_channels,
                self.vae.latent_channels,
                f"channels of the {network}'s output and the VAE's latents",
            ),
            (self.unet.context_dim, context_dim, f"the {network}'s context width and the text encoders'"),
            (self.unet.pooled_dim, pooled_dim, f"the {network}'s pooled width and the text encoders'"),
        ):
            if theirs is not None and ours != theirs:
                raise ValueError(f"{what} differ, {ours} and {theirs}: the parts are not of one text-to-image model")
        tokenizers: list[tuple[Any, Any]] = [(self.tokenizer, first), (self.tokenizer_2, second)]
        for tokenizer, encoder in [*tokenizers, (self.t5 and self.t5.tokenizer, t5)]:
            if tokenizer and encoder and (last := max(tokenizer.get_vocab().values())) >= encoder.vocab_size:
                raise ValueError(
                    f"the tokenizer has ids to {last}, its encoder only {encoder.vocab_size} tokens: "
                    "take both from one model"
                )
        lengths = [tokenizer.model_max_length for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer]
        check_noise(kind, self.noise)
        if len({*lengths}) > 1:
            raise ValueError(f"the tokenizers cut prompts at different lengths, {lengths[0]} and {lengths[1]} tokens")


def check_noise(kind: Kind, noise: AnyNoise) -> None:
    """Raise ValueError where a network of this kind was not trained with such noise."""
    is_flow, network = isinstance(noise, FlowConfig), "U-Net" if kind.folder == "unet" else kind.folder
    if is_flow != (network == "transformer"):
        kinds = "with" if is_flow else "without"
        raise ValueError(f"a {network} and a scheduler {kinds} flow matching do not fit: take both from one model")


def check_inputs(inputs: int, outputs: int) -> None:
    """Raise ValueError where these numbers of channels show that a U-Net reads other things than text and a mask."""
    if inputs != outputs and inputs in OTHER_INPUTS:
        raise ValueError(
            f"its U-Net has {inputs} input channels, so this is {OTHER_INPUTS[inputs]}: "
            "pass the text-to-image model that it was made from"
        )


@dataclass(frozen=True)
class Networks:
    """The networks of a model."""

    unet: Backbone[Any]
    vae: VAE
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection | None
    t5: T5EncoderModel | None = None

    def named(self) -> dict[str, nn.Module]:
        """The networks that the model has, by the names of a diffusers folder's sub-folders."""
        texts = (self.text_encoder, self.text_encoder_2, self.t5)
        return networks_of(self.unet, self.vae, [encoder for encoder in texts if encoder is not None])


def empty_networks(blueprint: Blueprint, keys: Mapping[str, Collection[str]]) -> Networks:
    """The networks on the meta device, which have keys and shapes but take no memory. `keys` has the names in the files
    of those that are read. The errors are those of `outlined`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    kind, last = kind_of(blueprint.unet), blueprint.names[-1]
    with outlined(kind.folder, keys.get(kind.folder)):
        unet = kind.network(blueprint.unet)
    with outlined("vae", keys.get("vae")):
        vae = VAE(blueprint.vae)
    with outlined("text_encoder", keys.get("text_encoder")):
        first = (CLIPTextModelWithProjection if kind.text.pools_first else CLIPTextModel)(blueprint.text_encoder)
    with outlined("text_encoder_2", keys.get("text_encoder_2")):
        second = CLIPTextModelWithProjection(blueprint.text_encoder_2) if blueprint.text_encoder_2 else None
    with outlined(last, keys.get(last)):
        t5 = T5EncoderModel(blueprint.t5.config) if blueprint.t5 else None
    return Networks(unet, vae, first, second, t5)


@contextmanager
def outlined(name: str, keys: Collection[str] | None = None) -> Iterator[None]:
    """Make the network `name` on the meta device. ValueError as soon as it has far more parameters than `keys`, the
    names in its file, or more than MAX_PARAMETERS: a few digits of a configuration may ask for millions."""
    thread, numbers, most = get_ident(), count(1), MAX_PARAMETERS
    limit = f"more than {most} tensors, which no model of these families has"
    if keys is not None and not {*FIRST[name]}.isdisjoint(keys):
        most = FAR_MORE * len(keys)
        limit = f"more than {most} tensors, and its file has {len(keys)}"

    def counted(*_: object) -> None:
        if get_ident() == thread and next(numbers) > most:
            raise ValueError(
                f"the configuration of {name} asks for {limit}: take the configuration and the weights from one model"
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            yield
    finally:
        handle.remove()


def build_model(
    blueprint: Blueprint,
    networks: Networks,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
    files: dict[str, Path],
    decided_by: dict[str, str],
    loras: tuple[MergedLora, ...],
    sources: Mapping[str, str],
) -> Model:
    """Give the empty `networks` their weights, by sub-folder name and diffusers key, and put the model together.

    `source` is the file or folder of the weights, and `sources` has that of each network that is from elsewhere.

    A tensor that has the dtype and device already is used where it lies in the mapped file. Raises ValueError that
    lists missing, unexpected and mis-shaped keys.
    """
    for name, network in networks.named().items():
        where = f"{sources.get(name, source)}: {name}"
        assign(network, weights[name], name=where, device=device, dtype=dtype)
    return model_of(blueprint, networks, source=source, files=files, decided_by=decided_by, loras=loras)


def model_of(blueprint: Blueprint, networks: Networks, **origin: Any) -> Model:
    """The networks as a model; `origin` has the fields of `Model` that say where they came from."""
    return Model(
        unet=networks.unet,
        vae=networks.vae,
        text=_text_encoders(blueprint, networks),
        noise=blueprint.noise,
        zeros_for_empty_negative=blueprint.zeros_for_empty_negative,
        **origin,
    )


def _text_encoders(blueprint: Blueprint, networks: Networks) -> TextEncoders:
    kind, beside = kind_of(blueprint.unet), dict[str, Any]()
    if blueprint.t5 and networks.t5:
        beside["t5"] = T5(blueprint.t5.tokenizer, networks.t5, blueprint.t5.length)
    elif kind.text is not TextEncoders:
        dtype = networks.text_encoder.dtype
        beside["t5"] = NoT5(blueprint.unet.context_dim, t5_length(blueprint.unet), dtype)
    return kind.text(
        tokenizer=blueprint.tokenizer,
        tokenizer_2=blueprint.tokenizer_2,
        text_encoder=networks.text_encoder,
        text_encoder_2=networks.text_encoder_2,
        layer=blueprint.text_layer,
        **beside,
    )


def assign(
    network: nn.Module, tensors: Mapping[str, Tensor], *, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Put `tensors` in the place of a meta network's parameters, and make it ready to run without gradients.

    In float16, layers of transformers' encoders that are known to overflow there stay in float32, as by transformers.
    Raises ValueError, headed by `name`, that lists missing, unexpected and mis-shaped keys, and keys that hold
    integers.
    """
    expected = network.state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if key in expected or not is_harmless(key)}
    common = [key for key in expected if key in tensors]
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} where {tuple(expected[key].shape)} belongs"
            for key in common
            if tensors[key].shape != expected[key].shape
        ],
        "quantized": [
            f"{key} {tensors[key].dtype} where torch.float16, bfloat16 or float32 belongs"
            for key in common
            if not tensors[key].is_floating_point() or (tensors[key].itemsize < 2 and tensors[key].dtype not in FP8)
        ],
    }
    if any(problems.values()):
        kinds = "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(
            f"{name}: the weights do not fit the network: {_why_not({*filter(problems.get, problems)})}. Keys {kinds}"
        )
    wide = getattr(network, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    dtypes = {key: dtype if {*wide}.isdisjoint(key.split(".")) else torch.float32 for key in expected}
    network.load_state_dict({key: tensors[key].to(device, dtypes[key]) for key in expected}, strict=True, assign=True)
    clip.materialise_positions(network, device)
    tie(network)
    network.eval().requires_grad_(False)
    if device.type != "cpu":  # on a CPU it would copy mapped weights; elsewhere they are copies anyway
        channels_last(network)


def _why_not(kinds: set[str]) -> str:
    """The cause and the remedy where a file's keys have problems of these kinds."""
    if kinds >= {"missing", "unexpected"}:
        return "they have other names, so they are another network's: pass the file that belongs here"
    if "missing" in kinds:
        return "some are missing, so the file is incomplete: download it again"
    if "of another shape" in kinds:
        return "they have other sizes than the configuration says: take both from one model"
    if "unexpected" in kinds:
        return "there are more than the configuration says: take both from one model"
    return "they are integers, which stand for quantized weights and are not read: take its fp16 or bf16 file"


LEFTOVERS = ("position_ids", "attn_mask", "logit_scale", "text_projection", "logvar", "scale_factor")
"""The ends of keys without effect: buffers, tensors for training only, and projections of encoders that do not pool."""
LEFTOVER_PREFIXES = (
    "model_ema.",
    "denoiser.sigmas",
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "lvlb_weights",
    "loss.",
)
"""The beginnings of keys without effect: averaged weights, tables of the noise schedule, and the critic of a VAE."""


def is_harmless(key: str) -> bool:
    """True for a key that no network has and that is known to have no effect."""
    return key.rpartition(".")[2] in LEFTOVERS or key.startswith(LEFTOVER_PREFIXES)
