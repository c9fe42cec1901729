"""The kernels are right at their edges: masks, ties, the order of copies, and addresses past 2³¹ elements.

The same checks fail, by an assertion and not by a crash, for the kernels' own code with one error in it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton.language as tl
from cutdiff_kernels import patches, permutations, reference, views
from cutdiff_kernels.permutations import Permutation, SeededPermutation
from layouts import poisoned
from torch import Tensor
from triton import knobs

GRID = (1, 3)
PAIR = {"copies": 2, "guidance_scale": 0.25}
ORIGINS = torch.tensor([[[-1, 0], [0, -1], [0, 8], [1, 9]], [[0, -2], [0, 9], [2, 3], [0, 8]]])
"""Origins of windows of 5×13 on 5×21 pixels, for two images: some reach past the canvas, some overlap."""
MAP_NORESERVE = 0x4000  # of Linux: what is mapped takes memory where it is written


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if not knobs.runtime.interpret:
        pytest.skip("compiled in this process: kernels with errors in them are for the interpreter alone")


def framed(values: Tensor) -> Tensor:
    """The same values, with NaN before and behind them."""
    frame = 512
    around = poisoned(frame + values.numel() + frame, dtype=values.dtype, device="cpu")
    return around[frame:-frame].view(values.shape).copy_(values)


def assert_written(expected: Tensor, write: Callable[..., Tensor]) -> None:
    """Assert that `write` fills its output with what is expected, and nothing beside it."""
    out = framed(torch.full_like(expected, float("nan")))
    write(out=out)
    assert torch.equal(out, expected)
    around = out.as_strided((out.storage_offset() * 2 + out.numel(),), (1,), 0)
    assert around.isnan().sum() == len(around) - out.numel()


def numbers(*shape: int) -> Tensor:
    """Numbers that are alike nowhere, so small that their sums and halves are exact."""
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def check_patches(module: ModuleType, source: str) -> None:
    """Check three patches, padded to four, of 35 positions in a tile of 64, with a guidance pair."""
    index = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).argsort(0)
    drawn = SeededPermutation((1, 2), 0, "channel")
    permutation: Permutation = {"none": None, "index": index}.get(source, drawn)
    canvas = framed(numbers(2, 2, 5, 21))
    expected = reference.gather_patches(canvas, GRID, permutation, copies=2)
    assert_written(expected, partial(module.gather_patches, canvas, GRID, permutation, copies=2))
    values = framed(4 * numbers(12, 2, 5, 7).flip(0))
    expected = reference.scatter_patches(values, GRID, permutation, **PAIR)
    assert_written(expected, partial(module.scatter_patches, values, GRID, permutation, **PAIR))


def check_views(module: ModuleType, source: str) -> None:
    """Check windows at `ORIGINS` in tiles of 8×32 pixels, with a guidance pair."""
    canvas = framed(numbers(2, 2, 5, 21))
    expected = reference.gather_views(canvas, ORIGINS, (5, 13), copies=2)
    assert_written(expected, partial(module.gather_views, canvas, ORIGINS, (5, 13), copies=2))
    values = framed(4 * numbers(16, 2, 5, 13).flip(0))
    weights = framed(1 + numbers(5, 13)) if source == "weighted" else None
    expected = reference.average_views(values, ORIGINS, (5, 21), weights=weights, **PAIR)
    assert_written(expected, partial(module.average_views, values, ORIGINS, (5, 21), weights=weights, **PAIR))


def check_ties(module: ModuleType, source: str) -> None:
    """Check that kernels which draw one or four distinct words rank ties by the patches' numbers."""
    grid, (mask, grain) = (3, 2) if source.startswith("6") else (3, 5), source.split()
    drawn, canvas = SeededPermutation((3, 5), 7, grain), numbers(2, 2, grid[0] * 5, grid[1] * 3)
    with pytest.MonkeyPatch.context() as patch:
        for owner in (tl, permutations):
            philox = owner.philox
            patch.setattr(
                owner, "philox", lambda *args, philox=philox: tuple(word & int(mask) for word in philox(*args))
            )
        mixed = module.gather_patches(canvas, grid, drawn)
        assert torch.equal(mixed, reference.gather_patches(canvas, grid, drawn))
        assert torch.equal(module.scatter_patches(mixed, grid, drawn), canvas)


