"""The U-Net through torch.compile: after minutes of compiling it runs on kernels that were made for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cutdiff.models.layers import TextContext
from cutdiff.models.unet import Context, UNet

BACKEND = "inductor"
GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
"""The options that record CUDA graphs; a graph that cannot be recorded is an error and not a slower run."""


def compiled(unet: UNet, *, cuda_graphs: bool = False) -> Callable[..., Tensor]:
    """`unet.forward`, compiled as one graph at its first call; later runs reuse what was compiled.

    The number of rows stays open, so neither another stage of a run nor its last, smaller batch compiles anew. With
    `cuda_graphs` a graph is recorded for each number of rows, and its output is copied, as the next call writes over
    it. A later change inside of `unet` may have no effect: hooks that are added do not run.
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
