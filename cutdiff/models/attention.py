"""Where in the picture each token of the text is looked at: cross-attention maps, recorded while the U-Net runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cutdiff.models.layers import Attention
from cutdiff.models.unet import Context, UNet


class AttentionMaps:
    """What was recorded: for every layer, the weights of each batch that it saw, averaged over the heads."""

    def __init__(self) -> None:
        self._seen: defaultdict[Attention, list[Tensor]] = defaultdict(list)
        self._pending: dict[Attention, Tensor] = {}

    def add(self, layer: Attention, args: tuple[Tensor, Context], output: Tensor) -> None:
        """A forward hook of `layer`, whose arguments were x and the context."""
        self._pending[layer] = layer.weights(*args).mean(dim=1)

    def keep(self, *_: object) -> None:
        """A forward hook of the U-Net: a pass that fails on the way, and is taken again, leaves nothing."""
        for layer, weights in self._pending.items():
            self._seen[layer].append(weights)

    def mean(self) -> Tensor:
        """The mean over the layers: (items, h·w, tokens), float32, items in the order in which they were seen."""
        return torch.stack([torch.cat(batches) for batches in self._seen.values()]).mean(dim=0)


@contextmanager
def recorded_attention(unet: UNet) -> Iterator[AttentionMaps]:
    """Record the attention over the text at `map_level`, on the way down and up, of all that the network does inside.

    Nothing that the network computes changes. ValueError where no level looks at the text.
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
    """The coarsest level that looks at the text; a map there has 1 / 2^level of the latents' height and width."""
    levels = [level for level, layers in enumerate(unet.config.transformer_layers) if layers]
    if not levels:
        raise ValueError("no level of the network attends to the text: there are no maps to record")
    return levels[-1]
