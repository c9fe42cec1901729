"""Draw and measure what the notebooks show: `python notebooks/studies.py table-2x2 ablation --out runs/studies`.

The result of each cell goes to results/<cell>-<size>.json with everything that is needed to repeat it. A cell that has
a result of as many pictures is left alone, so a study can be stopped, continued, extended, and divided (--part 1/2,
--part 2/2). The pictures stay in --out, with a page for each study.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from variants import (
    conditioned,
    contiguous_patches,
    cosine_weights,
    deep_reused,
    deep_reused_direct,
    interaction_every,
    not_held,
    told_native,
    without_jitter,
)

import cutdiff
from cutdiff.cli.arguments import AUTO, BadArgument, Parser
from cutdiff.cli.device import device_of, dtype_of, tell_dtype
from cutdiff.evaluation.cells import Cell, folder_of, picture_paths
from cutdiff.evaluation.page import save_report
from cutdiff.evaluation.report import save_sheet
from cutdiff.evaluation.testbed import Testbed, environment
from cutdiff.options import split
from cutdiff.output.images import save_json
from cutdiff.settings import Settings
from cutdiff.sources import described
from cutdiff.specs import METHODS, TABLES, options_of, resolve

RESULTS = Path(__file__).with_name("results")
BASE = Settings(num_steps=10, guidance_scale=4.0, view_batch_size=16)
"""The options of every cell that names no others. Twice the steps help a little (study `switch`) at twice the cost."""
CHOICE_SEED = 5000
CHOICE = {"seed": CHOICE_SEED}
"""The options of study `choice`, by which magnify's were chosen, on seeds and captions that no other study draws."""
MAGNIFY = ({}, {"structure_fraction": 0.5}, {"structure_fraction": 0.7}, {"detail_guidance_scale": 4.0})
"""The options of magnify that study `choice` compares."""


def cell(method: Any = "cutdiffusion", size: int = 256, **options: Any) -> Cell:
    """A cell that is named by its method and by the options in which it differs from `BASE`."""
    settings = replace(BASE, method=method, height=size, width=size, **options)
    return Cell(",".join([settings.method_name, *(f"{name}={value}" for name, value in options.items())]), settings)


FLOW = Path(__file__).parents[1] / "weights" / "scenes-flow"
"""The transformer of studies `flow-…`, whose results have a folder of their own."""
INSIDE_A_UNET = ("attention_scaling", "scalecrafter", "hidiffusion", "freescale", "accdiffusion")
"""The methods that need what only a U-Net has inside."""
POSITIONED = ("interpolation", "ntk", "yarn", "dype", "ultraimage")
"""The positions with which study `flow-…` draws the whole canvas at once."""
WHOLE = ("direct", "attention_scaling", "scalecrafter", "hidiffusion")
"""The methods that show the network the whole canvas at all steps."""
MENDED = {"structure": "mean", "detail_guidance_scale": 1.0, "upsample_guidance": 1.0}
"""The options by which Upsample guidance draws CutDiffusion's structure, and guides its views."""
SPLITS = ("wavelet", "butterworth", "down_up", "gaussian")
"""The splits that study `splits` compares."""
SPACES = ("pixels", "latents")
"""The spaces in which study `spaces` enlarges pictures."""
CFG, BY_BAND = "cfg,guidance_scale=4", "by_band,guidance_scale=4"
"""The guidances that study `bands` compares."""
BEST = ("climb", "magnify", "diffusehigh", "upscale")
"""The methods, besides CutDiffusion mended, that study `fifty` draws in fifty steps."""
FEW = {"solver": "lcm", "guidance_scale": 1.0}
"""The options of study `few-steps`, which are those that its LoRA was made for."""
LORA = Path(__file__).parents[1] / "weights" / "scenes-lcm.safetensors"
"""The LoRA of study `few-steps`, whose results have a folder of their own."""
STRIDES: tuple[dict[str, Any], ...] = ({}, {"stride": 10}, {"stride": 12})
"""The strides of study `seams`, half, 5/8 and 3/4 of a view, the first of which is the default."""
WEIGHTS: tuple[dict[str, Any], ...] = ({}, {"view_weights": "gaussian"}, {"view_weights": "cosine"})
"""The weights of views of study `seams`, the first of which are the default, uniform ones."""
SHARES = tuple(i / 10 for i in range(10))
"""The shares of the steps that the details of study `entry` leave out: they begin at sigmas from 8.4 to 0.04."""


def on_flow(size: int) -> list[Cell]:
    """The methods that a transformer can draw with, and direct inference with other positions."""
    options = {"frecas": {"map_weight": 0.0}}  # its attention maps are of a U-Net
    return [
        *(cell(method, size, **options.get(method, {})) for method in METHODS if method not in INSIDE_A_UNET),
        *(cell("direct", size, positions=positions) for positions in POSITIONED),
    ]


