"""Compile every kernel ahead of time, without a GPU, and print what it needs: `python -m cutdiff_kernels.compile`.

The wrappers are called with tensors of SDXL's sizes, and what they launch is compiled as Triton would compile it at
that launch: with its strides of one, its sizes that 16 divides and its aligned pointers known. A table of registers,
spills and memory is printed for each target, read from the compiled code. The exit status is 1 where a kernel spills
registers or uses local memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from cutdiff_kernels import launch, network, patches, views
from cutdiff_kernels.permutations import Permutation, SeededPermutation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIDE, CHANNELS = 128, 4
"""SDXL's native size and channels of latents."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A launch as its target compiles it: a kernel with the types of its arguments, and all that is known of them."""

    name: str
    key: str
    """The key that Triton keeps a compiled kernel under: a launch with another one compiles anew."""
    source: ASTSource
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> CompiledKernel:
        return triton.compile(self.source, target=target, options=self.options)


class Driver:
    """The part of Triton's driver of a device that is asked before a kernel is compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # a key of the caches

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list[Launch]]:
    """Record the launches of the block in a list, and run none of them: tensors may lie on the CPU."""
    launches: list[Launch] = []

    def record(*, key: str, fn: Any, compile: Any, **others: object) -> bool:
        name = f"{fn.module.rpartition('.')[2]}.{fn.name.removesuffix('_kernel')}"
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        launches.append(Launch(name, f"{name} {key}", source, {option: compile[option] for option in OPTIONS}))
        return True  # as if another process compiled it

    on_any = mock.patch.object(launch, "runs_on", return_value=True)
    with knobs.runtime.scope(), on_any, mock.patch.object(driver, "_active", Driver(target)):
        knobs.runtime.jit_cache_hook = record
        yield launches


@dataclass(frozen=True)
class Resources:
    """The resources that one thread of a compiled kernel takes, or for `shared` one block."""

    registers: int
    spills: int
    """The bytes of stack on NVIDIA, the registers on AMD."""
    local: int
    """The bytes of memory that only the thread can read."""
    shared: int
    """The bytes of shared memory."""


def calls(target: GPUTarget) -> Iterator[tuple[str, Callable[[], object]]]:
    """Make calls of every wrapper, at every grain, for grids up to 8×8, in the dtypes that networks run in.

    Runs have a guidance pair. A network leaves its output in channels_last on a GPU, and contiguous where a batch is
    split.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for grid in ((1, 1), (2, 2), (3, 3), (4, 4), (8, 8)):
            for grain in ("none", "channel", "pixel", "index"):
                if dtype != torch.bfloat16 and (grid, grain) != ((2, 2), "channel"):
                    continue  # the dtype changes a load and a store, not the permutation
                yield from _patch_calls(dtype, grid, grain)
        yield from _view_calls(dtype)
        yield from _network_calls(dtype, target)


def _values(items: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the network's output for pairs of items, in both layouts, by their names."""
    values = torch.empty(2 * items, CHANNELS, SIDE, SIDE, dtype=dtype)
    return {"": values.contiguous(memory_format=torch.channels_last), " contiguous": values}


def _patch_calls(dtype: torch.dtype, grid: tuple[int, int], grain: str) -> Iterator[tuple[str, Callable[[], object]]]:
    num_patches = grid[0] * grid[1]
    canvas = torch.empty(1, CHANNELS, grid[0] * SIDE, grid[1] * SIDE)
    permutation: Permutation = None
    if grain == "index":
        permutation = torch.empty(num_patches, CHANNELS, SIDE, SIDE, dtype=torch.int64)
    elif grain != "none":
        permutation = SeededPermutation((0,), 0, grain)
    name = f"{grid[0]}×{grid[1]} {grain} {_short(dtype)}"
    yield name, partial(patches.gather_patches, canvas, grid, permutation, dtype=dtype, copies=2)
    flag = torch.empty(1, dtype=torch.int32)
    for layout, values in _values(num_patches, dtype).items():
        how = {"copies": 2, "canvas": canvas, "flag": flag}
        yield name + layout, partial(patches.scatter_patches, values, grid, permutation, **how)


def _view_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    num_views, size = 49, (4 * SIDE, 4 * SIDE)
    canvas, origins = torch.empty(1, CHANNELS, *size), torch.empty(1, num_views, 2, dtype=torch.int64)
    yield _short(dtype), partial(views.gather_views, canvas, origins, (SIDE, SIDE), dtype=dtype, copies=2)
    flag = torch.empty(1, dtype=torch.int32)
    for layout, values in _values(num_views, dtype).items():
        for name, weights in (("", None), (" weighted", torch.empty(SIDE, SIDE))):
            how = {"weights": weights, "copies": 2, "canvas": canvas, "covered": True, "flag": flag}
            yield _short(dtype) + name + layout, partial(views.average_views, values, origins, size, **how)


def _network_calls(dtype: torch.dtype, target: GPUTarget) -> Iterator[tuple[str, Callable[[], object]]]:
    """Make calls of the norms with SDXL's widest groups, of 40 and 80 channels, and of the gate in all its variants."""
    for channels in (1280, 2560):
        x = torch.empty(2, channels, 32, 32, dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty(channels, dtype=dtype)
        yield f"{channels} {_short(dtype)}", partial(network.group_norm, x, 32, weight, weight, 1e-5, silu=True)
    rows, gates, bias = (torch.empty(*shape, dtype=dtype) for shape in ((2048, 1280), (10240, 1280), (10240,)))
    on_hopper = target.backend == "cuda" and target.arch == 90 and dtype != torch.float32
    for variant in network.VARIANTS if on_hopper else ("cp.async",):
        yield f"{variant} {_short(dtype)}", partial(network.geglu, rows, gates, bias, variant=variant)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def resources(compiled: CompiledKernel) -> Resources:
    """Read the resources from cuobjdump's report of a cubin, or from the metadata of an AMD code object's assembly."""
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        reported = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}
        return Resources(reported["REG"], reported["STACK"], reported["LOCAL"], compiled.metadata.shared)
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    reported = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
    registers, spills, local = (int(reported[name]) for name in fields)
    return Resources(registers, spills, local, compiled.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cutdiff_kernels.compile", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="(all)")
    failed = False
    for target in parser.parse_args(argv).targets:
        print(f"{target}: registers, spills, local bytes, shared bytes")
        done: set[str] = set()
        for name, call in calls(TARGETS[target]):
            with recorded(TARGETS[target]) as made:
                call()
            for one in made:
                if one.key not in done:
                    done.add(one.key)
                    needs = resources(one.compile(TARGETS[target]))
                    failed |= bool(needs.spills or needs.local)
                    numbers = f"{needs.registers:4} {needs.spills:4} {needs.local:4} {needs.shared:6}"
                    print(f"  {one.name + ' ' + name:48} {numbers}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
