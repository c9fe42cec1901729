"""The U-Net as a denoiser: text, guidance, size conditioning and prediction type around one network evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet

Size = tuple[int, int]
"""Height, width."""


@dataclass
class Denoiser:
    """`denoise(latents, sigma)` for a batch of patches or views of B images, whatever their number.

    The batch is ordered image first; every image's items share its row of the text states. A large batch is split
    into parts of `view_batch_size` items (a guidance pair is one item).
    """

    unet: UNet
    timestep: Callable[[float], float]
    """The timestep of a sigma, as `Schedule.timestep` tells it."""
    prediction_type: str
    positive: TextStates
    negative: TextStates
    guidance_scale: float
    factor: int
    """Pixels of an image for one latent, on each axis."""
    view_batch_size: int
    evaluations: int = field(default=0, init=False)
    """Items evaluated so far, a guidance pair counted as two."""

    @property
    def native_size(self) -> int:
        """Side, in latents, that the network was trained at."""
        return self.unet.config.native_size

    @torch.no_grad()
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
        num_items = len(latents)
        own: Size = (latents.shape[2], latents.shape[3])
        crops = torch.zeros(num_items, 2) if crop_origins is None else crop_origins.cpu().float()
        sizes = torch.tensor([*(original_size or own), *(target_size or own)], dtype=torch.float32).expand(num_items, 4)
        size_ids = torch.cat([sizes[:, :2], crops, sizes[:, 2:]], dim=1).to(latents.device) * self.factor
        image = torch.arange(num_items, device=latents.device) // (num_items // len(self.positive.context))
        parts = [
            self._denoise(latents[part], sigma, size_ids[part], image[part])
            for part in torch.arange(num_items, device=latents.device).split(self.view_batch_size)
        ]
        return torch.cat(parts)

    def _denoise(self, latents: Tensor, sigma: float, size_ids: Tensor, image: Tensor) -> Tensor:
        states = [self.positive] if self.guidance_scale == 1 else [self.negative, self.positive]
        dtype = self.unet.conv_in.weight.dtype
        prediction = self.unet(
            (latents / math.hypot(sigma, 1)).to(dtype).repeat(len(states), 1, 1, 1),
            torch.full((len(states) * len(latents),), self.timestep(sigma), device=latents.device),
            torch.cat([s.context[image] for s in states]),
            torch.cat([s.pooled[image] for s in states]),
            size_ids.repeat(len(states), 1),
        ).float()
        self.evaluations += len(prediction)
        if len(states) == 2:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        if self.prediction_type == "epsilon":
            return latents - sigma * prediction
        return latents / (sigma**2 + 1) - prediction * (sigma / math.hypot(sigma, 1))
