"""Plain-torch references of the layers inside of the network, with the checks of what they are given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = False) -> Tensor:
    """Normalise groups of neighbouring channels (Wu and He 2018, arXiv 1803.08494), then apply x·sigmoid(x) if `silu`.

    x (B, C, H, W), weight and bias (C,) -> the shape of x, in the dtype of x.
    """
    check_group_norm(x, num_groups, weight, bias)
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gate a linear layer by the GELU of another (Shazeer 2020, arXiv 2002.05202), whose weights are the last half.

    x (..., K), weight (2N, K), bias (2N,) -> (..., N), in the dtype of x.
    """
    check_geglu(x, weight, bias)
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def check_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError where groups or parameters do not fit the channels."""
    if x.ndim != 4 or x.shape[1] % num_groups or not weight.shape == bias.shape == x.shape[1:2]:
        raise ValueError(
            f"{num_groups} groups, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit an input of "
            f"{tuple(x.shape)}: pass (B, C, H, W) and two of (C,)"
        )


def check_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError where the shapes or dtypes of a gated linear layer do not go together."""
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and bias.shape == weight.shape[:1]
    if not fits or len(weight) % 2 or not x.dtype == weight.dtype == bias.dtype:
        given = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (x, weight, bias))
        raise ValueError(f"{given} are no gated linear layer: pass x (..., K), weight (2N, K), bias (2N,) of one dtype")
