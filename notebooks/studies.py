"""Draw and measure the studies that the notebooks show: `python notebooks/studies.py table ablation --out runs/studies`.

Each cell's result goes to results/<cell>-<size>.json with everything needed to repeat it; a cell whose result is there
is left alone, so that a study can be stopped, continued, extended, and divided among machines (--part 1/2, --part 2/2).
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

import cutdiff
import torch
from cutdiff.methods import METHODS
from cutdiff.scenes.cells import Cell
from cutdiff.scenes.testbed import Testbed, environment
from cutdiff.settings import Settings
from variants import contiguous_patches, conditioned, cosine_weights, interaction_every, without_jitter

RESULTS = Path(__file__).with_name("results")
BASE = Settings(num_steps=10, guidance_scale=4.0)
"""Of every cell that does not say otherwise. Twice the steps change little (study `switch`), and cost twice as much."""


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
    "limit": [
        cell(method, side * 128) for side in range(1, 7) for method in ("direct", "cutdiffusion", "magnify")
    ],
}  # fmt: skip


def measure(cells: Sequence[Cell], testbed: Testbed) -> None:
    """Draw and score the cells that have no result yet; ValueError where one has another cell's."""
    told = {"batch": testbed.batch, "caption_seed": testbed.caption_seed, **environment(testbed.model)}
    for cell in cells:
        path = result_path(cell)
        settings = json.loads(json.dumps(cell.settings.described()))
        if path.exists():
            if json.loads(path.read_text())["settings"] != settings:
                raise ValueError(f"{path} is the result of other settings: delete it to measure again")
            continue
        testbed.draw([cell])
        save(path, {**testbed.row(cell), **told})
        print(f"wrote {path.name}", flush=True)


def measure_floor(side: int, testbed: Testbed) -> None:
    """What other true renders would score at a size, and the native pictures at theirs."""
    path = RESULTS / f"truth-{side}.json"
    if not path.exists():
        save(path, testbed.floor(side))


def result_path(cell: Cell) -> Path:
    return RESULTS / f"{cell.name}-{cell.side}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python notebooks/studies.py", description=__doc__.partition("\n")[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--num", type=int, default=200, metavar="N", help="pictures of each cell (%(default)s)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth cell from the Kth on (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="pictures drawn at once (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="the pictures (%(default)s)")
    args = parser.parse_args(argv)
    part, parts = map(int, args.part.split("/"))
    model = cutdiff.load(device=args.device, dtype=getattr(torch, args.dtype))
    testbed = Testbed(model, BASE, args.num, args.out, args.batch)
    cells = {result_path(cell): cell for study in args.studies for cell in STUDIES[study]}.values()
    mine = list(cells)[part - 1 :: parts]
    measure(mine, testbed)
    for side in dict.fromkeys(cell.side for cell in mine):
        measure_floor(side, testbed)


if __name__ == "__main__":
    main()
