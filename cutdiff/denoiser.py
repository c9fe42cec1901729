"""The U-Net as a denoiser: text, guidance, size conditioning and preconditioning around one network evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cutdiff.models.text import TextStates
from cutdiff.models.unet import Context, UNet
from cutdiff.patches import Operator, Patches, upload
from cutdiff.preconditioning import Coefficients

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

    The batch is ordered image first; every image's items share its row of the text states. A large batch is split
    into parts of `view_batch_size` items (a guidance pair is one item), which is halved where memory does not suffice.
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
    backend: str = "auto"
    """Of the operators around the network: "auto", "triton" or "reference"."""
    evaluations: int = field(default=0, init=False)
    """Items evaluated so far, a guidance pair counted as two."""
    guided: bool = field(default=True, init=False)
    """Whether guidance is on; where it is off, only the prompt is evaluated."""
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
        self.evaluations += len(inputs[0])
        return prediction

    def predict(self, inputs: Tensor, sigma: float, size_ids: Tensor, positive: TextStates) -> Tensor:
        """The network's output for (items·copies, C, h, w), evaluated in parts of `view_batch_size` items.

        Raises torch.OutOfMemoryError where memory does not suffice for a single one.
        """
        context, pooled = self._text(len(inputs), positive)
        timestep = torch.full((1,), self.timestep(sigma), device=inputs.device).expand(len(inputs))
        parts, start = [], 0
        while start < len(inputs):
            num_items = min(self.view_batch_size or len(inputs), (len(inputs) - start) // self.copies)
            rows = slice(start, start + num_items * self.copies)
            part = (inputs[rows], timestep[rows], context[rows], pooled[rows], size_ids[rows])
            try:
                parts.append(self._pass(part, start, len(inputs)))
            except torch.OutOfMemoryError:
                if num_items == 1:
                    raise
                self.view_batch_size = num_items // 2
            else:
                start = rows.stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
