"""The command line `python -m cutdiff.trace RUN_A RUN_B`, which writes a page of two runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cutdiff.cli.arguments import BadArgument, Parser, add_debug
from cutdiff.cli.ending import Failure, exit_status
from cutdiff.cli.output import check_output
from cutdiff.files import contents
from cutdiff.output.images import write_atomically
from cutdiff.parallel.lines import write_line
from cutdiff.trace import page as pages

LARGEST = 1 << 30
"""The bytes of the largest page that is read."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for pages that cannot be compared."""
    return exit_status(lambda: _run(argv), argv)


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    runs = [_blocks(name, path) for name, path in (("RUN_A", args.run_a), ("RUN_B", args.run_b))]
    check_output("--out", args.out.parent)
    if args.out.exists() and not _is_page(args.out):
        raise BadArgument(f"--out {args.out} is no page of a trace, and stays: choose another name")
    title = " and ".join(run[0]["chosen"]["method"] for run in runs)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, lambda file: file.writelines(pages.compared(runs, title)))
    except OSError as error:
        raise Failure(f"--out {args.out} cannot be written ({error.strerror}): free space, or choose another") from None
    write_line(str(args.out), sys.stdout)


def _blocks(name: str, path: Path) -> list[pages.Block]:
    """The blocks of the page that `path` is, or that stands beside the picture or the folder that it is."""
    if not path.name:
        raise BadArgument(f"{name} {path} is no file: name a page or a picture")
    page = path.with_suffix(".html")
    try:
        return pages.blocks(contents(page, LARGEST))
    except FileNotFoundError as error:
        raise BadArgument(f"{name} {error}; --trace writes a page beside the picture") from None
    except ValueError as error:
        said = str(error)
        raise BadArgument(f"{name} {said if said.startswith(str(page)) else f'{page} {said}'}") from None


def _is_page(path: Path) -> bool:
    return path.is_file() and any(pages.BLOCK.finditer(path.read_bytes()))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cutdiff.trace",
        description="Write a page that shows two traced runs side by side, and the step at which they part.",
    )
    for name in ("run_a", "run_b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="page of --trace, or the picture that it is of")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="where the page goes")
    add_debug(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
