"""From a finished picture to the start of a larger one: resized, in latents or through the VAE, and noised again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.models.config import Size

Resampling = Literal["bicubic", "catmull_rom", "bilinear", "nearest", "area"]
Change = Callable[[Tensor], Tensor]
"""A change of images (B, 3, H, W) that keeps their size."""


def resize(x: Tensor, size: Size, resampling: Resampling = "bicubic", *, antialias: bool = True) -> Tensor:
    """x (B, C, H, W), float32 or float64 -> (B, C, *size), up or down, each axis by itself.

    "bicubic" (of −3/4, Keys 1981) and "bilinear" interpolate; an axis that they make shorter is smoothed first, which
    no published code of this field does: without `antialias` it is not. "catmull_rom" is bicubic of −1/2 as PIL has it:
    a shorter axis is smoothed in any case, and pixels past the border have no weight. "nearest" takes pixel ⌊i·n/m⌋ of
    n for pixel i of m. "area" is the mean of the pixels that one touches, all alike: the s×s mean where s divides the
    axes.
    ValueError where the size is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"size={tuple(size)} must be at least one pixel on each axis")
    if resampling == "nearest":  # torch's own rounds i·n/m in float32, and is one pixel off now and then
        rows, columns = (torch.arange(m, device=x.device) * n // m for n, m in zip(x.shape[2:], size, strict=True))
        return x.index_select(2, rows).index_select(3, columns)
    if resampling == "area":
        return F.interpolate(x, size, mode=resampling)
    if resampling == "catmull_rom":
        return _smoothed(x, size, "bicubic") if size != x.shape[2:] else x
    smaller = (min(size[0], x.shape[2]), min(size[1], x.shape[3]))
    if antialias and smaller != x.shape[2:]:
        x = _smoothed(x, smaller, resampling)
    return F.interpolate(x, size, mode=resampling) if size != x.shape[2:] else x


def _smoothed(x: Tensor, size: Size, mode: str) -> Tensor:
    """x resized by torch's kernels with `antialias`, whose bicubic one is of −1/2, also where it enlarges."""
    # On a CPU torch (2.13 too) makes all rows of a single column alike. A single row it makes well.
    turned = size[1] == 1
    lines = x.mT.contiguous() if turned else x
    lines = F.interpolate(lines, size[::-1] if turned else size, mode=mode, antialias=True)
    return lines.mT.contiguous() if turned else lines


@torch.no_grad()
def resize_pixels(
    latents: Tensor,
    size: Size,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[..., Tensor],
    *,
    resampling: Resampling = "bicubic",
    change: Change | None = None,
    noise: Tensor | None = None,
    corrections: int = 0,
) -> Tensor:
    """Latents (B, C, h, w) -> (B, C, *size) through the VAE: decode, resize, `change` where there is one, encode.

    `decode` and `encode` are those of a `Run`. `change` sharpens, for instance:
    `partial(sharpened, amount=1, split=Gaussian(1, radius=1))`. The latents are the encoder's mean, or with `noise`
    (B, C, *size), standard normal, as `Draws.encoder_noise` draws it, a sample of its distribution. Nothing clamps
    what the resizing or the change makes of the images.

    A VAE does not give back the picture that it was given: edges are softer, colours shift. Each of `corrections` adds
    to the latents what they lose on the way there and back, decoded and encoded once more.

    One image goes through at a time, and large ones go through the VAE in bands of rows: at the most one image and its
    change live in float32 beside what the VAE holds.
    """
    parts = []
    for i, picture in enumerate(latents.split(1)):
        image = decode(picture)
        height, width = (side * image.shape[2] // picture.shape[2] for side in size)
        image = resize(image, (height, width), resampling)
        image = image if change is None else change(image)
        options: dict[str, Any] = {} if noise is None else {"noise": noise[i : i + 1]}
        encoded = encode(image, **options)
        larger = encoded
        for _ in range(corrections):
            larger = larger + (encoded - encode(decode(larger), **options))
        parts.append(larger)
    return torch.cat(parts)


def renoise(x0: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """x0 + sigma · noise, (B, C, H, W): the state of a picture at any sigma, on the run's schedule or between.

    SDEdit (Meng et al. 2021, arXiv 2108.01073) begins a run from it. `noise` is standard normal and explicit, as
    `Draws.phase_noise` draws it; a method that holds a state to a picture takes the same noise at every sigma.
    """
    return x0 + sigma * noise
