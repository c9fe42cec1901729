"""Text to conditioning: both CLIP encoders and their tokenizers, through transformers.

Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1: the penultimate states of both encoders side by side, and
the projected pooled state of the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

END_OF_WORD = "</w>"
"""How CLIP's vocabulary marks a token that a word ends with."""


@dataclass(frozen=True)
class TextStates:
    """What the U-Net reads of B prompts: `context` (B, L, context_dim) and `pooled` (B, pooled_dim)."""

    context: Tensor
    pooled: Tensor

    @staticmethod
    def zeros_like(other: TextStates) -> TextStates:
        """The states of an empty negative prompt in families that were trained with zeros there, as SDXL was."""
        return TextStates(torch.zeros_like(other.context), torch.zeros_like(other.pooled))

    def repeat(self, times: int) -> TextStates:
        """Every row `times` in a row: what all views of a picture share."""
        return TextStates(self.context.repeat_interleave(times, dim=0), self.pooled.repeat_interleave(times, dim=0))


@dataclass(frozen=True)
class TextEncoders:
    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids for each encoder, both (B, L), cut and padded to the encoders' length (77)."""
        device = self.text_encoder.device
        first, second = (
            tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        return first, second

    def num_dropped(self, prompt: str) -> int:
        """How many tokens of a prompt do not fit the encoders' length and are cut off."""
        length = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        return max(0, length - self.tokenizer.model_max_length)

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt that fit, punctuation too, and where the tokens of each stand in the context."""
        tokenizer = self.tokenizer
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        words, begin = [], 1  # the first token begins the text, the last one ends it
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids[1:-1]), start=1):
            if token.endswith(END_OF_WORD) or i == len(ids) - 2:
                words.append((str(tokenizer.decode(ids[begin : i + 1])).strip(), list(range(begin, i + 1))))
                begin = i + 1
        return words

    def encode_tokens(self, first: Tensor, second: Tensor) -> TextStates:
        """Token ids of each encoder (B, L) -> text states; differentiable."""
        states = self.text_encoder(first, output_hidden_states=True).hidden_states[-2]
        output = self.text_encoder_2(second, output_hidden_states=True)
        context = torch.cat([states, output.hidden_states[-2]], dim=-1)
        return TextStates(context, output.text_embeds)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextStates:
        """Prompts -> text states of len(prompts) rows."""
        return self.encode_tokens(*self.tokenize(prompts))
