"""Numbers that are kept as soon as they are known: a file with a JSON object on each line. It imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNITS = {
    "_bytes_per_s": ("B/s", 1.0),
    "_flops_per_s": ("FLOP/s", 1.0),
    "_bytes": ("B", 1.0),
    "_flops": ("FLOP", 1.0),
    "_us": ("s", 1e-6),
    "_s": ("s", 1.0),
}
"""The unit that the end of a name stands for, and the factor that a number is multiplied by to have it."""


class Lines:
    """The file of a stage of measurements; without a path nothing is kept.

    A line has the `stage`, what a number is `of`, its `name`, its `value` and its `unit`, and all else that belongs
    to it. The file is closed between lines, so a process that is killed has written all that it knew.
    """

    def __init__(self, path: str | Path | None = None, stage: str = "") -> None:
        self.path, self.stage = path, stage

    def add(self, of: str, values: Mapping[str, Any], **about: Any) -> None:
        """Append the values that are not None or "", by names such as `call_s`, whose end is the unit."""
        if self.path is None:
            return
        lines = []
        for name, value in values.items():
            if value is None or value == "":
                continue
            ending = next((ending for ending in UNITS if f"_{name}".endswith(ending)), "")
            unit, scale = UNITS.get(ending, ("", 1.0))
            line = {
                "stage": self.stage,
                "of": of,
                "name": name.removesuffix(ending),
                "value": value * scale if ending else value,
                "unit": unit,
            }
            lines.append(json.dumps(line | about, ensure_ascii=False) + "\n")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))


def add_lines(parser: argparse.ArgumentParser) -> None:
    """Add the option `--lines`, whose values `Lines` takes."""
    parser.add_argument(
        "--lines",
        nargs=2,
        default=(),
        metavar=("FILE", "STAGE"),
        help="append each number to this file as soon as it is known, as a line of JSON with the name of this stage",
    )
