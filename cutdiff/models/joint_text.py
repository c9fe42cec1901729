"""The text side of a transformer: CLIP's encoders with a T5 encoder beside them, by transformers.

A prompt of any length is one sequence for T5, which is cut where it is longer than the network was trained with. All
its tokens are attended to, those that pad it too, as in training.

Sources: Esser et al. 2024 (arXiv 2403.03206), section 4.3, for SD3; Black Forest Labs 2024 for FLUX.1. Both by
diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from cutdiff.models.prompts import parse_weights, written
from cutdiff.models.text import TextEncoders, TextStates, moved_copies
from cutdiff.models.tokens import COMMA_WINDOW, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

START_OF_WORD = "▁"
"""The beginning of a token, in T5's vocabulary, that is the first of its word."""


@dataclass(frozen=True)
class T5:
    """A T5 encoder and its tokenizer; prompts are read as `length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    encoder: T5EncoderModel
    length: int

    def on(self, device: torch.device) -> T5:
        """A copy on `device`; it shares the weights that are there already."""
        return replace(self, encoder=deepcopy(self.encoder, moved_copies([self.encoder], device)))

    def pieces(self, prompt: str) -> list[tuple[int, float]]:
        """The tokens of a prompt and their weights, without the one that ends it, cut to the length. BREAK, which has
        no meaning for a single sequence, is left out."""
        weighted = [piece for part in parse_weights(prompt) for piece in part]
        ids = [self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text, _ in weighted]
        tokens = [(token, weight) for some, (_, weight) in zip(ids, weighted, strict=True) for token in some]
        return tokens[: self.length - 1]

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """The tokens of B prompts, (B, length), padded."""
        ids, weights = [], []
        for prompt in prompts:
            tokens = self.pieces(prompt)
            pads = self.length - 1 - len(tokens)
            end = [self.tokenizer.eos_token_id, *[self.tokenizer.pad_token_id] * pads]
            ids.append([*(token for token, _ in tokens), *end])
            weights.append([*(weight for _, weight in tokens), *[1.0] * len(end)])
        device = self.encoder.device
        return Tokens(torch.tensor(ids, device=device), torch.tensor(weights, dtype=torch.float32, device=device))

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt and the places of their tokens; see `tokens.words`."""
        tokens = self.pieces(prompt)
        names = self.tokenizer.convert_ids_to_tokens([token for token, _ in tokens])
        starts = [i for i, name in enumerate(names) if name.startswith(START_OF_WORD) or i == 0]
        placed = [[*range(begin, end)] for begin, end in zip(starts, [*starts[1:], len(names)], strict=True)]
        return [
            (written("".join(names[i] for i in places).removeprefix(START_OF_WORD), tokens[places[0]][1]), places)
            for places in placed
        ]

    def states(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> states (B, L, d), with gradients."""
        return self.encoder(ids).last_hidden_state


@dataclass(frozen=True, kw_only=True)
class FluxText(TextEncoders):
    """The text side of FLUX.1: the context is T5's states, and the pooled state is CLIP's of the prompt's beginning."""

    layer: int = 1
    t5: T5

    @staticmethod
    def widths(first: Any, second: Any, t5: Any) -> tuple[int, int]:
        return t5.d_model, first.hidden_size

    @property
    def parts(self) -> list[tuple[Any, PreTrainedTokenizerBase]]:
        return [*super().parts, (self.t5.encoder, self.t5.tokenizer)]

    def on(self, device: torch.device) -> Self:
        return replace(super().on(device), t5=self.t5.on(device))

    def skipping(self, clip_skip: int | None) -> Self:
        if clip_skip is not None:
            raise ValueError(f"clip_skip={clip_skip} is for models that read CLIP's states, and this one reads T5's")
        return self

    def length(self, prompt: str) -> int:
        return self.t5.length

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return self.t5.words(prompt)

    def tokenize(
        self,
        prompts: Sequence[str],
        prompt_2: str | None = None,
        *,
        min_length: int = 0,
        comma_window: int = COMMA_WINDOW,
    ) -> list[list[Tokens]]:
        """One chunk, of CLIP's tokens and T5's; T5 reads `prompt_2`, or the same as CLIP if that is None."""
        first, *_ = super().tokenize(prompts, comma_window=0)
        return [[*first, self.t5.tokenize(prompts if prompt_2 is None else [prompt_2] * len(prompts))]]

    def encode_tokens(self, first: Tensor, second: Tensor | None = None) -> TextStates:
        """The token ids of CLIP and T5 (B, L) -> text states, with gradients."""
        assert second is not None
        return TextStates(self.t5.states(second), self.text_encoder(first).pooler_output)

    def _encode_chunk(self, read: Sequence[Tokens]) -> TextStates:
        states = self.encode_tokens(*(part.ids for part in read))
        return replace(states, context=scaled(states.context, read[1].weights))


def scaled(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states (B, L, C) of T5 by their tokens' weights (B, L). Their mean is near 0, so that it gives no
    measure to restore, as for CLIP's."""
    return (states.float() * weights[:, :, None]).to(states.dtype)
