"""T5 text encoders: their configurations, the names of their tensors, and their tokenizers, read and written.

transformers is given the pieces that were read and checked here, but no folder, as for CLIP's tokenizers.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.read import read_json
from cutdiff.checkpoint.text import by_transformers
from cutdiff.checkpoint.vocabulary import CONFIG, MAX_CONTENT, MAX_WORDS, WORDS, read_optional

if TYPE_CHECKING:
    from transformers import T5Config, T5Tokenizer

CONFIG_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
)
"""The fields that determine what a T5 encoder computes."""
MAX_SIZES = {
    "vocab_size": 10_000_000,
    "d_model": 100_000,
    "d_kv": 10_000,
    "d_ff": 1_000_000,
    "num_layers": 1000,
    "num_heads": 10_000,
    "relative_attention_num_buckets": 10_000,
    "relative_attention_max_distance": 1_000_000,
}
"""Sizes past those of all T5 encoders that exist."""
TABLE, TIED = "shared.weight", "encoder.embed_tokens.weight"
"""Two names of the table of embeddings, of which a file may have either or both."""
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
"""The first three pieces of a vocabulary, in this order."""
EXTRA = "<extra_id_"
"""The beginning of the pieces that training masked spans with."""


@dataclass(frozen=True)
class T5Part:
    """A T5 encoder without its weights, its tokenizer, and the number of tokens that prompts are read as."""

    config: T5Config
    tokenizer: T5Tokenizer
    length: int


def t5_config(content: Mapping[str, Any]) -> T5Config:
    """The configuration of a T5 encoder from its config.json. Raises ValueError for an impossible field."""
    from transformers import T5Config
    from transformers.activations import ACT2FN

    with by_transformers():
        config = T5Config(
            **{name: value for name, value in content.items() if name in CONFIG_FIELDS},
            is_encoder_decoder=False,
            use_cache=False,
            dropout_rate=0.0,
        )
    for name, most in MAX_SIZES.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 to {most}")
    if config.dense_act_fn not in ACT2FN:
        raise ValueError(f"feed_forward_proj={config.feed_forward_proj!r} is not supported, only gated-gelu and relu")
    return config


def fields(encoder: nn.Module) -> dict[str, Any]:
    """The config.json of a T5 encoder."""
    sizes = {name: getattr(encoder.config, name) for name in CONFIG_FIELDS}
    kept = {"is_encoder_decoder": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1}
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": "float32", **kept, **sizes}


def with_both_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an encoder with the table of embeddings under both of its names."""
    tables = {name: tensors[name] for name in (TIED, TABLE) if name in tensors}
    return {**tensors, **{name: table for table in [*tables.values()][:1] for name in (TABLE, TIED)}}


def with_one_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an encoder, each once, as files have them."""
    return {key: tensor for key, tensor in tensors.items() if key != TIED}


def tie(network: nn.Module) -> None:
    """Let the two names of a T5 encoder's table be one parameter; other networks stay as they are."""
    if TIED in network.state_dict():
        network.get_submodule(TIED.removesuffix(".weight")).weight = network.get_parameter(TABLE)


def read_t5_tokenizer(folder: Path, max_length: int) -> T5Tokenizer:
    """A tokenizer of T5's kind from a folder's tokenizer.json. It reads its own number of tokens, or `max_length` where
    that is less. Raises ValueError where the folder has no tokenizer or a bad one."""
    from transformers import T5Tokenizer

    path = folder / WORDS
    if not path.exists():
        raise ValueError(f"{folder} holds no {WORDS}, which T5's tokenizer is read from: download it")
    content, config = read_json(path), read_optional(folder / CONFIG)
    pieces = _pieces(path, content)
    length = max_length if config.get("model_max_length") is None else config["model_max_length"]
    if type(length) not in (int, float) or length != length // 1 or length < 2:
        raise ValueError(f"{folder / CONFIG}: model_max_length={quoted(length)} is no number of tokens from 2")
    try:
        with by_transformers():
            return T5Tokenizer(
                vocab=pieces,
                _spm_precompiled_charsmap=_charsmap(path, content.get("normalizer")),
                extra_ids=sum(piece.startswith(EXTRA) for piece, _ in pieces),
                model_max_length=min(int(length), max_length),
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _pieces(path: Path, content: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The pieces of a vocabulary and their scores, in the order of their ids."""
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(listed, list) or not 4 <= len(listed) <= MAX_WORDS:
        raise ValueError(f"{path} has no list of 4 to {MAX_WORDS} pieces, so it is not T5's: download it again")
    for entry in listed:
        piece, score = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(piece, str) or not 1 <= len(piece) <= MAX_CONTENT:
            raise ValueError(f"{path} has {quoted(entry)} where a piece and its score belong: download it again")
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{path} gives {quoted(piece)} the score {quoted(score)}: download it again")
    if [piece for piece, _ in listed[:3]] != [*SPECIAL.values()]:
        raise ValueError(f"{path} does not begin with {', '.join(SPECIAL.values())}, so it is not T5's")
    if len({piece for piece, _ in listed}) < len(listed):
        raise ValueError(f"{path} has a piece twice: download it again")
    return [(piece, float(score)) for piece, score in listed]


def _charsmap(path: Path, normalizer: object) -> bytes | None:
    """The table by which characters are replaced before a text is read; None where there is none."""
    if normalizer is None:
        return None
    steps = cast(dict[str, Any], normalizer).get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    tables = [step.get("precompiled_charsmap") for step in steps if isinstance(step, dict)] if steps else []
    try:
        (table,) = filter(None, tables)
        return base64.b64decode(table, validate=True)
    except (ValueError, TypeError, binascii.Error):
        raise ValueError(f"{path}: its normalizer is not T5's table of characters: download it again") from None