STUDIES: dict[str, list[Cell]] = {
    "table-2x2": [cell(method) for method in METHODS],
    "table-3x3": [cell(method, 384) for method in METHODS],
    "table-4x4": [cell(method, 512) for method in METHODS],
    "table-6x6": [cell(method, 768) for method in METHODS],
    "mended": [cell(size=size, **MENDED) for size in (256, 512)],
    "spaces": [
        *(cell(method, enlarged_in=space) for method in ("rectifiedhr", "diffusehigh") for space in SPACES),
        *(cell("climb", enlarged_in=space, sharpness=0.0, corrections=0) for space in SPACES),
    ],
    "splits": [
        *(cell("diffusehigh", held_band=split) for split in SPLITS),
        *(cell("climb", hold_split=split) for split in SPLITS),
        cell("climb", hold="trajectory"),
        cell("climb", hold="none"),
    ],
    "bands": [
        *(cell(method, guidance=BY_BAND) for method in ("multidiffusion", "cutdiffusion", "demofusion")),
        *(cell("diffusehigh", guidance=guidance, detail_guidance_scale=None) for guidance in (CFG, BY_BAND)),
        *(cell("climb", guidance=guidance, detail_guidance_scale=4.0) for guidance in (CFG, BY_BAND)),
    ],
    "overlaps": [cell(method, overlaps="swap") for method in ("multidiffusion", "cutdiffusion", "climb")],
    "entry": [
        *(cell("climb", structure_fraction=share) for share in SHARES),
        *(cell("climb", hold="none", structure_fraction=SHARES[i]) for i in (0, 1, 3)),
    ],
    "fifty": [
        *(cell(method, size, num_steps=50) for size in (256, 512) for method in BEST),
        *(cell(size=size, num_steps=50, **MENDED) for size in (256, 512)),
    ],
    "few-steps": [
        *(cell("direct", 128, num_steps=steps, **FEW) for steps in (1, 2, 4, 8)),
        *(cell(method, num_steps=steps, **FEW) for steps in (4, 8) for method in METHODS),
    ],
    "undistilled": [
        *(cell("direct", 128, num_steps=steps, **FEW) for steps in (1, 2, 4, 8)),
        *(cell("direct", 128, num_steps=steps) for steps in (1, 2, 4, 8)),
    ],
    "told-native": [cell(told_native(resolve("method", name))) for name in WHOLE],
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
    "approximations": [
        cell(),
        *(cell(guidance_interval=interval) for interval in ((0.2, 1.0), (0.0, 0.8))),
        cell(deep_reused(2, "structure")),
        cell(deep_reused(2, "detail")),
        cell("direct", 128),
        cell(deep_reused_direct(2), 128),
    ],
    "seams": [
        cell(method, **stride, **weights)
        for method in ("multidiffusion", "cutdiffusion")
        for stride in STRIDES
        for weights in WEIGHTS
    ],
    "switch-4x4": [cell(size=512, structure_fraction=share) for share in (0.7, 0.9)],
    "choice": [
        *(cell("magnify", 512, **CHOICE, **options) for options in MAGNIFY),
        cell(not_held, 512, **CHOICE),
        *(cell(method, 256, **CHOICE) for method in ("magnify", "cutdiffusion")),
    ],
    "better": [cell(method, size) for size in (256, 512) for method in ("cutdiffusion", "demofusion", "magnify")],
    "flow-native": [cell("direct", 128)],
    **{f"flow-{n}x{n}": on_flow(128 * n) for n in (2, 3, 4)},
    "flow-choice": [
        *(cell("direct", 128, **CHOICE, guidance_scale=scale) for scale in (2.0, 3.0, 4.0, 6.0)),
        *(cell("direct", 128, **CHOICE, shift=shift) for shift in (1.5, 2.0, 3.0)),
        *(cell("direct", 128, **CHOICE, num_steps=steps) for steps in (20, 50)),
    ],
    "limit": [
        cell("direct", 128),  # a 1×1 grid, on which all three methods are one
        *(cell(method, side * 128) for side in range(2, 7) for method in ("direct", "cutdiffusion", "magnify")),
    ],
}  # fmt: skip


def measure(cells: Sequence[Cell], testbed: Testbed, results: Path = RESULTS) -> None:
    """Draw and score the cells that have no result yet; ValueError if one has the result of another cell."""
    for cell in cells:
        path = result_path(cell, results)
        if known(path, cell.settings, testbed):
            print(f"{path.name} is there, of {testbed.num} pictures or more", flush=True)
        else:
            testbed.draw([cell])
            save(path, testbed.row(cell), testbed)


def measure_floor(side: int, testbed: Testbed, results: Path = RESULTS) -> None:
    """Measure the scores of other true renders at a size, if they have no result yet."""
    path = results / f"truth-{side}.json"
    if not known(path, None, testbed):
        save(path, testbed.floor(side), testbed)


def known(path: Path, settings: Settings | None, testbed: Testbed) -> bool:
    """True if there is a result of as many pictures; ValueError if it is the result of something else.

    True renders have no settings.
    """
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    wanted = {"caption_seed": testbed.caption_seed, "model": environment(testbed.model)["model"], "settings": {}}
    if settings is not None:
        wanted["settings"] = json.loads(json.dumps(settings.described()))
        result["settings"] = completed(result["settings"], settings)
    for name, value in wanted.items():
        if result[name] != value:
            raise ValueError(f"{path} is the result of another {name}: delete it to measure again")
    return result["num"] >= testbed.num


