"""Time the kernels inside of the network beside what they replace: `python -m cutdiff_kernels.bench_network`.

It takes the shapes of SDXL's U-Net at 1024² px, in bfloat16, for `--rows` of a batch, and the device's time in a CUDA
graph: that of the kernel, of plain torch (a norm reads and writes the channels_last layout of convolutions), of
torch.compile of plain torch, and for a gated linear layer that of the product alone, which no gate can be faster than,
and that of every variant of the kernel. A kernel that is more than twice as far from float32 as plain torch is shown
without a time, and the exit status is 1. It needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff_kernels import network, reference_network
from cutdiff_kernels.bench import NETWORK_DTYPE
from cutdiff_kernels.lines import Lines, add_lines
from cutdiff_kernels.timing import copy_rate, graph_seconds, hardware

NORMS = ((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32))
"""The channels and sides of feature maps, in 32 groups."""
GATES = ((640, 64), (1280, 32))
"""The channels and sides of transformers, whose feed-forward is four times as wide."""
GROUPS, EPS = 32, 1e-5


@dataclass(frozen=True)
class Layer:
    """A layer on one input, in every way that it can be computed."""

    name: str
    bytes: int
    """The fewest bytes that it must move."""
    flops: int
    kernel: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    """Plain torch in float32."""
    product: Callable[[], Tensor] | None = None
    variants: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The measurements of a layer, in seconds on the device, None where they were not taken."""

    name: str
    rows: int
    bytes: int
    flops: int
    kernel_s: float | None = None
    plain_s: float | None = None
    compiled_s: float | None = None
    product_s: float | None = None
    failed: str = ""
    variants: dict[str, float | str] = field(default_factory=dict)
    """The seconds of each variant, or how it failed."""


def layers(rows: int, device: torch.device) -> list[Layer]:
    """Return all norms and gates for a batch of `rows`."""
    return [_norm(rows, *shape, device) for shape in NORMS] + [_gate(rows, *shape, device) for shape in GATES]


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(NETWORK_DTYPE)


def _norm(rows: int, channels: int, side: int, device: torch.device) -> Layer:
    x = _random(device, rows, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = _random(device, channels), _random(device, channels)
    return Layer(
        f"group norm and SiLU, {channels} × {side}²",
        2 * x.nbytes,
        0,
        kernel=lambda: network.group_norm(x, GROUPS, weight, bias, EPS, silu=True),
        plain=lambda: reference_network.group_norm(x, GROUPS, weight, bias, EPS, silu=True).contiguous(
            memory_format=torch.channels_last
        ),
        exact=lambda: reference_network.group_norm(x.float(), GROUPS, weight.float(), bias.float(), EPS, silu=True),
    )


def _gate(rows: int, channels: int, side: int, device: torch.device) -> Layer:
    x, hidden = _random(device, rows * side**2, channels), 4 * channels
    weight, bias = _random(device, 2 * hidden, channels) / channels**0.5, _random(device, 2 * hidden)
    return Layer(
        f"gated linear, {channels} × {side}²",
        x.nbytes + weight.nbytes + x.nbytes * hidden // channels,
        2 * x.numel() * 2 * hidden,
        kernel=lambda: network.geglu(x, weight, bias),
        plain=lambda: reference_network.geglu(x, weight, bias),
        exact=lambda: reference_network.geglu(x.float(), weight.float(), bias.float()),
        product=lambda: F.linear(x, weight, bias),
        variants={name: partial(network.geglu, x, weight, bias, variant=name) for name in network.VARIANTS},
    )


def measure(layer: Layer, rows: int) -> Row:
    """Check one layer, then time it in every way."""
    row = Row(layer.name, rows, layer.bytes, layer.flops, failed=compare(layer))
    if row.failed:
        return row

    def timed(call: Callable[[], Tensor]) -> float:
        return graph_seconds(lambda i: (call(),), 2)

    times = {"kernel_s": timed(layer.kernel), "plain_s": timed(layer.plain)}
    times["compiled_s"] = timed(torch.compile(layer.plain, dynamic=False))
    if layer.product is not None:
        times["product_s"] = timed(layer.product)
    variants = {name: _variant(layer, call, timed) for name, call in layer.variants.items()}
    return Row(layer.name, rows, layer.bytes, layer.flops, variants=variants, **times)


def _variant(layer: Layer, call: Callable[[], Tensor], timed: Callable[..., float]) -> float | str:
    """Check one variant of a layer, then time it; return how it failed where it does, so that others are timed."""
    try:
        return compare(replace(layer, kernel=call)) or timed(call)
    except Exception as error:  # of a compiler, or of a device that does not suffice
        return f"{type(error).__name__}: {error}".splitlines()[0]


def compare(layer: Layer) -> str:
    """Return how a kernel is wrong, or "": it may be twice as far from float32 as plain torch is, and a rounding."""
    exact = layer.exact()
    off, allowed = ((call().float() - exact).abs().max().item() for call in (layer.kernel, layer.plain))
    allowed = 2 * allowed + torch.finfo(NETWORK_DTYPE).eps * exact.abs().max().item()
    return "" if off <= allowed else f"differs by {off:.1e}, allowed {allowed:.1e}"


HEAD = (
    "| layer | rows | copy of its bytes µs | kernel µs | plain µs | compiled µs | product alone µs "
    "| kernel TFLOP/s | plain / kernel | variants µs |\n" + "|---" * 10 + "|"
)


def line(row: Row, rate: float) -> str:
    """Format a row under `HEAD`, in Markdown; `rate` is that of a large copy, in bytes per second."""

    def micro(seconds: float | None) -> str:
        return "–" if seconds is None else f"{1e6 * seconds:.0f}"

    kernel = row.failed or micro(row.kernel_s)
    rate_of = f"{row.flops / row.kernel_s / 1e12:.0f}" if row.flops and row.kernel_s else "–"
    ratio = f"{row.plain_s / row.kernel_s:.2f}" if row.plain_s and row.kernel_s else "–"
    times = [micro(row.bytes / rate), kernel, *(micro(s) for s in (row.plain_s, row.compiled_s, row.product_s))]
    others = [f"{name} {took if isinstance(took, str) else micro(took)}" for name, took in row.variants.items()]
    return "| " + " | ".join([row.name, str(row.rows), *times, rate_of, ratio, ", ".join(others) or "–"]) + " |"


def keep(lines: Lines, row: Row, rate: float) -> None:
    """Append the numbers of a layer, with the seconds of each variant, or how it failed."""
    values = asdict(row) | {"name": None, "variants": None, "copy_s": row.bytes / rate}
    for name, took in row.variants.items():
        values[f"{name} failed" if isinstance(took, str) else f"{name}_s"] = took
    lines.add(row.name, values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cutdiff_kernels.bench_network", description="Time the network's kernels beside plain torch."
    )
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="rows of a batch (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    add_lines(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("cutdiff_kernels: there is no GPU here, and nothing else to be timed", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    machine, rate = hardware(device), copy_rate(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), HEAD, sep="\n")
    rows: list[Row] = []
    for layer in layers(args.rows, device):
        rows.append(measure(layer, args.rows))
        print(line(rows[-1], rate), flush=True)
        keep(Lines(*args.lines), rows[-1], rate)
        if args.json is not None:  # after every layer, so that a run that is cut short leaves what it has
            result = {"hardware": machine, "copy_bytes_per_s": rate, "rows": [asdict(row) for row in rows]}
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row.failed or any(isinstance(took, str) for took in row.variants.values()) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
