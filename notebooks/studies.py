"""Draw and measure what the notebooks show: `python notebooks/studies.py table-2x2 ablation --out runs/studies`.

Each cell's result goes to results/<cell>-<size>.json with everything needed to repeat it. A cell whose result is there,
of as many pictures, is left alone: a study can be stopped, continued, extended, and divided (--part 1/2, --part 2/2).
Pictures stay in --out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from variants import conditioned, contiguous_patches, cosine_weights, interaction_every, not_held, without_jitter

import cutdiff
from cutdiff.methods import METHODS
from cutdiff.scenes.cells import Cell, folder_of
from cutdiff.scenes.report import save_sheet
from cutdiff.scenes.testbed import Testbed, environment
from cutdiff.settings import Settings

RESULTS = Path(__file__).with_name("results")
BASE = Settings(num_steps=10, guidance_scale=4.0)
"""Of every cell that does not say otherwise. Twice the steps change little (study `switch`), and cost twice as much."""


CHOICE_SEED = 5000
CHOICE = {"seed": CHOICE_SEED}
"""Study `choice`, by which magnify's settings were chosen: seeds and captions that no other study draws."""
MAGNIFY = ({}, {"structure_fraction": 0.5}, {"structure_fraction": 0.7}, {"detail_guidance_scale": 4.0})


def cell(method: Any = "cutdiffusion", size: int = 256, **options: Any) -> Cell:
    """Named by its method and by what differs from `BASE`."""
    settings = replace(BASE, method=method, height=size, width=size, **options)
    return Cell(",".join([settings.method_name, *(f"{name}={value}" for name, value in options.items())]), settings)


STUDIES: dict[str, list[Cell]] = {
    "table-2x2": [cell(method) for method in METHODS],
    "table-3x3": [cell(method, 384) for method in METHODS],
    "table-4x4": [cell(method, 512) for method in METHODS],
    "ablation": [
        cell(),
        cell(interaction="none"),
        cell(contiguous_patches),
        cell(structure_fraction=1.0),
        cell(structure_fraction=0.0),
        cell(interaction="pixel"),
        *(cell(interaction_every(k)) for k in (2, 3, 5)),
        cell(conditioned("target", "native")),
        cell(conditioned("native", "target")),
        cell(size_conditioning="target"),
    ],
    "switch": [
        *(cell(structure_fraction=share) for share in (0.0, 0.3, 0.7, 0.9, 1.0)),
        *(cell(stride=stride) for stride in (4, 12, 16)),
        cell(without_jitter),
        cell(cosine_weights),
        *(cell(num_steps=steps) for steps in (5, 20)),
        *(cell(guidance_scale=scale) for scale in (1.0, 2.0, 7.5)),
        cell(detail_guidance_scale=1.0),
        cell(solver="ddim"),
    ],
    "switch-4x4": [cell(size=512, structure_fraction=share) for share in (0.7, 0.9)],
    "choice": [
        *(cell("magnify", 512, **CHOICE, **options) for options in MAGNIFY),
        cell(not_held, 512, **CHOICE),
        *(cell(method, 256, **CHOICE) for method in ("magnify", "cutdiffusion")),
    ],
    "limit": [
        cell("direct", 128),  # a 1×1 grid, where all three are one
        *(cell(method, side * 128) for side in range(2, 7) for method in ("direct", "cutdiffusion", "magnify")),
    ],
}  # fmt: skip


def measure(cells: Sequence[Cell], testbed: Testbed, results: Path = RESULTS) -> None:
    """Draw and score the cells that have no result yet; ValueError where one has another cell's."""
    told = {"batch": testbed.batch, "caption_seed": testbed.caption_seed, **environment(testbed.model)}
    for cell in cells:
        path = result_path(cell, results)
        settings = json.loads(json.dumps(cell.settings.described()))
        known = json.loads(path.read_text()) if path.exists() else None
        if known is not None and known["settings"] != settings:
            raise ValueError(f"{path} is the result of other settings: delete it to measure again")
        if known is not None and known["num"] >= testbed.num:
            continue
        testbed.draw([cell])
        save(path, {**testbed.row(cell), **told})
        print(f"wrote {path.name}", flush=True)


def measure_floor(side: int, testbed: Testbed, results: Path = RESULTS) -> None:
    """What other true renders would score at a size."""
    path = results / f"truth-{side}.json"
    if not path.exists():
        save(path, testbed.floor(side))


def save_sheets(study: str, testbed: Testbed, results: Path = RESULTS) -> None:
    """A contact sheet for each size of a study whose pictures are all here."""
    for side in dict.fromkeys(cell.side for cell in STUDIES[study]):
        folders = [folder_of(testbed.folder, cell) for cell in STUDIES[study] if cell.side == side]
        if all(folder.exists() for folder in folders):
            save_sheet(results / f"{study}-{side}.png", folders, testbed.num)


def result_path(cell: Cell, results: Path = RESULTS) -> Path:
    return results / f"{cell.name}-{cell.side}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw and measure studies of the testbed.")
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--num", type=int, default=200, metavar="N", help="pictures of each cell (%(default)s)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth cell from the Kth on (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="pictures drawn at once (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--model", type=Path, help="another model of the scenes, with --results of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one file a cell (results/)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="the pictures (%(default)s)")
    args = parser.parse_args(argv)
    if args.model is not None and args.results == RESULTS:
        parser.error("--model needs --results of its own: those here are the embedded model's")
    part, parts = map(int, args.part.split("/"))
    model = cutdiff.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    judged = Testbed(model, BASE, args.num, args.out, args.batch)
    chosen_by = Testbed(model, replace(BASE, **CHOICE), args.num, args.out / "choice", args.batch, CHOICE_SEED)
    for study in args.studies:
        mine = STUDIES[study][part - 1 :: parts]
        testbed = chosen_by if study == "choice" else judged
        measure(mine, testbed, args.results)
        for side in dict.fromkeys(cell.side for cell in mine):
            measure_floor(side, judged, args.results)
        save_sheets(study, testbed, args.results)


if __name__ == "__main__":
    main()
