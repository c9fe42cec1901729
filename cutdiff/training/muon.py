"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al. 2024), for convolutions and linear layers.

On these small networks it needs about a third of AdamW's steps. torch.optim.Muon takes matrices only; this one reads a
convolution (out, in, k, k) as the matrix (out, in·k·k).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives singular values towards 1."""


class Muon(torch.optim.Optimizer):
    """Gradient descent with orthogonalised Nesterov momentum; `lr` is the size of a step in spectral norm."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"]
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = (p.grad + group["momentum"] * buffer).flatten(1)
                tall = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * tall)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of a matrix (m, n) near 1, by a Newton-Schulz iteration on its shorter side.

    It is computed in bfloat16, because the iteration forgives rounding and a training step must not wait for it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
