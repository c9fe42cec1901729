"""Compare the Triton kernels with their references, under Triton's interpreter, and with -m gpu on a device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from cutdiff_kernels import bench, patches, permutations, reference, views
from cutdiff_kernels.permutations import Permutation, SeededPermutation
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, few, laid_out, poisoned
from tiny import on
from torch import Tensor
from triton import knobs
from uninterpreted import run

import cutdiff
from cutdiff.bench.parity import full_precision
from cutdiff.checkpoint.model import Model
from cutdiff.sampling import operators as dispatch
from cutdiff.sampling.operators import Patches, Views

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A gather or scatter of patches of `shape` (B, C, h, w) on `grid`, with its options."""

    shape: tuple[int, int, int, int]
    grid: tuple[int, int]
    layout: str
    canvas_dtype: torch.dtype
    dtype: torch.dtype
    copies: int
    permutation: Permutation
    seed: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def canvas_shape(self) -> tuple[int, int, int, int]:
        b, c, h, w = self.shape
        return b, c, h * self.grid[0], w * self.grid[1]

    def random(self, shape: tuple[int, ...], device: str) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(device)

    def canvas(self, device: str) -> Tensor:
        return laid_out(self.random(self.canvas_shape, device).to(self.canvas_dtype), self.layout)

    def values(self, device: str) -> Tensor:
        b, c, h, w = self.shape
        shape = (b * self.num_patches * self.copies, c, h, w)
        return laid_out(self.random(shape, device).to(self.dtype), self.layout)

    def permutation_on(self, device: str) -> Permutation:
        return self.permutation.to(device) if isinstance(self.permutation, Tensor) else self.permutation


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw grids of 1×1 to 8×8, sizes that no block divides, and every layout, dtype and source of permutations."""
    grid = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    side = 9 if grid[0] * grid[1] <= 16 else 4
    b, c = draw(st.integers(1, 2)), draw(st.integers(1, 4 if side == 9 else 2))
    shape = (b, c, draw(st.integers(1, side)), draw(st.integers(1, side)))
    seed, n = draw(st.integers(0, 2**32 - 1)), grid[0] * grid[1]
    source = draw(st.sampled_from(["none", "channel", "pixel", "index", "index for each image"]))
    permutation = None
    if source in ("channel", "pixel"):
        seeds = draw(st.lists(st.integers(0, 2**64 - 1), min_size=b, max_size=b))
        permutation = SeededPermutation(tuple(seeds), draw(st.sampled_from([0, 1, 16, 49, 999])), source)
    elif source != "none":
        images = (b,) if source == "index for each image" else ()
        keys = torch.rand(
            *images, n, draw(st.sampled_from([1, c])), *shape[2:], generator=torch.Generator().manual_seed(seed)
        )
        permutation = keys.argsort(dim=-4)
    return Case(
        shape,
        grid,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([1, 2])),
        permutation,
        seed,
    )


def assert_copied(kernel: Tensor, expected: Tensor, *, rounded: bool) -> None:
    """Assert equality to the bit, or to the last place where Triton's interpreter cuts instead of rounding bfloat16."""
    assert kernel.dtype == expected.dtype
    if rounded and kernel.dtype == torch.bfloat16 and knobs.runtime.interpret:
        kernel, expected = kernel.view(torch.int16).int(), expected.view(torch.int16).int()
        assert (kernel - expected).abs().max() <= 1
    else:
        assert torch.equal(kernel, expected)


def assert_as_exact(kernel: Tensor, same_precision: Tensor, truth: Tensor) -> None:
    """Assert that a kernel is within twice the error of torch in the same precision, against float64."""
    assert kernel.isfinite().all()
    bound = 2 * (same_precision.double() - truth).abs().max() + 1e-9
    assert (kernel.double() - truth).abs().max() <= bound


@few
@given(case=cases(), c_in=st.sampled_from([1.0, 0.37]))
def test_gathered_patches_are_those_of_the_reference(device: str, case: Case, c_in: float) -> None:
    canvas, permutation = case.canvas(device), case.permutation_on(device)
    how = {"c_in": c_in, "dtype": case.dtype, "copies": case.copies}
    out = poisoned(*case.values(device).shape, dtype=case.dtype, device=device)
    patches.gather_patches(canvas, case.grid, permutation, **how, out=out)
    expected = reference.gather_patches(canvas, case.grid, permutation, **how)
    assert_copied(out, expected, rounded=c_in != 1 or case.dtype != case.canvas_dtype)


