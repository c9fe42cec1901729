"""The command line: `python -m cutdiff.sample "a red house at night"`.

No module below it prints or exits. Exit status: 0, 1 for a run that failed, 2 for arguments that
cannot be used. torch is imported after the arguments are parsed, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cutdiff.promptfile import parse_line, read_lines
from cutdiff.settings import BACKENDS, INTERACTIONS, METHOD_NAMES, SIZE_CONDITIONINGS, SOLVER_NAMES, Settings

if TYPE_CHECKING:
    from cutdiff.model import Model
    from cutdiff.pipeline import Result

DEMO_PROMPT = "a red house with mountains over a meadow at day"
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        _run(argv)
    except _BadArgument as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    except Exception as error:  # the last line of defence: one line instead of a traceback
        return _complain(f"the run failed: {type(error).__name__}: {error}", 1)
    return 0


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    runs = _runs(args)
    _check_output(args.out)
    model = _load(args)
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


class _BadArgument(Exception):
    """An argument that cannot be used; its message is the line that the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _BadArgument(f"{message} (see --help)")


def _parse(argv: list[str] | None, given: argparse.Namespace | None = None) -> argparse.Namespace:
    """The arguments; what they leave out is as `given`, or the default."""
    parser = _Parser(
        prog="python -m cutdiff.sample",
        description="Draw a picture past the size that a diffusion model was trained at.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT",
        help="what to draw; (word:1.2) and (word) weigh more, [word] less, BREAK begins a new chunk of tokens; "
        f"none: {DEMO_PROMPT!r}",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="in the place of PROMPT, a prompt a line, or a JSON object with a prompt and options of its own: "
        '{"prompt": "a tent", "width": 256, "seed": 7}; blank lines and those that begin with # are skipped',
    )  # fmt: skip
    parser.add_argument("--model", metavar="PATH", help="folder, .safetensors file or hub id; none: the embedded one")
    parser.add_argument("--config", metavar="PATH", help="folder with a single file's tokenizers and schedule")
    parser.add_argument("--method", default=defaults.method, choices=METHOD_NAMES)
    parser.add_argument("--width", type=int, metavar="W", help="in pixels; none: twice the native size")
    parser.add_argument("--height", type=int, metavar="H", help="in pixels; none: twice the native size")
    parser.add_argument(
        "--steps", type=int, default=defaults.num_steps, metavar="N", dest="num_steps",
        help="of each phase, where a method draws a cascade of sizes",
    )  # fmt: skip
    parser.add_argument("--guidance-scale", type=float, default=defaults.guidance_scale, metavar="G", help="1 is off")
    parser.add_argument(
        "--detail-guidance-scale", type=float, metavar="G",
        help="in the detail stage; none: 1 for magnify, else that of the run",
    )  # fmt: skip
    parser.add_argument("--negative-prompt", default=defaults.negative_prompt, metavar="TEXT")
    parser.add_argument("--prompt-2", metavar="TEXT", help="for SDXL's second text encoder; none: PROMPT")
    parser.add_argument("--negative-prompt-2", metavar="TEXT", help="for the second; none: the negative prompt")
    parser.add_argument(
        "--clip-skip", type=int, metavar="N",
        help="the layer of the text encoders that is read, 1 the last; none: as the model was trained",
    )  # fmt: skip
    parser.add_argument("--solver", default=defaults.solver, choices=SOLVER_NAMES)
    parser.add_argument("--eta", type=float, default=defaults.eta, metavar="E", help="fresh noise of ddim, 0 to 1")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="of the first picture")
    parser.add_argument("--num-images", type=int, default=1, metavar="K", help="pictures, with seeds S, S+1, …")
    parser.add_argument(
        "--structure-fraction", type=float, metavar="F",
        help="where in the steps the detail stage begins; none: 0.5 for cutdiffusion, 0.3 for magnify",
    )  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="L", help="between views, in latents; none: half a window")
    parser.add_argument("--interaction", default=defaults.interaction, choices=INTERACTIONS)
    parser.add_argument("--size-conditioning", default=defaults.size_conditioning, choices=SIZE_CONDITIONINGS)
    parser.add_argument(
        "--cosine-scales", type=float, nargs=3, default=defaults.cosine_scales, metavar=("SKIP", "DILATED", "BLUR"),
        help="how fast DemoFusion's guides fade",
    )  # fmt: skip
    parser.add_argument(
        "--word-threshold", type=float, default=defaults.word_threshold, metavar="C",
        help="share of a view that a word must fill for AccDiffusion",
    )  # fmt: skip
    parser.add_argument(
        "--view-batch-size", type=int, default=defaults.view_batch_size, metavar="V",
        help="patches or views that go through the network at once",
    )  # fmt: skip
    parser.add_argument(
        "--backend", default=defaults.backend, choices=BACKENDS, help="of the operators around the network"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="where the pictures go")
    args = parser.parse_args(argv, argparse.Namespace(**vars(given) if given else {}))
    args.cosine_scales = tuple(args.cosine_scales)
    if args.num_images < 1:
        raise _BadArgument(f"--num-images {args.num_images} must be at least 1")
    if args.prompt is not None and args.prompts is not None:
        raise _BadArgument(f"--prompts {args.prompts} takes the place of PROMPT {args.prompt!r}: give one of them")
    return args


