"""Measure methods: `python -m cutdiff.evaluate --methods direct cutdiffusion,structure_fraction=0.3 --sizes 256`.

The embedded model, or another of its world, draws the captions of a fixed list of scenes by every method at every size,
and by direct inference at the native size; the pictures are read, counted and compared with true renders. Any model is
measured with --prompts, --references and --features: by FID, KID, IS and CLIP score against images of your own.

Writes to --out the pictures, a folder for each method and size, results.json, table.md, a contact sheet for each size,
and report.html, which shows all of it in a browser; a second start goes on where the first ended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cutdiff import specs
from cutdiff.cli.arguments import (
    AUTO,
    DTYPES,
    MAX_PICTURES,
    BadArgument,
    Parser,
    add_debug,
    add_device,
    flag_of,
    number,
)
from cutdiff.cli.ending import exit_status
from cutdiff.cli.output import check_output
from cutdiff.options import options_of, read
from cutdiff.parallel.lines import write_line
from cutdiff.settings import Settings

OWN = ("method", "height", "width", "num_steps", "seed")
"""Options of a run that have arguments of their own here."""
FLAGS = {"method": "--methods", "height": "--sizes", "width": "--sizes", "num_steps": "--steps"}
"""The arguments of options that have another name here."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 for a run that failed, 2 for arguments that cannot be used."""
    bad_arguments = (ValueError, OSError)
    return exit_status(lambda: _run(argv), argv, bad_arguments=bad_arguments, failures=(FloatingPointError,))


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    check_output("--out", args.out)
    from cutdiff.evaluation.measure import measure

    command = ["python", "-m", "cutdiff.evaluate", *(sys.argv[1:] if argv is None else argv)]
    try:
        table = measure(args, command)
    except ValueError as error:
        raise BadArgument(_by_flag(str(error), args)) from error
    write_line(table, sys.stdout)


def _by_flag(message: str, args: argparse.Namespace) -> str:
    """The message of an error, which names an option as this command line does."""
    name, _, rest = message.partition("=")
    if name in dict(args.set):
        return f"--set {message}"
    if name in FLAGS or name in vars(args):
        return f"{FLAGS.get(name) or flag_of(name)} {rest}"
    return f"--methods: {message}" if name.isidentifier() and rest else message


def _parse(argv: list[str] | None) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    for method in args.methods:
        try:
            specs.check_name("method", method)
        except ValueError as error:
            raise BadArgument(f"--methods {str(error).partition('=')[2]} (see --help)") from None
    given = {name: getattr(args, name) for name in ("prompts", "references", "features")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if args.clip is not None:
            raise BadArgument("--clip goes with --prompts, --references and --features")
    elif missing:
        raise BadArgument(f"{', '.join(missing)} must be given too: a model is compared with images of your own by all")
    return args


def _parser() -> argparse.ArgumentParser:
    defaults = options_of(Settings)
    parser = Parser(
        prog="python -m cutdiff.evaluate",
        description="Draw and measure methods against true renders, or images of your own.",
    )
    parser.add_argument(
        "--methods", nargs="+", default=[*specs.METHODS], metavar="SPEC",
        help="names, or NAME,option=value to measure variants side by side, or module:object of your own",
    )  # fmt: skip
    parser.add_argument("--sizes", nargs="+", type=int, default=[256], metavar="PX", help="sides of square pictures")
    several = number(2, MAX_PICTURES)
    parser.add_argument("--num", type=several, default=200, metavar="N", help="pictures of each method and size")
    steps = f"of each phase; none: the model's, or {defaults['num_steps'].default}"
    parser.add_argument("--steps", type=int, metavar="N", help=steps)
    parser.add_argument(
        "--guidance-scale", type=float, metavar="G", help="1 or less is off; none: the model's, or the guidance's own"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture")
    parser.add_argument(
        "--set", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="any other option of a run, of its solver, schedule and guidance, or one that all methods have, for "
        "instance solver=ddim; repeatable",
    )  # fmt: skip
    any_number = number(1, MAX_PICTURES)
    parser.add_argument("--batch", type=any_number, default=8, metavar="B", help="pictures drawn at once")
    parser.add_argument("--model", metavar="PATH", help="none: the embedded one")
    parser.add_argument("--variant", metavar="NAME", help="variant of a folder's weights, as bf16; none: plain weights")
    parser.add_argument(
        "--dtype", default=AUTO, choices=(AUTO, *DTYPES),
        help="of the networks; auto is bfloat16 where the machine multiplies it in hardware, else float32",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), metavar="DIR", help="the output")
    parser.add_argument(
        "--caption-seed", type=number(0, 2**63), metavar="S",
        help="of the scenes, of which you judge on others than you chose by; none: those of the committed results",
    )  # fmt: skip
    add_debug(parser)
    real = parser.add_argument_group("any model, against images of your own")
    real.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line; the first --num are drawn")
    real.add_argument("--references", type=Path, metavar="DIR", help="images to compare with")
    real.add_argument("--features", type=Path, metavar="FILE", help="TorchScript, such as inception-2015-12-05.pt")
    real.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model, for the CLIP score")
    return parser


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value of an option of the run is read for its type, of others it stays a text until then."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name in OWN:
        raise argparse.ArgumentTypeError(f"{text!r}: {name} has an argument of its own here (see --help)")
    known = options_of(Settings)
    try:
        return name, read(name, value, known[name].type) if name in known else specs.Text(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
