"""The linear map from latents to colours by which a page shows latents without the VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.pipeline import encode
from cutdiff.sampling.resize import resize

FIELDS = (2, 4, 7)
"""The colours on each axis of the pictures that the map is fitted to."""
LARGEST = 32
"""The most latents on each axis of such a picture."""


def model_map(model: Model) -> list[list[float]]:
    """The map of a model: the best one for smooth fields of colours, which its VAE encodes; always the same fields."""
    side, generator = min(model.native_size, LARGEST), torch.Generator().manual_seed(0)
    colours = (torch.rand(1, 3, n, n, generator=generator, device="cpu") for n in FIELDS)
    pixels = side * model.factor
    images = torch.cat([resize(each, (pixels, pixels)).clamp(0, 1) for each in colours])
    return fitted(encode(model, images).cpu(), images)


def fitted(latents: Tensor, images: Tensor) -> list[list[float]]:
    """The map (3, C + 1), red, green and blue in [0, 1] of the C channels of a latent and 1, that gives images
    (B, 3, H, W) of latents (B, C, h, w) with the least squared error."""
    colours = resize(images, (latents.shape[2], latents.shape[3]), "area").permute(0, 2, 3, 1).flatten(0, 2).double()
    values = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    ones = torch.ones(len(values), 1, dtype=torch.float64, device=values.device)
    return torch.linalg.lstsq(torch.cat([values, ones], dim=1), colours, driver="gelsd").solution.T.tolist()
