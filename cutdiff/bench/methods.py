"""The methods side by side, one view at once and as many as a run takes by itself: `python -m cutdiff.bench --methods`.

Every method is planned for SDXL-base (`planning.forecast`), and drawn here with random weights: on a CPU those of the
small network alone. Each is drawn once while what it computes is counted, and then all in turns, --repeats times. The
seconds are those of all steps with all that surrounds the network. Peak memory is that of the steps, with the weights:
on a GPU the allocator's, and on a CPU the most bytes of tensors that live at once, without the workspace of kernels.
The picture is decoded by the same VAE whatever the method, which is planned, but not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cutdiff_kernels.timing import hardware
from torch import nn
from tqdm import trange

import cutdiff
from cutdiff.bench.measure import Memory
from cutdiff.bench.report import cell, spread
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import cast, random_model
from cutdiff.cli.arguments import BadArgument, errors_by_flag
from cutdiff.models.config import UNetConfig, VAEConfig
from cutdiff.output.images import save_json
from cutdiff.parallel.lines import say
from cutdiff.pipeline import first_view_batch_size, now, prepare
from cutdiff.planning.forecast import SDXL, decoding, outline, sized, walk, weight_bytes
from cutdiff.planning.meter import Meter
from cutdiff.sampling.schedules import make_schedule
from cutdiff.settings import Settings

METHODS = ("direct", "multidiffusion", "scalecrafter", "demofusion", "cutdiffusion")
SIDES = (2048, 3072, 4096)
STEPS, DTYPE = 50, "bfloat16"
"""The steps and the number format that are planned."""
BATCHES = {"one": 1, "automatic": None}
"""The view batch sizes of every method, by their names."""
FLAGS = ("methods", "plan", "small", "size", "steps", "dtype", "device", "repeats", "backend", "json", "debug")
"""The options that go together with --methods."""
COUNTS = {"evaluations": "evaluations", "flops": "FLOPs", "live_bytes": "peak memory besides the weights"}
"""The counts that are both planned and measured, by their names in a row and in words."""
Row = dict[str, Any]
"""The cost of one picture: `COUNTS`, and where it was drawn, the seconds of every round and the plan."""
Part = dict[str, Any]
"""The pictures of one size by one model: for each method its spec, and a `Row` for each of `BATCHES`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this comparison."""
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="SPEC",
        help=f"compare methods, not with the published loop; none: {' '.join(METHODS)}",
    )
    parser.add_argument(
        "--plan",
        nargs="*",
        type=int,
        metavar="SIDE",
        help=f"with --methods, the sizes planned for SDXL; left out: {' '.join(map(str, SIDES))}; no SIDE: none",
    )


def asked(args: argparse.Namespace, given: Sequence[str]) -> bool:
    """True where the arguments ask for this comparison. BadArgument where others are `given` that do not fit."""
    if args.methods is None and args.plan is not None:
        raise BadArgument("--plan goes with --methods: give both")
    names = [argument.partition("=")[0] for argument in given if argument.startswith("--")]
    if args.methods is not None and (strange := [name for name in names if name.removeprefix("--") not in FLAGS]):
        raise BadArgument(f"{strange[0]} does not go with --methods, which takes --{', --'.join(FLAGS[1:])}")
    return args.methods is not None


def compare(
    args: argparse.Namespace, command: list[str], device: torch.device, unet: UNetConfig, vae: VAEConfig
) -> dict[str, Any]:
    """Plan all pictures, then draw in turns; the results are saved after every size and every round."""
    specs, sides = args.methods or METHODS, SIDES if args.plan is None else args.plan
    dtype: torch.dtype = getattr(torch, args.dtype)
    sdxl, sizes = outline(None, DTYPE), sized(SDXL._replace(network=unet, vae=vae), dtype)
    settings = _settings(specs, sizes, "--size", args.size, num_steps=args.steps, backend=args.backend)
    to_plan = [_settings(specs, sdxl, "--plan", side, num_steps=STEPS) for side in sides]
    known = hardware(device) | {"cutdiff": cutdiff.__version__}
    result: dict[str, Any] = {"command": command, "hardware": known, "drawn": [], "planned": []}

    def save() -> None:
        if args.json is not None:
            save_json(args.json, result)

    for side, of_side in zip(sides, to_plan, strict=True):
        say(f"planning SDXL at {side}²")
        rows = [{name: _plan(sdxl, one) for name, one in of_row.items()} for of_row in of_side]
        decode = decoding(sdxl, of_side[0]["one"].canvas_size(sdxl.native_size, sdxl.factor))
        part = _part("SDXL", specs, of_side, rows)
        result["planned"].append(part | {"weight_bytes": weight_bytes(sdxl), "decode": decode._asdict()})
        save()
    if not (args.small or device.type == "cuda"):
        say("nothing is drawn: SDXL takes a GPU, and --small draws with a small network")
        return result
    say("counting what each method computes")
    model = cast(random_model(unet, vae, device), dtype)
    rows = [{name: _counted(model, sizes, one) for name, one in of_row.items()} for of_row in settings]
    part = _part("small network" if args.small else "SDXL", specs, settings, rows)
    result["drawn"].append(part | {"weight_bytes": weight_bytes(model), "dtype": args.dtype})
    for _ in trange(args.repeats, desc="rounds", disable=None):
        for row, of_row in zip(rows, settings, strict=True):
            for name, one in of_row.items():
                _time(model, one, row[name])
        save()
    return result


def _settings(specs: Sequence[str], model: Model, flag: str, side: int, **options: Any) -> list[dict[str, Settings]]:
    """The settings of each method by the names of `BATCHES`. BadArgument where something cannot be used."""
    rows = []
    for spec in specs:
        try:
            method = Settings(method=spec).method
        except ValueError as error:
            raise BadArgument(f"--methods {spec}: {error}") from None
        try:
            own = Settings(method=method, height=side, width=side)
            own.canvas_size(model.native_size, model.factor)
        except ValueError as error:
            raise BadArgument(f"{flag} {side}: {error}") from None
        with errors_by_flag():
            own = replace(own, **options)
            make_schedule(own.schedule, own.solver, model.noise, own.num_steps)
        rows.append({name: replace(own, view_batch_size=batch) for name, batch in BATCHES.items()})
    return rows


def _part(model: str, specs: Sequence[str], settings: list[dict[str, Settings]], rows: list[dict[str, Row]]) -> Part:
    first = settings[0]["one"]
    methods = [
        {"method": spec, "options": of_row["one"].described()["method"], **row}
        for spec, of_row, row in zip(specs, settings, rows, strict=True)
    ]
    return {"model": model, "side": first.height, "steps": first.num_steps, "methods": methods}


def _plan(model: Model, settings: Settings) -> Row:
    """The planned cost of one picture."""
    plan = walk(model, settings)
    totals = [stage.total for stage in plan.stages]
    return {
        "evaluations": sum(total.evaluations for total in totals),
        "flops": sum(total.flops for total in totals),
        "live_bytes": plan.peak_bytes - weight_bytes(model),
    }


def _counted(model: Model, sizes: Model, settings: Settings) -> Row:
    """The cost of one picture, counted while it is drawn, beside the planned one."""
    planned = _plan(sizes, replace(settings, view_batch_size=first_view_batch_size(model, settings)))
    row: Row = {"planned": planned, "seconds": []}
    with Meter() as meter:
        _time(model, settings, row)
    row |= {"flops": meter.flops, "seconds": []}
    if model.device.type == "cpu":
        row["live_bytes"] = meter.peak_bytes
    return row


def _time(model: Model, settings: Settings, row: Row) -> None:
    """Draw one picture, and add to a row the seconds, the evaluations, the batch and, on a GPU, the peak memory.

    FloatingPointError if the latents are not finite, because such numbers may take another time.
    """
    memory, began, latents = Memory(model.device), now(model.device), torch.empty(0)
    prepared = prepare(model, "", settings)
    for step in prepared.steps:
        latents = step.latents
    row["seconds"].append(now(model.device) - began)
    if not latents.isfinite().all():
        raise FloatingPointError("latents that were timed hold NaN or infinity")
    work, peak = prepared.denoiser.work, memory.peak(nn.ModuleList())
    row |= {"evaluations": work.evaluations, "view_batch_size": work.view_batch_size}
    if peak is not None:
        row["live_bytes"] = max(peak, row.get("live_bytes", 0))


def report(result: dict[str, Any]) -> str:
    """The table in Markdown, with a line for each method and size, and what it was measured on above it."""
    parts = [*result["drawn"], *result["planned"]]
    lines = [", ".join(f"{key} {value}" for key, value in result["hardware"].items())]
    lines += map(_about, parts)
    columns = ("picture", "method", "evaluations", "TFLOP", "s, one view at once", "s, automatic")
    lines += [f"in brackets: times {parts[0]['methods'][-1]['method']}"] if parts else []
    lines += ["", f"| {' | '.join((*columns, 'peak GB, one at once', 'peak GB, automatic'))} |", "|---" * 8 + "|"]
    for part in parts:
        lines += _lines(part)
    return "\n".join(lines)


def _about(part: Part) -> str:
    """The line above the table that tells of a part."""
    picture = f"{_picture(part)}, {part['steps']} steps"
    weights = f"weights {_giga(part['weight_bytes'])} GB, included"
    if "decode" in part:
        decode = f"to decode {_tera(part['decode']['flops'])} TFLOP, {_giga(part['decode']['peak_bytes'])} GB"
        return f"{picture}: planned, not measured, in {DTYPE}; {weights}; {decode}"
    rows = [row[name] for row in part["methods"] for name in BATCHES]
    rounds, batch = len(rows[0]["seconds"]), part["methods"][0]["automatic"]["view_batch_size"]
    off = {name: max(abs(row["planned"][name] / row[name] - 1) for row in rows) for name in COUNTS}
    planned = ", ".join(f"{COUNTS[name]} {value:.1%}" for name, value in off.items())
    return (
        f"{picture}: measured in {part['dtype']}, {rounds} rounds, median [least – most]; {weights}; "
        f"automatic is {batch or 'all'} at once; the plan is off by at most {planned}"
    )


def _lines(part: Part) -> list[str]:
    """The table's lines of a part; in brackets, the shares of the last method's values."""
    lines = []
    for row in part["methods"]:
        ones, last = ([line[name] for name in BATCHES] for line in (row, part["methods"][-1]))
        pairs = [*zip(ones, last, strict=True)]
        peaks = [[one["live_bytes"] + part["weight_bytes"] for one in pair] for pair in pairs]
        cells = [
            _once(f"{one['evaluations']:,}" for one in ones),
            _once(f"{_tera(one['flops'])} ({one['flops'] / other['flops']:.2f}×)" for one, other in pairs),
            *(_seconds(one, other) for one, other in pairs),
            *(f"{_giga(one)} ({one / other:.2f}×)" for one, other in peaks),
        ]
        lines.append(f"| {_picture(part)} | {row['method']} | {' | '.join(cells)} |")
    return lines


def _seconds(row: Row, last: Row) -> str:
    """Seconds as median, least and most, and the median over the rounds of their share of the last method's."""
    if not row.get("seconds"):
        return "–"
    ratios = [a / b for a, b in zip(row["seconds"], last["seconds"], strict=True)]
    return f"{cell(spread(row['seconds']))} ({spread(ratios)['median']:.2f}×)"


def _once(texts: Iterable[str]) -> str:
    """The texts without repetition: counts do not depend on the view batch size, unless a method of your own does."""
    return " / ".join(dict.fromkeys(texts))


def _picture(part: Part) -> str:
    return f"{part['model']}, {part['side']}²"


def _tera(value: float) -> str:
    return f"{value / 1e12:,.0f}" if value >= 1e14 else f"{value / 1e12:.3g}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g}"
