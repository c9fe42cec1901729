"""Textual inversion: files of vectors that a token of prompts stands for.

A file has one tensor for a model with one text encoder, (width,) or (vectors, width), under `emb_params` (A1111, kohya)
or the name of its token (diffusers); for SDXL it has two, `clip_l` and `clip_g`. The tokens of its vectors are named as
in pipelines that diffusers saves: `cat`, `cat_1`, `cat_2` and so on. A LoRA may bundle such tensors (OneTrainer,
A1111).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutdiff.checkpoint.files import listed
from cutdiff.checkpoint.model import AddedEmbedding, Model, sha256
from cutdiff.checkpoint.read import read_tensors
from cutdiff.models import editing
from cutdiff.models.prompts import LORA, parse_weights
from cutdiff.models.tokens import added_tokens

SDXL_KEYS = ("clip_l", "clip_g")
"""The keys of the vectors for the first encoder and the second."""
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second encoder"}


class EmbeddingError(ValueError):
    """A file of textual inversion that does not fit the model."""


@dataclass(frozen=True)
class Inversion:
    """The tensors of a textual inversion, by their keys in the file, and the token that is to stand for its vectors."""

    token: str
    path: Path
    tensors: Mapping[str, Tensor]


def read_inversion(token: str, path: Path) -> Inversion:
    """A file of textual inversion. FileNotFoundError where there is none, EmbeddingError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: pass a .safetensors file of textual inversion")
    try:
        return Inversion(token, path, read_tensors(path))
    except ValueError as error:
        raise EmbeddingError(str(error)) from None


def add_embeddings(model: Model, inversions: Sequence[Inversion]) -> Model:
    """The model, whose prompts then know the token of each inversion: its tokenizers and encoders are changed.

    Raises EmbeddingError where one is made for another model, or the model has the token already.
    """
    text, added = model.text, []
    for inversion in inversions:
        if len(text.encoders) > len(text.clips):
            raise EmbeddingError(f"{inversion.path} is for CLIP alone, and this model reads T5 too: leave it out")
        vectors = _vectors(inversion, [encoder.config.hidden_size for encoder in text.clips])
        for tokenizer, encoder, values in zip(text.tokenizers, text.clips, vectors, strict=True):
            _add(tokenizer, encoder, inversion.token, values, inversion.path)
        added.append(AddedEmbedding(str(inversion.path), inversion.token, sha256(inversion.path)))
    return replace(model, embeddings=(*model.embeddings, *added))


def _vectors(inversion: Inversion, widths: list[int]) -> list[Tensor]:
    """The vectors for each encoder, (vectors, width)."""
    path, tensors = inversion.path, inversion.tensors
    needed = SDXL_KEYS if len(widths) == 2 else tuple(tensors)
    if {*tensors} != {*needed} or len(needed) != len(widths):
        keys = " and ".join(SDXL_KEYS) if len(widths) == 2 else "one tensor, such as emb_params"
        raise EmbeddingError(
            f"{path} has the keys {listed(tensors)}, where this model needs {keys}: use one made for it"
        )
    vectors = []
    for key, width in zip(needed, widths, strict=True):
        values = tensors[key][None] if tensors[key].ndim == 1 else tensors[key]
        if values.ndim != 2 or not len(values) or values.shape[1] != width:
            made_for = WIDTHS.get(values.shape[-1] if values.ndim else 0)
            raise EmbeddingError(
                f"{path} has {key} {tuple(tensors[key].shape)}, where this model reads vectors of width {width}: "
                f"use one made for it{f', not for {made_for}' if made_for else ''}"
            )
        if not values.is_floating_point() or not values.float().isfinite().all():
            raise EmbeddingError(f"{path} has values in {key} that are no finite numbers: download it again")
        vectors.append(values)
    if len({len(values) for values in vectors}) > 1:
        shapes = " and ".join(f"{key} {tuple(values.shape)}" for key, values in zip(needed, vectors, strict=True))
        raise EmbeddingError(f"{path} has {shapes}, which must be as many vectors: download it again")
    return vectors


def _add(tokenizer: Any, encoder: Any, token: str, vectors: Tensor, path: Path) -> None:
    """Let the tokenizer know a token, and the encoder its vectors (n, width)."""
    from transformers import AddedToken

    names = [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    if known := next((name for name in names if name in vocabulary or name.lower() in vocabulary), None):
        raise EmbeddingError(
            f"{path}: {known!r} is a token of the model already: give another as TOKEN={path}, or omit the file"
        )
    if editing.terms(token) != [(token, 1.0)] or parse_weights(token) != [[(token, 1.0)]] or LORA.search(token):
        raise EmbeddingError(
            f"{path}: {token!r} is no plain text of a prompt, which could not name it: give another as TOKEN={path}"
        )
    base, _, number = token.rpartition("_")
    before = base if number == "1" else f"{base}_{int(number) - 1}" if number.isdecimal() and int(number) > 1 else ""
    if before in added_tokens(tokenizer) or f"{token}_{len(names)}" in vocabulary:
        raise EmbeddingError(
            f"{path}: {token!r} and another token would be read as the vectors of one: give another as TOKEN={path}"
        )
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in names])
    ids = [tokenizer.get_added_vocab()[name] for name in names]
    weight = encoder.get_input_embeddings().weight
    grown = torch.cat([weight, weight.new_zeros(max(0, max(ids) + 1 - len(weight)), weight.shape[1])])
    grown[torch.tensor(ids, device=grown.device)] = vectors.to(grown)
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown))
    encoder.config.vocab_size = len(grown)
