"""The runner behind `gpu.sh`: stages of measurements on one GPU, each a process with a limit, until a deadline.

`python -m cutdiff.bench.gpu OUT [SECONDS] [--second] [--small]` writes three files to OUT: `numbers.jsonl`, to which
every number is appended as soon as it is known (see `cutdiff_kernels.lines`), `log.txt` with all that the stages print,
and `summary.txt`, which is written anew after each stage and printed at the end, also after SIGTERM. A stage that fails
or reaches its limit does not keep the next ones from running; one that no longer fits into the time is skipped.

The exit status is 0; 1 if a stage failed or reached its limit; 2 for arguments that cannot be used; 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from cutdiff_kernels.lines import Lines

from cutdiff.cli.arguments import BadArgument, Parser, add_debug
from cutdiff.cli.ending import Failure, exit_status
from cutdiff.parallel.stopping import Terminated

ROOT = Path(__file__).parents[2]
SECONDS = {False: 420, True: 180}
"""The default deadline of the first and of the second script."""
GRACE = 5
"""The seconds between SIGTERM and SIGKILL for a stage that is over its limit; they are kept free at the end."""
WIDEST, LONGEST = 300, 100
"""The most characters of a line of the summary, and of a name or a word in it."""


@dataclass(frozen=True)
class Stage:
    """A command that appends its numbers with `--lines`."""

    name: str
    least: int
    """The seconds without which it is not begun: about what it takes on an H200 until its first numbers."""
    most: int
    """The seconds after which it is ended."""
    module: str
    arguments: tuple[str, ...] = ()
    instead_of: str = ""
    """A stage that must have failed for this one to run."""

    def command(self, numbers: Path) -> list[str]:
        """The command, to be run in the repository's folder."""
        return [sys.executable, "-m", self.module, *self.arguments, "--lines", str(numbers), self.name]


LOOPS = Stage("published loop", 0, 60, "cutdiff.bench.baselines")
"""The import of diffusers' networks: where it fails, the other stages do without them."""


def stages(second: bool, small: bool, loops: bool) -> list[Stage]:
    """The stages in order of worth; `loops` says whether the published loop's networks are there."""
    size = ("--small", "--repeats", "1") if small else ("--device", "cuda")
    few, many = ("4", "4") if small else ("10", "50")
    tiny = ("--small",) if small else ()
    sizes = ("--sizes", "2048") if small else ()
    rounds, twice = ((), ()) if small else (("--repeats", "3"), ("--repeats", "2"))
    bits = ("--dtype", "bfloat16") if small else ()  # which a GPU's products in 8 bits go with

    def bench(name: str, least: int, most: int, steps: str, *arguments: str) -> Stage:
        return Stage(name, least, most, "cutdiff.bench", (*size, "--steps", steps, *arguments))

    def own(name: str, least: int, most: int) -> Stage:
        return Stage(name, least, most, "cutdiff.bench.stages", (name, *tiny))

    if second:
        large = ("--size", "512") if small else ("--size", "4096")
        return [
            bench("large", 25, 60, "4", *large, *twice, "--only"),
            *([bench("loop compiled", 50, 400, few, "--compile", *twice, "--only", "d")] if loops else []),
            bench("graphs", 40, 400, few, "--compile", *twice, "--only", "--also", "graphs"),
            own("parts", 45, 200),
        ]
    pictures = [bench("pictures", 30, 90, few, *rounds, "--only", "--also", "direct")]
    if loops:
        beside = bench("pictures beside the loops", 45, 120, few, *rounds, "--only", "a", "c", "--also", "direct")
        pictures = [beside, replace(pictures[0], instead_of=beside.name)]
    return [
        own("machine", 20, 60),
        own("correct", 20, 80),
        own("call", 20, 60),
        *pictures,
        own("variants", 25, 80),
        own("benchmark", 15, 60),
        bench("compiled", 45, 200, many, "--compile", *twice, "--only", "--also", "eager"),
        bench("fp8 compiled", 45, 160, many, "--compile", *bits, *twice, "--only", "--also", "fp8"),
        Stage("operators", 20, 90, "cutdiff_kernels.bench", sizes),
        Stage("layers", 20, 80, "cutdiff_kernels.bench_network"),
        own("tests", 20, 300),
    ]


