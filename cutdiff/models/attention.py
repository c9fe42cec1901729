"""Recorded cross-attention: where in the picture the U-Net looks at each token of the text."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cutdiff.models.layers import Attention, KeysAndValues
from cutdiff.models.unet import UNet


class AttentionMaps:
    """A recording: the weights of each batch that each layer has attended with, averaged over the heads.

    It records what the thread does that made it; another thread that runs the network meanwhile adds nothing.
    """

    def __init__(self) -> None:
        self._recorded: defaultdict[Attention, list[Tensor]] = defaultdict(list)
        self._pending: dict[Attention, Tensor] = {}
        self._thread = threading.get_ident()

    def add(self, layer: Attention, args: tuple[Tensor, Tensor | KeysAndValues], output: Tensor) -> None:
        """A forward hook of `layer`, whose arguments were x and the context."""
        if threading.get_ident() == self._thread:
            self._pending[layer] = layer.weights(*args).mean(dim=1)

    def keep(self, *_: object) -> None:
        """A forward hook of the U-Net: only a pass that ends is recorded, so one that is repeated counts once."""
        if threading.get_ident() == self._thread:
            for layer, weights in self._pending.items():
                self._recorded[layer].append(weights)

    def mean(self) -> Tensor:
        """The mean over the layers: (items, h·w, tokens), float32, items in the order in which they were recorded."""
        return torch.stack([torch.cat(batches) for batches in self._recorded.values()]).mean(dim=0)


@contextmanager
def recorded_attention(unet: UNet) -> Iterator[AttentionMaps]:
    """Record the attention over the text in all passes inside the block, at `map_level` on the way down and up.

    Nothing that the network computes changes. Raises ValueError where no level attends to the text.
    """
    level = map_level(unet)
    maps = AttentionMaps()
    blocks = [unet.down_blocks[level], unet.up_blocks[-1 - level]]
    layers = [module for block in blocks for name, module in block.named_modules() if name.endswith("attn2")]
    hooks = [layer.register_forward_hook(maps.add) for layer in layers] + [unet.register_forward_hook(maps.keep)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def map_level(unet: UNet) -> int:
    """The coarsest level that attends to the text; a map there has 1 / 2^level of the latents' height and width."""
    levels = [level for level, layers in enumerate(unet.config.transformer_layers) if layers]
    if not levels:
        raise ValueError("no level of the network attends to the text: there are no maps to record")
    return levels[-1]
