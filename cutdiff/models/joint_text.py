"""The text side of a transformer: CLIP's encoders with a T5 encoder beside them, by transformers.

A prompt of any length is one sequence for T5, which is cut where it is longer than the network was trained with. All
its tokens are attended to, those that pad it too, as in training.

Sources: Esser et al. 2024 (arXiv 2403.03206), section 4.3, for SD3; Black Forest Labs 2024 for FLUX.1. Both by
diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.prompts import parse_weights, written
from cutdiff.models.text import TextEncoders, TextStates, moved_copies
from cutdiff.models.tokens import COMMA_WINDOW, Tokens, tokenize
from cutdiff.options import short

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

    @property
    def dim(self) -> int:
        """The width of the states."""
        return self.encoder.config.d_model

    def on(self, device: torch.device) -> T5:
        """A copy on `device`; it shares the weights that are there already."""
        return replace(self, encoder=deepcopy(self.encoder, moved_copies([self.encoder], device)))

    def pieces(self, prompt: str) -> list[tuple[int, float]]:
        """The tokens of a prompt that are read, and their weights, without the one that ends it."""
        return self._all_pieces(prompt)[: self.length - 1]

    def left_out(self, prompt: str) -> Iterator[str]:
        """The words for the end of a prompt that is not read, where it has such an end."""
        if rest := self._all_pieces(prompt)[self.length - 1 :]:
            words = self.tokenizer.decode([token for token, _ in rest])
            yield f"T5 reads the first {self.length - 1} tokens of {short(prompt)}, and not its end, {short(words)}"

    def _all_pieces(self, prompt: str) -> list[tuple[int, float]]:
        """The tokens of a prompt and their weights. BREAK, which has no meaning for a single sequence, is left out."""
        weighted = [piece for part in parse_weights(prompt) for piece in part]
        ids = [self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text, _ in weighted]
        return [(token, weight) for some, (_, weight) in zip(ids, weighted, strict=True) for token in some]

    def tokenize(self, prompts: Sequence[str], device: torch.device) -> Tokens:
        """The tokens of B prompts, (B, length), padded."""
        ids, weights = [], []
        for prompt in prompts:
            tokens = self.pieces(prompt)
            pads = self.length - 1 - len(tokens)
            end = [self.tokenizer.eos_token_id, *[self.tokenizer.pad_token_id] * pads]
            ids.append([*(token for token, _ in tokens), *end])
            weights.append([*(weight for _, weight in tokens), *[1.0] * len(end)])
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
    def widths(first: Any, second: Any, t5: Any) -> tuple[int | None, int]:
        return t5.d_model, first.hidden_size

    @property
    def parts(self) -> list[tuple[Any, PreTrainedTokenizerBase]]:
        return [*super().parts, (self.t5.encoder, self.t5.tokenizer)]

    def on(self, device: torch.device) -> Self:
        return replace(super().on(device), t5=self.t5.on(device))

    def skipping(self, clip_skip: int | None) -> Self:
        if clip_skip is not None:
            what = "is for models that read CLIP's states, and this one reads T5's"
            raise ValueError(f"clip_skip={clip_skip} {what}: leave it out")
        return self

    def length(self, prompt: str) -> int:
        return self.t5.length

    def left_out(self, prompt: str, prompt_2: str | None = None) -> Iterator[str]:
        if len(tokenize(self.tokenizer, prompt, 0)) > 1:
            length = self.tokenizer.model_max_length - 2
            what = "" if prompt_2 is None else ", which T5 is not given,"
            yield f"CLIP reads the first {length} tokens of {short(prompt)}{what} and no more"
        yield from self.t5.left_out(prompt if prompt_2 is None else prompt_2)

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
        return [[*first, self.t5.tokenize(prompts if prompt_2 is None else [prompt_2] * len(prompts), self.device)]]

    def encode_tokens(self, first: Tensor, second: Tensor | None = None) -> TextStates:
        """The token ids of CLIP and T5 (B, L) -> text states, with gradients."""
        assert second is not None
        return TextStates(self.t5.states(second), self.text_encoder(first).pooler_output)

    def _encode_chunk(self, read: Sequence[Tokens]) -> TextStates:
        states = self.encode_tokens(*(part.ids for part in read))
        return replace(states, context=scaled(states.context, read[1].weights))


@dataclass(frozen=True)
class NoT5:
    """Zeros in the place of T5's states, with which SD3 was trained too."""

    dim: int
    length: int
    dtype: torch.dtype

    def on(self, device: torch.device) -> NoT5:
        return self

    def tokenize(self, prompts: Sequence[str], device: torch.device) -> Tokens:
        shape = (len(prompts), self.length)
        return Tokens(torch.zeros(shape, dtype=torch.int64, device=device), torch.ones(shape, device=device))

    def states(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.dim, dtype=self.dtype, device=ids.device)


