"""CLIP text encoders: their configurations, and the names of their tensors in each layout.

The layout of both encoders in files is `text_model.embeddings…`, `text_model.encoder.layers.N…`, and for the second
`text_projection.weight`. Some releases of transformers leave the first part of these names out of a CLIPTextModel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

PREFIX, PROJECTION = "text_model.", "text_projection.weight"
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The fields that determine what a CLIP text encoder computes."""
MAX_CAUSE = 300
"""The characters of another library's message that an error repeats."""
MAX_SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 100_000,
    "vocab_size": 10_000_000,
}
"""Sizes past those of all text encoders that exist: a small file must not ask for more memory than there is."""
OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that files have, whichever release of transformers named them."""
    named = (PREFIX, "text_projection.", "logit_scale")
    return {key if key.startswith(named) else PREFIX + key: tensor for key, tensor in tensors.items()}


def named_for(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that the installed transformers gives to the encoder's own."""
    tensors = with_prefix(tensors)
    if any(key.startswith(PREFIX) for key, _ in encoder.named_parameters()):
        return tensors
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder's tensors under transformers' names; unknown keys stay as they are.

    Queries, keys and values are views of the fused matrix; the projection, stored transposed there, is copied.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "text_projection":
            converted[PROJECTION] = tensor.T.contiguous()
            continue
        parts = key.split(".")
        if parts[:2] == ["transformer", "resblocks"] and len(parts) > 3:
            layer, name = f"{PREFIX}encoder.layers.{parts[2]}.", ".".join(parts[3:])
            if name in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.ndim:
                kind = name.rpartition("_")[2]
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{layer}self_attn.{part}_proj.{kind}"] = rows
                continue
            module, _, kind = name.rpartition(".")
            if module in OPEN_CLIP_LAYER:
                key = f"{layer}{OPEN_CLIP_LAYER[module]}.{kind}"
        else:
            module, _, kind = key.rpartition(".")
            if key in OPEN_CLIP:
                key = PREFIX + OPEN_CLIP[key]
            elif module in OPEN_CLIP:
                key = f"{PREFIX}{OPEN_CLIP[module]}.{kind}"
        converted[key] = tensor
    return converted


def cut_to_depth(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors without those of layer `depth`, the one past the last: folders of SD 2.1 leave that layer out."""
    last = f"{PREFIX}encoder.layers.{depth}."
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(last)}


@contextmanager
def by_transformers() -> Iterator[None]:
    """Turn whatever transformers raises inside the block into a ValueError, and silence what it logs."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"transformers cannot read it ({cause[:MAX_CAUSE]}): download it again") from None
    finally:
        set_verbosity(verbosity)


def clip_config(fields: Mapping[str, Any]) -> CLIPTextConfig:
    """The configuration of a text encoder from its config.json. Raises ValueError for an impossible field.

    Fields that do not change what a CLIP encoder computes, such as its dtype, are left out.
    """
    from transformers import CLIPTextConfig
    from transformers.activations import ACT2FN

    if fields.get("num_attention_heads") == 0:
        raise ValueError("num_attention_heads=0 must be at least 1")
    with by_transformers():
        config = CLIPTextConfig.from_dict({name: value for name, value in fields.items() if name in CONFIG_FIELDS})
    for name, most in MAX_SIZES.items():
        if not 1 <= getattr(config, name) <= most:
            raise ValueError(f"{name}={getattr(config, name)} must lie in 1 … {most}")
    if type(config.eos_token_id) is not int or not 0 <= config.eos_token_id < config.vocab_size:
        raise ValueError(
            f"eos_token_id={config.eos_token_id!r} must be one of the vocabulary's ids, 0 … {config.vocab_size - 1}"
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported, only {', '.join(ACT2FN)}")
    return config


def materialise_positions(encoder: nn.Module, device: torch.device) -> None:
    """Give an encoder that was made on the meta device its position ids, the one buffer that no file holds."""
    for module in encoder.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)
