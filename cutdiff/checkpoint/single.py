"""Reading an SDXL single file in the original (Stability) layout, with what it does not say taken from its shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Blueprint, Networks, is_harmless
from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.keys import unet_keys, vae_keys
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.schedule import NoiseConfig

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

HEAD_DIM = 64
"""Channels of an attention head, in the U-Net and in both text encoders; no shape in a file tells it."""
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
OTHER_FAMILIES = {
    "cond_stage_model.": "is a Stable Diffusion 1 or 2 checkpoint",
    "conditioner.embedders.0.model.": "is an SDXL refiner",
    "down_blocks.": "is a single network in the diffusers layout: pass the folder of the whole model",
}
SCHEDULE_MARKS = {"v_pred", "ztsnr"}
"""Empty tensors with which some single files say that they were trained otherwise than SDXL."""

FIRST_POSITIONS, SECOND_POSITIONS = "text_model.embeddings.position_embedding.weight", "positional_embedding"

Parts = dict[str, dict[str, Tensor]]


def split(tensors: Mapping[str, Tensor], *, name: str, has_config: bool) -> Parts:
    """The tensors of each network, under original keys without their prefix.

    `has_config` says that a configuration comes from elsewhere. Raises ValueError where the file is no SDXL checkpoint,
    holds keys of no network, or is marked as trained with another schedule while no configuration tells which.
    """
    parts: Parts = {network: {} for network in PREFIXES}
    rest: list[str] = []
    for key, tensor in tensors.items():
        for network, prefix in PREFIXES.items():
            if key.startswith(prefix):
                parts[network][key.removeprefix(prefix)] = tensor
                break
        else:
            rest.append(key)
    missing = [prefix for network, prefix in PREFIXES.items() if not parts[network]]
    if missing:
        for start, what in OTHER_FAMILIES.items():
            if any(key.startswith(start) for key in tensors):
                raise ValueError(f"{name} {what}; single files are read for SDXL only")
        raise ValueError(
            f"{name} is no SDXL checkpoint in the original layout: no key begins with {', '.join(missing)}"
        )
    if not has_config and SCHEDULE_MARKS & {*rest}:
        marks = ", ".join(sorted(SCHEDULE_MARKS & {*rest}))
        raise ValueError(f"{name} is marked {marks}: pass config=FOLDER, a diffusers folder with its scheduler")
    unexpected = [key for key in rest if not is_harmless(key) and key not in SCHEDULE_MARKS]
    if unexpected:
        raise ValueError(f"{name}: {len(unexpected)} keys belong to no network of SDXL: {listed(unexpected)}")
    return parts


def convert(parts: Parts, networks: Networks) -> Parts:
    """The same tensors under the networks' own keys; nothing is copied but the second encoder's projection.

    Keys that the networks do not know stay, for the strict assignment to list.
    """
    unet, vae = unet_keys(networks.unet), vae_keys(networks.vae)
    shapes = {key: value.ndim for key, value in networks.vae.state_dict().items()}
    return {
        "unet": {unet.get(key, key): tensor for key, tensor in parts["unet"].items()},
        "vae": {
            (ours := vae.get(key, key)): _linear(tensor) if shapes.get(ours) == 2 else tensor
            for key, tensor in parts["vae"].items()
        },
        "text_encoder": clip.named_for(networks.text_encoder, parts["text_encoder"]),
        "text_encoder_2": clip.from_open_clip(parts["text_encoder_2"]),
    }


def _linear(weight: Tensor) -> Tensor:
    """The weight of a 1×1 convolution (C', C, 1, 1) as that of a linear layer (C', C); others as they are."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight


