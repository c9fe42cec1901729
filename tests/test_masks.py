"""Masks: what lies outside is held at every step, and comes back to the bit; what lies inside is drawn."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cutdiff.sampling.masks import MaskedPicture, feathered


def drawn_mask(seed: int, height: int, width: int) -> Tensor:
    """One white rectangle and some white pixels, (1, 1, H, W)."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(height, width, generator=rng) > 0.995).float()
    top, left = (int(torch.randint(side, (1,), generator=rng)) for side in (height, width))
    mask[top : top + height // 3, left : left + width // 3] = 1
    return mask[None, None]


def distances(mask: Tensor) -> Tensor:
    """The distance of each pixel to the nearest white one on the axis where it is farther, (H, W), one by one."""
    rows, columns = torch.nonzero(mask[0, 0], as_tuple=True)
    y, x = (torch.arange(side) for side in mask.shape[2:])
    apart = torch.maximum((y[:, None, None] - rows).abs(), (x[None, :, None] - columns).abs())
    return apart.amin(dim=2)


class TestFeather:
    @hypothesis_settings(max_examples=30)
    @given(seed=st.integers(0, 99), width=st.integers(0, 20), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
    def test_is_1_where_the_mask_is_and_0_from_its_width_on(self, seed: int, width: int, size: tuple[int, int]) -> None:
        mask = drawn_mask(seed, *size)
        mask[0, 0, 0, 0] = 1
        weights, apart = feathered(mask, width)[0, 0], distances(mask)
        assert torch.equal(weights[apart == 0], torch.ones(int((apart == 0).sum())))
        assert bool((weights[apart >= max(width, 1)] == 0).all())
        assert bool((weights[apart < max(width, 1)] > 0).all())

    def test_falls_evenly_beside_a_straight_border(self) -> None:
        mask = torch.zeros(1, 1, 4, 20)
        mask[..., :6] = 1
        weights = feathered(mask, 8)[0, 0, 2]
        assert weights[:6].tolist() == [1] * 6
        falls = weights[5:15].diff()
        assert bool((falls <= 0).all())
        assert falls.min() > -0.2
        assert weights[13:].tolist() == [0] * 7

    @given(seed=st.integers(0, 99), feather=st.integers(0, 9))
    def test_the_picture_is_kept_to_the_bit(self, seed: int, feather: int) -> None:
        mask = drawn_mask(seed, 24, 33)
        images, picture = (torch.rand(n, 3, 24, 33, generator=torch.Generator().manual_seed(n)) for n in (2, 1))
        laid = MaskedPicture(picture, mask, lambda x: x, 1).laid_onto(images, feather)
        far, inside = distances(mask) >= max(feather, 1), mask[0, 0] > 0
        assert torch.equal(laid[:, :, far], picture[:, :, far].expand(2, -1, -1))
        assert torch.equal(laid[:, :, inside], images[:, :, inside])