class Runner:
    """Runs stages one after another until a deadline or a signal, and keeps how each ended."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.numbers, self.log, self.summary = (out / name for name in ("numbers.jsonl", "log.txt", "summary.txt"))
        self.ends: dict[str, str] = {}
        self.signal: int | None = None
        """The signal that has arrived."""
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, stages: list[Stage]) -> None:
        """Run the stages that still fit; after SIGTERM or SIGINT the one that runs is ended, and no other is run."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for stage in stages:
                if stage.instead_of and not self.ends.get(stage.instead_of, "").startswith("failed"):
                    continue
                began = time.monotonic()
                left = self.deadline - began - GRACE
                if self.signal is not None:
                    self.ended(stage.name, "skipped: a signal ended the run")
                elif left < stage.least:
                    self.ended(stage.name, f"skipped: it takes {stage.least} s, and {max(left, 0):.0f} s are left")
                else:
                    how = self._run(stage, min(stage.most, left))
                    self.ended(stage.name, how, took_s=time.monotonic() - began)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ended(self, name: str, how: str, **values: Any) -> None:
        """Keep how a stage ended, and write the summary anew."""
        self.ends[name] = how
        Lines(self.numbers, name).add("stage", {"ended": how, **values})
        self.summary.write_text(summary(self.numbers), encoding="utf-8")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.process is not None:
            self.process.terminate()

    def _run(self, stage: Stage, limit: float) -> str:
        """Run one stage and return how it ended."""
        command = stage.command(self.numbers)
        words = " ".join(["python3", *command[1:-3]])
        Lines(self.numbers, stage.name).add("stage", {"command": words, "limit_s": limit})
        began = time.monotonic()
        with open(self.log, "ab") as file:
            file.write(f"\n== {stage.name}: {words} ==\n".encode())
            file.flush()
            printed_from = file.tell()
            # `timeout` ends all processes of the stage, also when this one is killed.
            timeout = ["timeout", f"--kill-after={GRACE}", f"{limit:.1f}"]
            self.process = subprocess.Popen(
                [*timeout, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            if self.signal is not None:  # it came before there was a process
                self.process.terminate()
            status, self.process = self.process.wait(), None
        if status == 0:
            return "done"
        if self.signal is not None:
            return "ended by a signal"
        if time.monotonic() - began >= limit:
            return f"ended at its limit of {limit:.0f} s"
        printed = self.log.read_bytes()[printed_from:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(printed) if line.strip()), "it printed nothing")
        if status == 2 and "GPU" in last:  # the stage says that it needs one
            return f"skipped: {last}"
        return f"failed with {f'status {status}' if status > 0 else signal.Signals(-status).name}: {last}"


def summary(numbers: Path) -> str:
    """All numbers as text: a line for each thing that numbers are of, with the median of those of one name."""
    by_stage: dict[str, dict[str, dict[str, list[Mapping[str, Any]]]]] = {}
    for text in numbers.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a process was killed as it wrote
            continue
        things = by_stage.setdefault(line["stage"], {}).setdefault(line["of"], {})
        things.setdefault(line["name"], []).append(line)
    written = []
    for stage, things in by_stage.items():
        about = things.pop("stage", {})
        end, took = ([line["value"] for line in about.get(name, [])] for name in ("ended", "took"))
        written.append(f"{stage}: {end[-1] if end else 'running'}" + (f", {took[-1]:.0f} s" if took else ""))
        for of, values in things.items():
            line = f"  {of[:LONGEST]}: " + ", ".join(f"{name} {_shown(lines)}" for name, lines in values.items())
            written.append(line if len(line) <= WIDEST else f"{line[: WIDEST - 2]} …")
    return "\n".join(written) + "\n"


def _shown(lines: list[Mapping[str, Any]]) -> str:
    """The median of numbers with its unit, and how many there are if several; what is no number, as it is."""
    values = [line["value"] for line in lines]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return str(values[0])[:LONGEST] if len(values) == 1 else f"{len(values)} times"
    value, unit = median(values), lines[0]["unit"]
    prefix = ""
    if unit and value:
        scale, prefix = next((s for s in PREFIXES if abs(value) >= s[0]), PREFIXES[-1])
        value /= scale
    return f"{value:.4g} {prefix}{unit}".rstrip() + (f" ({len(values)})" if len(values) > 1 else "")


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(lambda: _run(argv), argv)


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out, args.seconds or SECONDS[args.second])
    runner.run([LOOPS])
    runner.run(stages(args.second, args.small, loops=runner.ends[LOOPS.name] == "done"))
    print(summary(runner.numbers), end="", flush=True)
    if runner.signal is not None:
        raise KeyboardInterrupt if runner.signal == signal.SIGINT else Terminated
    ends = [(name, how) for name, how in runner.ends.items() if name != LOOPS.name]
    bad = [name for name, how in ends if not how.startswith(("done", "skipped"))]
    if bad:
        raise Failure(f"{len(bad)} stages did not end well: {', '.join(bad)}; see {runner.log}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cutdiff/bench/gpu.sh", description="Measure all that needs a GPU, in one call.")
    parser.add_argument("out", type=lambda text: Path(text).absolute(), metavar="OUT", help="a new folder for results")
    parser.add_argument("seconds", type=int, nargs="?", metavar="SECONDS", help="the deadline (420; with --second 180)")
    parser.add_argument("--second", action="store_true", help="4096², the compiled published loop, and CUDA graphs")
    parser.add_argument("--small", action="store_true", help="small networks and shapes, to rehearse on a CPU")
    add_debug(parser)
    args = parser.parse_args(argv)
    if args.seconds is not None and args.seconds < 1:
        raise BadArgument(f"SECONDS {args.seconds} must be at least 1")
    if (args.out / "numbers.jsonl").exists():
        raise BadArgument(f"OUT {args.out} has results already: choose a new folder")
    return args


if __name__ == "__main__":
    sys.exit(main())
