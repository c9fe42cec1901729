"""Attention over the text from outside: recorded, where in the picture the U-Net looks at each token, and blended."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from cutdiff.models.inside import replaced
from cutdiff.models.layers import Attention, KeysAndValues
from cutdiff.models.unet import TransformerBlock, UNet

ALL = slice(None)


class AttentionMaps:
    """A recording: the weights of each batch that layers have attended with, averaged over their heads and, among those
    with as many positions, over the layers.

    It records what the thread does that made it; another thread that runs the network meanwhile adds nothing.
    """

    def __init__(self, rows: slice) -> None:
        self.passes = 0  # that have ended
        self._rows = rows
        self._recorded: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._pending: dict[int, tuple[Tensor, int]] = {}  # the sum over the layers of a pass, and their number
        self._thread = threading.get_ident()

    def begin(self, *_: object) -> None:
        """A forward hook of the U-Net, before a pass."""
        if threading.get_ident() == self._thread:
            self._pending.clear()

    def add(self, layer: Attention, args: tuple[Tensor, Tensor | KeysAndValues], output: Tensor) -> None:
        """A forward hook of `layer`, whose arguments were x and the context."""
        if threading.get_ident() == self._thread:
            (x, context), rows = args, self._rows
            context = (context[0][rows], context[1][rows]) if isinstance(context, tuple) else context[rows]
            weights, positions = layer.weights(x[rows], context).mean(dim=1), x.shape[1]
            total, count = self._pending.get(positions, (0, 0))
            self._pending[positions] = total + weights, count + 1

    def keep(self, *_: object) -> None:
        """A forward hook of the U-Net: only a pass that ends is recorded, so one that is repeated counts once."""
        if threading.get_ident() == self._thread:
            self.passes += 1
            for positions, (total, count) in self._pending.items():
                self._recorded[positions].append(total / count)
            self._pending.clear()

    def means(self, rows: int | None = None) -> dict[int, Tensor]:
        """The mean maps by their number of positions, each (items, positions, tokens), float32. The items have the
        order in which they came; they are all, or the first `rows`."""
        return {positions: torch.cat(batches)[:rows] for positions, batches in self._recorded.items()}

    def mean(self, rows: int | None = None) -> Tensor:
        """The only one of `means`, where all layers have as many positions."""
        (mean,) = self.means(rows).values()
        return mean


@contextmanager
def recorded_attention(
    unet: UNet, *, level: int | None = None, everywhere: bool = False, rows: slice = ALL
) -> Iterator[AttentionMaps]:
    """Record the attention over the text in all passes inside the block, or that of some rows of each: at `map_level`
    on the way down and up, or at a `level` on the way up, or `everywhere`.

    Nothing that the network computes changes. Raises ValueError where no level attends to the text.
    """
    coarsest = map_level(unet)
    parts = (
        [unet.down_blocks[coarsest], unet.up_blocks[-1 - coarsest]] if level is None else [unet.up_blocks[-1 - level]]
    )
    parts = [unet] if everywhere else parts
    maps = AttentionMaps(rows)
    hooks = [layer.register_forward_hook(maps.add) for part in parts for layer in text_layers(part)]
    hooks += [unet.register_forward_pre_hook(maps.begin), unet.register_forward_hook(maps.keep)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def blended_attention(unet: UNet, maps: Callable[[int], Tensor], weight: float) -> Iterator[None]:
    """Attend to the text with (1 − weight) · the layer's own weights + weight · `maps(h·w)`, which are (B, h·w, tokens)
    for all heads, in every layer and pass inside the block."""
    with ExitStack() as changes:
        for layer in text_layers(unet):
            changes.enter_context(replaced(layer, attend=partial(_blend, layer, maps, weight)))
        yield


def _blend(layer: Attention, maps: Callable[[int], Tensor], weight: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # All heads have the same map, so their values are one matrix, and no map is repeated.
    own, values = (x.transpose(1, 2).flatten(2) for x in (Attention.attend(layer, q, k, v), v))  # (B, L, C), (B, M, C)
    blended = torch.baddbmm(own, maps(q.shape[2]).to(v.dtype), values, beta=1 - weight, alpha=weight)
    return blended.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)


def text_layers(part: nn.Module) -> list[Attention]:
    """The layers that attend to the text."""
    return [module.attn2 for module in part.modules() if isinstance(module, TransformerBlock)]


def map_level(unet: UNet) -> int:
    """The coarsest level that attends to the text; a map there has 1 / 2^level of the latents' height and width."""
    levels = text_levels(unet)
    if not levels:
        raise ValueError("no level of the network attends to the text: there are no maps to record")
    return levels[-1]


def text_levels(unet: UNet) -> list[int]:
    """The levels that attend to the text, the finest first."""
    return [level for level, layers in enumerate(unet.config.transformer_layers) if layers]
