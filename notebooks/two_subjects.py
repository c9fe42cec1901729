"""Draw two subjects in two halves of a picture with every method, and count them: `python notebooks/two_subjects.py`.

The captions of two scenes of two colours, in the scenery of the first, are asked for in the left and in the right half
of a canvas of 1×2 native sizes. A half is right where the reader counts one subject in it, of the kind and the colour
that were asked for there. Results go to results/regions/ after every picture, so that a study can be stopped and goes
on; `--study choice` draws what options were chosen by, on captions and seeds that the other does not have.
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
from studies import BASE, CHOICE_SEED, RESULTS
from torch import Tensor
from variants import told_native

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import AUTO, Parser
from cutdiff.cli.device import device_of, dtype_of
from cutdiff.evaluation.score import CAPTION_SEED, mean_score, scenes
from cutdiff.evaluation.testbed import environment
from cutdiff.given.regions import Region
from cutdiff.methods.multidiffusion import MultiDiffusion
from cutdiff.output.images import save_json
from cutdiff.scenes import world
from cutdiff.scenes.read import read
from cutdiff.settings import Settings
from cutdiff.specs import METHODS

FOLDER = RESULTS / "regions"
SIZE = {"height": 128, "width": 256}
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
JUDGED = 40
"""The pictures of MultiDiffusion; other methods and options have `OTHERS`."""
OTHERS = 20
CHOSEN = 12
"""The pictures by which options were chosen."""
FIRST = ("cutdiffusion", "magnify", "climb", "direct", "demofusion")
"""The methods that are measured before the others."""


@dataclass(frozen=True)
class Case:
    """A method and options by which pairs of subjects are drawn."""

    name: str
    options: dict[str, Any]
    num: int = OTHERS
    seed: int = CAPTION_SEED
    """The seed of the captions; that of the first picture is 0, or this where options are chosen."""
    in_regions: bool = True
    """False for one prompt that asks for both, without regions."""

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def settings(self, choices: Tensor, number: int) -> Settings:
        """The settings of a picture."""
        seed = number + (self.seed if self.seed == CHOICE_SEED else 0)
        regions = [Region(text, box) for text, box in zip(world.captions(choices), HALVES, strict=True)]
        own = {"regions": regions} if self.in_regions else {}
        return replace(BASE, **{**SIZE, "seed": seed, **own, **self.options})


def case(method: str, num: int = OTHERS, seed: int = CAPTION_SEED, **options: Any) -> Case:
    """A case that is named by its method and its options."""
    label = ",".join([method, *(f"{option}={value}" for option, value in options.items())])
    return Case(f"{label},choice" if seed == CHOICE_SEED else label, {"method": method, **options}, num, seed)


SIDE_BY_SIDE = told_native(MultiDiffusion(stride=16))
"""MultiDiffusion with one view for each half, of which the network is told that it is a whole picture."""
TOLD = "multidiffusion,stride=16,told native"
CASES = {
    "choice": [
        *(case("multidiffusion", CHOSEN, CHOICE_SEED, bootstrapping=share) for share in (0.2, 0.4)),
        case("multidiffusion", CHOSEN, CHOICE_SEED, stride=16),
        Case(f"{TOLD},choice", {"method": SIDE_BY_SIDE}, CHOSEN, CHOICE_SEED),
    ],
    "judged": [
        Case(TOLD, {"method": SIDE_BY_SIDE}, JUDGED),
        case("multidiffusion"),
        *(case(name) for name in FIRST),
        *(case(name) for name in METHODS if name not in ("multidiffusion", *FIRST)),
        Case("multidiffusion,one prompt", {"method": "multidiffusion"}, in_regions=False),
    ],
}


def pairs(num: int, seed: int) -> Tensor:
    """The choices (num, 2, 5) of pairs of captions of two colours and one scenery."""
    left, right = scenes(2 * num, seed).choices.unflatten(0, (num, 2)).unbind(1)
    right[:, 2:] = left[:, 2:]
    right[:, 0] = torch.where(right[:, 0] == left[:, 0], (right[:, 0] + 1) % len(world.COLORS), right[:, 0])
    return torch.stack([left, right], dim=1)


def right_halves(image: Tensor, choices: Tensor) -> list[bool]:
    """Tell for each half of an image (1, 3, H, W) if it shows the subject that `choices` (2, 5) ask for there alone."""
    reading = read(torch.cat(image.chunk(2, dim=3)))
    right = (reading.subjects == 1) & (reading.color == choices[:, 0]) & (reading.subject == choices[:, 1])
    return right.tolist()


def draw(model: Model, case: Case, most: int) -> None:
    """Draw the pictures of a case that its result lacks, at most so many, and save the result after each."""
    halves, evaluations = [], 0
    if case.path.exists():
        result = json.loads(case.path.read_text())
        halves, evaluations = result["halves"], result["evaluations"]
    for number, choices in enumerate(pairs(min(case.num, most), case.seed)):
        if number < len(halves):
            continue
        texts = world.captions(choices)
        settings = case.settings(choices, number)
        prompt = texts[0].partition(" with ")[2] if case.in_regions else " AND ".join(texts)
        drawn = cutdiff.generate(model, prompt, settings)
        halves.append(right_halves(drawn.images, choices))
        evaluations = drawn.record["network_evaluations"]
        save(case, settings, halves, evaluations, model)
    print(f"{case.name}: {sum(map(all, halves))} of {len(halves)}, {evaluations} evaluations", flush=True)


def save(case: Case, settings: Settings, halves: list[list[bool]], evaluations: int, model: Model) -> None:
    """Write the result of a case."""
    right = torch.tensor(halves, dtype=torch.float64)
    scores = {"both": right.prod(dim=1), "a half": right.mean(dim=1)}
    described = settings.described()
    for name in ("regions", "seed"):
        described.pop(name, None)
    result = {
        "name": case.name,
        "num": len(halves),
        "scores": {name: {**asdict(mean_score(values)), "values": None} for name, values in scores.items()},
        "evaluations": evaluations,
        "caption_seed": case.seed,
        "settings": described,
        "halves": halves,
        **environment(model),
    }
    FOLDER.mkdir(exist_ok=True)
    save_json(case.path, result)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Draw two subjects in two halves of a picture, and count them.")
    parser.add_argument("--study", choices=CASES, default="judged")
    parser.add_argument(
        "--num", type=int, default=JUDGED, metavar="N", help="the most pictures of a case (%(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")
    args: argparse.Namespace = parser.parse_args(argv)
    device = device_of(args.device)
    model = cutdiff.load(device=device, dtype=dtype_of(AUTO, device))
    for each in CASES[args.study]:
        draw(model, each, args.num)
    return 0


if __name__ == "__main__":
    sys.exit(main())
