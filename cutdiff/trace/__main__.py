"""The command line `python -m cutdiff.trace RUN_A RUN_B`, which writes a page of two runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cutdiff.cli.arguments import BadArgument, Parser, add_debug
from cutdiff.cli.ending import Failure, exit_status
from cutdiff.cli.output import check_output
from cutdiff.files import contents
from cutdiff.output.images import numbered, write_atomically
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
    if not args.out.name or args.out.is_dir():
        raise BadArgument(f"--out {args.out} is a folder: name a file in it")
    page = b"".join(pages.compared(runs, " and ".join(run[0]["chosen"]["method"] for run in runs)))
    try:
        names = numbered(args.out.parent, args.out.stem, args.out.suffix)
        path = next(path for path in names if not path.exists() or _holds(path, page))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise Failure(f"--out {args.out} cannot be written ({error.strerror}): free space, or choose another") from None
    write_line(str(path), sys.stdout)


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


def _holds(path: Path, page: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(page) and path.read_bytes() == page


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cutdiff.trace",
        description="Write a page that shows two traced runs side by side, and the step at which they part.",
    )
    for name in ("run_a", "run_b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="page of --trace, or the picture that it is of")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE",
        help="where the page goes; a number is added to the name where that is taken (default: compare.html)",
    )  # fmt: skip
    add_debug(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
