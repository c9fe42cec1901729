"""Pairs of command lines that draw into one folder at once, each a fork of this process: `python paired.py MODEL FOLDER
ROUNDS`. The tests look at `FOLDER`/KIND ROUND, and at what each printed, in `FOLDER`/KIND ROUND printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import sampler, start, statuses

import cutdiff.evaluation.cells
from cutdiff.evaluation.cells import Cell
from cutdiff.settings import Settings

QUICK = ["--method", "direct", "--steps", "1", "--width", "64", "--height", "64"]
CAPTIONS = ("a", "b", "c", "d")


def pair(folder: Path, runs: Sequence[Callable[[], object]]) -> None:
    """Call both at the same time; `folder` printed/ended.json has the statuses."""
    printed = folder.with_name(f"{folder.name} printed")
    children: list[int] = []
    for number, run in enumerate(runs):
        (printed / str(number)).mkdir(parents=True)
        children += start(run, prints_to=printed / str(number))
    (printed / "ended.json").write_text(json.dumps(statuses(children)))


def samplers(model: str, folder: Path, *prompts: Sequence[str]) -> list[Callable[[], object]]:
    return [sampler([*own, "--model", model, *QUICK, "--out", str(folder)]) for own in prompts]


def evaluation(model: str, folder: Path, captions: Sequence[str], scale: float) -> Callable[[], object]:
    """A function that draws a cell; its process ends with status 1 if the folder holds other pictures."""

    def run() -> None:
        settings = Settings(method="direct", height=64, width=64, num_steps=1, guidance_scale=scale)
        try:
            cutdiff.evaluation.cells.draw(cutdiff.load(model), Cell("a", settings), captions, folder, batch=2)
        except ValueError as error:
            print(error, flush=True)
            sys.exit(1)
        sys.exit(0)

    return run


def main(model: str, folder: Path, rounds: int) -> None:
    folder.mkdir(exist_ok=True)
    sets = []
    for name in ("ab", "cd"):
        (folder / f"{name}.txt").write_text("\n".join(name))
        sets.append(["--prompts", str(folder / f"{name}.txt")])
    for turn in range(rounds):
        kinds = {"one prompt": (["a"], ["a"]), "two prompts": (["a"], ["b"]), "one set": (sets[0], sets[0])}
        for kind, prompts in (kinds | {"two sets": tuple(sets)}).items():
            out = folder / f"{kind} {turn}"
            pair(out, samplers(model, out, *prompts))
        for kind, (captions, scale) in {
            "one cell": (CAPTIONS, 2.0), "other captions": (CAPTIONS[::-1], 2.0), "other options": (CAPTIONS, 3.0)
        }.items():  # fmt: skip
            out = folder / f"{kind} {turn}"
            pair(out, [evaluation(model, out, CAPTIONS, 2.0), evaluation(model, out, captions, scale)])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
