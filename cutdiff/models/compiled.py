"""The U-Net through torch.compile: kernels of its own for a device, after minutes of compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cutdiff.models.layers import TextContext
from cutdiff.models.unet import Context, UNet

BACKEND = "inductor"
GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
"""Where a graph cannot be recorded, that is an error, not a slower run."""


def compiled(unet: UNet, *, cuda_graphs: bool = False) -> Callable[..., Tensor]:
    """`unet.forward`, compiled as one graph when it is first called; what was compiled serves later runs too.

    The number of rows stays open, so that the stages of a run and its last, smaller batches do not each compile anew.
    `cuda_graphs` are recorded for each number of rows; what they give is copied, as the next call writes over it.
    What is changed inside of `unet` afterwards is not always seen: hooks are not.
    """
    graphs: dict[str, Any] = {"options": GRAPHS} if cuda_graphs else {}
    run = torch.compile(unet, fullgraph=True, backend=BACKEND, **graphs)

    def forward(x: Tensor, timesteps: Tensor, context: Context, pooled: Tensor, size_ids: Tensor) -> Tensor:
        timesteps = timesteps.contiguous()
        by_row = (x, timesteps, context.rows if isinstance(context, TextContext) else context, pooled, size_ids)
        for values in by_row:
            torch._dynamo.maybe_mark_dynamic(values, 0)
        if not cuda_graphs:
            return run(x, timesteps, context, pooled, size_ids)
        torch.compiler.cudagraph_mark_step_begin()
        return run(x, timesteps, context, pooled, size_ids).clone()

    return forward
