"""The time of a picture drawn by one process and by all: `torchrun --nproc-per-node=2 -m cutdiff.bench.scaling`.

Both draw in turns, in the same processes and with the same weights, so that a ratio does not depend on what else the
machine does. While the first process draws alone, the others wait without computing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cutdiff
from cutdiff.cli.arguments import DEMO_PROMPT, BadArgument, Parser, add_debug, errors_by_flag
from cutdiff.cli.device import device_of
from cutdiff.cli.ending import exit_status
from cutdiff.output.images import save_json
from cutdiff.parallel.launch import joined
from cutdiff.parallel.lines import write_line
from cutdiff.parallel.process import alike
from cutdiff.parallel.ranks import Ranks
from cutdiff.pipeline import Result, now
from cutdiff.settings import Settings
from cutdiff.specs import METHODS


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(lambda: _run(argv), argv)


def _run(argv: list[str] | None) -> None:
    with alike():
        args = _parse(argv)
        settings = _settings(args)
        device = device_of(args.device)
    with joined(args.device, 1, 1800.0) as launch:
        result = measure(settings, device, args.repeats, launch.world)
    if launch.world.leads:
        write_line(table(result), sys.stdout)
        if args.json is not None:
            save_json(args.json, result)


def measure(settings: Settings, device: torch.device, repeats: int, ranks: Ranks) -> dict[str, Any]:
    """The seconds of each picture, after one pair that does not count. All ranks must call this."""
    model = cutdiff.load(device=device)

    def timed(draw: Callable[[], Result]) -> tuple[dict[str, float], Result]:
        ranks.values(0)  # all ranks begin together
        began = now(model.device)
        result = draw()
        return result.record["seconds"] | {"whole": now(model.device) - began}, result

    def alone() -> Result:
        return cutdiff.generate(model, DEMO_PROMPT, settings)

    def together() -> Result:
        return cutdiff.generate(model, DEMO_PROMPT, settings, ranks=ranks, on_step=lambda _, num: steps.append(num))

    steps: list[int] = []  # the number of steps of a picture, in all stages
    seconds: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    one = both = together()
    for turn in range(repeats + 1):
        if ranks.leads:
            times, one = timed(alone)
            seconds["alone"] += [times] * (turn > 0)
        else:
            ranks.values(0)
        times, both = timed(together)
        seconds["together"] += [times] * (turn > 0)
    difference = (both.latents - one.latents).norm() / one.latents.norm()
    rows = both.record["network_evaluations"]
    row_bytes = model.native_size**2 * model.unet.config.out_channels * model.dtype.itemsize
    return {
        "ranks": ranks.size,
        "device": both.record["device"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": settings.described(),
        "seconds": seconds,
        "difference": difference.item(),
        "received_bytes_per_step": both.record["received_bytes_per_step"],
        "ideal_bytes_per_step": rows * row_bytes * (ranks.size - 1) / ranks.size / steps[-1],
    }


def table(result: dict[str, Any]) -> str:
    """The medians of each part alone and together with their ratio, and the bytes received beside the ideal."""
    lines = [f"{result['ranks']} ranks of {result['threads']} thread(s), {result['device']}, torch {result['torch']}"]
    for part in result["seconds"]["alone"][0]:
        alone, together = (median(times[part] for times in result["seconds"][who]) for who in ("alone", "together"))
        ratios = [
            a[part] / b[part] for a, b in zip(result["seconds"]["alone"], result["seconds"]["together"], strict=True)
        ]
        faster = f"{median(ratios):.2f} times [{min(ratios):.2f} – {max(ratios):.2f}]"
        lines.append(f"{part:10}{alone:8.2f} s alone {together:8.2f} s together   {faster}")
    received, ideal = (result[f"{name}_bytes_per_step"] / 1e3 for name in ("received", "ideal"))
    lines.append(f"{received:.1f} kB a step into each rank, {received / ideal if ideal else 1:.2f} of the ideal")
    lines.append(f"relative difference of the latents: {result['difference']:.1e}")
    return "\n".join(lines)


def _settings(args: argparse.Namespace) -> Settings:
    with errors_by_flag():
        return Settings(method=args.method, height=args.size, width=args.size, num_steps=args.steps)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cutdiff.bench.scaling", description="Time one process and all that torchrun started."
    )
    parser.add_argument("--method", default="cutdiffusion", metavar="SPEC", help=f"{', '.join(METHODS)}, or your own")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the picture; none: twice the native size")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="number of steps")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="number of pairs that are timed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="the device of all ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    add_debug(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise BadArgument(f"--repeats {args.repeats} must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
