"""Measure methods against the truth: `python -m cutdiff.evaluate --methods direct cutdiffusion --sizes 256 --num 200`.

Draws the captions of a fixed list of scenes by every method at every size, and by direct inference at the native size;
then reads, counts and compares the pictures with true renders. Writes to --out the pictures, a folder for each
method and size, results.json, table.md and a contact sheet for each size; a second start goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import cutdiff
from cutdiff.model import Model
from cutdiff.pipeline import plan
from cutdiff.scenes import score, world
from cutdiff.scenes.cells import Cell, cost, draw, pictures
from cutdiff.scenes.features import FeatureNet, load_features
from cutdiff.scenes.report import contact_sheet, table
from cutdiff.scenes.world import Scenes
from cutdiff.settings import METHOD_NAMES, Settings

NATIVE, FLOOR = "native", "other truth"
"""Names of the cells that no method draws: direct inference at native size, and true renders compared with others."""


def evaluate(
    model: Model, cells: Sequence[Cell], num: int, out: Path, *, batch: int, network: FeatureNet
) -> dict[str, Any]:
    """Draw and score `cells` and the native pictures: what results.json holds. Writes pictures below `out`."""
    native = model.native_size * model.factor
    first = cells[0].settings
    base = Cell(NATIVE, replace(first, method="direct", height=native, width=native))
    scenes = score.scenes(num)
    captions = world.captions(scenes.choices)
    every = [base, *cells]
    with tqdm(total=len(every) * num, unit="picture", disable=None) as bar:
        for cell in every:
            bar.set_description(f"{cell.name} {cell.side}", refresh=False)
            draw(model, cell, captions, out / folder_of(cell), batch=batch, on_batch=bar.update)
    rows, truths = [], {}
    natives = pictures(out / folder_of(base), num)
    for cell in tqdm(every, desc="scores", disable=None):
        side = cell.side
        if side not in truths:
            truths[side] = score.gather_facts(score.true_renders(scenes, side), network, native)
            _save_sheet(out / f"contact-{side}.png", [out / folder_of(c) for c in every if c.side == side], num)
            rows.append(_floor(scenes, truths[side], side, network, native))
        images = pictures(out / folder_of(cell), num)
        facts = score.gather_facts(images, network, native)
        scored = score.score(
            images,
            scenes.choices,
            facts,
            truths[side],
            None if cell is base else natives,
            native=native,
            border=(cell.settings.stride or model.native_size // 2) * model.factor,
        )
        rows.append(_row(cell.name, cell.side, scored, cost(out / folder_of(cell)), asdict(cell.settings)))
    return {"cells": rows, "num": num, "batch": batch, "caption_seed": score.CAPTION_SEED}


def folder_of(cell: Cell) -> str:
    return f"{cell.name}-{cell.side}"


def _floor(scenes: Scenes, truth: score.Facts, side: int, network: FeatureNet, native: int) -> dict[str, Any]:
    """Other true renders as if a method had drawn them: what a perfect one would score."""
    others = score.scenes(len(scenes), score.FLOOR_SEED)
    images = score.true_renders(others, side)
    facts = score.gather_facts(images, network, native)
    scored = score.score(images, others.choices, facts, truth, None, native=native, border=native // 2)
    return _row(FLOOR, side, scored, {}, {})


def _row(
    name: str, side: int, scored: dict[str, score.Score], spent: dict[str, float | None], settings: dict[str, Any]
) -> dict[str, Any]:
    scores = {key: asdict(value) for key, value in scored.items()}
    return {"name": name, "size": side, "scores": scores, "cost": spent, "settings": settings}


def _save_sheet(path: Path, folders: Sequence[Path], num: int) -> None:
    sheet = contact_sheet([pictures(folder, min(num, 8)) for folder in folders])
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        base = Settings(**dict(args.set), num_steps=args.steps, guidance_scale=args.guidance_scale, seed=args.seed)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = cutdiff.load(args.model, device=device, dtype=getattr(torch, args.dtype))
        cells = [
            Cell(method, replace(base, method=method, height=size, width=size))
            for size in args.sizes
            for method in args.methods
        ]
        for cell in cells:
            plan(model, cell.settings)
        score.scenes(args.num)
        network = load_features(device="cpu")
        result = evaluate(model, cells, args.num, args.out, batch=args.batch, network=network)
    except (ValueError, TypeError, OSError) as error:
        print(f"cutdiff: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    result |= {
        "command": ["python", "-m", "cutdiff.evaluate", *(sys.argv[1:] if argv is None else argv)],
        "model": {"source": model.source, "sha256": model.hashes},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "versions": {"cutdiff": cutdiff.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result["cells"])
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m cutdiff.evaluate",
        description="Draw and measure methods against true renders of the same captions.",
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
    return parser


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE with the value in the type of the option's default."""
    name, separator, value = text.partition("=")
    known = {field.name: field.default for field in fields(Settings)}
    if not separator or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of {', '.join(known)}")
    try:
        return name, json.loads(value) if not isinstance(known[name], str) else value
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no number") from None


if __name__ == "__main__":
    sys.exit(main())
