"""Enlarge true renders of native size, and count what is in them: `python notebooks/enlarged.py`.

The given pictures are true renders of scenes at native size, and their prompts are the scenes' captions. What they
become is scored as all pictures of the testbed are, against true renders of the same scenes at the larger size. The
baseline, `bicubic`, resizes the pixels without a model. Results go to results/enlarged/, a file for each method and
size, which is not measured anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from studies import BASE, RESULTS
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import AUTO, Parser
from cutdiff.cli.device import device_of, dtype_of
from cutdiff.evaluation import score
from cutdiff.evaluation.features import load_features
from cutdiff.evaluation.testbed import environment, row_of
from cutdiff.output.images import save_json, to_pil
from cutdiff.sampling.resize import resize
from cutdiff.scenes import world

FOLDER = RESULTS / "enlarged"
NATIVE, NUM = 128, 20
BICUBIC = "bicubic"
SHOWN = ("one of each", "detail", "agreement")


@dataclass(frozen=True)
class Case:
    """A method by which pictures are enlarged to a size."""

    method: str
    side: int
    strength: float | None = None
    """The share of the steps that larger canvases take; None: the method's own."""

    @property
    def name(self) -> str:
        """The name of its result."""
        return f"{self.method}{'' if self.strength is None else f',strength={self.strength:g}'}-{self.side}"

    @property
    def path(self) -> Path:
        """The file of its result."""
        return FOLDER / f"{self.name}.json"


CASES = [
    *(Case(method, side) for side in (256, 512) for method in (BICUBIC, "upscale", "magnify", "climb")),
    *(Case(method, 256, 0.2) for method in ("magnify", "climb")),
]


def enlarged(model: Model, case: Case, given: Tensor, captions: Sequence[str]) -> tuple[Tensor, float]:
    """Pictures (N, 3, 128, 128), uint8, enlarged to (N, 3, side, side), uint8, and the network evaluations for each."""
    if case.method == BICUBIC:
        return score.to_bytes(resize(given.float() / 255, (case.side, case.side)).clamp(0, 1)), 0.0
    images, evaluations = [], 0
    for index, (picture, caption) in enumerate(zip(given, captions, strict=True)):
        own = {"method": case.method, "strength": case.strength, "height": case.side, "width": case.side}
        result = cutdiff.generate(model, caption, replace(BASE, seed=index, image=picture, **own))
        images.append(score.to_bytes(result.images))
        evaluations += result.record["network_evaluations"]
    return torch.cat(images), evaluations / len(given)


def measure(model: Model, case: Case, out: Path) -> None:
    """Enlarge the first scenes, save the pictures, and write their scores."""
    scenes = score.scenes(NUM)
    given, truth = (score.true_renders(scenes, side) for side in (NATIVE, case.side))
    images, evaluations = enlarged(model, case, given, world.captions(scenes.choices))
    folder = out / case.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        to_pil(image / 255).save(folder / f"{number:04}.png")
    facts, true_facts = (score.gather_facts(each, load_features(), NATIVE) for each in (images, truth))
    scores = score.score(images, scenes.choices, facts, true_facts, given, native=NATIVE, borders=[])
    row = row_of(case.name, case.side, NUM, scores, {"evaluations": evaluations}, asdict(case))
    save_json(case.path, {**row, **environment(model)})
    print(case.name, {name: round(scores[name].value, 3) for name in SHOWN}, evaluations)


def row(result: dict[str, Any]) -> str:
    """The row of a result in the table of cutdiff/cli/README.md."""
    share, detail, agreement = (result["scores"][name] for name in SHOWN)
    method, strength, side = (result["settings"][name] for name in ("method", "strength", "side"))
    numbers = [
        f"{100 * share['value']:.0f}% [{100 * share['low']:.0f}%, {100 * share['high']:.0f}%]",
        f"{detail['value']:.2f} [{detail['low']:.2f}, {detail['high']:.2f}]",
        f"{agreement['value']:.1f}",
        f"{result['cost']['evaluations']:.0f}",
    ]
    name = f"`{method}`" if strength is None else f"`{method}`, `--strength {strength:g}`"
    return " | ".join([f"| {side // NATIVE}×{side // NATIVE}", name, *numbers]) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases that have no result yet, or those that are named."""
    parser: argparse.ArgumentParser = Parser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; none: all that are missing")
    parser.add_argument("--out", type=Path, default=Path("runs/enlarged"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args(argv)
    device = device_of(None)
    model = cutdiff.load(device=device, dtype=dtype_of(AUTO, device))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if case.name in args.cases or not (args.cases or case.path.exists()):
            measure(model, case, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