@dataclass(frozen=True, kw_only=True)
class SD3Text(TextEncoders):
    """The text side of SD3: the context is the states of two CLIP encoders side by side, with zeros up to T5's width,
    and then T5's; the pooled state is both CLIPs'."""

    pools_first = True
    t5: T5 | NoT5

    @staticmethod
    def widths(first: Any, second: Any, t5: Any) -> tuple[int | None, int]:
        return t5 and t5.d_model, first.projection_dim + second.projection_dim

    @property
    def parts(self) -> list[tuple[Any, PreTrainedTokenizerBase]]:
        return [*super().parts, *([(self.t5.encoder, self.t5.tokenizer)] if isinstance(self.t5, T5) else [])]

    def on(self, device: torch.device) -> Self:
        return replace(super().on(device), t5=self.t5.on(device))

    def length(self, prompt: str) -> int:
        return super().length(prompt) + self.t5.length

    def left_out(self, prompt: str, prompt_2: str | None = None) -> Iterator[str]:
        if isinstance(self.t5, T5):
            yield from self.t5.left_out(prompt)

    def tokenize(
        self,
        prompts: Sequence[str],
        prompt_2: str | None = None,
        *,
        min_length: int = 0,
        comma_window: int = COMMA_WINDOW,
    ) -> list[list[Tokens]]:
        """The chunks of the CLIPs' tokens, and a last one of T5's, which reads the prompt."""
        of_clips = max(min_length - self.t5.length, 0)
        chunks = super().tokenize(prompts, prompt_2, min_length=of_clips, comma_window=comma_window)
        return [*chunks, [self.t5.tokenize(prompts, self.device)]]

    def encode_tokens(self, first: Tensor, second: Tensor | None = None) -> TextStates:
        """The token ids of both CLIPs, or of T5 alone (B, L) -> text states, with gradients."""
        if second is None:
            context = self.t5.states(first)
            return TextStates(context, context[:, 0, :0])
        outputs = [clip(ids, output_hidden_states=True) for clip, ids in zip(self.clips, (first, second), strict=True)]
        context = torch.cat([output.hidden_states[-self.layer] for output in outputs], dim=2)
        return TextStates(context, torch.cat([output.text_embeds for output in outputs], dim=1))

    def _encode_chunk(self, read: Sequence[Tokens]) -> TextStates:
        if len(read) == 1:
            states = self.encode_tokens(read[0].ids)
            return replace(states, context=scaled(states.context, read[0].weights))
        states, width = super()._encode_chunk(read), self.t5.dim
        if states.context.shape[2] > width:
            raise ValueError(f"the CLIP encoders' states have width {states.context.shape[2]}, and T5's only {width}")
        return replace(states, context=F.pad(states.context, (0, width - states.context.shape[2])))


def scaled(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states (B, L, C) of T5 by their tokens' weights (B, L). Their mean is near 0, so that it gives no
    measure to restore, as for CLIP's."""
    return (states.float() * weights[:, :, None]).to(states.dtype)
