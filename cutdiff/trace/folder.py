"""The data of a trace as a folder, to be loaded in a notebook: JSON, and a file of tensors for each step that has any.

    trace = cutdiff.trace.load("outputs/cutdiffusion-256x256-seed0.trace")
    trace.steps[4].items[0].estimates  # what each patch predicted alone, (N, C, h, w)

`trace.json` tells of the run, `steps.jsonl` of each step in a line, and `end.json` of the end, where there was one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutdiff.files import json_lines, json_of
from cutdiff.output.page import finite
from cutdiff.trace.recorder import Items, Moment

RUN, STEPS, END = "trace.json", "steps.jsonl", "end.json"
SUFFIX = ".trace"


@dataclass(frozen=True)
class Trace:
    """A trace as it was loaded."""

    run: dict[str, Any]
    """The prompt, the options, the sizes, and the words whose attention the steps have."""
    steps: list[Moment]
    end: dict[str, Any] | None
    """The way the run ended; None where it was killed, or goes on."""


def load(folder: str | Path) -> Trace:
    """Load the folder of a trace. FileNotFoundError where there is none, ValueError where it is damaged."""
    folder = Path(folder)
    run, lines, end = json_of(folder / RUN), json_lines(folder / STEPS), folder / END
    return Trace(run, [_moment(folder, line) for line in lines], json_of(end) if end.exists() else None)


def begin(folder: Path, run: dict[str, Any]) -> None:
    """Begin the folder of a run, which must not exist."""
    folder.mkdir()
    _save(folder / RUN, run)
    (folder / STEPS).touch()


def add(folder: Path, moment: Moment) -> int:
    """Add a step, its tensors first; returns their bytes."""
    tensors, line = _parts(moment)
    if tensors:
        path = folder / _file(moment.index)
        path.touch()  # safetensors makes files that only their owner can read
        mode = path.stat().st_mode
        save_file(tensors, path)
        path.chmod(mode)
    with (folder / STEPS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line)) + "\n")
    return sum(tensor.nbytes for tensor in tensors.values())


def end(folder: Path, told: dict[str, Any]) -> None:
    """Note how the run ended."""
    _save(folder / END, told)


def _parts(moment: Moment) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a step by their names, and the rest as JSON has it."""
    own = {field.name: getattr(moment, field.name) for field in fields(Moment) if field.name != "items"}
    parts = {f"items.{n}": asdict(item) for n, item in enumerate(moment.items)}
    flat = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()} | own
    tensors = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in flat.items()
        if isinstance(value, Tensor)
    }
    rest = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    items = [{key: value for key, value in part.items() if not isinstance(value, Tensor)} for part in parts.values()]
    return tensors, {**rest, "items": items}


def _moment(folder: Path, line: dict[str, Any]) -> Moment:
    path = folder / _file(line["index"])
    tensors = load_file(path) if path.exists() else {}
    items = []
    for n, item in enumerate(line.pop("items")):
        start = f"items.{n}."
        own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        items.append(Items(**{**item, "grid": item["grid"] and tuple(item["grid"]), **own}))
    return Moment(
        **{**line, **{name: value for name, value in tensors.items() if "." not in name}, "items": tuple(items)}
    )


def _file(index: int) -> str:
    return f"step-{index:04}.safetensors"


def _save(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(value), indent=1) + "\n", encoding="utf-8")
