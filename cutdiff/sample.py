"""The command line: `python -m cutdiff.sample "a red house at night"`.

No module below it prints or exits. Exit status: 0, 1 for a run that failed or a model whose files are no good, 2 for
arguments that cannot be used, 143 for one that was terminated. torch is imported after the arguments are parsed, so
that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from cutdiff.options import BadArgument, of_flag, parse
from cutdiff.runs import BadLine, Picture, check_fit, is_set, plan_pictures, read_requests

if TYPE_CHECKING:
    from cutdiff.model import Model
    from cutdiff.solvers import Step

LISTED = 5
"""How many lines of a file of prompts the last message names before it only counts them."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        _run(argv)
    except BadArgument as error:
        return _complain(str(error), 2)
    except _Failure as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        # CPython remembers an interrupt that passed through an exec of text, which imports have, and would at last end
        # by SIGINT although it was caught; the next such exec makes it forget.
        exec("")
        return _complain("interrupted", 1)
    except _Terminated:
        return _complain("terminated", 128 + signal.SIGTERM)
    except Exception as error:  # the last line of defence: one line instead of a traceback
        return _complain(f"the run failed: {type(error).__name__}: {error}", 1)
    return 0


class _Failure(Exception):
    """What a file turns out to be, or a disk; its message is the line that the user sees."""


class _Terminated(BaseException):
    """SIGTERM, which drops the picture that is being drawn, as an interrupt does."""


_caught: list[BaseException] = []


def _stop(number: int, _: object) -> NoReturn:
    """The handler of signals. Python drops what it raises inside of a finaliser: then the next step raises it again."""
    _caught.append(KeyboardInterrupt() if number == signal.SIGINT else _Terminated())
    raise _caught[-1]


def _run(argv: list[str] | None) -> None:
    args = parse(argv)
    requests, bad = read_requests(args)
    _leave_out(args, bad, everything=not requests)
    _check_output(args.out)
    model = _load(args)
    _tell_model(model, everything=args.verbose)
    requests, unfit = check_fit(model, args, requests)
    _leave_out(args, unfit, everything=not requests)
    _draw_all(model, args, plan_pictures(model, args, requests))
    if bad or unfit:
        lines = sorted(error.line for error in (*bad, *unfit))
        more = f" and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        named = ", ".join(map(str, lines[:LISTED]))
        raise _Failure(f"{args.prompts}, left out: {named}{more}; correct these lines and start again")


def _leave_out(args: argparse.Namespace, bad: list[BadLine], *, everything: bool) -> None:
    """Tell of lines that cannot be drawn; where there are no others, the first ends the run."""
    if everything:
        raise bad[0]
    for error in bad:
        _tell(f"{error}; the other lines are drawn")
        if args.log_json:
            _print(json.dumps({"line": error.line, "state": "left out", "error": str(error)}))


