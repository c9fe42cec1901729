"""Low-rank changes of a network's weights that are trained while the weights stay, and their file.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class LowRank(nn.Module):
    """The change of one weight, `up` (O, rank) times `down` (rank, I) or (rank, I, kh, kw), which begins at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down.flatten(1)).view_as(weight)


def add_lora(network: nn.Module, rank: int) -> nn.ModuleDict:
    """Let a change of `rank` be added to the weight of every linear layer and convolution, in place.

    The weights themselves no longer have gradients. Returns the changes by the names of their modules, in which "/"
    stands for dots.
    """
    network.requires_grad_(False)
    changes = nn.ModuleDict()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            changes[name.replace(".", "/")] = change = LowRank(module.weight, rank)
            register_parametrization(module, "weight", change)
    return changes


def save_lora(path: Path, changes: nn.ModuleDict) -> None:
    """Write the changes of a U-Net in float16, with the keys of diffusers and PEFT; the file appears whole."""
    tensors: dict[str, Tensor] = {}
    for name, change in cast(Mapping[str, LowRank], changes).items():
        up, down = change.up.detach(), change.down.detach()
        module = f"unet.{name.replace('/', '.')}"
        tensors[f"{module}.lora_A.weight"] = down
        tensors[f"{module}.lora_B.weight"] = up.view(*up.shape, *(1,) * (down.ndim - 2))
    tensors = {key: tensor.half().cpu().contiguous() for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)
