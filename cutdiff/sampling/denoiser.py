"""The U-Net as a denoiser: text, guidance, size conditioning and preconditioning around one network evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cutdiff.models.text import TextStates
from cutdiff.models.unet import Context, UNet
from cutdiff.parallel.ranks import ALONE, Ranks
from cutdiff.sampling.operators import Operator, Patches, upload
from cutdiff.sampling.preconditioning import Coefficients

Size = tuple[int, int]
"""Height, width."""

Inputs = tuple[Tensor, Tensor, Context, Tensor, Tensor]
"""What the U-Net takes, row by row: latents, timesteps, context, pooled, size ids."""

Network = Callable[[Tensor, Inputs], Tensor]
"""(the image of each row (n,), the rows) -> prediction (n, C, h, w); of a guidance pair, the negative row is first."""


class _Read(NamedTuple):
    """The text of the distinct rows, and what it was read from."""

    sources: tuple[TextStates, TextStates, UNet]
    """Positive and negative states, and the network."""
    context: Context
    pooled: Tensor
    cut: dict[int, tuple[Context, Tensor]]
    """The text of every row, by their number."""


@dataclass
class Denoiser:
    """`denoise(latents, sigma)` for a batch of patches or views of B images, whatever their number.

    The batch is ordered image first; every image's items share its row of the text states. It is divided among the
    `ranks`, and split into parts of `view_batch_size` items (a guidance pair is one item), which is halved where memory
    does not suffice.
    """

    unet: UNet
    timestep: Callable[[float], float]
    """The timestep of a sigma, as `Schedule.timestep` tells it."""
    coefficients: Callable[[float], Coefficients]
    """Around the network at a sigma, as the model's noise configuration tells them."""
    positive: TextStates
    negative: TextStates
    guidance_scale: float
    factor: int
    """Pixels of an image for one latent, on each axis."""
    view_batch_size: int | None
    """None: all at once."""
    compiled: Callable[..., Tensor] | None = None
    """What takes the place of the U-Net's forward pass where it was compiled."""
    ranks: Ranks = ALONE
    """The processes that each compute their share of a batch."""
    items_of_a_call: int | None = None
    """Ranks share whole calls of so many items, as one process makes them, which gives the same bits; None: they share
    the rows evenly, those of a guidance pair too."""
    backend: str = "auto"
    """Of the operators around the network: "auto", "triton" or "reference"."""
    evaluations: int = field(default=0, init=False)
    """Rows evaluated so far by this rank, a guidance pair counted as two; what all evaluate is the first rank's."""
    guided: bool = field(default=True, init=False)
    """Whether guidance is on; where it is off, only the prompt is evaluated."""
    divided: bool = field(default=True, init=False)
    """Whether ranks share the rows; where a method looks into the network, every rank may have to evaluate all."""
    keeps_text: bool = field(default=True, init=False)
    """Whether keys and values of the prompt are made once: not where a method changes `to_k` or `to_v` of `attn2`."""
    network: Network | None = field(default=None, init=False)
    """What a method puts in the place of one pass of the U-Net, made of calls of `evaluate`."""
    _read: dict[int, _Read] = field(default_factory=dict, init=False, repr=False)
    """By `copies`."""

    @property
    def native_size(self) -> int:
        """Side, in latents, that the network was trained at."""
        return self.unet.config.native_size

    @property
    def copies(self) -> int:
        """How often the network sees each item: twice for a guidance pair, the positive one last."""
        return 2 if self.guided and self.guidance_scale != 1 else 1

    def __call__(
        self,
        latents: Tensor,
        sigma: float,
        *,
        crop_origins: Tensor | None = None,
        original_size: Size | None = None,
        target_size: Size | None = None,
    ) -> Tensor:
        """Estimate x0: latents (B·V, C, h, w) in sigma space, float32 -> denoised, the same shape, float32.

        `original_size` and `target_size`, in latents, and `crop_origins` (B·V, 2) of (top, left), in latents, are what
        the network is told of each item; left out, each item is a whole picture of its own size.
        """
        return self.through(
            Patches((1, 1)),
            latents,
            sigma,
            crop_origins=crop_origins,
            original_size=original_size,
            target_size=target_size,
        )

    @torch.no_grad()
    def through(
        self,
        operator: Operator,
        canvas: Tensor,
        sigma: float,
        *,
        seen: Tensor | None = None,
        positive: TextStates | None = None,
        crop_origins: Tensor | None = None,
        original_size: Size | None = None,
        target_size: Size | None = None,
    ) -> Tensor:
        """operator.scatter ∘ D ∘ operator.gather: canvas (B, C, H, W), float32 -> denoised, the same shape, float32.

        D's estimate is linear in its input and in what the network says, and scatter undoes gather: so the input's part
        is taken from the canvas itself, and each way is one pass. Where `seen` (B, C, H, W) is given, the network reads
        that, and what it predicts holds for the canvas. `positive` are text states for the prompt's, B rows or one for
        each item of the operator.
        """
        copies, (c_in, c_skip, c_out) = self.copies, self.coefficients(sigma)
        dtype = self.unet.conv_in.weight.dtype
        read = canvas if seen is None else seen
        inputs = operator.gather(read, self.backend, c_in=c_in, dtype=dtype, copies=copies)
        told = _size_ids(inputs, copies, self.factor, crop_origins, original_size, target_size)
        prediction = self.predict(inputs, sigma, told, self.positive if positive is None else positive)
        return operator.scatter(
            prediction,
            self.backend,
            copies=copies,
            guidance_scale=self.guidance_scale,
            canvas=canvas,
            c_skip=c_skip,
            c_out=c_out,
        )

    def evaluate(self, inputs: Inputs) -> Tensor:
        """One pass of the U-Net over the rows, which are counted."""
        prediction = (self.compiled or self.unet)(*inputs)
        if self.divided or self.ranks.leads:
            self.evaluations += len(inputs[0])
        return prediction

    def predict(self, inputs: Tensor, sigma: float, size_ids: Tensor, positive: TextStates) -> Tensor:
        """The network's output for all rows (items·copies, C, h, w), of which this rank evaluates its share.

        Raises torch.OutOfMemoryError where memory does not suffice for a single item.
        """
        context, pooled = self._text(len(inputs), positive)
        timestep = torch.full((1,), self.timestep(sigma), device=inputs.device).expand(len(inputs))
        ranks = self.ranks if self.divided else ALONE
        starts = self.shares(len(inputs), ranks)
        first, end = starts[ranks.rank : ranks.rank + 2]
        parts, start = [], first
        while start < end:
            rows = slice(start, min(start + (self.view_batch_size or len(inputs)) * self.copies, end))
            part = (inputs[rows], timestep[rows], context[rows], pooled[rows], size_ids[rows])
            try:
                parts.append(self._pass(part, start, len(inputs)))
            except torch.OutOfMemoryError:
                if len(part[0]) <= self.copies:
                    raise
                self.view_batch_size = max(len(part[0]) // self.copies // 2, 1)
            else:
                start = rows.stop
        if ranks.size == 1:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        # A rank without rows does not know what a method's own network gives: float32 holds it.
        prediction = inputs.new_empty(inputs.shape, dtype=inputs.dtype if self.network is None else torch.float32)
        if parts:
            prediction[first:end] = torch.cat(parts)
        ranks.gather(prediction, starts)
        return prediction

    def shares(self, num_rows: int, ranks: Ranks) -> list[int]:
        """Where the rows of each rank begin, and where the last ones end."""
        together = 1 if self.network is None else self.copies  # a method may want both rows of a pair
        if self.items_of_a_call is not None:
            together = self.items_of_a_call * self.copies
        return [min(start * together, num_rows) for start in ranks.starts(math.ceil(num_rows / together))]

    def _pass(self, part: Inputs, start: int, num_rows: int) -> Tensor:
        """One pass over the rows from `start` on, of all `num_rows`, as a method may have it."""
        if self.network is None:
            return self.evaluate(part)
        rows = torch.arange(start, start + len(part[0]), device=part[0].device)
        return self.network(rows // (num_rows // len(self.positive.context)), part)

    def _text(self, num_rows: int, positive: TextStates) -> tuple[Context, Tensor]:
        """Context and pooled states of every row. What layers make of the prompt, which all items of an image share at
        every step, is kept; of a view's own states, it is not."""
        sources = (positive, self.negative, self.unet)
        read = self._read.get(self.copies)
        if read is None or not self.keeps_text or any(a is not b for a, b in zip(read.sources, sources, strict=True)):
            negative = self.negative.repeat(len(positive.context) // len(self.negative.context))
            states = [negative, positive][-self.copies :]
            context = torch.stack([s.context for s in states], dim=1).flatten(0, 1)
            pooled = torch.stack([s.pooled for s in states], dim=1).flatten(0, 1)
            read = _Read(sources, context, pooled, {})
            if self.keeps_text and positive is self.positive:
                read = self._read[self.copies] = read._replace(context=self.unet.read(context))
        if num_rows not in read.cut:
            rows = torch.arange(len(read.pooled), device=read.pooled.device).unflatten(0, (-1, self.copies))
            rows = rows.repeat_interleave(num_rows // len(read.pooled), dim=0).flatten()
            read.cut[num_rows] = read.context[rows], read.pooled[rows]
        return read.cut[num_rows]


def _size_ids(
    inputs: Tensor, copies: int, factor: int, crop_origins: Tensor | None, original: Size | None, target: Size | None
) -> Tensor:
    """What the network is told of each row: (items·copies, 6), original size, crop corner, target size in pixels."""
    num_items, own = len(inputs) // copies, (inputs.shape[2], inputs.shape[3])
    crops = torch.zeros(num_items, 2) if crop_origins is None else crop_origins.cpu().float()
    sizes = torch.tensor([*(original or own), *(target or own)], dtype=torch.float32).expand(num_items, 4)
    ids = torch.cat([sizes[:, :2], crops, sizes[:, 2:]], dim=1) * factor
    return upload(ids.repeat_interleave(copies, dim=0), inputs.device)
