"""CLIP text encoders and tokenizers, in the layouts and under the key names that they are found in.

The layout of both encoders in files is `text_model.embeddings…`, `text_model.encoder.layers.N…`, and for the second
`text_projection.weight`. Releases of transformers differ in whether a CLIPTextModel has the first part of these names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.read import read_json, read_text

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

PREFIX, PROJECTION = "text_model.", "text_projection.weight"
CACHED_TOKENIZERS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ("stabilityai/sdxl-turbo", "tokenizer"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
)
"""Where the local Hugging Face cache may hold CLIP's tokenizer, which all families share: repository and folder."""
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
"""What a CLIP text encoder is computed from."""
MAX_CAUSE = 300
"""Characters of another library's message."""
MAX_SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 100_000,
    "vocab_size": 10_000_000,
}
"""Of a text encoder, past all that exist: a small file must not ask for more memory than there is."""
FRAME = ("<|startoftext|>", "<|endoftext|>")
"""What begins and ends a prompt."""
PAD_TOKENS = {True: "!", False: "<|endoftext|>"}
"""What prompts are padded with, by whether the encoder is OpenCLIP's."""
TOKENIZER_JSON = (
    "vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What transformers reads of a tokenizer, beside merges.txt."""
FILE_FIELDS = ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "init_inputs")
"""Fields of a tokenizer_config.json that some release of transformers opens as files, wherever they lie."""

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
    """The same tensors under the names that files have, whichever release named them."""
    named = (PREFIX, "text_projection.", "logit_scale")
    return {key if key.startswith(named) else PREFIX + key: tensor for key, tensor in tensors.items()}


def named_for(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that the installed transformers gives to the encoder's own."""
    tensors = with_prefix(tensors)
    if any(key.startswith(PREFIX) for key, _ in encoder.named_parameters()):
        return tensors
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder's tensors under transformers' names; keys that it does not know stay as they are.

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
    """The encoder without its last layer, where it has one more than `depth`: SD 2.1's folders leave that out."""
    last = f"{PREFIX}encoder.layers.{depth}."
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(last)}


@contextmanager
def _by_transformers() -> Iterator[None]:
    """What transformers makes of files: whatever it raises is a ValueError, and what it logs is not told."""
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
    """The configuration of a text encoder from its config.json. Raises ValueError for a field that cannot be.

    Fields that change nothing in what a CLIP encoder computes, such as its dtype, are left out.
    """
    from transformers import CLIPTextConfig
    from transformers.activations import ACT2FN

    if fields.get("num_attention_heads") == 0:
        raise ValueError("num_attention_heads=0 must be at least 1")
    with _by_transformers():
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
    """Give an encoder that was made on the meta device its position numbers, the one buffer that no file holds."""
    for module in encoder.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)


def read_tokenizer(folder: Path, max_length: int, pad_token: str | None = None) -> CLIPTokenizer:
    """A tokenizer in CLIP's file format, that cuts prompts at its own length or at `max_length` where that is less.

    Without a `pad_token` it pads as its files say. Raises ValueError where there is none.
    """
    from transformers import CLIPTokenizer

    if not _holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer (vocab.json and merges.txt), so the model is incomplete: download it"
        )
    _check_tokenizer(folder)
    special: dict[str, Any] = {} if pad_token is None else {"pad_token": pad_token}
    try:
        with _by_transformers():
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **special)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or length != length // 1:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length={quoted(length)} is no number of tokens"
        )
    # Files that give no length would let the encoder fail on a long prompt.
    tokenizer.model_max_length = int(min(length, max_length))
    if tokenizer.model_max_length < 3:  # one token begins a prompt, one ends it
        raise ValueError(f"{folder} and its encoder leave {tokenizer.model_max_length} tokens, too few for a prompt")
    return tokenizer


def cached_tokenizer() -> Path:
    """The folder of CLIP's tokenizer in the local Hugging Face cache. Raises ValueError where it has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for repository, folder in CACHED_TOKENIZERS:
        try:
            path = Path(snapshot_download(repository, local_files_only=True)) / folder
        except LocalEntryNotFoundError:
            continue
        if _holds_tokenizer(path):
            return path
    raise ValueError(
        "a single file holds no tokenizer, and the local Hugging Face cache has none either: pass --config FOLDER, a "
        "diffusers folder of the same model family (its weights are not read), or fetch one with "
        f"`hf download {CACHED_TOKENIZERS[0][0]}`"
    )


def _check_tokenizer(folder: Path) -> None:
    """Raise ValueError where a file that transformers would read is none that it can, or names one elsewhere."""
    files = {name: read_json(folder / name) for name in TOKENIZER_JSON if (folder / name).exists()}
    if (folder / "merges.txt").exists():
        read_text(folder / "merges.txt")
    if (vocabulary := files.get("vocab.json")) is not None:
        _check_vocabulary(folder / "vocab.json", vocabulary, files.get("added_tokens.json", {}))
    named = [field for field in FILE_FIELDS if files.get("tokenizer_config.json", {}).get(field)]
    if named:
        raise ValueError(f"{folder / 'tokenizer_config.json'} names files, in {', '.join(named)}: remove these fields")


def _check_vocabulary(path: Path, vocabulary: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Raise ValueError where tokens have no ids of their own, or what frames a prompt is missing."""
    ids = [*vocabulary.values()]
    if odd := next((token for token, value in vocabulary.items() if type(value) is not int or value < 0), None):
        raise ValueError(f"{path} gives {quoted(odd)} the id {quoted(vocabulary[odd])}: download it again")
    if len({*ids}) < len(ids):
        raise ValueError(f"{path} gives {len(ids)} tokens {len({*ids})} different ids: download it again")
    if missing := [token for token in FRAME if token not in vocabulary and token not in added]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}, so it is not CLIP's: download it again")


def _holds_tokenizer(folder: Path) -> bool:
    """Looked at here, because transformers makes an empty tokenizer where it finds no files."""
    layouts = (("vocab.json", "merges.txt"), ("tokenizer.json",))
    return any(all((folder / name).exists() for name in layout) for layout in layouts)
