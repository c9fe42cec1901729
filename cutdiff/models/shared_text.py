"""Text that one rank encodes for all ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cutdiff.models.text import TextEncoders, TextStates
from cutdiff.parallel.ranks import Ranks


@dataclass(frozen=True)
class SharedText:
    """Stands in for a model's `TextEncoders`: the first rank encodes, and all ranks get the states."""

    text: TextEncoders
    ranks: Ranks
    device: torch.device
    """The device of the states on this rank."""
    dtype: torch.dtype

    def length(self, prompt: str) -> int:
        """The length of the context of a prompt, in tokens."""
        return self.text.length(prompt)

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt and the positions of their tokens in the context; see `tokens.words`."""
        return self.text.words(prompt)

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        """Prompts -> text states of len(prompts) rows. The arguments are those of `TextEncoders.encode`."""
        states = self.text.encode(prompts, *args, **options) if self.ranks.leads else None
        shapes = self.ranks.values([] if states is None else [states.context.shape, states.pooled.shape])[0]
        if states is None:
            states = TextStates(*(torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes))
        for tensor in (states.context, states.pooled):
            self.ranks.share(tensor)
        return states
