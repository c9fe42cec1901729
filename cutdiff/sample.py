"""The command line: `python -m cutdiff.sample "a red house at night"`.

No module below it prints or exits. Exit status: 0, 1 for a run that failed or a model whose files are no good, 2 for
arguments that cannot be used. torch is imported after the arguments are parsed, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cutdiff.settings import (
    BACKENDS,
    INTERACTIONS,
    METHOD_NAMES,
    PREDICTION_TYPES,
    SIZE_CONDITIONINGS,
    SOLVER_NAMES,
    Settings,
    nearest,
    not_one_of,
)

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
    except _Failure as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    except Exception as error:  # the last line of defence: one line instead of a traceback
        return _complain(f"the run failed: {type(error).__name__}: {error}", 1)
    return 0


def _run(argv: list[str] | None) -> None:
    args = _parse(argv)
    settings = _settings(args)
    _check_output(args.out)
    model = _load(args)
    if args.verbose:
        _tell(model)
    _check_fit(model, settings)
    _warn_about_length(model, args.prompt, settings.negative_prompt)
    for index in range(args.num_images):
        print(_draw(model, args, settings, settings.seed + index), flush=True)


class _BadArgument(Exception):
    """An argument that cannot be used; its message is the line that the user sees."""


class _Failure(Exception):
    """What a file turns out to be, or a disk; its message is the line that the user sees."""


class _Parser(argparse.ArgumentParser):
    """Errors are raised, and name what was most likely meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        if unknown:
            message = f"{unknown[1]} is no option{nearest(unknown[1], self._option_string_actions)}"
        raise _BadArgument(f"{message} (see --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(value, action.choices))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m cutdiff.sample",
        description="Draw a picture past the size that a diffusion model was trained at.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument("prompt", nargs="?", default=DEMO_PROMPT, help="what to draw", metavar="PROMPT")
    parser.add_argument("--model", metavar="PATH", help="folder, .safetensors file or hub id; none: the embedded one")
    parser.add_argument("--config", metavar="PATH", help="folder with a single file's tokenizers and schedule")
    parser.add_argument("--vae", metavar="PATH", help="folder or file whose VAE replaces the model's")
    parser.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="what the network predicts; none: as the model says"
    )
    parser.add_argument(
        "--zero-terminal-snr", action=argparse.BooleanOptionalAction,
        help="whether the model was trained with noise that ends at zero SNR; none: as the model says",
    )  # fmt: skip
    parser.add_argument("--check-weights", action="store_true", help="read all weights first, and name NaN among them")
    parser.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="PATH[:SCALE]", dest="loras",
        help="file to merge into the model, times SCALE (none: 1); may be given several times",
    )  # fmt: skip
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
    parser.add_argument("-v", "--verbose", action="store_true", help="tell what was read and what it cost")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="where the pictures go")
    args = parser.parse_args(argv)
    args.cosine_scales = tuple(args.cosine_scales)
    if args.num_images < 1:
        raise _BadArgument(f"--num-images {args.num_images} must be at least 1")
    for text in (args.prompt, args.negative_prompt):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _BadArgument(f"the prompt {text!r} is not valid UTF-8: check the terminal's encoding")
    return args


def _lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE]. What is a file is PATH, even with a colon in its name."""
    if Path(text).is_file():
        return text, 1.0
    path, _, scale = text.rpartition(":")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file: give PATH or PATH:SCALE")
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} has the scale {scale!r}: it must be a finite number")
    return path, value


def _settings(args: argparse.Namespace) -> Settings:
    """The arguments that are options of the run, checked."""
    names = Settings.__dataclass_fields__
    with _errors_by_flag():
        settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
        Settings(seed=settings.seed + args.num_images - 1)
    return settings


def _check_fit(model: Model, settings: Settings) -> None:
    """Whether this model can draw with these settings."""
    from cutdiff.pipeline import plan

    with _errors_by_flag():
        plan(model, settings)


@contextmanager
def _errors_by_flag() -> Iterator[None]:
    """Say of an option `name=value …` what its error says, by the command line's name: `--name value …`."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        flag = {"num_steps": "steps"}.get(name, name).replace("_", "-")
        raise _BadArgument(f"--{flag} {rest}") from None


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
    from cutdiff.checkpoint import LoraError

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise _BadArgument(f"--device {device} is not cpu or cuda")
    except (RuntimeError, AssertionError):
        raise _BadArgument(f"--device {device} is not available here: use --device cpu") from None
    try:
        return cutdiff.load(
            args.model,
            device=device,
            dtype=getattr(torch, args.dtype),
            config=args.config,
            vae=args.vae,
            prediction_type=args.prediction_type,
            zero_terminal_snr=args.zero_terminal_snr,
            loras=args.loras,
            check_weights=args.check_weights,
        )
    except LoraError as error:
        raise _Failure(f"--lora {error}") from None
    except FileNotFoundError as error:
        raise _BadArgument(str(error)) from None
    except ValueError as error:
        if str(error).startswith("config="):
            raise _BadArgument(f"--{str(error).replace('=', ' ', 1)}") from None
        raise _Failure(str(error)) from None


def _tell(model: Model) -> None:
    """Which model was read, and who decided how its noise is scheduled."""
    decided = {
        "prediction_type": model.noise.prediction_type,
        "zero_terminal_snr": model.noise.rescale_betas_zero_snr,
    }
    print(f"cutdiff: {model.source}, native size {model.native_size * model.factor} px", file=sys.stderr)
    for name, value in decided.items():
        print(f"cutdiff: {name}={value}, decided by: {model.decided_by[name]}", file=sys.stderr)


def _warn_about_length(model: Model, *prompts: str) -> None:
    for prompt in prompts:
        dropped = model.text.num_dropped(prompt)
        if dropped:
            print(f"cutdiff: the last {dropped} tokens of {prompt[:40]!r}… do not fit and are dropped", file=sys.stderr)


def _draw(model: Model, args: argparse.Namespace, settings: Settings, seed: int) -> Path:
    from dataclasses import replace

    from tqdm import tqdm

    import cutdiff
    from cutdiff.images import save_image

    settings = replace(settings, seed=seed)
    with tqdm(total=settings.num_steps, unit="step", leave=False, disable=None) as bar:

        def on_step(step: cutdiff.Step, num_steps: int) -> None:
            bar.total = num_steps
            bar.set_description(step.stage, refresh=False)
            bar.update()

        result: Result = cutdiff.generate(model, args.prompt, settings, on_step=on_step)
    record = result.record
    if record["decoded_in"] != record["vae_dtype"]:
        print(f"cutdiff: the VAE overflowed in {record['vae_dtype']}, so it decoded in float32", file=sys.stderr)
    if args.verbose:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in record["seconds"].items())
        print(f"cutdiff: {record['network_evaluations']} network evaluations; {seconds}", file=sys.stderr)
    stem = f"{settings.method_name}-{record['width']}x{record['height']}-seed{seed}"
    try:
        return save_image(result.images[0], record, args.out, stem)
    except OSError as error:
        raise _Failure(
            f"{args.out / stem}.png cannot be written ({error.strerror}): free space, or change --out"
        ) from None


def _complain(message: str, status: int) -> int:
    print(f"cutdiff: {message.splitlines()[0]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
