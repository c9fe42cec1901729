"""Measure methods: `python -m cutdiff.evaluate --methods direct cutdiffusion --sizes 256 --num 200`.

The embedded model, or another of its world, draws the captions of a fixed list of scenes by every method at every size,
and by direct inference at the native size; the pictures are read, counted and compared with true renders. Any model is
measured with --prompts, --references and --features: by FID, KID, IS and CLIP score against images of your own.

Writes to --out the pictures, a folder for each method and size, results.json, table.md and a contact sheet for each
size; a second start goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import BadArgument, Parser
from cutdiff.evaluation import score
from cutdiff.evaluation.cells import Cell, cost, draw, folder_of, picture_paths
from cutdiff.evaluation.references import References, compare
from cutdiff.evaluation.report import save_sheet, table
from cutdiff.evaluation.testbed import Testbed, environment, row_of
from cutdiff.output.images import save_json
from cutdiff.pipeline import plan
from cutdiff.settings import METHOD_NAMES, Settings, nearest

OWN = ("method", "height", "width", "num_steps", "guidance_scale", "seed")
"""Options of a run that have arguments of their own here."""


def measure_scenes(testbed: Testbed, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Draw and score the native pictures and `cells`: a row for each, and one for the truth of each size."""
    testbed.draw(cells)
    rows, seen = [], set()
    for cell in tqdm([testbed.native_cell, *cells], desc="scores", disable=None):
        if cell.side not in seen:
            seen.add(cell.side)
            rows.append(testbed.floor(cell.side))
        rows.append(testbed.row(cell))
    return rows


def measure_prompts(
    model: Model, cells: Sequence[Cell], prompts: Sequence[str], references: References, out: Path, *, batch: int
) -> list[dict[str, Any]]:
    """Draw `cells` for `prompts` and compare them with the references: a row for each."""
    rows = []
    for cell in tqdm(cells, desc="cells", disable=None):
        folder = folder_of(out, cell)
        draw(model, cell, prompts, folder, batch=batch)
        paths = picture_paths(folder, len(prompts))
        scores = compare(paths, prompts, references, model.native_size * model.factor)
        rows.append(row_of(cell.name, cell.side, len(prompts), scores, cost(folder), cell.settings.described()))
    return rows


def main(argv: list[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        rows = _measure(args, ["python", "-m", "cutdiff.evaluate", *(sys.argv[1:] if argv is None else argv)])
    except (BadArgument, ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"cutdiff: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    print(table(rows))
    return 0


def _measure(args: argparse.Namespace, command: list[str]) -> list[dict[str, Any]]:
    """Check, draw, score and write: the rows of the table."""
    base = Settings(**dict(args.set), num_steps=args.steps, guidance_scale=args.guidance_scale, seed=args.seed)
    sizes = [(size, method) for size in args.sizes for method in args.methods]
    cells = [Cell(method, replace(base, method=method, height=size, width=size)) for size, method in sizes]
    prompts = _prompts(args)
    device, references = _device(args.device), None
    if args.references is not None:
        references = References.load(args.references, args.features, args.clip, device)
    model = cutdiff.load(args.model, device=device, dtype=getattr(torch, args.dtype))
    native = model.native_size * model.factor
    for cell in cells:
        plan(model, cell.settings)
        if references is not None and cell.side < native:
            raise ValueError(f"--sizes {cell.side}: a picture smaller than the native {native} px has no crops of it")
    if references is None:
        testbed = Testbed(model, base, args.num, args.out, args.batch, args.caption_seed)
        rows, cells = measure_scenes(testbed, cells), [testbed.native_cell, *cells]
        told = {"batch": args.batch, "caption_seed": args.caption_seed}
    else:
        rows = measure_prompts(model, cells, prompts, references, args.out, batch=args.batch)
        told = {"batch": args.batch, "prompts": prompts}
    result = {"cells": rows, "command": command, **told, **environment(model), "source": model.source}
    save_json(args.out / "results.json", result)
    (args.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    for size in dict.fromkeys(cell.side for cell in cells):
        folders = [folder_of(args.out, cell) for cell in cells if cell.side == size]
        save_sheet(args.out / f"contact-{size}.png", folders, num=rows[0]["num"])
    return rows


def _device(name: str | None) -> torch.device:
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name} is not available here: use --device cpu") from None


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of --prompts, a line each; none where captions of scenes are drawn. ValueError where arguments misfit."""
    for name, least in (("num", 2), ("batch", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    given = {name: getattr(args, name) for name in ("prompts", "references", "features")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if args.clip is not None:
            raise ValueError("--clip goes with --prompts, --references and --features")
        score.scenes(args.num, args.caption_seed)
        return []
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given too: a model is compared with images of your own by all")
    lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][: args.num]
    if len(prompts) < 2:
        raise ValueError(f"--prompts {args.prompts} holds {len(prompts)} prompts: 2 are needed, one a line")
    return prompts


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = Parser(
        prog="python -m cutdiff.evaluate",
        description="Draw and measure methods against true renders, or images of your own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=list(METHOD_NAMES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256], metavar="PX", help="sides of square pictures")
    parser.add_argument("--num", type=int, default=200, metavar="N", help="pictures of each method and size")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, metavar="N")
    parser.add_argument("--guidance-scale", type=float, default=defaults.guidance_scale, metavar="G")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="of the first picture")
    parser.add_argument(
        "--set", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="any other option of a run, by its name in Settings, for instance interaction=none; repeatable",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="pictures drawn at once")
    parser.add_argument("--model", metavar="PATH", help="none: the embedded one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), metavar="DIR")
    parser.add_argument(
        "--caption-seed", type=int, default=score.CAPTION_SEED, metavar="S",
        help="of the scenes; judge on other ones than you chose by",
    )  # fmt: skip
    real = parser.add_argument_group("any model, against images of your own")
    real.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line; the first --num are drawn")
    real.add_argument("--references", type=Path, metavar="DIR", help="images to compare with")
    real.add_argument("--features", type=Path, metavar="FILE", help="TorchScript, such as inception-2015-12-05.pt")
    real.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model, for the CLIP score")
    return parser


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE with the value in the type of the option's default."""
    name, separator, value = text.partition("=")
    known = {field.name: field.default for field in fields(Settings) if field.name not in OWN}
    if not separator or name not in known:
        names = f"{', '.join(known)}{nearest(name, known)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of {names}")
    try:
        return name, json.loads(value) if not isinstance(known[name], str) else value
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no number") from None


if __name__ == "__main__":
    sys.exit(main())
