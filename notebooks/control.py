"""Draw scenes along the edges of a true render, and measure how well they stand there: `python notebooks/control.py`.

The hint is `outlines` of the scene whose caption is drawn. The subject, the ridge and the ground of the picture and of
the true render are masks that one reader makes of both; the score is the area that they share over that which either
has. The same captions and seeds without a ControlNet tell what is luck. Results go to results/control/ after every
picture, so that a study can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from studies import BASE, RESULTS
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import AUTO, Parser
from cutdiff.cli.device import device_of, dtype_of
from cutdiff.evaluation.report import contact_sheet
from cutdiff.evaluation.score import mean_score, scenes
from cutdiff.evaluation.testbed import environment
from cutdiff.output.images import save_json
from cutdiff.scenes import world
from cutdiff.scenes.read import places
from cutdiff.scenes.render import outlines, render
from cutdiff.scenes.world import Scenes

FOLDER = RESULTS / "control"
CONTROL = Path(__file__).parents[1] / "weights" / "scenes-control.safetensors"
PARTS = ("subject", "ridge", "ground")


@dataclass(frozen=True)
class Case:
    """A method at a size, whose pictures are drawn along the edges, or without them."""

    name: str
    method: str
    side: int
    num: int
    control: dict[str, Any]
    """The options of the ControlNet; none where there is none."""

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.json"


def case(method: str, side: int, num: int, label: str = "", **options: Any) -> Case:
    """A case that is named by its method, its size and what is unusual of its control."""
    label = f"{method}-{side}{f',{label}' if label else ''}"
    return Case(label, method, side, num, options)


NATIVE, LARGE, OTHERS = 48, 24, 12
"""The pictures of native size, of CutDiffusion and magnify at twice that, and of further methods and options."""
ON: dict[str, Any] = {"control_scale": 1.0}
CASES = [
    *(case("direct", 128, NATIVE, label, **on) for label, on in (("", ON), ("uncontrolled", {}))),
    *(
        case(method, 256, LARGE, label, **on)
        for method in ("cutdiffusion", "magnify")
        for label, on in (("", ON), ("uncontrolled", {}))
    ),
    case("direct", 128, NATIVE, "half", control_scale=0.5),
    case("direct", 128, NATIVE, "first-half", control_scale=1.0, control_interval=(0.0, 0.5)),
    *(
        case(method, 256, OTHERS, label, **on)
        for method in ("multidiffusion", "demofusion", "direct")
        for label, on in (("", ON), ("uncontrolled", {}))
    ),
]


def drawn(model: Model, case: Case, scene: Scenes, number: int) -> Tensor:
    """The picture of a scene, (1, 3, side, side) in [0, 1]."""
    settings = replace(BASE, method=case.method, height=case.side, width=case.side, seed=number)
    if case.control:
        settings = replace(settings, control=CONTROL, control_image=outlines(scene, case.side), **case.control)
    return cutdiff.generate(model, world.captions(scene.choices), settings).images


def overlaps(images: Tensor, truth: Tensor) -> list[dict[str, float]]:
    """For each picture the share of each part that it has in common with the true render."""
    ours, theirs = places(images), places(truth)
    scores = {}
    for part in PARTS:
        both, either = ((op(ours[part], theirs[part])).sum((1, 2)) for op in (torch.logical_and, torch.logical_or))
        scores[part] = (both / either.clamp(min=1)).tolist()
    return [{part: scores[part][i] for part in PARTS} for i in range(len(images))]


def measure(model: Model, case: Case, out: Path) -> None:
    """Draw the missing pictures of a case, and write its result."""
    result = json.loads(case.path.read_text(encoding="utf-8")) if case.path.exists() else {}
    before = [result["scores"][part]["values"] for part in PARTS] if result else []
    values = [dict(zip(PARTS, picture, strict=True)) for picture in zip(*before, strict=True)]
    for number in range(len(values), case.num):
        scene = scenes(case.num)[number : number + 1]
        image = drawn(model, case, scene, number)
        values += overlaps(image, render(scene, case.side) / 2 + 0.5)
        pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
        (out / case.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(out / case.name / f"{number:04}.png")
        scores = {part: asdict(mean_score(torch.tensor([value[part] for value in values]))) for part in PARTS}
        facts = {**{key: value for key, value in asdict(case).items() if key != "name"}, "num": len(values)}
        save_json(case.path, {"name": case.name, **facts, "scores": scores, **environment(model)})
    print(case.name, {part: score["value"] for part, score in json.loads(case.path.read_text())["scores"].items()})


def sheet(out: Path, columns: int = 8) -> None:
    """A sheet of hints, true renders, and pictures of the first cases, a column for each scene."""
    shown = scenes(columns)
    rows = [outlines(shown, 128) * 255, (render(shown, 128) / 2 + 0.5) * 255]
    names = ("direct-128", "direct-128,uncontrolled", "cutdiffusion-256", "magnify-256")
    for name in names:
        files = [Image.open(out / name / f"{i:04}.png") for i in range(columns)]
        rows.append(torch.stack([torch.tensor([*file.tobytes()]).view(*file.size[::-1], 3) for file in files]))
        rows[-1] = rows[-1].permute(0, 3, 1, 2)
    Image.fromarray(contact_sheet(rows, columns).permute(1, 2, 0).numpy()).save(FOLDER / "control.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases, or those that are named."""
    parser: argparse.ArgumentParser = Parser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; none: all")
    parser.add_argument("--out", type=Path, default=Path("runs/control"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args(argv)
    device = device_of(None)
    model = cutdiff.load(device=device, dtype=dtype_of(AUTO, device))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in CASES:
        if not args.cases or each.name in args.cases:
            measure(model, each, args.out)
    if not args.cases:
        sheet(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
