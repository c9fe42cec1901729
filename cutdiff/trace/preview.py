"""The linear map from latents to colours by which a page shows latents without the VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.pipeline import encode
from cutdiff.sampling.resize import resize

COLOURS = 8
"""The colours on each axis of the picture that the map is fitted to."""
LARGEST = 12
"""The most latents on each axis of this picture."""


def model_map(model: Model) -> list[list[float]]:
    """The map of a model: the best one for smooth fields of colours, which its VAE encodes; always the same ones."""
    side, generator = min(model.native_size, LARGEST), torch.Generator().manual_seed(0)
    colours = torch.rand(1, 3, COLOURS, COLOURS, generator=generator, device="cpu")
    images = resize(colours, (side * model.factor, side * model.factor)).clamp(0, 1)
    return fitted(encode(model, images).cpu(), images)


def fitted(latents: Tensor, images: Tensor) -> list[list[float]]:
    """The map (3, C + 1), red, green and blue in [0, 1] of the C channels of a latent and 1, that gives images
    (B, 3, H, W) of latents (B, C, h, w) with the least squared error."""
    colours = resize(images, (latents.shape[2], latents.shape[3]), "area").permute(0, 2, 3, 1).flatten(0, 2).double()
    values = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    ones = torch.ones(len(values), 1, dtype=torch.float64, device=values.device)
    return torch.linalg.lstsq(torch.cat([values, ones], dim=1), colours, driver="gelsd").solution.T.tolist()
