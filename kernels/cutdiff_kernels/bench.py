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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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


Call = Callable[[int], tuple[Tensor, ...]]
"""Run on one of the input sets; gives all that was written, so that it can be checked and stays alive."""


@dataclass(frozen=True)
class Operation:
    """One operator at one size, in every way that it can be had."""

    name: str
    bytes: int
    """The least that it must move: every input read once, every output written once."""
    reference: Call
    kernel: Call | None = None
    compiled: Call | None = None
    published: Call | None = None


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
        # Every operation goes through all sets, and none may find its own in the cache when it comes round again.
        self.count = max(2, min(128, math.ceil(3 * _cache_bytes(device) / min(self.bytes().values()))))
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

    def bytes(self) -> dict[str, int]:
        """What each operation must move."""
        item = 2 * NETWORK_DTYPE.itemsize  # of one number of a guidance pair
        canvas, patches, views = 4 * self.canvas_numel, item * self.canvas_numel, item * self.view_numel
        found = {
            "gather patches": canvas + patches,
            "scatter patches": 2 * canvas + patches,
            "gather views": canvas + views,
            "average views": 2 * canvas + views,
        }
        update = 3 * canvas
        found["structure step"] = found["gather patches"] + found["scatter patches"] + update
        found["detail step"] = found["gather views"] + found["average views"] + update
        return found

    def operations(self, compiled: bool) -> list[Operation]:
        """The four operators and the two kinds of step, as Triton and plain torch do them."""
        on_gpu = self.device.type == "cuda"
        plain = self._calls(reference, reference, self.host_origins)
        fused: dict[str, Call] = {}
        if on_gpu:
            from cutdiff_kernels import patches, views

            fused = self._calls(patches, views, self.origins)
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

    def _calls(
        self, patches: Any, views: Any, origins: Tensor, draw: Callable[[], Tensor] | None = None
    ) -> dict[str, Call]:
        """The operators of a pair of modules, by name; with `draw`, permutations are drawn by it once a step."""
        to_network: Any = {"c_in": C_IN, "dtype": NETWORK_DTYPE, "copies": 2}
        window = (WINDOW, WINDOW)

        def permutation(i: int) -> Seeded | Tensor:
            return self.permutations[i] if draw is None else draw()

        def from_network(i: int) -> Any:
            pair = {"copies": 2, "guidance_scale": GUIDANCE}
            return pair | {"canvas": self.canvases[i], "c_skip": C_SKIP, "c_out": C_OUT}

        def gathered_patches(i: int, drawn: Seeded | Tensor) -> Tensor:
            return patches.gather_patches(self.canvases[i], self.grid, drawn, **to_network)

        def scattered_patches(i: int, drawn: Seeded | Tensor) -> Tensor:
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
        row["launches"] = _launches(operation.kernel)
    row["reference_us"] = 1e6 * clock(operation.reference)
    if operation.compiled is not None:
        row["compiled_us"] = 1e6 * clock(operation.compiled)
    if operation.published is not None:
        row["published_us"] = 1e6 * host_seconds(operation.published, 1, inputs.device, repeats=3)
    return Row(**row)


def compare(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What is wrong: copies for the network must be equal to the bit, float32 arithmetic to rounding."""
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"gives {tuple(one.shape)} of {one.dtype}, its reference {tuple(other.shape)} of {other.dtype}"
        same = torch.equal if one.dtype == NETWORK_DTYPE else partial(torch.allclose, rtol=1e-5, atol=1e-5)
        if not same(one, other):
            return f"differs from its reference in {int((one != other).sum())} of {one.numel()} places"
    return ""


def host_seconds(call: Call, count: int, device: torch.device, repeats: int = 9) -> float:
    """Median seconds of a call, over `count` input sets in a row."""
    for i in range(count):
        call(i)
    times = []
    for _ in range(repeats):
        _synchronize(device)
        began = time.perf_counter()
        for i in range(count):
            call(i)
        _synchronize(device)
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


def graph_seconds(call: Call, count: int, repeats: int = 15, replays: int = 5) -> float:
    """Median seconds of a call among `count` of them in one CUDA graph, which is replayed without a pause."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(count)]  # outputs of their own, so that none is still in the cache
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / replays / count)
    del kept
    return statistics.median(times)


def _launches(call: Call) -> int:
    """How many operations one call puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events() or ())


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Bytes read and written by a second of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / graph_seconds(lambda i: (source.clone(),), 2)


def draw_seconds(positions: int = CHANNELS * WINDOW**2, num_patches: int = 4) -> dict[str, float]:
    """One structure step's permutations at 2048² on one CPU thread: the published loop, the vectorised reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        permutation, shape = Seeded(torch.tensor([0]), 0, True), (CHANNELS, WINDOW, positions // CHANNELS // WINDOW)
        cpu = torch.device("cpu")
        loop = lambda i: tuple(torch.randperm(num_patches) for _ in range(positions))  # noqa: E731
        published = host_seconds(loop, 1, cpu, 5)
        vectorised = host_seconds(lambda i: (reference.permutation_index(permutation, num_patches, shape),), 4, cpu)
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
    found = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    found["python"] = platform.python_version()
    if device.type == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}
        found |= {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip), "driver": _driver()}
    return found


def _cpu_name() -> str:
    """As Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rate = copy_rate(device) if on_gpu else None
    found = hardware(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print("no GPU here: the references were timed, no kernel" if rate is None else f"copy: {rate / 1e9:.0f} GB/s")
    draw = draw_seconds()
    print(
        f"one step's permutations at 2048² on one CPU thread: published {1e3 * draw['published_s']:.0f} ms, "
        f"vectorised {1e3 * draw['reference_s']:.1f} ms, {draw['published_s'] / draw['reference_s']:.0f} times less\n"
    )
    rows: list[Row] = []
    for size in args.sizes:
        inputs = Inputs(size, device)
        new = [measure(operation, inputs, rate) for operation in inputs.operations(args.compile and on_gpu)]
        rows += new
        print(_table(new), flush=True)
        if args.json is not None:  # after every size, so that a run that is cut short leaves what it has
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