def _runs(args: argparse.Namespace) -> list[_Run]:
    """What is to be drawn: the prompt, or those of the file, each checked."""
    if args.prompts is None:
        prompt = DEMO_PROMPT if args.prompt is None else args.prompt
        return [_Run(prompt, _settings(prompt, args))]
    try:
        lines = read_lines(args.prompts)
    except OSError as error:
        raise _BadArgument(f"--prompts {args.prompts} cannot be read: {error.strerror}") from None
    if not lines:
        raise _BadArgument(f"--prompts {args.prompts} holds no prompt: give at least one line")
    runs = []
    for number, line in lines:
        with _errors_by_line(args, number):
            prompt, own = parse_line(line)
            runs.append(_Run(prompt, _settings(prompt, _parse(own, args)), number))
    return runs


def _settings(prompt: str, args: argparse.Namespace) -> Settings:
    """The arguments that are options of the run, checked."""
    values = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    for text in (prompt, *(value for value in values.values() if isinstance(value, str))):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _BadArgument(f"the prompt {text!r} is not valid UTF-8: check the terminal's encoding")
        if "\0" in text:
            raise _BadArgument(f"the prompt {text!r} holds a NUL, which a PNG's text cannot hold: leave it out")
    with _errors_by_flag():
        settings = Settings(**values)
        Settings(seed=settings.seed + args.num_images - 1)
    return settings


def _check_fit(model: Model, args: argparse.Namespace, run: _Run) -> None:
    """Whether this model can draw with these settings."""
    from cutdiff.pipeline import plan

    with _errors_by_line(args, run.line), _errors_by_flag():
        plan(model, run.settings)


@contextmanager
def _errors_by_flag() -> Iterator[None]:
    """Say of an option `name=value …` what its error says, by the command line's name: `--name value …`."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        flag = {"num_steps": "steps"}.get(name, name).replace("_", "-")
        raise _BadArgument(f"--{flag} {rest}") from None


@contextmanager
def _errors_by_line(args: argparse.Namespace, line: int) -> Iterator[None]:
    """Say of an error in which line of the file of prompts it is, where there is one."""
    try:
        yield
    except (ValueError, _BadArgument) as error:
        raise _BadArgument(f"{args.prompts}, line {line}: {error}" if line else str(error)) from None


def _check_output(folder: Path) -> None:
    """Create the output folder now, so that a long run does not end at a closed door."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _BadArgument(f"--out {folder} cannot be created ({error.strerror}): choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _BadArgument(f"--out {folder} cannot be written to: choose another folder")


def _load(args: argparse.Namespace) -> Model:
    import torch

    import cutdiff

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise _BadArgument(f"--device {device} is not cpu or cuda")
    except (RuntimeError, AssertionError):
        raise _BadArgument(f"--device {device} is not available here: use --device cpu") from None
    try:
        return cutdiff.load(args.model, device=device, dtype=getattr(torch, args.dtype), config=args.config)
    except (ValueError, OSError) as error:
        raise _BadArgument(f"--model {args.model}: {error}") from None


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
    stem = f"{settings.method_name}-{record['width']}x{record['height']}-seed{seed}"
    return save_image(result.images[0], record, args.out, f"{run.line:04}-{stem}" if run.line else stem)


def _complain(message: str, status: int) -> int:
    print(f"cutdiff: {message.splitlines()[0]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
