"""The text side of a model: one CLIP encoder or two, with their tokenizers, by transformers.

A prompt is read in chunks of the encoders' length (77 tokens), whose states follow each other. The pooled state is that
of the first chunk, as in A1111 and ComfyUI.

Sources: Rombach et al. 2022 (arXiv 2112.10752), section 3.3: the states of one encoder, whose final norm SD 1.5 and
SD 2.1 keep. Podell et al. 2023 (arXiv 2307.01952), section 2.1: the penultimate states of two encoders side by side,
and the projected pooled state of the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cutdiff.models.tokens import COMMA_WINDOW, Tokens, frame, tokenize, words
from cutdiff.options import short

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

CUT_DEPTH = 23
"""The depth of SD 2.1's encoder in a diffusers folder, which omits the last of 24 layers as the one before is read."""


@dataclass(frozen=True)
class TextStates:
    """The states of B prompts: `context` (B, L, context_dim) and `pooled` (B, pooled_dim).

    In families with one encoder `pooled` is empty, (B, 0).
    """

    context: Tensor
    pooled: Tensor

    @staticmethod
    def zeros_like(other: TextStates) -> TextStates:
        """The states of an empty negative prompt in families that were trained with zeros there, as SDXL was."""
        return TextStates(torch.zeros_like(other.context), torch.zeros_like(other.pooled))

    def repeat(self, times: int) -> TextStates:
        """The states with every row `times` in a row, for all views of each picture."""
        return TextStates(self.context.repeat_interleave(times, dim=0), self.pooled.repeat_interleave(times, dim=0))


@dataclass(frozen=True)
class TextSum:
    """The states of a weighted sum of T prompts for each of B pictures, whose guidance is added up: the estimate is
    unconditional + Σ weight · (conditional − unconditional).

    Source: Liu et al. 2022 (arXiv 2206.01714), and A1111's `AND`.
    """

    terms: tuple[TextStates, ...]
    """T times the states of B rows."""
    weights: tuple[tuple[float, ...], ...]
    """The T weights of each of the B pictures."""


