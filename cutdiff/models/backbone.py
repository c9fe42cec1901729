"""The base of every network that a run samples with, a U-Net or a transformer: what all may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cutdiff.models.layers import TextContext

Context = Tensor | TextContext
"""The states of the text (B, L, context_dim), or the keys and values that a network made of them."""


class Shape(Protocol):
    """The properties that the configurations of all networks have."""

    @property
    def in_channels(self) -> int:
        """The channels of what the network reads."""
        ...

    @property
    def out_channels(self) -> int:
        """The channels of its prediction."""
        ...

    @property
    def guidance_dim(self) -> int:
        """The width of the embedded guidance scale; 0 where the network does not read it."""
        ...

    @property
    def inpaints(self) -> bool:
        """True where the network is shown a mask."""
        ...

    @property
    def native_size(self) -> int:
        """The side, in latents, of the pictures that the network was trained on."""
        ...

    @property
    def context_dim(self) -> int: ...

    @property
    def pooled_dim(self) -> int: ...


class Stack(NamedTuple):
    """Blocks that are alike and follow one another."""

    blocks: Sequence[nn.Module]
    skip: Callable[..., Any]
    """The function of a block's arguments that gives what the next block is given in its place."""


C = TypeVar("C", bound=Shape)


class Backbone(nn.Module, Generic[C]):
    """(latents, timesteps, context, pooled, numbers) -> prediction of the latents' size, for B rows."""

    config: C

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, those apart that are quantized."""
        return next(self.parameters()).dtype

    def read(self, states: Tensor) -> Context:
        """The context of text states (P, L, context_dim), made of them once for all calls: what layers make of the text
        alone, or where there is no such thing, the states themselves."""
        return states

    def stacks(self) -> Iterator[Stack]:
        """All blocks that attend, by those that are alike."""
        raise NotImplementedError
