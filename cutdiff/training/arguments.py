"""The arguments that the command lines of training share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from cutdiff.cli.arguments import add_debug, add_device
from cutdiff.training.fit import COUNT

Counts = Iterable[tuple[str, int, str]]
"""Options that are counts, each with its default and what it counts."""


def add_how(parser: argparse.ArgumentParser, counts: Counts) -> None:
    """The options that say how, on what, and how long is trained."""
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="type of the arithmetic (%(default)s)"
    )
    for name, default, text in counts:
        parser.add_argument(f"--{name}", type=COUNT, default=default, metavar="N", help=f"{text} (%(default)s)")
    add_debug(parser)