@dataclass(frozen=True)
class TextEncoders:
    """The text side of a model: SDXL's two encoders, or the only one of SD 1.5 and SD 2.1."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase | None
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection | None
    layer: int = 2
    """The layer whose states are read, counted from the end: 1 is the last."""
    pools_first: ClassVar[bool] = False
    """True where the first encoder has a projected pooled state too."""
    encodes_on: torch.device | None = None
    """The device to which encoders are copied for the time of encoding; None: they encode where they are."""

    @staticmethod
    def widths(first: Any, second: Any, t5: Any) -> tuple[int | None, int]:
        """The widths of the context and the pooled state, by the configurations of the encoders that there are; None
        where these do not say it."""
        return first.hidden_size + (second.hidden_size if second else 0), second.projection_dim if second else 0

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [tokenizer for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]

    @property
    def clips(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """CLIP's encoders, in the order of `tokenizers`."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def parts(self) -> list[tuple[Any, PreTrainedTokenizerBase]]:
        """All encoders and their tokenizers, in the order of a diffusers folder: `text_encoder`, `text_encoder_2`, …"""
        return [*zip(self.clips, self.tokenizers, strict=True)]

    @property
    def encoders(self) -> list[Any]:
        """All encoders, in the order of `parts`."""
        return [encoder for encoder, _ in self.parts]

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    def offloaded(self) -> Self:
        """Encoders that rest on the CPU; `encode` copies them to the device of these encoders while it runs."""
        return replace(self.on(torch.device("cpu")), encodes_on=self.device)

    def on(self, device: torch.device) -> Self:
        """A copy with its weights on `device`; it shares the weights that are there already."""
        moved = moved_copies(self.clips, device)
        first, second = deepcopy((self.text_encoder, self.text_encoder_2), moved)
        return replace(self, text_encoder=first, text_encoder_2=second, encodes_on=None)

    def skipping(self, clip_skip: int | None) -> Self:
        """The same encoders read at another layer, counted from the end as A1111 does: 1 is the last; None: this one.

        diffusers' `clip_skip` counts on from the layer that the family was trained with: its 0 is 1 here for SD 1.5,
        and 2 for SDXL and SD 2.1. Raises ValueError where the encoders have no such layer.
        """
        if clip_skip is None:
            return self
        depth = min(encoder.config.num_hidden_layers for encoder in self.clips)
        left_out = int(depth == CUT_DEPTH)
        if not 1 <= clip_skip - left_out <= depth:
            raise ValueError(
                f"clip_skip={short(clip_skip)} must lie in {1 + left_out} … {depth + left_out} for this model"
            )
        return replace(self, layer=clip_skip - left_out)

    def length(self, prompt: str) -> int:
        """The length of a prompt's context, in tokens."""
        return max(tokenizer.model_max_length * len(tokenize(tokenizer, prompt)) for tokenizer in self.tokenizers)

    def left_out(self, prompt: str, prompt_2: str | None = None) -> Iterator[str]:
        """The words for what no encoder reads of a prompt, by which a user learns of it; none where all is read."""
        yield from ()

    def tokenize(
        self,
        prompts: Sequence[str],
        prompt_2: str | None = None,
        *,
        min_length: int = 0,
        comma_window: int = COMMA_WINDOW,
    ) -> list[list[Tokens]]:
        """The tokens that each encoder reads, chunk by chunk; the second reads `prompt_2`, or the same if that is None.

        There are as many chunks as the longest prompt takes, and enough for `min_length` tokens; a shorter prompt ends
        in empty ones. `tokens.split` explains `comma_window`.
        """
        texts = (prompts, prompts if prompt_2 is None else [prompt_2] * len(prompts))
        chunks = [
            [tokenize(tokenizer, prompt, comma_window) for prompt in texts[i]]
            for i, tokenizer in enumerate(self.tokenizers)
        ]
        longest = max(len(prompt) for encoder in chunks for prompt in encoder)
        num_chunks = max(longest, math.ceil(min_length / self.tokenizer.model_max_length))
        return [
            [
                frame(tokenizer, [prompt[n] if n < len(prompt) else [] for prompt in encoder], self.device)
                for tokenizer, encoder in zip(self.tokenizers, chunks, strict=True)
            ]
            for n in range(num_chunks)
        ]

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt, and the places of each word's tokens in the context; see `tokens.words`."""
        return words(self.tokenizer, prompt)

    def encode_tokens(self, first: Tensor, second: Tensor | None = None) -> TextStates:
        """The token ids of each encoder (B, L) -> text states, with gradients."""
        states = self.text_encoder(first, output_hidden_states=True).hidden_states[-self.layer]
        if self.text_encoder_2 is None:
            context = final_norm(self.text_encoder)(states)
            return TextStates(context, context[:, 0, :0])
        output = self.text_encoder_2(second, output_hidden_states=True)
        context = torch.cat([states, output.hidden_states[-self.layer]], dim=-1)
        return TextStates(context, output.text_embeds)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        prompt_2: str | None = None,
        *,
        min_length: int = 0,
        comma_window: int = COMMA_WINDOW,
    ) -> TextStates:
        """Prompts -> text states of len(prompts) rows; the arguments are those of `tokenize`."""
        if self.encodes_on is not None:
            awake = self.on(self.encodes_on)
            return awake.encode(prompts, prompt_2, min_length=min_length, comma_window=comma_window)
        chunks = self.tokenize(prompts, prompt_2, min_length=min_length, comma_window=comma_window)
        states = [self._encode_chunk(chunk) for chunk in chunks]
        return TextStates(torch.cat([chunk.context for chunk in states], dim=1), states[0].pooled)

    def _encode_chunk(self, read: Sequence[Tokens]) -> TextStates:
        """The tokens that each encoder reads -> states, the context weighted."""
        states = self.encode_tokens(*(part.ids for part in read))
        contexts = states.context.split([encoder.config.hidden_size for encoder in self.clips], dim=2)
        context = [weighted(part, tokens.weights) for part, tokens in zip(contexts, read, strict=True)]
        return TextStates(torch.cat(context, dim=2), states.pooled)


def moved_copies(encoders: Sequence[nn.Module], device: torch.device) -> dict[int, Any]:
    """The tensors of the encoders on a device, by the ids of their own: what `deepcopy` then takes in their place."""
    weights = [tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers())]
    return {id(tensor): _moved(tensor, device) for tensor in weights}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states (B, L, C) by their tokens' weights (B, L), and scale each chunk to the mean that it had.

    Source: AUTOMATIC1111's stable-diffusion-webui, `sd_emphasis.EmphasisOriginal`, the default there. That code takes
    the mean over the batch, this one for each prompt. States whose weights are all 1 come back to the bit.
    """
    plain = states.float()
    emphasised = plain * weights[:, :, None]
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (plain, emphasised))
    as_is = (weights == 1).all(dim=1)[:, None, None] | (after == 0)
    return (emphasised * torch.where(as_is, 1.0, before / after)).to(states.dtype)


def final_norm(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> nn.Module:
    """The norm after the last layer, wherever this release of transformers keeps it."""
    owner: Any = getattr(encoder, "text_model", encoder)
    return owner.final_layer_norm
