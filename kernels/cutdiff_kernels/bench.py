"""Time every kernel beside what it replaces: `python -m cutdiff_kernels.bench [--json FILE]`.

For the latents of SDXL pictures of 2048², 3072² and 4096² px, in bfloat16 with a guidance pair. A kernel's time is that
in a CUDA graph over as many input sets as the L2 cache cannot hold; "launched" is the same called from Python. Beside
it stand the plain-torch reference, torch.compile of it (but not of the average, a loop over up to 49 views, on which
it takes more than five minutes), and the published approach, which draws the permutation by `torch.randperm` on the
host and gathers with index tensors. Every kernel is first compared with its reference: one that differs is shown
without a time, and the exit status is 1. On a CPU the references are timed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from cutdiff_kernels import reference
from cutdiff_kernels.reference import Seeded

SIZES = (2048, 3072, 4096)
FACTOR, CHANNELS, WINDOW, STRIDE = 8, 4, 128, 64
"""Of SDXL: pixels for one latent, latent channels, native size, and CutDiffusion's stride between views."""
C_IN, GUIDANCE, C_SKIP, C_OUT, RATIO = 0.2, 7.5, 1.0, -4.9, 0.9
"""A step's coefficients; any would do."""
NETWORK_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Operation:
    """One operator at one size, in every way that it can be had; calls are made by input set."""

    name: str
    bytes: int
    """The least that it must move: every input read once, every output written once."""
    reference: Callable[[int], Tensor]
    kernel: Callable[[int], Tensor] | None = None
    published: Callable[[int], Tensor] | None = None
    compiles: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured of an operation; times in microseconds, None where it was not measured."""

    size: int
    name: str
    bytes: int
    kernel_us: float | None = None
    """On the device, in a CUDA graph."""
    share_of_copy: float | None = None
    """Of the bandwidth of a large copy."""
    launched_us: float | None = None
    """Called from Python; launch-bound where this is more than `kernel_us`."""
    launches: int | None = None
    reference_us: float | None = None
    compiled_us: float | None = None
    published_us: float | None = None
    failed: str = ""


class Inputs:
    """`count` sets of a step's tensors at one picture size, and the operations on them."""

    def __init__(self, pixels: int, device: torch.device) -> None:
        self.latents = pixels // FACTOR
        self.grid = (math.ceil(self.latents / WINDOW),) * 2
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch = self.latents // self.grid[0]
        starts = [
            min(i * STRIDE, self.latents - WINDOW) for i in range(math.ceil((self.latents - WINDOW) / STRIDE) + 1)
        ]
        self.host_origins = torch.tensor([[(y, x) for y in starts for x in starts]])  # (1, V, 2)
        self.origins = self.host_origins.to(device)
        self.device = device
        self.size = (self.latents, self.latents)
        self.canvas_numel = CHANNELS * self.latents**2
        self.view_numel = len(starts) ** 2 * CHANNELS * WINDOW**2
        item = 2 * NETWORK_DTYPE.itemsize
        largest = 8 * self.canvas_numel + item * self.view_numel
        self.count = max(2, min(64, math.ceil(2 * _cache_bytes(device) / largest)))
        seeds = torch.tensor([0], device=device)
        self.permutations = [Seeded(seeds, step, True) for step in range(self.count)]
        self.canvases = [self._random(1, self.latents, torch.float32) for _ in range(self.count)]
        self.patches = [self._random(2 * self.num_patches, self.patch, NETWORK_DTYPE) for _ in range(self.count)]
        self.views = [self._random(2 * self.origins.shape[1], WINDOW, NETWORK_DTYPE) for _ in range(self.count)]

    def _random(self, items: int, side: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(items, CHANNELS, side, side, device=self.device).to(dtype)

    def published_index(self) -> Tensor:
        """One `torch.randperm` for every channel of every position, on the host: (N, C, h, w) on the device."""
        draws = [torch.randperm(self.num_patches) for _ in range(CHANNELS * self.patch**2)]
        return torch.stack(draws, dim=1).view(self.num_patches, CHANNELS, self.patch, self.patch).to(self.device)

    def operations(self) -> list[Operation]:
        """The four operators and the two kinds of step, as Triton and plain torch do them."""
        item = 2 * NETWORK_DTYPE.itemsize  # bytes of one number of a guidance pair
        canvas = 4 * self.canvas_numel
        plain = self._calls(reference, reference, self.host_origins)
        fused: dict[str, Callable[[int], Tensor]] = {}
        if self.device.type == "cuda":
            from cutdiff_kernels import patches, views

            fused = self._calls(patches, views, self.origins)

        def published_gather(i: int) -> Tensor:
            drawn = self.published_index()
            return reference.gather_patches(
                self.canvases[i], self.grid, drawn, c_in=C_IN, dtype=NETWORK_DTYPE, copies=2
            )

        moved = {
            "gather patches": canvas + item * self.canvas_numel,
            "scatter patches": 2 * canvas + item * self.canvas_numel,
            "gather views": canvas + item * self.view_numel,
            "average views": 2 * canvas + item * self.view_numel,
        }
        update = 3 * canvas
        moved["structure step"] = moved["gather patches"] + moved["scatter patches"] + update
        moved["detail step"] = moved["gather views"] + moved["average views"] + update
        return [
            Operation(
                name,
                size,
                reference=plain[name],
                kernel=fused.get(name),
                published=published_gather if name == "gather patches" else None,
                compiles=name in ("gather patches", "scatter patches", "gather views"),
            )
            for name, size in moved.items()
        ]

    def _calls(self, patches: Any, views: Any, origins: Tensor) -> dict[str, Callable[[int], Tensor]]:
        """The operators of a pair of modules, by name."""
        to_network: Any = {"c_in": C_IN, "dtype": NETWORK_DTYPE, "copies": 2}
        window = (WINDOW, WINDOW)

        def from_network(i: int) -> Any:
            return {
                "copies": 2,
                "guidance_scale": GUIDANCE,
                "canvas": self.canvases[i],
                "c_skip": C_SKIP,
                "c_out": C_OUT,
            }

        def gather_patches(i: int) -> Tensor:
            return patches.gather_patches(self.canvases[i], self.grid, self.permutations[i], **to_network)

        def scatter_patches(i: int) -> Tensor:
            return patches.scatter_patches(self.patches[i], self.grid, self.permutations[i], **from_network(i))

        def gather_views(i: int) -> Tensor:
            return views.gather_views(self.canvases[i], origins, window, **to_network)

        def average_views(i: int) -> Tensor:
            return views.average_views(self.views[i], origins, self.size, covered=True, **from_network(i))

        def structure_step(i: int) -> Tensor:
            gather_patches(i)
            return torch.lerp(scatter_patches(i), self.canvases[i], RATIO)

        def detail_step(i: int) -> Tensor:
            gather_views(i)
            return torch.lerp(average_views(i), self.canvases[i], RATIO)

        calls = (gather_patches, scatter_patches, gather_views, average_views, structure_step, detail_step)
        return {call.__name__.replace("_", " "): call for call in calls}


def measure(operation: Operation, inputs: Inputs, copy_rate: float | None, compiled: bool) -> Row:
    """Check one operation, then time it in every way."""
    row: dict[str, Any] = {"size": inputs.latents * FACTOR, "name": operation.name, "bytes": operation.bytes}
    clock = partial(_seconds, count=inputs.count, device=inputs.device)
    if operation.kernel is not None:
        difference = compare(operation.kernel(0), operation.reference(0))
        if difference:
            return Row(**row, failed=difference)
        seconds = _graph_seconds(operation.kernel, inputs.count)
        row["kernel_us"] = 1e6 * seconds
        row["share_of_copy"] = None if copy_rate is None else operation.bytes / seconds / copy_rate
        row["launched_us"] = 1e6 * clock(operation.kernel)
        row["launches"] = _launches(operation.kernel)
    row["reference_us"] = 1e6 * clock(operation.reference)
    if compiled and operation.compiles:
        row["compiled_us"] = 1e6 * clock(torch.compile(operation.reference))
    if operation.published is not None:
        row["published_us"] = 1e6 * _seconds(operation.published, 1, inputs.device, repeats=3)
    return Row(**row)


def compare(got: Tensor, expected: Tensor) -> str:
    """What is wrong: copies for the network must be equal to the bit, float32 arithmetic to rounding."""
    same = torch.equal if got.dtype == NETWORK_DTYPE else partial(torch.allclose, rtol=1e-5, atol=1e-5)
    if got.shape == expected.shape and same(got, expected):
        return ""
    return f"differs from its reference in {int((got != expected).sum())} of {got.numel()} places"


def _seconds(call: Callable[[int], Tensor], count: int, device: torch.device, repeats: int = 9) -> float:
    """Median seconds of a call, over `count` input sets in a row."""
    call(0)
    times = []
    for _ in range(repeats):
        _synchronize(device)
        began = time.perf_counter()
        for i in range(count):
            call(i)
        _synchronize(device)
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


def _graph_seconds(call: Callable[[int], Tensor], count: int, repeats: int = 50) -> float:
    """Median seconds of a call among `count` of them in one CUDA graph."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(count)]  # outputs of their own, so that none is still in the cache
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    del kept
    return statistics.median(times)


def _launches(call: Callable[[int], Tensor]) -> int:
    """How many operations one call puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events() or ())


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Bytes read and written by a second of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / _graph_seconds(lambda i: source.clone(), 2)