def infer_blueprint(parts: Parts) -> Blueprint:
    """Sizes from keys and shapes, SDXL's constants for the rest, tokenizers from the local Hugging Face cache.

    Raises ValueError where a key that tells a size is missing, or no tokenizer is found.
    """
    shapes = {name: _Shapes(name, part) for name, part in parts.items()}
    shapes["text_encoder"] = _Shapes("text_encoder", clip.with_prefix(parts["text_encoder"]))
    lengths = shapes["text_encoder"].of(FIRST_POSITIONS)[0], shapes["text_encoder_2"].of(SECOND_POSITIONS)[0]
    tokenizer, tokenizer_2 = clip.cached_tokenizers(lengths)
    pooled_dim = shapes["text_encoder_2"].of("text_projection")[1]
    return Blueprint(
        unet=_infer_unet(shapes["unet"], pooled_dim),
        vae=_infer_vae(shapes["vae"]),
        text_encoder=_infer_clip(shapes["text_encoder"], tokenizer, lengths[0]),
        text_encoder_2=_infer_open_clip(shapes["text_encoder_2"], tokenizer_2, lengths[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        noise=NoiseConfig(),
        zeros_for_empty_negative=True,
    )


@dataclass(frozen=True)
class _Shapes:
    name: str
    tensors: Mapping[str, Tensor]

    def of(self, key: str) -> tuple[int, ...]:
        if key not in self.tensors:
            raise ValueError(
                f"the file has no {PREFIXES[self.name]}{key}, from which a size of the {self.name} is read"
            )
        return tuple(self.tensors[key].shape)

    def count(self, prefix: str) -> int:
        """How many modules are numbered after `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for key in self.tensors if (match := pattern.match(key))})


def _infer_unet(shapes: _Shapes, pooled_dim: int) -> UNetConfig:
    channels: list[int] = [shapes.of("input_blocks.0.0.weight")[0]]
    layers: list[list[int]] = [[]]
    for i in range(1, shapes.count("input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes.tensors:
            channels.append(channels[-1])
            layers.append([])
            continue
        channels[-1] = shapes.of(f"input_blocks.{i}.0.in_layers.2.weight")[0]
        layers[-1].append(shapes.count(f"input_blocks.{i}.1.transformer_blocks."))
    return UNetConfig(
        in_channels=shapes.of("input_blocks.0.0.weight")[1],
        out_channels=shapes.of("out.2.weight")[0],
        channels=tuple(channels),
        layers_per_block=_one("layers in a level", {len(level) for level in layers}),
        transformer_layers=tuple(_one("transformer blocks in a level", set(level)) for level in layers),
        mid_transformer_layers=shapes.count("middle_block.1.transformer_blocks."),
        num_heads=tuple(
            # A level without attention has no heads to get wrong.
            _heads(width) if any(level) or width % HEAD_DIM == 0 else 1
            for width, level in zip(channels, layers, strict=True)
        ),
        context_dim=shapes.of("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        pooled_dim=pooled_dim,
        size_embedding_dim=(shapes.of("label_emb.0.0.weight")[1] - pooled_dim) // 6,
    )


def _infer_vae(shapes: _Shapes) -> VAEConfig:
    levels = range(shapes.count("encoder.down."))
    return VAEConfig(
        in_channels=shapes.of("encoder.conv_in.weight")[1],
        out_channels=shapes.of("decoder.conv_out.weight")[0],
        channels=tuple(shapes.of(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels),
        layers_per_block=shapes.count("encoder.down.0.block."),
        latent_channels=shapes.of("post_quant_conv.weight")[0],
    )


def _infer_clip(shapes: _Shapes, tokenizer: CLIPTokenizer, positions: int) -> CLIPTextConfig:
    vocab_size, width = shapes.of("text_model.embeddings.token_embedding.weight")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes.of("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": shapes.count("text_model.encoder.layers."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": positions,
    }
    return clip.clip_config({**sizes, **_special_tokens(tokenizer), "hidden_act": "quick_gelu"})


def _infer_open_clip(shapes: _Shapes, tokenizer: CLIPTokenizer, positions: int) -> CLIPTextConfig:
    vocab_size, width = shapes.of("token_embedding.weight")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes.of("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": shapes.count("transformer.resblocks."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": positions,
        "projection_dim": shapes.of("text_projection")[1],
    }
    return clip.clip_config({**sizes, **_special_tokens(tokenizer), "hidden_act": "gelu"})


def _special_tokens(tokenizer: CLIPTokenizer) -> dict[str, object]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _heads(width: int) -> int:
    if width % HEAD_DIM:
        raise ValueError(f"{width} channels do not divide into heads of {HEAD_DIM} as in SDXL: pass config=FOLDER")
    return width // HEAD_DIM


def _one(what: str, values: Collection[int]) -> int:
    if len(values) != 1:
        raise ValueError(
            f"the file's U-Net has different numbers of {what}, {sorted(values)}: only one number is built"
        )
    return next(iter(values))
