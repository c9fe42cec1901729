"""Compile every kernel ahead of time, without a GPU, and print what it needs: `python -m cutdiff_kernels.compile`.

It prints a table of registers, spills and memory for each target, read from the compiled code. The exit status is 1
where a kernel spills registers or uses local memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from cutdiff_kernels import network, patches, views
from cutdiff_kernels.launch import ROUNDING

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGER, FLOAT, INT64 = "i32", "fp32", "*i64"
STRIDES_4, STRIDES_5, PAIR = (INTEGER,) * 4, (INTEGER,) * 5, (INTEGER,) * 2


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments and its compile-time constants, as the wrappers launch it."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, object]
    constants: dict[str, int | bool | str]
    options: dict[str, int | bool]
    sixteens: tuple[str, ...] = ()
    """The arguments that are multiples of 16 in all networks that matter, for which Triton compiles a variant."""

    def compile(self, target: GPUTarget) -> CompiledKernel:
        # Pointers come from torch's allocator, which aligns to more than 16 bytes.
        known = [i for i, (name, t) in enumerate(self.types.items()) if str(t).startswith("*") or name in self.sixteens]
        source = ASTSource(
            fn=self.kernel,
            signature=self.types | dict.fromkeys(self.constants, "constexpr"),
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in known},
        )
        return triton.compile(source, target=target, options=self.options)


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


def variants(target: str) -> list[Variant]:
    """Return every kernel at every grain, for grids up to 8×8, in the dtypes that networks run in."""
    kinds = []
    for dtype in ("bf16", "fp16", "fp32"):
        for grid in ((1, 1), (2, 2), (3, 3), (4, 4), (8, 8)):
            for source, grain in ((0, "none"), (1, "channel"), (1, "pixel"), (2, "index")):
                if dtype != "bf16" and (grid, grain) != ((2, 2), "channel"):
                    continue  # the dtype changes a load and a store, not the permutation
                kinds += _patch_variants(dtype, grid, source, grain)
        kinds += _view_variants(dtype)
        kinds += _network_variants(dtype, target)
    return kinds


def _patch_variants(dtype: str, grid: tuple[int, int], source: int, grain: str) -> list[Variant]:
    constants = patches.constants(128 * 128, grid, source, per_channel=grain != "pixel") | {"COPIES": 2}
    options = patches.options(patches.padded(grid))
    name = f"{grid[0]}×{grid[1]} {grain} {dtype}"
    sizes = {"index_strides": STRIDES_5, "channels": INTEGER, "width": INTEGER, "positions": INTEGER}
    gather = {
        "canvas": "*fp32", "out": f"*{dtype}", "permutation": INT64, "step": INTEGER, "c_in": FLOAT,
        "strides": STRIDES_4,
    }  # fmt: skip
    scatter = {
        "values": f"*{dtype}", "out": "*fp32", "permutation": INT64, "canvas": "*fp32", "flag": "*i32",
        "step": INTEGER, "guidance_scale": FLOAT, "c_skip": FLOAT, "c_out": FLOAT,
        "strides": STRIDES_4, "canvas_strides": STRIDES_4,
    }  # fmt: skip
    return [
        Variant(f"gather_patches {name}", patches.gather_kernel, gather | sizes, constants, options),
        Variant(
            f"scatter_patches {name}",
            patches.scatter_kernel,
            scatter | sizes,
            constants | {"HAS_CANVAS": True, "HAS_FLAG": True},
            options,
        ),
    ]


def _view_variants(dtype: str) -> list[Variant]:
    sizes = {"size": PAIR, "window": PAIR}
    tile = {"COPIES": 2, "ROWS": views.TILE // views.WIDEST, "COLUMNS": views.WIDEST}
    gather = {
        "canvas": "*fp32", "out": f"*{dtype}", "origins": INT64, "c_in": FLOAT, "strides": STRIDES_4,
        "channels": INTEGER, "num_views": INTEGER,
    }  # fmt: skip
    average = {
        "values": f"*{dtype}", "out": "*fp32", "origins": INT64, "weights": "*fp32", "canvas": "*fp32",
        "flag": "*i32", "guidance_scale": FLOAT, "c_skip": FLOAT, "c_out": FLOAT,
        "strides": STRIDES_4, "canvas_strides": STRIDES_4, "channels": INTEGER,
    }  # fmt: skip
    return [
        Variant(f"gather_views {dtype}", views.gather_kernel, gather | sizes, tile, ROUNDING),
        *(
            Variant(
                f"average_views {dtype}{' weighted' * weighted}",
                views.average_kernel,
                average | sizes,
                tile | {"NUM_VIEWS": 49, "HAS_WEIGHTS": weighted, "HAS_CANVAS": True, "HAS_FLAG": True},
                ROUNDING,
            )
            for weighted in (False, True)
        ),
    ]


def _network_variants(dtype: str, target: str) -> list[Variant]:
    """Return the norms and gates, with SDXL's widest groups, of 40 and 80 channels."""
    sizes = {"num_positions": INTEGER, "channels": INTEGER}
    parameters = {"weight": f"*{dtype}", "bias": f"*{dtype}"}
    fold = {"CHUNKS": network.CHUNKS, "ROWS": network.NORM_TILE["ROWS"]}
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tile, options = network.geglu_tile(torch_dtype, hopper=target == "sm_90", hip=target == "gfx942")
    product = {"num_rows": INTEGER, "num_out": INTEGER, "num_in": INTEGER}
    return [
        Variant(
            f"norm_stats {dtype}",
            network.norm_stats_kernel,
            {"x": f"*{dtype}", "stats": "*fp32"} | sizes,
            dict(network.NORM_TILE),
            network.NORM_OPTIONS,
            ("channels",),
        ),
        *(
            Variant(
                f"norm_fold {channels} {dtype}",
                network.norm_fold_kernel,
                {"stats": "*fp32", "weight": f"*{dtype}", "scaling": "*fp32"}
                | sizes
                | {"num_tiles": INTEGER, "eps": FLOAT},
                fold | {"GROUP_CHANNELS": channels, "PADDED": padded},
                {},
                ("channels",),
            )
            for channels, padded in ((40, 64), (80, 128))
        ),
        Variant(
            f"norm_apply {dtype}",
            network.norm_apply_kernel,
            {"x": f"*{dtype}", "scaling": "*fp32", "bias": f"*{dtype}", "out": f"*{dtype}"} | sizes,
            {"SILU": True, **network.NORM_TILE},
            network.NORM_OPTIONS,
            ("channels",),
        ),
        Variant(
            f"geglu {dtype}",
            network.geglu_kernel,
            {"x": f"*{dtype}"} | parameters | {"out": f"*{dtype}"} | product,
            tile | {"EVEN_K": True},
            options,
            ("num_out", "num_in"),
        ),
    ]


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
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size")
    reported = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
    return Resources(*(int(reported[name]) for name in fields))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cutdiff_kernels.compile", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="(all)")
    failed = False
    for target in parser.parse_args(argv).targets:
        print(f"{target}: registers, spills, local bytes, shared bytes")
        for variant in variants(target):
            needs = resources(variant.compile(TARGETS[target]))
            failed |= bool(needs.spills or needs.local)
            print(
                f"  {variant.name:38} {needs.registers:4} {needs.spills:4} {needs.local:4} {needs.shared:6}", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