def _check_output(folder: Path) -> None:
    """Create the output folder now, so that a long run does not end at a closed door."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # the modes of a folder do not tell root, nor of a read-only disk
    except OSError as error:
        raise BadArgument(f"--out {folder} cannot be written to ({error.strerror}): choose another folder") from None


def _load(args: argparse.Namespace) -> Model:
    import torch

    import cutdiff
    from cutdiff.checkpoint import LoraError

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise BadArgument(f"--device {device} is not cpu or cuda")
    except (RuntimeError, AssertionError):
        raise BadArgument(f"--device {device} is not available here: use --device cpu") from None
    if args.offload and torch.device(device).type == "cpu":
        raise BadArgument("--offload moves the text encoders to the CPU, where this run is: leave it out")
    try:
        model = cutdiff.load(
            args.model,
            device=device,
            dtype=getattr(torch, args.dtype),
            config=args.config,
            vae=args.vae,
            prediction_type=args.prediction_type,
            zero_terminal_snr=args.zero_terminal_snr,
            timestep_spacing=args.timestep_spacing,
            loras=args.loras,
            check_weights=args.check_weights,
            fp8=args.fp8,
        )
    except LoraError as error:
        raise _Failure(f"--lora {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith(("config=", "vae=", "zero_terminal_snr=", "timestep_spacing=", "fp8=")):
            raise of_flag(error) from None
        raise (BadArgument if isinstance(error, FileNotFoundError) else _Failure)(str(error)) from None
    return replace(model, text=model.text.offloaded()) if args.offload else model


def _tell_model(model: Model, *, everything: bool) -> None:
    """Which model was read, and who decided what it predicts; without `everything` only what may be wrong."""
    if everything:
        _tell(f"{model.source}, native size {model.native_size * model.factor} px")
        for name, path in model.files.items():
            _tell(f"weights {name} from {path}")
        for lora in model.loras:
            _tell(f"LoRA {lora.path} times {lora.scale}")
    values = model.noise.described()
    for name, source in model.decided_by.items():
        if everything or source.startswith("default,"):
            _tell(f"{name}={values[name]}, decided by: {source}")


def _draw_all(model: Model, args: argparse.Namespace, pictures: list[Picture]) -> None:
    """Draw what is not finished, and print of each picture, in order, where it is."""
    from cutdiff.images import remove_parts

    missing = [picture for picture in pictures if not picture.finished]
    if len(missing) < len(pictures):
        _tell(f"{len(pictures) - len(missing)} of {len(pictures)} pictures are finished already")
    remove_parts(args.out, {picture.path.stem for picture in missing})
    told: set[str] = set()
    with _Progress(len(missing)) as progress:
        for picture in pictures:
            path, record = (picture.path, {}) if picture.finished else _draw(model, args, picture, progress)
            for notice in _notices(record):
                if notice not in told:
                    _tell(notice)
                told.add(notice)
            _print(_entry(picture, path, record) if args.log_json else str(path))


def _draw(model: Model, args: argparse.Namespace, picture: Picture, progress: _Progress) -> tuple[Path, dict[str, Any]]:
    """Where the picture was saved, and its record."""
    import torch

    import cutdiff
    from cutdiff.images import save_image

    try:
        result = cutdiff.generate(model, picture.prompt, picture.settings, on_step=progress.step)
    except torch.OutOfMemoryError:
        raise _Failure("memory does not hold the network on one item: try --dtype bfloat16, or --device cpu") from None
    record = result.record
    if args.verbose:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in record["seconds"].items())
        _tell(f"{record['network_evaluations']} network evaluations; {seconds}")
    overwrite = args.overwrite or is_set(args)
    try:
        return save_image(result.images[0], record, args.out, picture.path.stem, overwrite=overwrite), record
    except OSError as error:
        raise _Failure(f"{picture.path} cannot be written ({error.strerror}): free space, or change --out") from None


def _notices(record: dict[str, Any]) -> Iterator[str]:
    """What a run should be told once, whichever picture it was seen at."""
    if record and record["decoded_in"] != record["vae_dtype"]:
        yield f"the VAE overflowed in {record['vae_dtype']}, so it decoded in float32"
    if record and record["view_batch_halved"]:
        held = record["view_batch_size"]
        yield f"memory holds {held} patches or views at once: pass --view-batch-size {held}"


def _entry(picture: Picture, path: Path, record: dict[str, Any]) -> str:
    """What --log-json prints of a picture."""
    entry = {"line": picture.line or None, "seed": picture.settings.seed, "path": str(path)}
    if picture.finished:
        return json.dumps({**entry, "state": "finished"})
    seconds = round(sum(record["seconds"].values()), 3)
    evaluations = record["network_evaluations"]
    return json.dumps({**entry, "state": "drawn", "seconds": seconds, "network_evaluations": evaluations})


class _Progress:
    """A bar that counts the pictures of the run, where standard error is a terminal."""

    def __init__(self, num_pictures: int) -> None:
        from tqdm import tqdm

        self.began = time.perf_counter()
        self.bar = tqdm(
            total=num_pictures,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            smoothing=0,  # the time left follows from the mean of the run
            miniters=0,
            leave=False,
            disable=None if num_pictures else True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, step: Step, num_steps: int) -> None:
        """Count a step of a picture that takes `num_steps`."""
        if _caught:
            raise _caught[-1]
        picture = int(self.bar.n + 1e-6) + 1  # shares of steps add up to a picture but for rounding
        per_hour = 3600 * (self.bar.n + 1 / num_steps) / (time.perf_counter() - self.began)
        self.bar.set_description(f"{picture} of {self.bar.total}, {step.stage}", refresh=False)
        self.bar.set_postfix_str(f"{per_hour:.3g} pictures/h", refresh=False)
        self.bar.update(1 / num_steps)


def _tell(message: str) -> None:
    _print(f"cutdiff: {' '.join(message.split())}", sys.stderr)


def _print(line: str, file: TextIO | None = None) -> None:
    """A line above the bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file):
        print(line, file=file, flush=True)


def _complain(message: str, status: int) -> int:
    print(f"cutdiff: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(main())