def completed(settings: dict[str, Any], wanted: Settings) -> dict[str, Any]:
    """The settings of a result, completed with the defaults of options that did not exist when it was measured."""
    complete = {**json.loads(json.dumps(Settings().described())), **settings}
    for kind in TABLES:
        name, *given = split(complete[kind])
        options = {option.strip(): value.strip() for option, _, value in (part.partition("=") for part in given)}
        defaults = {option: described(known.default) for option, known in options_of(getattr(wanted, kind)).items()}
        complete[kind] = ",".join([name, *(f"{option}={value}" for option, value in {**defaults, **options}.items())])
    return complete


def save_sheets(study: str, testbed: Testbed, results: Path = RESULTS) -> None:
    """Save a contact sheet for each size of a study, if all of its pictures are here."""
    for side in dict.fromkeys(cell.side for cell in STUDIES[study]):
        folders = [folder_of(testbed.folder, cell) for cell in STUDIES[study] if cell.side == side]
        if all(path.exists() for folder in folders for path in picture_paths(folder, min(8, testbed.num))):
            save_sheet(results / f"{study}-{side}.png", folders, testbed.num)


def save_page(study: str, testbed: Testbed, results: Path = RESULTS) -> None:
    """Save a page of the results of a study beside its pictures, with those that are here."""
    cells = [cell for cell in STUDIES[study] if result_path(cell, results).exists()]
    rows = [json.loads(path.read_text()) for path in (result_path(cell, results) for cell in cells)]
    folders = {(cell.name, cell.side): folder_of(testbed.folder, cell) for cell in cells}
    here = {key: folder for key, folder in folders.items() if (folder / "cell.json").exists()}
    how = {"batch": testbed.batch, "caption_seed": testbed.caption_seed, **environment(testbed.model)}
    if rows:
        save_report(testbed.folder / f"{study}.html", f"Study {study}", {"cells": rows, **how}, here)


def result_path(cell: Cell, results: Path = RESULTS) -> Path:
    """The file of a cell's result."""
    return results / f"{cell.name}-{cell.side}.json"


def save(path: Path, result: dict[str, Any], testbed: Testbed) -> None:
    """Write a result, without the values of single pictures, with everything that is needed to repeat it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ("value", "low", "high")
    scores = {name: {key: score[key] for key in kept} for name, score in result["scores"].items()}
    how = {"batch": testbed.batch, "caption_seed": testbed.caption_seed, **environment(testbed.model)}
    save_json(path, {**result, "scores": scores, **how})
    print(f"wrote {path.name}", flush=True)


def main(argv: list[str] | None = None) -> int:
    try:
        _run(_parse(argv))
    except (BadArgument, ValueError, FileNotFoundError) as error:
        print(f"studies: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Draw and measure studies of the testbed.")
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument(
        "--num", type=int, default=200, metavar="N", help="number of pictures of each cell (%(default)s)"
    )
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every Nth cell from the Kth on (1/1)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="B", help="number of pictures drawn at once (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=(AUTO, "float32", "bfloat16"), default=AUTO,
        help="auto is bfloat16 where the machine multiplies it in hardware, else float32 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")
    parser.add_argument("--model", type=Path, help="another model of the scenes, with --results of its own")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the results, a file for each cell (results/)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args(argv)
    if args.model is not None and args.results.resolve() == RESULTS.resolve():
        parser.error("--model needs --results of its own: those here are the embedded model's")
    return args


def _run(args: argparse.Namespace) -> None:
    part, parts = args.part
    device = device_of(args.device)
    loaded = partial(cutdiff.load, device=device, dtype=dtype_of(args.dtype, device))
    model = loaded(args.model)
    tell_dtype(args.dtype, model.device, model.dtype)
    judged = Testbed(model, BASE, args.num, args.out, args.batch)
    for study in args.studies:
        mine, testbed, results = STUDIES[study][part - 1 :: parts], judged, args.results
        if study.startswith("flow-"):
            testbed, results = replace(judged, model=loaded(FLOW), folder=args.out / "flow"), results / "flow"
        if study.endswith("choice"):
            base = replace(BASE, **CHOICE)
            testbed = replace(testbed, base=base, folder=testbed.folder / study, caption_seed=CHOICE_SEED)
        elif study == "few-steps":
            base, results = replace(BASE, num_steps=8, **FEW), results / study
            testbed = replace(judged, model=loaded(args.model, loras=[(LORA, 1.0)]), base=base, folder=args.out / study)
        measure(mine, testbed, results)
        for side in dict.fromkeys(cell.side for cell in mine):
            measure_floor(side, replace(judged, model=testbed.model), results)
        save_sheets(study, testbed, results)
        save_page(study, testbed, results)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 ≤ K ≤ N, such as 1/2")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
