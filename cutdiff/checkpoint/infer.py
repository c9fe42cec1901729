"""Inferring the configuration of a single file: sizes from its keys and shapes, the rest from its family."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.build import Blueprint
from cutdiff.checkpoint.families import Family
from cutdiff.checkpoint.keys import HINT
from cutdiff.checkpoint.single import Parts
from cutdiff.checkpoint.tokenizer import PAD_TOKENS, cached_tokenizer, read_tokenizer
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.models.controlnet import ControlNetConfig
from cutdiff.models.text import CUT_DEPTH
from cutdiff.sampling.edm import AnyNoise

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

HEAD_DIM = 64
"""The channels of an attention head in the U-Nets of SDXL and SD 2.1 and in all text encoders; no shape shows it."""


def infer_blueprint(parts: Parts, family: Family, noise: AnyNoise, vae: VAEConfig | None = None) -> Blueprint:
    """Sizes from keys and shapes, the family's constants for the rest, tokenizers from the local Hugging Face cache.

    `vae` is the configuration of another file's VAE, where that takes the place of the file's own.

    Raises ValueError where a key that shows a size is missing, or the cache has no tokenizer.
    """
    shapes = {name: Shapes(name, part) for name, part in parts.items()}
    tokenizer = cached_tokenizer()
    encoders, tokenizers = [], []
    for text in family.texts:
        length = shapes[text.name].of(f"{clip.PREFIX}embeddings.position_embedding.weight")[0]
        tokenizers.append(read_tokenizer(tokenizer, length, PAD_TOKENS[text.is_open_clip]))
        encoders.append(_infer_text(shapes[text.name], tokenizers[-1], "gelu" if text.is_open_clip else "quick_gelu"))
    second = len(encoders) > 1
    return Blueprint(
        unet=infer_unet(parts["unet"], encoders[1].projection_dim if second else 0, family, noise.prediction_type),
        vae=vae or infer_vae(parts["vae"], family.vae),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1] if second else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if second else None,
        text_layer=family.text_layer - (not second and encoders[0].num_hidden_layers == CUT_DEPTH),
        noise=noise,
        zeros_for_empty_negative=family.zeros_for_empty_negative,
    )


@dataclass(frozen=True)
class Shapes:
    """The shapes of one network's tensors; `name` is the network's, for errors."""

    name: str
    tensors: Mapping[str, Tensor]

    def of(self, key: str) -> tuple[int, ...]:
        """The shape of a weight, with two dimensions at least."""
        if key not in self.tensors or self.tensors[key].ndim < 2:
            raise ValueError(f"the file's {self.name} has no {key}, or no matrix there, which tells some of its sizes")
        return tuple(self.tensors[key].shape)

    def count(self, prefix: str) -> int:
        """The number of modules that are numbered after `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for key in self.tensors if (match := pattern.match(key))})


def unet_channels(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The channels of a U-Net's input and output, in either layout. ValueError where a key is missing."""
    shapes = Shapes("unet", tensors)
    first, last = ("conv_in", "conv_out") if "conv_in.weight" in tensors else ("input_blocks.0.0", "out.2")
    return shapes.of(f"{first}.weight")[1], shapes.of(f"{last}.weight")[0]


def infer_unet(tensors: Mapping[str, Tensor], pooled_dim: int, family: Family, prediction_type: str) -> UNetConfig:
    """The sizes of a U-Net in the original layout; what no shape shows is as in its family."""
    shapes = Shapes("unet", tensors)
    in_channels, out_channels = unet_channels(tensors)
    channels, layers = _levels(shapes)
    depths = _depths(layers)
    resnets = _one("layers in a level", {len(level) for level in layers})
    up = [
        tuple(shapes.count(f"output_blocks.{i * (resnets + 1) + j}.1.transformer_blocks.") for j in range(resnets + 1))
        for i in reversed(range(len(channels)))
    ]
    mid = shapes.count("middle_block.1.transformer_blocks.") if shapes.count("middle_block.") else None
    attended = [key for key in shapes.tensors if key.endswith(".1.transformer_blocks.0.attn2.to_k.weight")]
    if not attended:
        raise ValueError("no layer of the file's U-Net attends to the text, so it is no text-to-image model")
    return UNetConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        channels=tuple(channels),
        layers_per_block=resnets,
        transformer_layers=depths,
        mid_transformer_layers=mid,
        up_transformer_layers=None if up == [(n,) * (resnets + 1) for n in depths] else tuple(up),
        num_heads=tuple(
            # In a level without attention any number of heads is right.
            family.num_heads or (_heads(width) if any(level) or width % HEAD_DIM == 0 else 1)
            for width, level in zip(channels, layers, strict=True)
        ),
        context_dim=shapes.of(attended[0])[1],
        pooled_dim=pooled_dim,
        size_embedding_dim=(shapes.of("label_emb.0.0.weight")[1] - pooled_dim) // 6 if pooled_dim else 0,
        linear_projections=len(shapes.of(attended[0].partition("transformer_blocks")[0] + "proj_in.weight")) == 2,
        native_size=family.native_sizes[prediction_type],
    )


def infer_control(tensors: Mapping[str, Tensor], unet: UNetConfig) -> ControlNetConfig:
    """The sizes of a ControlNet in either layout; what no shape shows is as in the U-Net that it is for."""
    shapes = Shapes("ControlNet", tensors)
    if f"{HINT}.0.weight" in tensors:
        channels, layers = _levels(shapes)
        first, mid = "input_blocks.0.0", "middle_block.1"
        convolutions = [f"{HINT}.{2 * i}" for i in range(shapes.count(f"{HINT}."))]
    else:
        levels = range(shapes.count("down_blocks."))
        channels = [shapes.of(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels]
        layers = [
            [
                shapes.count(f"down_blocks.{i}.attentions.{j}.transformer_blocks.")
                for j in range(shapes.count(f"down_blocks.{i}.resnets."))
            ]
            for i in levels
        ]
        first, mid, hint = "conv_in", "mid_block.attentions.0", "controlnet_cond_embedding"
        blocks = range(shapes.count(f"{hint}.blocks."))
        convolutions = [f"{hint}.conv_in", *(f"{hint}.blocks.{i}" for i in blocks), f"{hint}.conv_out"]
    attended = [key for key in tensors if key.endswith("transformer_blocks.0.attn2.to_k.weight")]
    changed: dict[str, Any] = {}
    if attended:
        projection = shapes.of(attended[0].partition("transformer_blocks")[0] + "proj_in.weight")
        changed = {"context_dim": shapes.of(attended[0])[1], "linear_projections": len(projection) == 2}
    is_alike = tuple(channels) == unet.channels
    heads, groups = (unet.num_heads, unet.norm_groups) if is_alike else ((1,) * len(channels), 1)
    return ControlNetConfig(
        replace(
            unet,
            in_channels=shapes.of(f"{first}.weight")[1],
            channels=tuple(channels),
            layers_per_block=_one("layers in a level", {len(level) for level in layers}),
            transformer_layers=_depths(layers),
            mid_transformer_layers=shapes.count(f"{mid}.transformer_blocks."),
            up_transformer_layers=None,
            num_heads=heads,
            norm_groups=groups,
            **changed,
        ),
        hint_widths=tuple(shapes.of(f"{name}.weight")[0] for name in convolutions[:-1:2]),
        hint_channels=shapes.of(f"{convolutions[0]}.weight")[1],
    )


def _levels(shapes: Shapes) -> tuple[list[int], list[list[int]]]:
    """The channels of each level in the original layout, and the depth of the transformer of each of its layers."""
    channels: list[int] = [shapes.of("input_blocks.0.0.weight")[0]]
    layers: list[list[int]] = [[]]
    for i in range(1, shapes.count("input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes.tensors:
            channels.append(channels[-1])
            layers.append([])
            continue
        channels[-1] = shapes.of(f"input_blocks.{i}.0.in_layers.2.weight")[0]
        layers[-1].append(shapes.count(f"input_blocks.{i}.1.transformer_blocks."))
    return channels, layers


def _depths(layers: Sequence[Sequence[int]]) -> tuple[int | tuple[int, ...], ...]:
    return tuple(level[0] if len({*level}) == 1 else tuple(level) for level in layers)


def infer_vae(tensors: Mapping[str, Tensor], like: VAEConfig) -> VAEConfig:
    """The sizes of a VAE in the original or the diffusers layout; what no shape shows is as in `like`."""
    shapes = Shapes("vae", tensors)
    level, layer = ("down", "block") if shapes.count("encoder.down.") else ("down_blocks", "resnets")
    levels = range(shapes.count(f"encoder.{level}."))
    return replace(
        like,
        in_channels=shapes.of("encoder.conv_in.weight")[1],
        out_channels=shapes.of("decoder.conv_out.weight")[0],
        channels=tuple(shapes.of(f"encoder.{level}.{i}.{layer}.0.conv1.weight")[0] for i in levels),
        layers_per_block=shapes.count(f"encoder.{level}.0.{layer}."),
        latent_channels=shapes.of("decoder.conv_in.weight")[1],
        quant_conv="quant_conv.weight" in tensors,
    )


def _infer_text(shapes: Shapes, tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    vocab_size, width = shapes.of(f"{clip.PREFIX}embeddings.token_embedding.weight")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes.of(f"{clip.PREFIX}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": shapes.count(f"{clip.PREFIX}encoder.layers."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": shapes.of(f"{clip.PREFIX}embeddings.position_embedding.weight")[0],
        "hidden_act": activation,
    }
    if clip.PROJECTION in shapes.tensors:
        sizes["projection_dim"] = shapes.of(clip.PROJECTION)[0]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return clip.clip_config({**sizes, **special})


def _heads(width: int) -> int:
    if width % HEAD_DIM:
        raise ValueError(f"{width} channels do not divide into heads of {HEAD_DIM}: pass --config FOLDER")
    return width // HEAD_DIM


def _one(what: str, values: Collection[int]) -> int:
    if len(values) != 1:
        raise ValueError(
            f"the file's U-Net has different numbers of {what}, {sorted(values)}: only one number is built"
        )
    return next(iter(values))
