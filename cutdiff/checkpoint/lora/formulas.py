"""Computing the change of one weight from its factors in a LoRA file.

Sources: Hu et al. 2021 (arXiv 2106.09685) for LoRA; Yeh et al. 2023 (arXiv 2309.14859) for LoCon, LoHa and LoKr; Liu et
al. 2024 (arXiv 2402.09353) for DoRA. The names of factors are those in the files. Shapes: the weight is (O, I) or
(O, I, kh, kw), and R is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]

LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = (
    ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}),
    ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
COMPLETE: tuple[set[str], ...] = (
    {"lora_down", "lora_up"},
    {"lora_down", "lora_up", "lora_mid"},
    LOHA,
    LOHA | {"hada_t1", "hada_t2"},
    *(first | second for first in LOKR[0] for second in LOKR[1]),
    {"diff"},
)
"""The sets of factors that make a change together."""
RANKED = ("lora_down", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
"""The factors whose first dimension is the rank."""


def ranks(factors: Factors) -> set[int]:
    """The ranks of the factors: one in a sound file, and none where nothing is factorized and alpha has no effect."""
    return {factors[name].shape[0] for name in RANKED if name in factors}


def change_shape(factors: Factors) -> tuple[int, ...] | None:
    """The shape of `change(factors)`, which is not computed; None where the factors do not fit each other."""
    try:
        return tuple(change({name: torch.empty(factor.shape, device="meta") for name, factor in factors.items()}).shape)
    except (RuntimeError, IndexError):
        return None


def change(factors: Factors) -> Tensor:
    """The change of a weight before it is scaled: (O, I, kh, kw), or (O, I·kh·kw) where the factors are matrices.

    Raises RuntimeError or IndexError where the factors do not fit each other.
    """
    if "diff" in factors:
        return factors["diff"]
    if "lora_up" in factors:
        up, down = _matrix(factors["lora_up"]), factors["lora_down"]  # (O, R), (R, I, kh, kw)
        if "lora_mid" in factors:
            return _tucker(factors["lora_mid"], up, _matrix(down))
        return torch.mm(up, down.flatten(1)).view(len(up), *down.shape[1:])
    if "hada_w1_a" in factors:
        first, second = _half(factors, "hada", 1), _half(factors, "hada", 2)
        if first.shape != second.shape:
            raise RuntimeError("a Hadamard product of different shapes")
        return first * second
    first, second = _half(factors, "lokr", 1), _half(factors, "lokr", 2)
    return torch.kron(first[:, :, None, None] if second.ndim == 4 else first, second)


def _half(factors: Factors, kind: str, number: int) -> Tensor:
    """One side of a Hadamard or Kronecker product: given whole, or by factors, with or without a Tucker core."""
    whole, core = f"{kind}_w{number}", f"{kind}_t{number}"
    if whole in factors:
        return factors[whole]
    left, right = factors[f"{whole}_a"], factors[f"{whole}_b"]
    if left.ndim != 2 or right.ndim != 2:
        raise RuntimeError("factors that are no matrices")
    return _tucker(factors[core], left.mT, right) if core in factors else torch.mm(left, right)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The product of a Tucker core (R, S, kh, kw) with left (O, R) and right (S, I): (O, I, kh, kw)."""
    if right.ndim != 2:
        raise RuntimeError("factors that are no matrices")
    half = torch.mm(left, core.flatten(1)).view(len(left), core.shape[1], -1)  # (O, S, kh·kw)
    return torch.matmul(right.mT, half).reshape(len(left), right.shape[1], *core.shape[2:])


def _matrix(kernel: Tensor) -> Tensor:
    """The kernel of a 1×1 convolution as a matrix; other kernels as they are."""
    return kernel.flatten(1) if kernel.shape[2:] == (1, 1) else kernel


def magnitude_shape(own: tuple[int, ...], shape: tuple[int, ...], *, by_peft: bool) -> tuple[int, ...] | None:
    """The shape in which DoRA's magnitudes, of the shape `own` in the file, multiply a weight: (O, 1, …) or (1, I, …).

    PEFT has a magnitude for each output, (O,) or (1, O, 1, 1). LyCORIS has one for each output, (O, 1, …), or for each
    input, (1, I, …). None where the shape is another.
    """
    count, ones = math.prod(own), (1,) * len(shape)
    if count == shape[0] and (by_peft or own[:1] == (count,)):
        return (count, *ones[1:])
    if len(shape) > 1 and count == shape[1] and own[:2] == (1, count) and not by_peft:
        return (1, count, *ones[2:])
    return None


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """The sum that DoRA adds to a weight: rows or columns of weight and change together get lengths `magnitude`."""
    merged = weight + change
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    lengths = torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
    return magnitude / (lengths + torch.finfo(lengths.dtype).eps) * merged - weight
