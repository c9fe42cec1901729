"""CLIP text encoders and tokenizers, in the layouts and under the key names that they are found in.

The layout of both encoders in files is `text_model.embeddings…`, `text_model.encoder.layers.N…`, and for the second
`text_projection.weight`. Releases of transformers differ in whether a CLIPTextModel has the first part of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
MAX_SIZES = {
    "num_hidden_layers": 1000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 100_000,
    "vocab_size": 10_000_000,
}
"""Of a text encoder, past all that exist: a small file must not ask for more memory than there is."""
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


def clip_config(fields: Mapping[str, Any]) -> CLIPTextConfig:
    """The configuration of a text encoder from its config.json. Raises ValueError for a field that cannot be."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig
    from transformers.activations import ACT2FN

    try:
        config = CLIPTextConfig.from_dict(dict(fields))
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size"):
        if not 1 <= getattr(config, name) <= MAX_SIZES[name]:
            raise ValueError(f"{name}={getattr(config, name)} must lie in 1 … {MAX_SIZES[name]}")
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
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **special)
    # Files that give no length would let the encoder fail on a long prompt.
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
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
    named = [field for field in FILE_FIELDS if files.get("tokenizer_config.json", {}).get(field)]
    if named:
        raise ValueError(f"{folder / 'tokenizer_config.json'} names files, in {', '.join(named)}: remove these fields")


def _holds_tokenizer(folder: Path) -> bool:
    """Looked at here, because transformers makes an empty tokenizer where it finds no files."""
    layouts = (("vocab.json", "merges.txt"), ("tokenizer.json",))
    return any(all((folder / name).exists() for name in layout) for layout in layouts)