@few
@given(case=cases(), guidance_scale=st.sampled_from([0.0, 1.0, 7.5]), on_canvas=st.booleans())
def test_scattered_patches_are_those_of_the_reference(
    device: str, case: Case, guidance_scale: float, on_canvas: bool
) -> None:
    values, canvas, permutation = case.values(device), case.canvas(device), case.permutation_on(device)

    def how(dtype: torch.dtype) -> dict:
        base = {"canvas": canvas.to(dtype), "c_skip": 0.3, "c_out": -1.7} if on_canvas else {}
        return {"copies": case.copies, "guidance_scale": guidance_scale, **base}

    out = poisoned(*case.canvas_shape, dtype=torch.float32, device=device)
    patches.scatter_patches(values, case.grid, permutation, **how(case.canvas_dtype), out=out)
    expected = reference.scatter_patches(values, case.grid, permutation, **how(case.canvas_dtype))
    truth = reference.scatter_patches(values.double(), case.grid, permutation, **how(torch.float64))
    assert_as_exact(out, expected, truth)
    if case.copies == 1 and not on_canvas:
        assert torch.equal(out, expected)


@few
@given(case=cases())
def test_scatter_undoes_gather_to_the_bit(device: str, case: Case) -> None:
    canvas, permutation = case.canvas(device), case.permutation_on(device)
    mixed = patches.gather_patches(canvas, case.grid, permutation, copies=case.copies)
    assert torch.equal(patches.scatter_patches(mixed, case.grid, permutation, copies=case.copies), canvas.float())


@pytest.mark.parametrize("grain", ["channel", "pixel"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (5, 7), (8, 8)])
def test_kernels_draw_the_permutations_of_the_cpu_reference(device: str, grid: tuple[int, int], grain: str) -> None:
    """A gather of the patches' own numbers gives the index."""
    n, shape = grid[0] * grid[1], (3, 5, 3)
    drawn = SeededPermutation((2**40 + 7, 2**64 - 3), 31, grain)
    numbers = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, *shape).repeat(2, 1, 1, 1)
    canvas = reference.relocate(numbers, grid).to(device)
    arrived = patches.gather_patches(canvas, grid, drawn)
    expected = permutations.permutation_index(drawn, n, shape).expand(2, n, *shape).flatten(0, 1)
    assert torch.equal(arrived.cpu().long(), expected)


@triton.jit
def philox_kernel(out, seed, c0, c1, c2, c3):
    zero = tl.zeros((1,), tl.int32)
    words = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero + c3)
    tl.store(out + tl.arange(0, 4), tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3])).reshape(4))


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (-1, -1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3 - 2**32, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_in_a_kernel_gives_the_known_answers_of_random123(
    device: str, seed: int, counter: tuple[int, int, int, int], expected: tuple[int, ...]
) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=device)
    philox_kernel[(1,)](out, seed, *counter)
    assert tuple(word & 0xFFFFFFFF for word in out.tolist()) == expected


@dataclass(frozen=True)
class ViewCase:
    origins: Tensor
    window: tuple[int, int]
    size: tuple[int, int]
    channels: int
    layout: str
    dtype: torch.dtype
    copies: int
    weighted: bool
    seed: int

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def canvas(self, device: str) -> Tensor:
        return laid_out(self.random(len(self.origins), self.channels, *self.size).to(device), self.layout)

    def values(self, device: str) -> Tensor:
        items = self.origins.shape[0] * self.origins.shape[1] * self.copies
        return laid_out(self.random(items, self.channels, *self.window).to(device, self.dtype), self.layout)


