"""A U-Net's norms and gates as Triton kernels (`cutdiff_kernels.network`), under the names of the layers they replace.

A fused layer shares the parameters of the layer that it replaces, so the network is saved as before. It has no
gradients, and a FLOP counter does not see its products. The sampler runs without fused layers until the bench
(`python -m cutdiff.bench --also fused`) has shown on a GPU that they are faster.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from cutdiff.models.layers import GroupNormSiLU
from cutdiff.models.unet import GEGLU, UNet


@torch.library.custom_op("cutdiff::group_norm", mutates_args=())
def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """The kernel of `cutdiff_kernels.reference_network.group_norm`, which torch.compile does not look into."""
    from cutdiff_kernels import network

    return network.group_norm(x, num_groups, weight, bias, eps, silu=silu)


@group_norm.register_fake
def _(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("cutdiff::geglu", mutates_args=())
def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The kernel of `cutdiff_kernels.reference_network.geglu`, which torch.compile does not look into."""
    from cutdiff_kernels import network

    return network.geglu(x, weight, bias)


@geglu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


class FusedGroupNorm(nn.Module):
    """The kernel for a group norm, with its SiLU if it has one: (B, C, h, w) -> (B, C, h, w) in channels_last."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, isinstance(norm, GroupNormSiLU)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class FusedGEGLU(nn.Module):
    """The kernel for a gated linear layer: (..., dim) -> (..., hidden)."""

    def __init__(self, gated: GEGLU) -> None:
        super().__init__()
        self.proj = gated.proj

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x, self.proj.weight, self.proj.bias)


def fuse(unet: UNet, *, norms: bool = True, gates: bool = True) -> None:
    """Put fused layers in the place of all group norms, and of gated linear layers that are not in 8 bits.

    Without `norms` or `gates`, these stay. Raises ValueError where no kernel can run on the network's device.
    """
    check_fused(unet.conv_in.weight.device)
    for name, module in list(unet.named_modules()):
        if norms and isinstance(module, nn.GroupNorm):
            unet.set_submodule(name, FusedGroupNorm(module))
        elif gates and isinstance(module, GEGLU) and isinstance(module.proj, nn.Linear):
            unet.set_submodule(name, FusedGEGLU(module))


def check_fused(device: torch.device) -> None:
    """Raise ValueError where a network on `device` cannot have fused layers."""
    try:
        runs_on = import_module("cutdiff_kernels.launch").runs_on
    except ModuleNotFoundError as error:
        raise ValueError(f"fused layers need {error.name}: install it, or leave them out") from None
    if not runs_on(device):
        raise ValueError(f"fused layers need a GPU (or TRITON_INTERPRET=1), and the device is {device}: leave them out")
