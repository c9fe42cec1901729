"""Time every kernel beside what it replaces: `python -m cutdiff_kernels.bench [--json FILE]`.

It takes the latents of SDXL pictures of 2048², 3072² and 4096² px, in bfloat16 with a guidance pair. A kernel is timed
in a CUDA graph over more input sets than the L2 cache can hold; "launched" is its time called from Python. Beside it
stand the plain-torch reference, torch.compile of it (not for the average, a loop over up to 49 views, which takes more
than five minutes to compile), and the published approach, which draws the permutation by `torch.randperm` on the host
and gathers with index tensors. Every kernel is first compared with its reference: one that differs is shown without a
time, and the exit status is 1. On a CPU only the references are timed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cutdiff_kernels import reference
from cutdiff_kernels.geometry import grid_for, view_grid
from cutdiff_kernels.lines import Lines, add_lines
from cutdiff_kernels.permutations import Permutation, SeededPermutation, permutation_index
from cutdiff_kernels.timing import Call, cache_bytes, copy_rate, graph_seconds, hardware, host_seconds, launches

SIZES = (2048, 3072, 4096)
FACTOR, CHANNELS, WINDOW, STRIDE = 8, 4, 128, 64
"""SDXL's pixels per latent, latent channels and native size, and CutDiffusion's stride between views."""
C_IN, GUIDANCE, C_SKIP, C_OUT, RATIO = 0.2, 7.5, 1.0, -4.9, 0.9
"""The coefficients of a step; any would do."""
NETWORK_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Operation:
    """One operator at one size, in every way that it can be computed."""

    name: str
    bytes: int
    """The fewest bytes that it must move: every input read once, every output written once."""
    reference: Call
    kernel: Call | None = None
    compiled: Call | None = None
    published: Call | None = None


@dataclass(frozen=True)
class Row:
    """The measurements of an operation, times in microseconds, None where they were not taken."""

    size: int
    name: str
    bytes: int
    kernel_us: float | None = None
    """The time on the device, in a CUDA graph."""
    share_of_copy: float | None = None
    """The bandwidth as a share of that of a large copy."""
    launched_us: float | None = None
    """The time called from Python, which is bound by the launch where it is more than `kernel_us`."""
    launches: int | None = None
    reference_us: float | None = None
    compiled_us: float | None = None
    published_us: float | None = None
    failed: str = ""


class Inputs:
    """`count` sets of a step's tensors at one picture size, and the operations on them."""

    def __init__(self, pixels: int, device: torch.device, dtype: torch.dtype = NETWORK_DTYPE) -> None:
        self.dtype = dtype
        """The dtype of the network."""
        self.latents = pixels // FACTOR
        self.size = (self.latents, self.latents)
        self.grid = grid_for(self.size, WINDOW)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch = self.latents // self.grid[0]
        self.host_origins = view_grid(self.size, (WINDOW, WINDOW), (STRIDE, STRIDE))[None]  # (1, V, 2)
        self.origins = self.host_origins.to(device)
        self.device = device
        self.canvas_numel = CHANNELS * self.latents**2
        self.view_numel = self.origins.shape[1] * CHANNELS * WINDOW**2
        # Every operation goes through all sets, and none may find its own in the cache when it comes round again.
        self.count = max(2, min(128, math.ceil(3 * cache_bytes(device) / min(self.bytes().values()))))
        self.permutations = [SeededPermutation((0,), step, "channel") for step in range(self.count)]
        self.canvases = [self._random(1, self.latents, torch.float32) for _ in range(self.count)]
        self.patches = [self._random(2 * self.num_patches, self.patch, dtype) for _ in range(self.count)]
        self.views = [self._random(2 * self.origins.shape[1], WINDOW, dtype) for _ in range(self.count)]

    def _random(self, items: int, side: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(items, CHANNELS, side, side, device=self.device).to(dtype)

    def published_index(self) -> Tensor:
        """Draw one `torch.randperm` for every channel of every position, on the host: (N, C, h, w) on the device."""
        draws = [torch.randperm(self.num_patches) for _ in range(CHANNELS * self.patch**2)]
        return torch.stack(draws, dim=1).view(self.num_patches, CHANNELS, self.patch, self.patch).to(self.device)

    def bytes(self) -> dict[str, int]:
        """Return the fewest bytes that each operation must move."""
        item = 2 * self.dtype.itemsize  # for one number of a guidance pair
        canvas, patches, views = 4 * self.canvas_numel, item * self.canvas_numel, item * self.view_numel
        moved = {
            "gather patches": canvas + patches,
            "scatter patches": 2 * canvas + patches,
            "gather views": canvas + views,
            "average views": 2 * canvas + views,
        }
        update = 3 * canvas
        moved["structure step"] = moved["gather patches"] + moved["scatter patches"] + update
        moved["detail step"] = moved["gather views"] + moved["average views"] + update
        return moved

    def operations(self, compiled: bool) -> list[Operation]:
        """Return the four operators and the two kinds of step, as Triton and plain torch compute them."""
        plain = self._calls(reference, reference, self.host_origins)
        fused = self.kernels() if self.device.type == "cuda" else {}
        by_compiler: dict[str, Call] = {}
        if compiled:
            names = ("gather_patches", "scatter_patches", "gather_views")
            module = SimpleNamespace(**{name: torch.compile(getattr(reference, name)) for name in names})
            calls = self._calls(module, module, self.host_origins)
            by_compiler = {name: calls[name] for name in (n.replace("_", " ") for n in names)}
        published = self._calls(reference, reference, self.host_origins, self.published_index)
        return [
            Operation(
                name,
                size,
                reference=plain[name],
                kernel=fused.get(name),
                compiled=by_compiler.get(name),
                published=published[name] if name in ("gather patches", "structure step") else None,
            )
            for name, size in self.bytes().items()
        ]

    def kernels(self) -> dict[str, Call]:
        """Return the operators as Triton computes them, by name."""
        from cutdiff_kernels import patches, views

        return self._calls(patches, views, self.origins)

    def _calls(
        self, patches: Any, views: Any, origins: Tensor, draw: Callable[[], Tensor] | None = None
    ) -> dict[str, Call]:
        """Return the operators of a pair of modules, by name; `draw`, if given, draws the permutation of each step."""
        to_network: Any = {"c_in": C_IN, "dtype": self.dtype, "copies": 2}
        window = (WINDOW, WINDOW)

        def permutation(i: int) -> Permutation:
            return self.permutations[i] if draw is None else draw()

        def from_network(i: int) -> Any:
            pair = {"copies": 2, "guidance_scale": GUIDANCE}
            return pair | {"canvas": self.canvases[i], "c_skip": C_SKIP, "c_out": C_OUT}

        def gathered_patches(i: int, drawn: Permutation) -> Tensor:
            return patches.gather_patches(self.canvases[i], self.grid, drawn, **to_network)

        def scattered_patches(i: int, drawn: Permutation) -> Tensor:
            return patches.scatter_patches(self.patches[i], self.grid, drawn, **from_network(i))

        def gathered_views(i: int) -> Tensor:
            return views.gather_views(self.canvases[i], origins, window, **to_network)

        def averaged_views(i: int) -> Tensor:
            return views.average_views(self.views[i], origins, self.size, covered=True, **from_network(i))

        def structure_step(i: int) -> tuple[Tensor, ...]:
            drawn = permutation(i)
            return gathered_patches(i, drawn), torch.lerp(scattered_patches(i, drawn), self.canvases[i], RATIO)

        def detail_step(i: int) -> tuple[Tensor, ...]:
            return gathered_views(i), torch.lerp(averaged_views(i), self.canvases[i], RATIO)

        return {
            "gather patches": lambda i: (gathered_patches(i, permutation(i)),),
            "scatter patches": lambda i: (scattered_patches(i, permutation(i)),),
            "gather views": lambda i: (gathered_views(i),),
            "average views": lambda i: (averaged_views(i),),
            "structure step": structure_step,
            "detail step": detail_step,
        }


def measure(operation: Operation, inputs: Inputs, copy_rate: float | None) -> Row:
    """Check one operation, then time it in every way."""
    row: dict[str, Any] = {"size": inputs.latents * FACTOR, "name": operation.name, "bytes": operation.bytes}
    clock = partial(host_seconds, count=inputs.count, device=inputs.device)
    if operation.kernel is not None:
        for i in (0, inputs.count - 1):
            difference = compare(operation.kernel(i), operation.reference(i))
            if difference:
                return Row(**row, failed=difference)
        seconds = graph_seconds(operation.kernel, inputs.count)
        row["kernel_us"] = 1e6 * seconds
        row["share_of_copy"] = None if copy_rate is None else operation.bytes / seconds / copy_rate
        row["launched_us"] = 1e6 * clock(operation.kernel)
        row["launches"] = launches(operation.kernel)
    row["reference_us"] = 1e6 * clock(operation.reference)
    if operation.compiled is not None:
        row["compiled_us"] = 1e6 * clock(operation.compiled)
    if operation.published is not None:
        row["published_us"] = 1e6 * host_seconds(operation.published, 1, inputs.device, repeats=3)
    return Row(**row)


def compare(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return how results are wrong, or "": copies must be equal to the bit, float32 arithmetic to rounding."""
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"gives {tuple(one.shape)} of {one.dtype}, its reference {tuple(other.shape)} of {other.dtype}"
        same = torch.equal if one.dtype == NETWORK_DTYPE else partial(torch.allclose, rtol=1e-5, atol=1e-5)
        if not same(one, other):
            return f"differs from its reference in {int((one != other).sum())} of {one.numel()} places"
    return ""


def draw_seconds(positions: int = CHANNELS * WINDOW**2, num_patches: int = 4) -> dict[str, float]:
    """Time the permutations of a structure step at 2048² on one CPU thread: the published loop, and the reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        permutation, shape = SeededPermutation((0,), 0, "channel"), (CHANNELS, WINDOW, positions // CHANNELS // WINDOW)
        cpu = torch.device("cpu")
        loop = lambda i: tuple(torch.randperm(num_patches) for _ in range(positions))  # noqa: E731
        published = host_seconds(loop, 1, cpu, 5)
        vectorised = host_seconds(lambda i: (permutation_index(permutation, num_patches, shape),), 4, cpu)
    finally:
        torch.set_num_threads(threads)
    return {"published_s": published, "reference_s": vectorised}


def _table(rows: list[Row]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        "| picture | operation | MB | kernel µs | of copy | launched µs | bound by | launches | reference µs "
        "| compiled µs | published µs | published / kernel |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        times = [number(value) for value in (row.reference_us, row.compiled_us, row.published_us)]
        bound = "-"
        if row.kernel_us is not None and row.launched_us is not None:
            bound = "launch" if row.launched_us > 1.2 * row.kernel_us else "device"
        cells = [
            f"{row.size}²",
            row.name,
            f"{row.bytes / 1e6:.1f}",
            row.failed or number(row.kernel_us),
            "-" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
            number(row.launched_us),
            bound,
            "-" if row.launches is None else str(row.launches),
            *times,
            number(row.published_us / row.kernel_us if row.published_us and row.kernel_us else None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    lines = Lines(*args.lines)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rate = copy_rate(device) if on_gpu else None
    machine = hardware(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("no GPU here: the references were timed, no kernel" if rate is None else f"copy: {rate / 1e9:.0f} GB/s")
    draw = draw_seconds()
    print(
        f"one step's permutations at 2048² on one CPU thread: published {1e3 * draw['published_s']:.0f} ms, "
        f"vectorised {1e3 * draw['reference_s']:.1f} ms, {draw['published_s'] / draw['reference_s']:.0f} times less\n"
    )
    lines.add("permutations of a step on one CPU thread", draw)
    rows: list[Row] = []
    for size in args.sizes:
        inputs = Inputs(size, device)
        new = []
        for operation in inputs.operations(args.compile and on_gpu):
            new.append(measure(operation, inputs, rate))
            lines.add(f"{operation.name}, {size}²", asdict(new[-1]) | {"size": None, "name": None})
        rows += new
        print(_table(new), flush=True)
        if args.json is not None:  # after every size, so that a run that is cut short leaves what it has
            result = {
                "hardware": machine,
                "copy_bytes_per_s": rate,
                "draw": draw,
                "rows": [asdict(row) for row in rows],
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row.failed for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cutdiff_kernels.bench", description="Time every kernel beside what it replaces."
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="sizes of pictures, in px (all)"
    )
    parser.add_argument("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    add_lines(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