def far(values: Tensor, dim: int) -> Tensor:
    """The same values, those along `dim` so far apart that the last one lies 2³¹ elements behind the first one.

    An address that wraps around in 32 bits lies before the first one, in memory that is mapped too and holds zeros.
    """
    stride = math.ceil(2**31 / (values.shape[dim] - 1))
    around = mmap.mmap(
        -1, (2**32 + 2**20) * values.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    strides = list(torch.empty_like(values.select(dim, 0)).contiguous().stride())
    strides.insert(dim, stride)
    memory = torch.frombuffer(around, dtype=values.dtype)
    return memory.as_strided(values.shape, strides, 2**31 + 2**10).copy_(values)


def check_far(module: ModuleType, source: str) -> None:
    """Check the tensors that a kernel reads, far apart along each axis in turn."""
    what, dim = source.split()
    canvas, cuts, wide = 1 + numbers(3, 3, 5, 9), 1 + numbers(9, 3, 5, 3), 1 + numbers(9, 3, 5, 7)
    index = torch.rand(3, 3, 3, 5, 3, generator=torch.Generator().manual_seed(0)).argsort(1)
    origins = torch.tensor([[0, 0], [0, 1], [0, 2]]).expand(3, 3, 2)
    near = {"canvas": canvas, "cuts": cuts, "wide": wide, "index": index}
    given = near | {what: far(near[what], int(dim))}
    base = {"canvas": given["canvas"], "c_skip": 2.0}
    if hasattr(module, "gather_patches"):
        gathered = reference.gather_patches(canvas, GRID, index)
        assert torch.equal(module.gather_patches(given["canvas"], GRID, given["index"]), gathered)
        scattered = reference.scatter_patches(cuts, GRID, index, canvas=canvas, c_skip=2.0)
        assert torch.equal(module.scatter_patches(given["cuts"], GRID, given["index"], **base), scattered)
    else:
        gathered = reference.gather_views(canvas, origins, (5, 7))
        assert torch.equal(module.gather_views(given["canvas"], origins, (5, 7)), gathered)
        averaged = reference.average_views(wide, origins, (5, 9), canvas=canvas, c_skip=2.0)
        assert torch.equal(module.average_views(given["wide"], origins, (5, 9), **base), averaged)


CANVAS = tuple(f"canvas {dim}" for dim in range(4))
FAR_PATCHES = (*CANVAS, *(f"cuts {dim}" for dim in range(4)), *(f"index {dim}" for dim in range(5)))
FAR_VIEWS = (*CANVAS, *(f"wide {dim}" for dim in range(4)))
CHECKS = [
    (patches, check_patches, ("none", "channel", "index")),
    (patches, check_ties, ("0 channel", "6 channel", "6 pixel")),
    (patches, check_far, FAR_PATCHES),
    (views, check_views, ("alike", "weighted")),
    (views, check_far, FAR_VIEWS),
]


def check_all(module: ModuleType, changed: ModuleType) -> None:
    for of, check, sources in CHECKS:
        for source in sources if of is module else ():
            check(changed, source)


@pytest.mark.parametrize(
    ("module", "check", "source"), [(module, check, source) for module, check, all_of in CHECKS for source in all_of]
)
def test_kernels_are_right_at_their_edges(module: ModuleType, check: Callable[..., None], source: str) -> None:
    check(module, source)


MUTANTS = [
    (patches, "inside = position < positions", "inside = position < positions - 1"),
    (patches, "inside = position < positions", "inside = position <= positions"),
    (patches, "(patch < NUM_PATCHES)[None, :]", "(patch < NUM_PATCHES - 1)[None, :]"),
    (patches, "(patch < NUM_PATCHES)[None, :]", "(patch <= NUM_PATCHES)[None, :]"),
    (patches, "* PADDED + patch", "* PADDED"),
    (patches, "* PADDED + patch", "* PADDED - patch"),
    (patches, "1 << 32", "0"),
    (patches, "keys[:, None, :] < keys[:, :, None]", "keys[:, None, :] <= keys[:, :, None]"),
    (patches, "guidance_scale * (positive - combined)", "guidance_scale * (combined - positive)"),
    (patches, "combined + guidance_scale * (positive - combined)", "positive + guidance_scale * (combined - positive)"),
    (patches, "+ patch) * COPIES + copy", "+ patch) + copy * NUM_PATCHES"),
    (patches, "source + stride_n", "source"),
    (views, "(y < window[0]) & (x < window[1])", "(y < window[0] - 1) & (x < window[1])"),
    (views, "(y < window[0]) & (x < window[1])", "(y < window[0]) & (x <= window[1])"),
    (views, "(row >= 0) & (row < size[0])", "(row >= 0) & (row <= size[0])"),
    (views, "(row >= 0) & (row < size[0])", "(row >= -1) & (row < size[0])"),
    (views, "(column >= 0) & (column < size[1])", "(column > 0) & (column < size[1])"),
    (views, "(column >= 0) & (column < size[1])", "(column >= 0) & (column < size[1] - 1)"),
    (views, "(y < size[0]) & (x < size[1])", "(y <= size[0]) & (x < size[1])"),
    (views, "(y < size[0]) & (x < size[1])", "(y < size[0]) & (x <= size[1])"),
    (views, "(y >= top) & (y < below)", "(y > top) & (y < below)"),
    (views, "(y >= top) & (y < below)", "(y >= top) & (y <= below)"),
    (views, "(x >= left) & (x < right)", "(x >= left - 1) & (x < right)"),
    (views, "(x >= left) & (x < right)", "(x >= left) & (x < right - 1)"),
    (views, "tl.where(inside, share, 1.0)", "tl.where(inside, 2.0, 1.0)"),
    (views, "share += weight", "share += 1.0"),
    (views, "share += covered.to(tl.float32)", "share += 1.0"),
    (views, "guidance_scale * (positive - combined)", "guidance_scale * (combined - positive)"),
    (views, "* COPIES + copy)", "+ copy * num_views)"),
    (views, "source + stride_n", "source"),
]


def without_casts(module: ModuleType) -> list[tuple[ModuleType, str, str]]:
    """Leave out every cast to int64 in turn, but those of an output, for which the interpreter takes too long."""
    mutants = []
    for line in Path(str(module.__file__)).read_text(encoding="utf-8").splitlines():
        head, *others = line.split(".to(tl.int64)")
        if "first" not in line and "out +" not in line and "+ copy" not in line and "words" not in line:
            for n in range(len(others)):
                wrong = head + "".join(("" if n == k else ".to(tl.int64)") + other for k, other in enumerate(others))
                mutants.append((module, line, wrong))
    return mutants


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in (scalar multiply|divide)")
@pytest.mark.parametrize(("module", "right", "wrong"), MUTANTS + without_casts(patches) + without_casts(views))
def test_an_error_is_caught(tmp_path: Path, module: ModuleType, right: str, wrong: str) -> None:
    code = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert right in code
    file = tmp_path / "changed.py"
    file.write_text(code.replace(right, wrong), encoding="utf-8")
    spec = spec_from_file_location("changed", file)
    assert spec is not None
    assert spec.loader is not None
    changed = module_from_spec(spec)
    spec.loader.exec_module(changed)
    with pytest.raises(AssertionError):
        check_all(module, changed)
