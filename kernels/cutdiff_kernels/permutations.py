"""The permutations that exchange pixels between patches, explicit or drawn by counter where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cutdiff_kernels import GRAINS

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class SeededPermutation:
    """A permutation that is drawn by counter where it is used, so that no index tensor travels."""

    seeds: tuple[int, ...]
    """One seed in 0 … 2⁶⁴ − 1 for each image."""
    step: int
    grain: str
    """One of `GRAINS`."""

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise ValueError(f"interaction {self.grain!r} is not one of {', '.join(GRAINS)}")
        for seed in self.seeds:
            if not isinstance(seed, int) or not 0 <= seed < 2**64:
                raise ValueError(f"seed={seed!r} of a permutation must be a whole number in 0 … 2⁶⁴ − 1")


Permutation = Tensor | SeededPermutation | None
"""An explicit index, a permutation drawn by counter, or none.

An index is int64, (N, C or 1, h, w) for all images or (B, N, C or 1, h, w). At each position,
permuted[n] = patches[index[n]].
"""


def as_index(
    permutation: Permutation, num_patches: int, shape: tuple[int, int, int], device: torch.device
) -> Tensor | None:
    """Return the index (B or 1, N, C or 1, h, w) of a permutation of patches of `shape` (C, h, w), None if identity."""
    if isinstance(permutation, SeededPermutation):
        return None if permutation.grain == "none" else permutation_index(permutation, num_patches, shape, device)
    if permutation is None:
        return None
    return (permutation if permutation.ndim == 5 else permutation[None]).to(device)


def permutation_index(
    permutation: SeededPermutation,
    num_patches: int,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a permutation of the N patches at each position: (B, N, C or 1, h, w) for patches of `shape` (C, h, w).

    At each position every patch gets a random 32-bit key, and the rank of its key is the patch's destination; equal
    keys, one in 2³², are ranked by the patches' numbers. The generator's key is the image's seed. Its counter is
    (position, channel, step, patch // 4), and patch % 4 picks one of its four words. A draw that serves all channels
    counts as channel 0.
    """
    channels, height, width = shape
    seeds = seed_bits(permutation.seeds, torch.device(device)).view(-1, 1, 1, 1)
    *counter, _ = torch.broadcast_tensors(
        torch.arange(height * width, device=seeds.device),
        torch.arange(channels if permutation.grain == "channel" else 1, device=seeds.device).view(-1, 1),
        torch.tensor(permutation.step, device=seeds.device),
        torch.arange((num_patches + 3) // 4, device=seeds.device).view(-1, 1, 1),
        seeds,
    )
    words = torch.stack(philox(counter, (seeds & WORD, (seeds >> 32) & WORD)), dim=2)  # (B, N / 4, 4, C, h·w)
    keys = words.flatten(1, 2)[:, :num_patches].mul_(num_patches)
    keys += torch.arange(num_patches, device=seeds.device).view(-1, 1, 1)  # now no two are alike
    rank = torch.zeros_like(keys, dtype=torch.int16)
    for other in keys.unbind(1):
        rank += other[:, None] < keys
    return invert(rank.long().unflatten(3, (height, width)))


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four counter words of one shape -> four random words, int64 of 32 bits.

    The two words of the key broadcast against the counter's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words wraps around in int64, but its 64 bits are right: mask what the shift's sign smears.
        # The low words c1 and c3 keep what lies above them until it is masked away with the next.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD), p1
        c2, c3 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD), p0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


@lru_cache(maxsize=16)
def seed_bits(seeds: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the bits of the seeds on the device, (B,) int64, from a cache: nobody may write to them."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=device)


def invert(index: Tensor) -> Tensor:
    """Invert the permutation at each position of an index (B, N, C, h, w), which must be one."""
    source = torch.arange(index.shape[1], device=index.device).view(1, -1, 1, 1, 1).expand(index.shape)
    return torch.empty_like(index).scatter_(1, index, source)


def check_permutation(permutation: Permutation, num_patches: int, batch: int, shape: tuple[int, int, int]) -> None:
    """Raise ValueError where a permutation does not fit patches of `shape` (C, h, w), without reading an index."""
    if isinstance(permutation, SeededPermutation):
        if len(permutation.seeds) != batch:
            raise ValueError(f"{len(permutation.seeds)} seeds of a permutation do not fit {batch} images: pass {batch}")
    elif permutation is not None and not (
        permutation.dtype == torch.int64
        and permutation.ndim in (4, 5)
        and permutation.shape[:-4] in ((), (1,), (batch,))
        and permutation.shape[-4] == num_patches
        and permutation.shape[-3] in (1, shape[0])
        and permutation.shape[-2:] == shape[1:]
    ):
        raise ValueError(
            f"a permutation {tuple(permutation.shape)} of {permutation.dtype} does not fit {num_patches} patches of "
            f"shape {shape}: pass int64 (N, C or 1, h, w), or one for each image"
        )


def check_index(index: Tensor, num_patches: int) -> None:
    """Raise ValueError where an explicit index is no permutation of the patches at some position.

    The values are read, for which the host waits if they lie on a GPU. An index without values, on "meta", passes.
    """
    if index.dtype != torch.int64 or index.ndim not in (4, 5) or index.shape[-4] != num_patches:
        raise ValueError(
            f"a permutation {tuple(index.shape)} of {index.dtype} does not fit {num_patches} patches: pass int64 "
            f"({num_patches}, C or 1, h, w), or one for each image"
        )
    if index.is_meta or not index.numel():
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= num_patches:
        raise ValueError(
            f"a permutation index holds {low if low < 0 else high}, and patches are numbered 0 to {num_patches - 1}: "
            "name each of them once at every position"
        )
    named = torch.zeros(index.shape, dtype=torch.bool, device=index.device).scatter_(-4, index, True)
    if not bool(named.all()):
        *_, patch, channel, row, column = (~named).nonzero()[0].tolist()
        raise ValueError(
            f"a permutation index names another patch twice instead of patch {patch} at channel {channel}, row {row}, "
            f"column {column}: name each of the {num_patches} patches once at every position"
        )
