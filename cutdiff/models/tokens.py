"""Tokenizing prompts, in chunks of the encoders' length, as many as a prompt takes.

Source: AUTOMATIC1111's stable-diffusion-webui, `sd_hijack_clip.tokenize_line`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutdiff.models.prompts import parse_weights, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_WORD = "</w>"
"""The end of a token, in CLIP's vocabulary, that is the last of its word."""
COMMA_WINDOW = 20
"""The number of tokens at the end of a full chunk among which `split` looks for a comma."""

Chunk = list[tuple[int, float]]
"""Token ids and their weights, without the tokens that begin and end a chunk."""


@dataclass(frozen=True)
class Tokens:
    """One chunk of each of B prompts, as one encoder reads it: token `ids` and their `weights`, both (B, L)."""

    ids: Tensor
    weights: Tensor


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, comma_window: int = COMMA_WINDOW) -> list[Chunk]:
    """The chunks of a prompt. There is at least one, which may be empty."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    parts = [[(token, weight) for text, weight in pieces for token in ids(text)] for pieces in parse_weights(prompt)]
    size = tokenizer.model_max_length - 2  # one token begins a chunk, one ends it
    return split(parts, size, ids(",")[0], comma_window)


def split(parts: Sequence[Chunk], size: int, comma: int, comma_window: int) -> list[Chunk]:
    """The tokens of each part in chunks of at most `size`. An empty part after the last BREAK is no chunk.

    A chunk that is full ends after its last comma, where that is one of its last `comma_window` tokens and no comma
    follows the chunk.
    """
    chunks: list[Chunk] = []
    for part in parts:
        while len(part) > size:
            near = [i for i in range(max(0, size - comma_window), size) if part[i][0] == comma]
            end = near[-1] + 1 if near and part[size][0] != comma else size
            chunks.append(part[:end])
            part = part[end:]
        chunks.append(part)
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def frame(tokenizer: PreTrainedTokenizerBase, chunks: Sequence[Chunk], device: torch.device) -> Tokens:
    """One chunk of each prompt between the tokens that begin and end it, padded to the encoder's length."""
    length = tokenizer.model_max_length
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [[begin, *(token for token, _ in chunk), end] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight in chunk), 1.0] for chunk in chunks]
    weights = [row + [1.0] * (length - len(row)) for row in weights]
    return Tokens(
        ids=torch.tensor([row + [pad] * (length - len(row)) for row in ids], device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
    )


def words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, punctuation too, and the places of each word's tokens in its chunks, one after another.

    A word is written as one would type it alone: with its weight, if that is not 1, in brackets of its own.
    """
    placed = [
        (number * tokenizer.model_max_length + place, token, weight)
        for number, chunk in enumerate(tokenize(tokenizer, prompt))
        for place, (token, weight) in enumerate(chunk, start=1)
    ]
    names = tokenizer.convert_ids_to_tokens([token for _, token, _ in placed])
    result, begin = [], 0
    for stop, name in enumerate(names, start=1):
        if name.endswith(END_OF_WORD) or stop == len(placed):
            word = str(tokenizer.decode([token for _, token, _ in placed[begin:stop]])).strip()
            result.append((written(word, placed[begin][2]), [place for place, _, _ in placed[begin:stop]]))
            begin = stop
    return result
