"""A network or a ControlNet through torch.compile: after a while of compiling it runs on kernels for the device."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cutdiff.models.backbone import Backbone
from cutdiff.models.layers import ResnetBlock
from cutdiff.models.unet import TransformerBlock

BACKEND = "inductor"
MOST_GRAPHS = 1024
"""The graphs of one kind of block. SDXL has up to 12 for each number of rows, and torch of itself takes 8."""
GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
"""The options that record CUDA graphs; a graph that cannot be recorded is an error and not a slower run."""


def compiled(
    network: Backbone[Any], *, parts: Literal["blocks", "whole"] = "blocks", cuda_graphs: bool = False
) -> Callable[..., Any]:
    """`network.forward` on compiled kernels, which are made at its first call for a number
    of rows; later runs reuse them.

    "blocks" compiles each kind of resnet and of attending block once, one graph for all of the same shapes and number
    of rows, and leaves what stands between them as it is; "whole" compiles one graph. With `cuda_graphs` the whole
    network is recorded for each number of rows, and its output is copied, as the next call writes over it. A later
    change inside of `network` has no effect: it runs as a copy that shares its tensors. torch's limits of graphs are
    raised for the process.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_GRAPHS)
    own = _sharing_tensors(network)
    if parts == "blocks" and not cuda_graphs:
        kinds = (ResnetBlock, *{type(block) for stack in own.stacks() for block in stack.blocks})
        for module in own.modules():
            if isinstance(module, kinds):
                module.compile(fullgraph=True, dynamic=False, backend=BACKEND)
    else:
        own.compile(fullgraph=True, dynamic=False, backend=BACKEND, **({"options": GRAPHS} if cuda_graphs else {}))

    def forward(x: Tensor, timesteps: Tensor, *others: Any) -> Any:
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        given = own(x, timesteps.contiguous(), *others)
        return tree_map(torch.clone, given) if cuda_graphs else given

    return forward


def _sharing_tensors(network: Backbone[Any]) -> Backbone[Any]:
    """A copy of the modules on the same tensors and hooks. Layers that attend to text stay the same, as texts are kept
    for them."""
    kept: list[Any] = [*network.parameters(), *network.buffers()]
    for module in network.modules():
        kept += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        kept += [module.attn2] if isinstance(module, TransformerBlock) else []
    return deepcopy(network, {id(thing): thing for thing in kept})