@st.composite
def view_cases(draw: st.DrawFn) -> ViewCase:
    """Draw views that cover the canvas and may reach past it, one set for each image."""
    axes = []
    for _ in range(2):
        window = draw(st.integers(1, 12))
        axes.append((draw(st.integers(window, 3 * window)), window, draw(st.integers((window + 2) // 3, window))))
    size, window, stride = (tuple(values) for values in zip(*axes, strict=True))
    jitter = tuple((w - s) // 4 for w, s in zip(window, stride, strict=True))
    draws = cutdiff.Draws(tuple(range(draw(st.integers(1, 2)))))
    return ViewCase(
        draws.view_origins(draw(st.integers(0, 9)), size, window, stride, jitter),
        window,
        size,
        draw(st.integers(1, 3)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([1, 2])),
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


@few
@given(case=view_cases(), c_in=st.sampled_from([1.0, 0.37]))
def test_gathered_views_are_those_of_the_reference(device: str, case: ViewCase, c_in: float) -> None:
    canvas = case.canvas(device)
    how = {"c_in": c_in, "dtype": case.dtype, "copies": case.copies}
    out = poisoned(*case.values(device).shape, dtype=case.dtype, device=device)
    views.gather_views(canvas, case.origins.to(device), case.window, **how, out=out)
    expected = reference.gather_views(canvas, case.origins, case.window, **how)
    assert_copied(out, expected, rounded=c_in != 1 or case.dtype != torch.float32)


@few
@given(case=view_cases(), guidance_scale=st.sampled_from([1.0, 7.5]), on_canvas=st.booleans())
def test_averaged_views_are_those_of_the_reference(
    device: str, case: ViewCase, guidance_scale: float, on_canvas: bool
) -> None:
    values, canvas = case.values(device), case.canvas(device)
    weights = case.random(*case.window).abs().add(0.1).to(device) if case.weighted else None

    def how(dtype: torch.dtype) -> dict:
        base = {"canvas": canvas.to(dtype), "c_skip": 0.3, "c_out": -1.7} if on_canvas else {}
        return {"weights": weights, "copies": case.copies, "guidance_scale": guidance_scale, **base}

    out = poisoned(*canvas.shape, dtype=torch.float32, device=device)
    views.average_views(values, case.origins.to(device), case.size, **how(torch.float32), out=out)
    expected = reference.average_views(values, case.origins, case.size, **how(torch.float32))
    truth = reference.average_views(values.double(), case.origins, case.size, **how(torch.float64))
    assert_as_exact(out, expected, truth)
    again = views.average_views(values, case.origins.to(device), case.size, **how(torch.float32))
    assert torch.equal(out, again), "no run differs from another"


@pytest.mark.parametrize(("size", "window"), [((5, 300), (4, 200)), ((40, 150), (30, 140)), ((3, 2), (3, 2))])
def test_views_wider_than_a_tile(device: str, size: tuple[int, int], window: tuple[int, int]) -> None:
    origins = cutdiff.Draws((1, 2)).view_origins(0, size, window, (2, 33) if size != window else window, (0, 9))
    canvas = torch.randn(2, 1, *size, device=device)
    cuts = views.gather_views(canvas, origins.to(device), window)
    assert torch.equal(cuts, reference.gather_views(canvas, origins, window))
    torch.testing.assert_close(views.average_views(cuts, origins.to(device), size), canvas)


@pytest.mark.parametrize(("grid", "side"), [((1, 1), 25), ((2, 2), 13), ((3, 3), 7), ((8, 8), 5)])
def test_patches_of_more_positions_than_a_tile(device: str, grid: tuple[int, int], side: int) -> None:
    canvas = torch.randn(1, 2, grid[0] * side, grid[1] * side, device=device)
    drawn = SeededPermutation((3,), 5, "channel")
    mixed = patches.gather_patches(canvas, grid, drawn)
    assert torch.equal(mixed, reference.gather_patches(canvas, grid, drawn))
    assert torch.equal(patches.scatter_patches(mixed, grid, drawn), canvas)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["patches", "views"])
def test_more_elements_than_32_bits_count(operator: str) -> None:
    """Values come back from both copies of a canvas of 2³¹ elements and more, to the last one: 26 GB in all."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of free memory on the GPU")
    side = 20736
    canvas = torch.empty(1, 5, side, side, dtype=torch.bfloat16, device="cuda").normal_()
    assert canvas.numel() > 2**31
    if operator == "patches":
        drawn = SeededPermutation((1,), 2, "channel")
        back = patches.scatter_patches(patches.gather_patches(canvas, (2, 2), drawn, copies=2), (2, 2), drawn, copies=2)
    else:
        origins = torch.zeros(1, 1, 2, dtype=torch.int64, device="cuda")
        cuts = views.gather_views(canvas, origins, (side, side), copies=2)
        back = views.average_views(cuts, origins, (side, side), copies=2)
    assert all(torch.equal(back[:, channel], canvas[:, channel].float()) for channel in range(5))


def test_what_lies_outside_the_canvas_is_never_read(device: str) -> None:
    """The average of views is one where their parts outside of the canvas are NaN and the others ones."""
    values = torch.full((2, 1, 5, 5), float("nan"), device=device)
    values[0, :, 2:, 2:] = 1
    values[1, :, :4, :4] = 1
    out = views.average_views(values, torch.tensor([[[-2, -2], [0, 0]]], device=device), (4, 4))
    assert torch.equal(out, torch.ones(1, 1, 4, 4, device=device))


def test_an_uncovered_pixel_is_an_error_before_the_launch(device: str) -> None:
    out = poisoned(1, 1, 4, 4, dtype=torch.float32, device=device)
    origins = torch.tensor([[[0, 0], [2, 2]]], device=device)
    with pytest.raises(ValueError, match="uncovered"):
        views.average_views(torch.ones(2, 1, 2, 2, device=device), origins, (4, 4), out=out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: patches.gather_patches(x, (3, 1)), "does not divide"),
        (lambda x: patches.gather_patches(x.expand(1, 1, 144, 144), (12, 12)), "up to 64"),
        (lambda x: patches.scatter_patches(x.expand(3, 1, 8, 8), (2, 2)), "no whole number"),
        (
            lambda x: patches.gather_patches(x, (2, 2), SeededPermutation((1, 2), 0, "channel")),
            "2 seeds .* do not fit 1 images",
        ),
        (lambda x: patches.scatter_patches(x.expand(12, 1, 8, 8), (2, 2), copies=3), "copies=3 cannot be joined"),
        (
            lambda x: patches.scatter_patches(x.expand(8, 1, 8, 8), (2, 2), canvas=torch.zeros(1, 1, 16, 16)),
            "does not fit a",
        ),
        (lambda x: patches.gather_patches(x.double(), (2, 2)), "for float64 take"),
        (lambda x: patches.gather_patches(x.clone().requires_grad_(), (2, 2)), "for gradients take"),
        (
            lambda x: views.gather_views(x.expand(2, 1, 8, 8), torch.zeros(1, 1, 2, dtype=torch.int64), (4, 4)),
            "fit 2 images",
        ),
        (lambda x: patches.gather_patches(x, (2, 2), torch.zeros(4, 1, 3, 4, dtype=torch.int64)), "does not fit 4"),
        (lambda x: patches.gather_patches(x, (2, 2), out=x), "needed is a contiguous"),
        (lambda x: views.average_views(x, torch.zeros(1, 2, 2, dtype=torch.int64), (8, 8)), "do not fit origins"),
        (
            lambda x: views.average_views(x, torch.zeros(1, 1, 2, dtype=torch.int64), (8, 8), weights=torch.ones(2, 2)),
            "weights of",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(device: str, call: Callable[[Tensor], Tensor], message: str) -> None:
    size = (1, 1, 144, 144) if "64" in message else (1, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(size, device=device))


@pytest.mark.parametrize("method", ["direct", "multidiffusion", "cutdiffusion"])
def test_a_run_on_kernels_is_the_run_on_references(device: str, tiny_model: Model, method: str) -> None:
    """A run of odd sizes, two pictures and guidance takes every operator through the dispatch."""
    options = {"height": 104, "width": 136, "num_steps": 4, "method": method, "view_batch_size": 5}
    model = on(device, tiny_model)
    with full_precision():
        runs = [
            [step.latents for step in cutdiff.denoise(model, ["a red house", "a tree"], backend=backend, **options)][-1]
            for backend in ("triton", "reference")
        ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_embedded_model_draws_the_same_on_a_gpu_and_a_cpu() -> None:
    """The final latents of a whole CutDiffusion run in float32 are within 1e-3, relative."""
    latents = {}
    with full_precision():
        for device in ("cpu", "cuda"):
            steps = cutdiff.denoise(cutdiff.load(device=device), "a red house over a meadow at day", num_steps=20)
            latents[device] = list(steps)[-1].latents.cpu()
    error = torch.linalg.norm(latents["cuda"] - latents["cpu"]) / torch.linalg.norm(latents["cpu"])
    assert error <= 1e-3


def test_the_bench_times_what_is_here_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code = (
        f"from cutdiff_kernels.bench import main; raise SystemExit(main(['--sizes', '2048', '--json', {str(file)!r}]))"
    )
    result = run(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "no GPU here: the references were timed, no kernel" in result.stdout
    report = json.loads(file.read_text())
    assert report["hardware"]["torch"] == torch.__version__
    assert report["copy_bytes_per_s"] is None
    assert {row["name"] for row in report["rows"]} >= {"gather patches", "scatter patches", "structure step"}
    assert all(row["reference_us"] > 0 and row["kernel_us"] is None for row in report["rows"])
    assert report["draw"]["published_s"] > 10 * report["draw"]["reference_s"], "20 and more where nothing else runs"


def test_the_bench_shows_no_time_of_a_kernel_that_differs() -> None:
    inputs = bench.Inputs(2048, torch.device("cpu"))
    wrong = bench.Operation("wrong", 1, lambda i: (torch.zeros(3),), lambda i: (torch.tensor([0, float("nan"), 0]),))
    row = bench.measure(wrong, inputs, None)
    assert row.failed == "differs from its reference in 1 of 3 places"
    assert row.kernel_us is None
    assert row.reference_us is None


def test_without_triton_the_cpu_still_draws() -> None:
    """Triton is not imported where it is not used, because macOS has none."""
    code = """
import sys
sys.modules["triton"] = None
import cutdiff
steps = list(cutdiff.denoise(cutdiff.load(), "a red house", num_steps=2))
assert steps[-1].latents.isfinite().all()
assert "cutdiff_kernels.patches" not in sys.modules
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_triton_backend_says_so_where_it_cannot_run() -> None:
    code = "import torch, cutdiff; next(iter(cutdiff.denoise(cutdiff.load(), 'a red house', backend='triton')))"
    result = run(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "backend='triton' does not run on cpu" in result.stderr.splitlines()[-1]


@few
@given(case=cases())
def test_patches_are_the_same_on_either_backend(device: str, case: Case) -> None:
    canvas = case.canvas(device)
    operator = Patches(case.grid, case.permutation)
    mixed = operator.gather(canvas, "reference")
    assert torch.equal(operator.gather(canvas, "triton"), mixed)
    assert torch.equal(operator.scatter(mixed, "triton"), operator.scatter(mixed, "reference"))


@few
@given(case=view_cases())
def test_views_are_the_same_on_either_backend(device: str, case: ViewCase) -> None:
    canvas = case.canvas(device)
    weights = case.random(*case.window).abs().add(0.1) if case.weighted else None
    operator = Views(case.origins, case.window, case.size, weights, device)
    cuts = operator.gather(canvas, "reference")
    assert torch.equal(operator.gather(canvas, "triton"), cuts)
    torch.testing.assert_close(operator.scatter(cuts, "triton"), operator.scatter(cuts, "reference"))
    torch.testing.assert_close(operator.scatter(cuts, "triton"), canvas.float())


def test_one_set_of_origins_serves_all_images(device: str) -> None:
    origins = torch.tensor([[0, 0], [0, 2]]).expand(2, 2, 2)
    canvas = torch.randn(2, 3, 4, 6, device=device)
    operator = Views(origins, (4, 4), (4, 6), device=device)
    assert torch.equal(operator.scatter(operator.gather(canvas, "triton"), "triton"), canvas)


def test_auto_is_triton_on_a_gpu_alone() -> None:
    def chosen(backend: str, device: str) -> str:
        return dispatch._kernels("views", backend, SimpleNamespace(device=torch.device(device))).__name__

    assert chosen("auto", "cuda") == "cutdiff_kernels.views"
    assert chosen("triton", "cpu") == "cutdiff_kernels.views"
    assert chosen("auto", "cpu") == chosen("reference", "cuda") == "cutdiff_kernels.reference"
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, triton, reference"):
        chosen("cuda", "cuda")


def test_views_check_cover_and_weights_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="uncovered"):
        Views(torch.tensor([[[0, 0]]]), (2, 2), (4, 4))
    with pytest.raises(ValueError, match="positive"):
        Views(torch.tensor([[[0, 0]]]), (2, 2), (2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
