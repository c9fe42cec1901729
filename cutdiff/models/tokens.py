"""Tokenizing prompts, in chunks of the encoders' length, as many as a prompt takes.

A token of textual inversion that has several vectors stands for all of them: they are those of the added tokens
`<cat>`, `<cat>_1`, `<cat>_2` and so on, as diffusers names them.

Sources: AUTOMATIC1111's stable-diffusion-webui, `sd_hijack_clip.tokenize_line`; diffusers, `loaders.textual_inversion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, cast

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

    vectors = vectors_of_tokens(tokenizer)

    def ids(text: str) -> list[int]:
        plain = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [each for token in plain for each in vectors.get(token, (token,))] if vectors else plain

    parts = [[(token, weight) for text, weight in pieces for token in ids(text)] for pieces in parse_weights(prompt)]
    size = tokenizer.model_max_length - 2  # one token begins a chunk, one ends it
    return split(parts, size, ids(",")[0], comma_window)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that were added to the tokenizer's vocabulary."""
    return cast(Any, tokenizer).get_added_vocab()  # missing from the annotations of transformers


def vectors_of_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[int, ...]]:
    """The ids of all vectors of each added token that has several, by its own id, which is the first of them."""
    added, vectors = added_tokens(tokenizer), {}
    for token, first in added.items():
        others = (added.get(f"{token}_{i}") for i in count(1))
        further = [*takewhile(lambda each: each is not None, others)]
        if further:
            vectors[first] = (first, *further)
    return vectors


def split(parts: Sequence[Chunk], size: int, comma: int, comma_window: int) -> list[Chunk]:
    """The tokens of each part in chunks of at most `size`. An empty part after the last BREAK is no chunk.

    A chunk that is full ends after its last comma, where that is one of its last `comma_window` tokens and no comma
    follows the chunk.
    """
    chunks: list[Chunk] = []
    for part in parts:
        begin = 0
        while len(part) > (stop := begin + size):
            near = [i for i in range(max(begin, stop - comma_window), stop) if part[i][0] == comma]
            end = near[-1] + 1 if near and part[stop][0] != comma else stop
            chunks.append(part[begin:end])
            begin = end
        chunks.append(part[begin:])
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

    A word is written as one would type it alone: with its weight, if that is not 1, in brackets of its own. An added
    token is a word, of all its vectors.
    """
    added = {*added_tokens(tokenizer).values()}
    further = {each for vectors in vectors_of_tokens(tokenizer).values() for each in vectors[1:]}
    placed = [
        (number * tokenizer.model_max_length + place, token, weight)
        for number, chunk in enumerate(tokenize(tokenizer, prompt))
        for place, (token, weight) in enumerate(chunk, start=1)
    ]
    names = tokenizer.convert_ids_to_tokens([token for _, token, _ in placed])
    result, begin = [], 0
    for stop, name in enumerate(names, start=1):
        is_word = name.endswith(END_OF_WORD) or placed[stop - 1][1] in added
        if stop == len(placed) or (is_word and placed[stop][1] not in further):
            word = str(tokenizer.decode([token for _, token, _ in placed[begin:stop] if token not in further])).strip()
            result.append((written(word, placed[begin][2]), [place for place, _, _ in placed[begin:stop]]))
            begin = stop
    return result
