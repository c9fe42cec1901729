"""Launches compile the same for every step, and can be compiled for ahead of time."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from cutdiff_kernels import patches, views
from cutdiff_kernels.permutations import SeededPermutation
from uninterpreted import run


def steps(device: str) -> Iterator[None]:
    """Launch the four kernels for steps that differ in all that steps differ in, with numbers of any type.

    Triton knows ints at compile time that are 0, 1 or a multiple of 16.
    """
    flags = torch.zeros(64, dtype=torch.int32, pin_memory=device == "cuda")
    canvas = torch.randn(1, 4, 16, 24, device=device)
    for n, number in enumerate((0, 1, 1.0, 2, 7, 16, 32, 49, 0.5)):
        drawn = SeededPermutation((n**20,), n * 8, "channel")
        mixed = patches.gather_patches(canvas, (2, 2), drawn, c_in=number, copies=2)
        back = {"copies": 2, "guidance_scale": number, "canvas": canvas, "c_skip": number, "c_out": number}
        patches.scatter_patches(mixed, (2, 2), drawn, **back, flag=flags[n : n + 1])
        origins = torch.tensor([[[0, 0], [n % 3, n % 8], [0, 8], [5, 8]]], device=device)
        cuts = views.gather_views(canvas, origins, (16, 16), c_in=number, copies=2)
        views.average_views(cuts, origins, (16, 24), covered=True, **back, flag=flags[n : n + 1])
        yield


def test_a_new_step_compiles_nothing() -> None:
    """Triton keeps a compiled kernel under a key that is the same for every step."""
    result = run("""
import json
from cutdiff_kernels.compile import TARGETS, recorded
from test_kernels_launch import steps
with recorded(TARGETS["sm_90"]) as launches:
    for _ in steps("cpu"):
        print(json.dumps([launch.key for launch in launches]))
        launches.clear()
""")
    assert result.returncode == 0, result.stderr
    first, *others = map(json.loads, result.stdout.splitlines())
    assert len(set(first)) == 4
    assert len(others) == 8
    assert all(keys == first for keys in others)


@pytest.mark.gpu
def test_a_new_step_compiles_nothing_on_a_gpu() -> None:
    def compiled() -> list[int]:
        kernels = (patches.gather_kernel, patches.scatter_kernel, views.gather_kernel, views.average_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    drawn = steps("cuda")
    next(drawn)
    before = compiled()
    assert min(before) > 0
    for _ in drawn:
        assert compiled() == before


def test_every_kernel_compiles_ahead_of_time_and_spills_nothing() -> None:
    """The targets are sm_80, sm_90 and gfx942, without a GPU; spills and local memory give exit status 1."""
    result = run("from cutdiff_kernels.compile import main; raise SystemExit(main([]))")
    assert result.returncode == 0, result.stdout + result.stderr
    for target in ("sm_80", "sm_90", "gfx942"):
        assert target in result.stdout


def test_what_is_compiled_ahead_of_time_is_what_is_launched() -> None:
    """Strides of one are constants, and aligned pointers and sizes that 16 divides are known to be."""
    result = run("""
import torch
from cutdiff_kernels import patches
from cutdiff_kernels.compile import TARGETS, recorded
with recorded(TARGETS["sm_90"]) as launches:
    patches.gather_patches(torch.empty(1, 4, 256, 256), (2, 2), dtype=torch.bfloat16)
    patches.gather_patches(torch.empty(1 + 4 * 256 * 256)[1:].view(1, 4, 256, 256), (2, 2), dtype=torch.bfloat16)
aligned, shifted = (launch.source for launch in launches)
assert list(aligned.signature["strides"]) == ["i32", "i32", "i32", "constexpr"], aligned.signature
canvas, width = ((list(aligned.signature).index(name),) for name in ("canvas", "width"))
assert aligned.attrs[canvas] == aligned.attrs[width] == shifted.attrs[width] == [["tt.divisibility", 16]]
assert not shifted.attrs.get(canvas)
""")
    assert result.returncode == 0, result.stderr
