"""Text to conditioning: one CLIP encoder or two, and their tokenizers, through transformers.

Sources: Rombach et al. 2022 (arXiv 2112.10752), section 3.3: the states of one encoder, whose final norm SD 1.5 and
SD 2.1 keep. Podell et al. 2023 (arXiv 2307.01952), section 2.1: the penultimate states of two encoders side by side,
and the projected pooled state of the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

END_OF_WORD = "</w>"
"""How CLIP's vocabulary marks a token that a word ends with."""


@dataclass(frozen=True)
class TextStates:
    """What the U-Net reads of B prompts: `context` (B, L, context_dim) and `pooled` (B, pooled_dim), which is empty
    (B, 0) in families with one encoder."""

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
    """The text side of a model: SDXL's two encoders, or the only one of SD 1.5 and SD 2.1."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase | None
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection | None
    layer: int = 2
    """Which layer's states are read, counted from the end: 1 is the last."""

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [tokenizer for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]

    @property
    def encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Token ids for each encoder, all (B, L), cut and padded to the encoders' length (77)."""
        return tuple(
            tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(self.text_encoder.device)
            for tokenizer in self.tokenizers
        )

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

    def encode_tokens(self, first: Tensor, second: Tensor | None = None) -> TextStates:
        """Token ids of each encoder (B, L) -> text states; differentiable."""
        states = self.text_encoder(first, output_hidden_states=True).hidden_states[-self.layer]
        if self.text_encoder_2 is None:
            context = final_norm(self.text_encoder)(states)
            return TextStates(context, context[:, 0, :0])
        output = self.text_encoder_2(second, output_hidden_states=True)
        context = torch.cat([states, output.hidden_states[-self.layer]], dim=-1)
        return TextStates(context, output.text_embeds)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextStates:
        """Prompts -> text states of len(prompts) rows."""
        return self.encode_tokens(*self.tokenize(prompts))


def final_norm(encoder: CLIPTextModel) -> nn.Module:
    """The norm after the last layer; releases of transformers differ in where they keep it."""
    return getattr(encoder, "text_model", encoder).final_layer_norm
