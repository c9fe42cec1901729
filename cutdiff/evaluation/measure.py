"""The work of `python -m cutdiff.evaluate`: draw, score, and write the results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import cutdiff
from cutdiff.checkpoint.locate import name_of
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import as_taken
from cutdiff.cli.device import device_of, dtype_of, tell_dtype
from cutdiff.cli.promptfile import MAX_BYTES
from cutdiff.evaluation import score
from cutdiff.evaluation.cells import Cell, cost, draw_cells, folder_of, picture_paths
from cutdiff.evaluation.features import DIM, PIXELS
from cutdiff.evaluation.page import save_report
from cutdiff.evaluation.references import References, compare
from cutdiff.evaluation.report import few_pictures, save_sheet, table
from cutdiff.evaluation.testbed import NATIVE, Testbed, environment, row_of
from cutdiff.files import contents
from cutdiff.options import options_of, written
from cutdiff.output.images import save_json, write_atomically
from cutdiff.parallel.lines import say
from cutdiff.pipeline import canvas_and_schedule
from cutdiff.settings import Settings, left_to_model


def measure(args: argparse.Namespace, command: list[str]) -> str:
    """Check the arguments, draw, score and write the results; returns the table."""
    options, own = dict(args.set), {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    if "guidance_scale" in options and own:
        raise ValueError("--set guidance_scale goes in the place of --guidance-scale: give one of them")
    own |= {} if args.steps is None else {"num_steps": args.steps}
    base = Settings(seed=args.seed)
    cells = [
        Cell(_named(method, options), replace(base, method=method, height=size, width=size, **own, **options))
        for size in args.sizes
        for method in args.methods
    ]
    of_run = {name: value for name, value in options.items() if name in options_of(base)}
    base = replace(base, method="direct", **of_run, **own)
    shared = {name: value for name, value in options.items() if base.has(name)}
    prompts = _prompts(args)
    caption_seed = score.CAPTION_SEED if args.caption_seed is None else args.caption_seed
    device, references = device_of(args.device), None
    if args.references is not None:
        references = References.load(args.references, args.features, args.clip, device)
    else:
        score.scenes(args.num, caption_seed)
    model = cutdiff.load(args.model, device=device, dtype=dtype_of(args.dtype, device), variant=args.variant)
    if left := left_to_model({**own, **options}, model.preferred):
        cells, base = [replace(cell, settings=replace(cell.settings, **left)) for cell in cells], replace(base, **left)
    native = model.native_size * model.factor
    if references is None and native < PIXELS:
        raise ValueError(
            f"{model.source} has a native size of {native} px: pictures are measured in crops of {PIXELS} px"
        )
    least, what = (PIXELS, "the crops of") if references is None else (native, "the native")
    for cell in cells:
        canvas_and_schedule(model, cell.settings)
        if cell.side < least:
            raise ValueError(f"--sizes {cell.side}: a picture smaller than {what} {least} px has no crops of that size")
    base = replace(base, **shared)
    testbed = Testbed(model, base, args.num, args.out, args.batch, caption_seed, _named(NATIVE, shared))
    tell_dtype(args.dtype, model.device, model.dtype)
    if left:
        say(as_taken(left))
    if references is None:
        rows, cells = measure_scenes(testbed, cells), [testbed.native_cell, *cells]
        drawn: dict[str, Any] = {"batch": args.batch, "caption_seed": caption_seed}
    else:
        rows = measure_prompts(model, cells, prompts, references, args.out, batch=args.batch)
        drawn = {"batch": args.batch, "prompts": prompts}
    name, features = ("Fréchet", DIM) if references is None else ("FID", references.num_features)
    if rows[0]["num"] <= features:
        drawn["notice"] = few_pictures(rows[0]["num"], name, features)
        say(drawn["notice"])
    result = {"cells": rows, "command": command, **drawn, **environment(model), "source": name_of(model.source)}
    save_json(args.out / "results.json", result)
    text = table(rows)
    write_atomically(args.out / "table.md", lambda file: file.write(f"{text}\n".encode()))
    for size in dict.fromkeys(cell.side for cell in cells):
        folders = [folder_of(args.out, cell) for cell in cells if cell.side == size]
        save_sheet(args.out / f"contact-{size}.png", folders, num=rows[0]["num"])
    folders = {(cell.name, cell.side): folder_of(args.out, cell) for cell in cells}
    save_report(args.out / "report.html", "Evaluation", result, folders)
    return text


def measure_scenes(testbed: Testbed, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Draw and score the native pictures and `cells`; returns a row for each, and one for the truth of each size."""
    testbed.draw(cells)
    rows: list[dict[str, Any]] = []
    sides: set[int] = set()
    for cell in tqdm([testbed.native_cell, *cells], desc="scores", disable=None):
        if cell.side not in sides:
            sides.add(cell.side)
            rows.append(testbed.floor(cell.side))
        rows.append(testbed.row(cell))
    return rows


def measure_prompts(
    model: Model, cells: Sequence[Cell], prompts: Sequence[str], references: References, out: Path, *, batch: int
) -> list[dict[str, Any]]:
    """Draw `cells` for `prompts` and compare them with the references; returns a row for each."""
    draw_cells(model, cells, prompts, out, batch=batch)
    rows = []
    for cell in tqdm(cells, desc="scores", disable=None):
        folder = folder_of(out, cell)
        paths = picture_paths(folder, len(prompts))
        scores = compare(paths, prompts, references, model.native_size * model.factor)
        rows.append(row_of(cell.name, cell.side, len(prompts), scores, cost(folder), cell.settings.described()))
    return rows


def _named(name: str, options: dict[str, Any]) -> str:
    """The name of a cell, which is its spec with the options that --set adds; a spec among their values is quoted."""
    texts = {option: written(value) for option, value in options.items()}
    quoted = {option: repr(text) if "=" in text else text for option, text in texts.items()}
    return ",".join([name, *(f"{option}={text}" for option, text in quoted.items())])


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompts, one on each line; none if captions of scenes are drawn."""
    if args.prompts is None:
        return []
    try:
        lines = [line.strip() for line in contents(args.prompts, MAX_BYTES).decode().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {args.prompts}: byte {error.start + 1} is not UTF-8: save it as UTF-8") from None
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--prompts {error}") from None
    prompts = [line for line in lines if line][: args.num]
    if len(prompts) < 2:
        raise ValueError(f"--prompts {args.prompts} holds {len(prompts)} prompts: 2 are needed, one a line")
    return prompts
