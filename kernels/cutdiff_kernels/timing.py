"""Clocks for the benchmarks, on the host and in a CUDA graph, and the hardware that their numbers belong to."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

Call = Callable[[int], tuple[Tensor, ...]]
"""A call with the number of an input set, which returns all that it wrote, to be checked and to be kept alive."""


def host_seconds(call: Call, count: int, device: torch.device, repeats: int = 9) -> float:
    """Return the median seconds of a call, over `count` input sets in a row."""
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
    """Return the median seconds of a call, of which a CUDA graph with `count` is replayed without a pause."""
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


def launches(call: Call) -> int:
    """Return how many operations one call puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events() or ())


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / graph_seconds(lambda i: (source.clone(),), 2)


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the device's L2 cache, 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def hardware(device: torch.device) -> dict[str, str]:
    """Return the hardware and versions that measured numbers belong to."""
    known = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    known["python"] = platform.python_version()
    if device.type == "cuda":
        import triton

        known |= {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}
        known |= {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip), "driver": _driver()}
    return known


def _cpu_name() -> str:
    """Return the name that Linux gives, else the one that Python knows."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