def draw_seconds(positions: int = CHANNELS * WINDOW**2, num_patches: int = 4) -> dict[str, float]:
    """One structure step's permutations at 2048² on one CPU thread: the published loop, the vectorised reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        permutation, shape = Seeded(torch.tensor([0]), 0, True), (CHANNELS, WINDOW, positions // CHANNELS // WINDOW)
        cpu = torch.device("cpu")
        published = _seconds(lambda i: torch.stack([torch.randperm(num_patches) for _ in range(positions)]), 1, cpu, 5)
        vectorised = _seconds(lambda i: reference.permutation_index(permutation, num_patches, shape), 4, cpu)
    finally:
        torch.set_num_threads(threads)
    return {"published_s": published, "reference_s": vectorised}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def hardware(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    found["python"] = platform.python_version()
    if device.type == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}
        found |= {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip), "driver": _driver()}
    return found


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def _table(rows: list[Row]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        "| picture | operation | MB | kernel µs | of copy | launched µs | bound by | launches | reference µs "
        "| compiled µs | published µs |",
        "|---" * 11 + "|",
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
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rate = copy_rate(device) if on_gpu else None
    found = hardware(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print("no GPU here: the references were timed, no kernel" if rate is None else f"copy: {rate / 1e9:.0f} GB/s")
    rows = []
    for size in args.sizes:
        inputs = Inputs(size, device)
        rows += [measure(operation, inputs, rate, args.compile and on_gpu) for operation in inputs.operations()]
    print("\n" + _table(rows) + "\n")
    draw = draw_seconds()
    print(
        f"one step's permutations at 2048² on one CPU thread: published {1e3 * draw['published_s']:.0f} ms, "
        f"vectorised {1e3 * draw['reference_s']:.1f} ms, {draw['published_s'] / draw['reference_s']:.0f} times less"
    )
    if args.json is not None:
        result = {"hardware": found, "copy_bytes_per_s": rate, "draw": draw, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row.failed for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cutdiff_kernels.bench", description="Time every kernel beside what it replaces."
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="of pictures, in px (all)")
    parser.add_argument("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
