"""The attention over the words of the prompt, as maps on the canvas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.models.attention import AttentionMaps, recorded_attention, text_levels
from cutdiff.models.config import Size
from cutdiff.models.editing import described
from cutdiff.models.inside import size_at
from cutdiff.models.prompts import parse_weights
from cutdiff.models.unet import UNet, as_unet
from cutdiff.sampling.denoiser import Call
from cutdiff.sampling.operators import Operator, Patches
from cutdiff.sampling.resize import resize
from cutdiff.settings import Settings


class Words:
    """The places where a network looks for each word of a prompt: the mean over heads and layers, on the finest level
    that reads the text."""

    def __init__(self, model: Model, prompt: str, settings: Settings) -> None:
        read = model.text.words(prompt) if unread_because(model, prompt, settings) is None else []
        self.names = [_shown(name) for name, _ in read]
        self.places = [places for _, places in read]
        self.unet = model.unet
        self.levels = len(model.unet.config.channels) if isinstance(model.unet, UNet) else 0
        self.finest = next(iter(text_levels(as_unet(model.unet))), None) if self.names else None
        self.maps: AttentionMaps | None = None

    @contextmanager
    def listening(self, call: Call) -> Iterator[None]:
        """Record the attention of a call, which is made inside the block, in the rows that read the prompt."""
        self.maps = None
        if self.finest is None or call.is_changed:
            yield
            return
        prompted = slice(call.copies - call.num_terms, None, call.copies)
        with recorded_attention(as_unet(self.unet), level=self.finest, rows=prompted) as self.maps:
            yield

    def take(self) -> Tensor | None:
        """The maps of the last call's items, (n, words, positions), float32; None where nothing attended to the text,
        or a network of one's own took other passes than the one."""
        if self.maps is None or self.maps.passes != 1:
            return None
        means = self.maps.means()
        weights = means[max(means)]  # (n, positions, tokens)
        return torch.stack([weights[:, :, places].sum(dim=2) for places in self.places], dim=1)

    def on_canvas(self, maps: Tensor, operator: Operator, window: Size, size: Size) -> Tensor | None:
        """The maps (N, words, positions) of all items of an operator together, (words, h, w): for patches, which are
        pictures, their mean. None where they are not those of whole items of `window`."""
        sizes = {h * w: (h, w) for h, w in (size_at(window, level) for level in range(self.levels))}
        if maps.shape[2] not in sizes:
            return None
        planes = maps.unflatten(2, sizes[maps.shape[2]])
        if isinstance(operator, Patches):
            return planes.mean(dim=0).cpu()
        scale = round(window[0] / planes.shape[2])
        canvas = operator.scatter(resize(planes, window, "nearest"))
        return resize(canvas, (-(-size[0] // scale), -(-size[1] // scale)), "area")[0].cpu()


def _shown(name: str) -> str:
    """A word as `written`, without its brackets: with its weight, if that is not 1."""
    pieces = [piece for part in parse_weights(name) for piece in part]
    text, weight = "".join(text for text, _ in pieces), pieces[0][1] if pieces else 1
    return text if weight == 1 else f"{text} ×{weight:.3g}"


def unread_because(model: Model, prompt: str, settings: Settings) -> str | None:
    """The reason why the words of a run have no maps; None where they have."""
    if described(prompt, settings.num_steps) is not None:
        return "the prompt changes by step, or is a sum of prompts"
    if not isinstance(model.unet, UNet):
        return "a transformer has no attention over the text alone"
    return "the network is compiled" if settings.compile else None
