"""The arguments that the command lines of training share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from cutdiff.cli.arguments import Parser, add_debug, add_device
from cutdiff.training.fit import COUNT

Counts = Iterable[tuple[str, int, str]]
"""Options that are counts, each with its default and what it counts."""


def parser_beside(name: str, description: str | None, out: Path, product: str, counts: Counts) -> Parser:
    """The parser of `python -m cutdiff.training.NAME`, which makes a `product` for a model that is trained already."""
    parser = Parser(prog=f"python -m cutdiff.training.{name}", description=description)
    parser.add_argument("--model", type=Path, help="a model of the scenes; none: the embedded model")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}"), help="checkpoints, log (%(default)s)")
    parser.add_argument("--out", type=Path, default=out, help=f"the {product} (%(default)s)")
    add_how(parser, counts)
    return parser


def add_how(parser: argparse.ArgumentParser, counts: Counts) -> None:
    """The options that say how, on what, and how long is trained."""
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="type of the arithmetic (%(default)s)"
    )
    for name, default, text in counts:
        parser.add_argument(f"--{name}", type=COUNT, default=default, metavar="N", help=f"{text} (%(default)s)")
    add_debug(parser)
