"""The command line `python -m cutdiff.plan --width 4096 --height 4096 --devices 8`, which prints the cost of a run.

Network evaluations and FLOPs are counted on the method itself (`planning.forecast`), without the text encoders' share.
The floor is the time that the busiest device needs for its FLOPs at the rate --tflops. The expected time is the floor
divided by --utilisation, plus the time in which the device receives its bytes at --bandwidth. No time is expected for
decoding, whose attention runs in float32. Memory is that of tensors; the workspace of kernels and the allocator's
reserve come on top.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from cutdiff.cli.arguments import (
    DTYPES,
    OF_IMAGE,
    BadArgument,
    Parser,
    add_controls,
    add_debug,
    add_how,
    add_option,
    as_taken,
    errors_by_flag,
    number,
)
from cutdiff.cli.ending import exit_status
from cutdiff.options import options_of
from cutdiff.parallel.lines import say, write_line
from cutdiff.settings import Settings, check_owned, left_to_model

TFLOPS = 790.0
"""The rate of a plain bfloat16 product of large matrices on an H200."""
UTILISATION = 0.5
"""The share of that rate which this network is expected to reach: MLPerf's best entries reach 0.8, with FP8."""
BANDWIDTH = 50.0
"""The GB/s that a device receives through a network card of 400 Gbit/s; within a machine, NVLink carries 450 GB/s."""
MEMORY = 141.0
"""The memory of an H200, in gigabytes."""

MODEL = (
    "folder, .safetensors file or hub id, or FLUX.1-dev, FLUX.1-schnell, SD3-medium, SD3.5-medium or SD3.5-large for "
    "their sizes; none: SDXL-base's"
)
MAX_DEVICES = 4096


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 1 for a model that is no good, 2 for unusable arguments."""
    return exit_status(lambda: _run(argv), argv, bad_arguments=(FileNotFoundError,), failures=(ValueError, OSError))


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    plan = make_plan(args)
    write_line(json.dumps(plan, indent=1) if args.json else table(plan), sys.stdout)


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as --json prints it, with sizes in pixels, memory in bytes and times in seconds."""
    from cutdiff.planning.forecast import decoding, outline, walk

    settings = _settings(args)
    model = outline(args.model, args.dtype, args.config)
    if left := left_to_model(args.options, model.preferred):
        settings = Settings(**args.options, **left)
    with errors_by_flag():
        size = settings.canvas_size(model.native_size, model.factor)
        rank = walk(model, settings, args.devices, args.memory * 1e9)
        whole = rank if args.devices == 1 else walk(model, settings)
    if left:
        say(as_taken(left))
    decode = decoding(model, size)
    stages = []
    for stage, share in zip(whole.stages, rank.stages, strict=True):
        total, busiest = stage.total, share.total
        floor_s = busiest.flops / (args.tflops * 1e12)
        stages.append(
            {
                "stage": stage.name,
                "steps": len(stage.steps),
                "evaluations": total.evaluations,
                "flops": total.flops,
                "floor_s": floor_s,
                "expected_s": floor_s / args.utilisation + busiest.received_bytes / (args.bandwidth * 1e9),
                "received_bytes": busiest.received_bytes,
            }
        )
    hardware = ("devices", "tflops", "utilisation", "bandwidth", "memory", "dtype")
    return {
        "model": model.source,
        "method": settings.method_name,
        "settings": settings.described(),
        "height": size[0] * model.factor,
        "width": size[1] * model.factor,
        **{name: getattr(args, name) for name in hardware},
        "stages": stages,
        "network": {"stage": "network"} | {name: sum(stage[name] for stage in stages) for name in [*stages[0]][1:]},
        "decode": {"flops": decode.flops, "floor_s": decode.flops / (args.tflops * 1e12)},
        "view_batch_size": rank.view_batch_size,
        "peak_bytes": {"network": rank.peak_bytes, "decode": decode.peak_bytes},
    }


def table(plan: dict[str, Any]) -> str:
    """The plan in aligned columns, with a line on memory below."""
    columns = ("stage", "steps", "evaluations", "TFLOP", "floor s", "expected s", "received MB")
    rows: list[tuple[str, ...]] = [columns]
    for part in (*plan["stages"], plan["network"]):
        counts = (f"{part[name]:,}" for name in ("steps", "evaluations"))
        seconds = (f"{part[name]:,.2f}" for name in ("floor_s", "expected_s"))
        rows.append((part["stage"], *counts, _tera(part), *seconds, f"{part['received_bytes'] / 1e6:,.0f}"))
    rows.append(("decode", "", "", _tera(plan["decode"]), f"{plan['decode']['floor_s']:,.2f}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    settings, batch = plan["settings"], plan["view_batch_size"]
    devices = f"{plan['devices']} device{'s' * (plan['devices'] > 1)} of {plan['tflops']:g} TFLOP/s"
    head = f"{plan['method']}, {plan['width']}×{plan['height']}, {settings['num_steps']} steps, {plan['dtype']}"
    network, decode = (f"{plan['peak_bytes'][part] / 1e9:.1f} GB" for part in ("network", "decode"))
    line = f"memory of a device: {network} for the network, {decode} for decoding; views at once: {batch or 'all'}"
    if max(plan["peak_bytes"].values()) > plan["memory"] * 1e9:
        line += f"; more than the {plan['memory']:g} GB that it has"
    return "\n".join([f"{head}, on {devices}: computed, not measured", *lines, line])


def _tera(part: dict[str, Any]) -> str:
    return f"{part['flops'] / 1e12:,.0f}" if part["flops"] >= 1e13 else f"{part['flops'] / 1e12:.3g}"


def _settings(args: argparse.Namespace) -> Settings:
    for name in ("tflops", "bandwidth", "memory", "utilisation"):
        value = getattr(args, name)
        if not 0 < value < math.inf or (name == "utilisation" and value > 1):
            raise BadArgument(f"--{name} {value} must be above 0{', at most 1' * (name == 'utilisation')}")
    with errors_by_flag():
        check_owned(args.options, args.options)
        return Settings(**args.options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cutdiff.plan",
        description="Compute what drawing a picture takes, without drawing it.",
    )
    picture, own = parser.add_argument_group("picture"), options_of(Settings)
    for name in ("width", "height", "image", *OF_IMAGE, "regions", "bootstrapping"):
        add_option(picture, own[name])
    add_controls(picture)
    parser.add_argument("--model", metavar="PATH", help=MODEL)
    parser.add_argument("--config", metavar="PATH", help="folder with a single file's tokenizers and schedule")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="number format of the networks")
    batch = "patches or views at once; none: all of a step that a device has, halved until memory suffices"
    add_option(picture, own["view_batch_size"], batch)
    parser.add_argument("--json", action="store_true", help="print JSON in the place of the table")
    add_debug(parser)
    add_how(parser.add_argument_group("how"))
    hardware = parser.add_argument_group("hardware")
    for name, kind, default, metavar, text in (
        ("devices", number(1, MAX_DEVICES), 1, "N", "devices, which share the patches or views of a step"),
        ("tflops", float, TFLOPS, "T", "best TFLOP/s of a device; the default is an H200's"),
        ("utilisation", float, UTILISATION, "U", "share of --tflops that is expected to be reached"),
        ("bandwidth", float, BANDWIDTH, "B", "GB/s that a device can receive"),
        ("memory", float, MEMORY, "GB", "memory of a device"),
    ):
        hardware.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    return parser.parse_run(argv)


if __name__ == "__main__":
    sys.exit(main())
