"""The command line: `python -m cutdiff.sample "a red house at night"`.

No module below it prints or exits. Exit status: 0, 1 for a run that failed or a model whose files are no good, 2 for
arguments that cannot be used. torch is imported after the arguments are parsed, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cutdiff.options import DEMO_PROMPT, BadArgument, of_flag, parse
from cutdiff.promptfile import parse_line, read_lines
from cutdiff.settings import WITHOUT_VIEWS, Settings

if TYPE_CHECKING:
    from cutdiff.model import Model
    from cutdiff.pipeline import Result


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
    except Exception as error:  # the last line of defence: one line instead of a traceback
        return _complain(f"the run failed: {type(error).__name__}: {error}", 1)
    return 0


def _run(argv: list[str] | None) -> None:
    args = parse(argv)
    runs = _runs(args)
    _check_output(args.out)
    model = _load(args)
    _tell(model, everything=args.verbose)
    for run in runs:
        _check_fit(model, args, run)
    for run in runs:
        for index in range(args.num_images):
            print(_draw(model, args, run, run.settings.seed + index), flush=True)


class _Run(NamedTuple):
    """What a prompt asks for."""

    prompt: str
    settings: Settings
    line: int = 0
    """In the file of prompts, counted from 1; 0 where there is none."""


class _Failure(Exception):
    """What a file turns out to be, or a disk; its message is the line that the user sees."""


def _runs(args: argparse.Namespace) -> list[_Run]:
    """What is to be drawn: the prompt, or those of the file, each checked."""
    if args.prompts is None:
        prompt = DEMO_PROMPT if args.prompt is None else args.prompt
        return [_Run(prompt, _settings(prompt, args))]
    try:
        lines = read_lines(args.prompts)
    except OSError as error:
        raise BadArgument(f"--prompts {args.prompts} cannot be read ({error.strerror}): give a text file") from None
    if not lines:
        raise BadArgument(f"--prompts {args.prompts} holds no prompt: give at least one line")
    runs = []
    for number, line in lines:
        with _errors_by_line(args, number):
            prompt, own = parse_line(line)
            runs.append(_Run(prompt, _settings(prompt, parse(own, args)), number))
    return runs


def _settings(prompt: str, args: argparse.Namespace) -> Settings:
    """The arguments that are options of the run, checked."""
    values = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    for text in (prompt, *(value for value in values.values() if isinstance(value, str))):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadArgument(f"the prompt {text!r} is not valid UTF-8: check the terminal's encoding")
        if "\0" in text:
            raise BadArgument(f"the prompt {text!r} holds a NUL, which a PNG's text cannot hold: leave it out")
    with _errors_by_flag():
        settings = Settings(**values)
        Settings(seed=settings.seed + args.num_images - 1)
    if settings.stride is not None and settings.method in WITHOUT_VIEWS:
        raise BadArgument(f"--stride {settings.stride} is for methods with views, not {settings.method}: leave it out")
    return settings


def _check_fit(model: Model, args: argparse.Namespace, run: _Run) -> None:
    """Whether this model can draw with these settings."""
    from cutdiff.pipeline import plan

    with _errors_by_line(args, run.line), _errors_by_flag():
        plan(model, run.settings)


@contextmanager
def _errors_by_flag() -> Iterator[None]:
    """Say what an error says of an option by the command line's name."""
    try:
        yield
    except ValueError as error:
        raise of_flag(error) from None


@contextmanager
def _errors_by_line(args: argparse.Namespace, line: int) -> Iterator[None]:
    """Say of an error in which line of the file of prompts it is, where there is one."""
    try:
        yield
    except (ValueError, BadArgument) as error:
        raise BadArgument(f"{args.prompts}, line {line}: {error}" if line else str(error)) from None


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
    try:
        return cutdiff.load(
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
        )
    except LoraError as error:
        raise _Failure(f"--lora {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith(("config=", "vae=", "zero_terminal_snr=", "timestep_spacing=")):
            raise of_flag(error) from None
        raise (BadArgument if isinstance(error, FileNotFoundError) else _Failure)(str(error)) from None


def _tell(model: Model, *, everything: bool) -> None:
    """Which model was read, and who decided what it predicts; without `everything` only what may be wrong."""
    if everything:
        print(f"cutdiff: {model.source}, native size {model.native_size * model.factor} px", file=sys.stderr)
        for name, path in model.files.items():
            print(f"cutdiff: weights {name} from {path}", file=sys.stderr)
        for lora in model.loras:
            print(f"cutdiff: LoRA {lora.path} times {lora.scale}", file=sys.stderr)
    values = model.noise.described()
    for name, source in model.decided_by.items():
        if everything or source.startswith("default,"):
            print(f"cutdiff: {name}={values[name]}, decided by: {source}", file=sys.stderr)


def _draw(model: Model, args: argparse.Namespace, run: _Run, seed: int) -> Path:
    from dataclasses import replace

    from tqdm import tqdm

    import cutdiff
    from cutdiff.images import save_image

    settings = replace(run.settings, seed=seed)
    with tqdm(total=settings.num_steps, unit="step", leave=False, disable=None) as bar:

        def on_step(step: cutdiff.Step, num_steps: int) -> None:
            bar.total = num_steps
            bar.set_description(step.stage, refresh=False)
            bar.update()

        result: Result = cutdiff.generate(model, run.prompt, settings, on_step=on_step)
    record = result.record
    if record["decoded_in"] != record["vae_dtype"]:
        print(f"cutdiff: the VAE overflowed in {record['vae_dtype']}, so it decoded in float32", file=sys.stderr)
    if record["view_batch_halved"]:
        held = record["view_batch_size"]
        print(f"cutdiff: memory holds {held} patches or views at once: pass --view-batch-size {held}", file=sys.stderr)
    if args.verbose:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in record["seconds"].items())
        print(f"cutdiff: {record['network_evaluations']} network evaluations; {seconds}", file=sys.stderr)
    stem = f"{settings.method_name}-{record['width']}x{record['height']}-seed{seed}"
    stem = f"{run.line:04}-{stem}" if run.line else stem
    try:
        return save_image(result.images[0], record, args.out, stem)
    except OSError as error:
        raise _Failure(
            f"{args.out / stem}.png cannot be written ({error.strerror}): free space, or change --out"
        ) from None


def _complain(message: str, status: int) -> int:
    print(f"cutdiff: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
