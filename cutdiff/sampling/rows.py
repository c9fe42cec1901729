"""The rows that the network reads in a step: their text, their sizes, and how several of them become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutdiff.models.backbone import Backbone, Context
from cutdiff.models.config import Size
from cutdiff.models.layers import TextContext
from cutdiff.models.text import TextStates, TextSum
from cutdiff.sampling.controls import Hint
from cutdiff.sampling.operators import Operator, upload

GATHERED_BYTES = 256 << 20
"""The most bytes of the text's keys and values that are kept for the rows of calls, and not gathered by every layer in
every call: those of 10 rows of SDXL in 16 bits. In larger calls the layers' work outweighs their gathers."""
Inputs = tuple[Tensor, Tensor, Context, Tensor, Tensor, *tuple[Hint, ...]]
"""The rows that the network reads: latents, timesteps, context, pooled, size ids. Behind them stand the hints of the
ControlNets that count in the step. All are indexed by rows."""
Text = TextStates | TextSum | Callable[[int], TextStates | TextSum]
"""Text states of B rows, a sum of such, or a function that gives either for the number of a step. It gives the same
object for the same text, which is then not read anew."""


class StepText(NamedTuple):
    """The text that one step reads: the states of the negative prompt and of each term of the prompt."""

    negative: TextStates
    terms: tuple[TextStates, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    """The weights of the terms for each image, where they are a sum."""
    is_kept: bool = True
    """True where other steps may read the same text."""

    @classmethod
    def of(cls, positive: Text, negative: Text, step: int) -> StepText:
        """The text of a step. ValueError where the negative one is a sum."""
        positive, negative = (text(step) if callable(text) else text for text in (positive, negative))
        if isinstance(negative, TextSum):
            raise ValueError("negative is a sum of prompts, which only positive may be: give states of B rows")
        if isinstance(positive, TextSum):
            return cls(negative, positive.terms, positive.weights)
        return cls(negative, (positive,))

    @property
    def is_mean(self) -> bool:
        """True where the weights of each image add up to 1, so that the negative estimate cancels out."""
        return all(math.isclose(sum(weights), 1) for weights in self.weights)


class Rows(NamedTuple):
    """The properties that all rows of a step have in common."""

    step: int
    sigma: float
    operator: Operator
    copies: int
    is_guided: bool
    """True where the guidance of the step is on."""
    text: StepText
    num_images: int
    is_changed: bool = False
    """True for rows of the network as the guidance changes it, which all read the prompt."""
    hints: tuple[Hint, ...] = ()
    """The hints of the items, one row each for all copies."""

    def hints_of(self, part: slice, device: torch.device) -> tuple[Hint, ...]:
        """The hints of a part of all rows."""
        if not self.hints:
            return ()
        items = torch.arange(part.start, part.stop, device=device) // self.copies
        return tuple(hint[items] for hint in self.hints)

    def of_prompt(self, values: Tensor) -> Tensor:
        """Those of the values of all rows that belong to rows which read the prompt."""
        return values.unflatten(0, (-1, self.copies))[:, -len(self.text.terms) :].flatten(0, 1)

    def with_prompt(self, values: Tensor, prompted: Tensor) -> Tensor:
        """The values of all rows, but of those that read the prompt the ones of `prompted`."""
        negative = values.unflatten(0, (-1, self.copies))[:, : -len(self.text.terms)]
        return torch.cat([negative, prompted.unflatten(0, (len(negative), -1))], dim=1).flatten(0, 1)

    def joined(self, prediction: Tensor) -> Tensor:
        """The network's output for all rows -> that of a guidance pair (items·2, C, h, w), or where guidance is off of
        one row an item. A sum of prompts, whose output comes as float32, is one of them: the estimate of x0 is linear
        in it, so that sums of either are the same."""
        if not self.text.weights:
            return prediction
        weights = torch.tensor(self.text.weights, dtype=torch.float32, device="cpu")  # (B, T)
        weights = upload(weights, prediction.device)[:, None, :, None, None, None]
        items = prediction.float().unflatten(0, (len(self.text.weights), -1, self.copies))
        terms = items[:, :, -len(self.text.terms) :]
        if self.copies == len(self.text.terms):
            return (weights * terms).sum(dim=2).flatten(0, 1)
        negative = items[:, :, :1]
        positive = negative + (weights * (terms - negative)).sum(dim=2, keepdim=True)
        return torch.cat([negative, positive][0 if self.is_guided else 1 :], dim=2).flatten(0, 2)


class Texts:
    """The texts of a run as the network reads them, made once for all steps and calls that read the same."""

    class _Read(NamedTuple):
        """The text of the distinct rows, and what it was made from."""

        sources: tuple[TextStates | Backbone[Any], ...]
        """The states of the negative prompt and of the terms, and the networks."""
        context: Context
        pooled: Tensor
        by_rows: dict[tuple[int, ...], tuple[Context, Tensor]]
        """The text of each row of the last kinds of calls, by the numbers of their rows' texts."""

    def __init__(self) -> None:
        self._kept: dict[int, Texts._Read] = {}  # by the number of copies

    def read(self, networks: Sequence[Backbone[Any]], text: StepText, copies: int, *, keeps: bool) -> Texts._Read:
        """The text of each image, or of each item that has its own. Where the run `keeps` any, what layers make of the
        prompt, which all items of an image share at every step, is kept; of a view's own states, it is not."""
        sources = (text.negative, *text.terms, *networks)
        read = self._kept.get(copies)
        is_same = read is not None and [*map(id, read.sources)] == [*map(id, sources)]
        if read is None or not keeps or not is_same:
            negative = text.negative.repeat(len(text.terms[0].context) // len(text.negative.context))
            states = [negative, *text.terms][-copies:]
            context = torch.stack([s.context for s in states], dim=1).flatten(0, 1)
            pooled = torch.stack([s.pooled for s in states], dim=1).flatten(0, 1)
            read = self._Read(sources, context, pooled, {})
            if keeps and text.is_kept:
                parts = [network.read(context) for network in networks]
                kept = [part.kept for part in parts if isinstance(part, TextContext)]
                if kept:
                    context = TextContext({layer: pair for each in kept for layer, pair in each.items()})
                read = self._kept[copies] = read._replace(context=context)
        return read

    @staticmethod
    def of_rows(
        read: Texts._Read, part: slice, num_rows: int, copies: int, gather: Callable[[TextContext], TextContext]
    ) -> tuple[Context, Tensor]:
        """Context and pooled states of a part of all rows, which is kept for calls with the same texts."""
        shared_by = num_rows // (len(read.pooled) // copies)
        rows = tuple(row // shared_by * copies + row % copies for row in range(part.start, part.stop))
        if rows not in read.by_rows:
            index = upload(torch.tensor(rows, device="cpu"), read.pooled.device)
            context, pooled = read.context[index], read.pooled[index]
            if isinstance(context, TextContext):
                most = GATHERED_BYTES // max(context.row_bytes, 1)  # no layer may read the text
                if len(rows) + sum(len(kind) for kind in read.by_rows if len(kind) <= most) > most:
                    read.by_rows.clear()
                if len(rows) <= most:
                    context = gather(context)
            read.by_rows[rows] = context, pooled
        return read.by_rows[rows]


def size_ids_of(
    inputs: Tensor, copies: int, factor: int, crop_origins: Tensor | None, original: Size | None, target: Size | None
) -> Tensor:
    """The size conditioning of each row: (items·copies, 6), original size, crop corner, target size in pixels."""
    num_items, own = len(inputs) // copies, (inputs.shape[2], inputs.shape[3])
    whole = torch.zeros(num_items, 2, dtype=torch.float32, device="cpu")
    crops = whole if crop_origins is None else crop_origins.cpu().float()
    sizes = torch.tensor([*(original or own), *(target or own)], dtype=torch.float32, device="cpu").expand(num_items, 4)
    ids = torch.cat([sizes[:, :2], crops, sizes[:, 2:]], dim=1) * factor
    return upload(ids.repeat_interleave(copies, dim=0), inputs.device)
