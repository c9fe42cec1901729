"""The kernels that write the canvas say by a flag that they wrote something that is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cutdiff_kernels import patches, views
from cutdiff_kernels.permutations import SeededPermutation
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # by numpy, which interprets
Write = Callable[..., Tensor]
UNTOUCHED = 7
NAN, INF = float("nan"), float("inf")


def patches_of_three(values: Tensor, **how: object) -> Tensor:
    """Scatter six items of two copies onto (1, 1, 5, 21): 35 positions in a tile of 64, three patches of four."""
    return patches.scatter_patches(values, (1, 3), SeededPermutation((5,), 2, "channel"), copies=2, **how)


def three_views(values: Tensor, **how: object) -> Tensor:
    """Average six items of two copies, of which the second reaches past the canvas (1, 1, 5, 9)."""
    origins = torch.tensor([[[0, 0], [1, 4], [0, 2]]], device=values.device)
    return views.average_views(values, origins, (5, 9), copies=2, covered=True, **how)


@pytest.fixture(params=[patches_of_three, three_views])
def write(request: pytest.FixtureRequest) -> Write:
    return request.param


def flagged(write: Write, values: Tensor, **how: object) -> int:
    flag = torch.tensor([UNTOUCHED], dtype=torch.int32, device=values.device)
    plain = write(values, **how)
    out = write(values, flag=flag, **how)
    assert torch.equal(out.view(torch.int32), plain.view(torch.int32)), "a flag changes nothing that is written"
    assert (flag.item() == 1) == (not out.isfinite().all())
    return int(flag)


def test_finite_values_leave_the_flag_alone(device: str, write: Write) -> None:
    values = torch.full((6, 1, 5, 7), torch.finfo(torch.float32).max / 4, device=device)
    assert flagged(write, values) == UNTOUCHED
    assert flagged(write, values, canvas=write(values), c_skip=-1.0, c_out=2.0) == UNTOUCHED


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("item", [0, 3, 5])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (3, 4)])
def test_one_value_that_is_not_finite_sets_the_flag(
    device: str, write: Write, wrong: float, item: int, place: tuple[int, int]
) -> None:
    """It does in the first and the last item, and in either copy."""
    values = torch.ones(6, 1, 5, 7, device=device)
    values[item, 0, *place] = wrong
    assert flagged(write, values, guidance_scale=2.0) == 1


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_a_canvas_that_is_not_finite_sets_the_flag(device: str, write: Write, wrong: float) -> None:
    values = torch.ones(6, 1, 5, 7, device=device)
    canvas = torch.ones_like(write(values))
    canvas[0, 0, -1, -1] = wrong
    assert flagged(write, values, canvas=canvas, c_skip=1.0) == 1


def test_a_value_that_overflows_on_the_way_to_the_canvas_sets_the_flag(device: str, write: Write) -> None:
    values = torch.full((6, 1, 5, 7), 1e30, device=device)
    canvas = torch.ones_like(write(values))
    assert flagged(write, values, canvas=canvas, c_skip=1.0, c_out=1e8) == UNTOUCHED
    assert flagged(write, values, canvas=canvas, c_skip=1.0, c_out=1e9) == 1


def test_what_is_not_written_sets_no_flag(device: str) -> None:
    """Neither a view's part outside of the canvas counts, nor the lanes past the last patch, position and pixel."""
    values = torch.ones(6, 1, 5, 7, device=device)
    values[2:4, :, 4:] = NAN
    values[2:4, :, :, 5:] = INF
    assert flagged(three_views, values) == UNTOUCHED
    around = torch.full((64, 1, 5, 7), NAN, device=device)
    around[16:22] = 1
    assert flagged(patches_of_three, around[16:22]) == UNTOUCHED


def test_a_flag_is_one_int32(device: str, write: Write) -> None:
    for flag in (torch.zeros(1), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"a flag is .*: pass one int32"):
            write(torch.ones(6, 1, 5, 7, device=device), flag=flag)


@pytest.mark.gpu
def test_a_flag_in_pinned_memory_is_read_without_a_copy(write: Write) -> None:
    """Any one of several flags, aligned to four bytes, serves, and the kernel is not compiled for each."""
    flags = torch.zeros(5, dtype=torch.int32, pin_memory=True)
    values = torch.ones(6, 1, 5, 7, device="cuda")
    values[0] = NAN
    kernel = patches.scatter_kernel if write is patches_of_three else views.average_kernel
    compiled = set()
    for n in (0, 1, 4):
        write(values, flag=flags[n : n + 1])
        compiled.add(len(kernel.device_caches[torch.cuda.current_device()][0]))
    torch.cuda.synchronize()
    assert flags.tolist() == [1, 1, 0, 0, 1]
    assert len(compiled) == 1
