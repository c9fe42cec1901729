"""The arguments of `python -m cutdiff.sample`. Imports no torch."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from cutdiff.settings import (
    BACKENDS,
    INTERACTIONS,
    MAX_FLOAT32,
    METHOD_NAMES,
    PREDICTION_TYPES,
    SIZE_CONDITIONINGS,
    SOLVER_NAMES,
    SPACINGS,
    STAGED,
    WITHOUT_VIEWS,
    Settings,
    nearest,
    not_one_of,
)

DEMO_PROMPT = "a red house with mountains over a meadow at day"
Group = argparse._ArgumentGroup
DTYPES = ("float32", "bfloat16", "float16")


class BadArgument(Exception):
    """An argument that cannot be used; its message is the line that the user sees."""


def of_flag(error: Exception) -> BadArgument:
    """`name=value …` as `--name value …`, and `name=True …` as `--name …`."""
    name, _, rest = str(error).partition("=")
    return BadArgument(f"{flag_of(name)} {rest.removeprefix('True ')}")


@contextmanager
def errors_by_flag() -> Iterator[None]:
    """Say what an error says of an option by the command line's name."""
    try:
        yield
    except ValueError as error:
        raise of_flag(error) from None


def flag_of(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + {"num_steps": "steps"}.get(name, name).replace("_", "-")


def check_used(settings: Settings) -> None:
    """BadArgument for an option that the method has no use for."""
    if settings.stride is not None and settings.method in WITHOUT_VIEWS:
        raise BadArgument(f"--stride {settings.stride} is for methods with views, not {settings.method}: leave it out")
    if settings.structure_fraction is not None and settings.method not in STAGED:
        raise BadArgument(
            f"--structure-fraction {settings.structure_fraction} is for {' and '.join(STAGED)}, not {settings.method}: "
            "leave it out"
        )


class Parser(argparse.ArgumentParser):
    """Raises BadArgument, which names what was most likely meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments:(?: | .* )(-[^ ]+)", message)
        hint = ""
        if unknown:
            meant = nearest(unknown[1], self._option_string_actions) if unknown[1].startswith("--") else ""
            message = f"{unknown[1]} is no option{meant}"
        if self._get_positional_actions() and (unknown or "ignored explicit argument" in message):
            hint = '; a prompt that begins with - comes last, after --: -- "-…"'
        elif option := re.search(r"(--[\w-]+): expected one argument", message):
            hint = f"; a value that begins with - is given as {option[1]}=-…"
        raise BadArgument(f"{message} (see --help{hint})")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(value, action.choices))


def parse(argv: list[str] | None, given: argparse.Namespace | None = None) -> argparse.Namespace:
    """The arguments; what they leave out is as `given`, or the default."""
    parser = Parser(
        prog="python -m cutdiff.sample",
        usage="%(prog)s [PROMPT] [options]",
        description="Draw a picture past the size that a diffusion model was trained at.",
        formatter_class=_Formatter,
    )
    for add, title in (
        (_add_prompt, "what to draw"),
        (_add_model, "the model"),
        (add_method, "how"),
        (_add_run, "where"),
    ):
        add(parser.add_argument_group(title), Settings())
    args = parser.parse_args(argv, argparse.Namespace(**vars(given) if given else {}))
    args.cosine_scales, args.guidance_interval = tuple(args.cosine_scales), tuple(args.guidance_interval)
    if args.num_images < 1:
        raise BadArgument(f"--num-images {args.num_images} must be at least 1")
    if args.prompt is not None and args.prompts is not None:
        raise BadArgument(f"--prompts {args.prompts} takes the place of PROMPT {args.prompt!r}: give one of them")
    return args


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], "")
        return action.help if silent else super()._get_help_string(action)


def _add_prompt(group: Group, defaults: Settings) -> None:
    group.add_argument(
        "prompt", nargs="?", metavar="PROMPT",
        help="(word:1.2) and (word) weigh more, [word] less, BREAK begins a new chunk of tokens; "
        f"none: {DEMO_PROMPT!r}",
    )  # fmt: skip
    group.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="in the place of PROMPT, a prompt a line, or a JSON object with a prompt and options of its own: "
        '{"prompt": "a tent", "width": 256, "seed": 7}; blank lines and those that begin with # are skipped',
    )  # fmt: skip
    group.add_argument("--negative-prompt", default=defaults.negative_prompt, metavar="TEXT", help="what not to draw")
    group.add_argument("--prompt-2", metavar="TEXT", help="for SDXL's second text encoder; none: PROMPT")
    group.add_argument("--negative-prompt-2", metavar="TEXT", help="for the second; none: the negative prompt")
    group.add_argument("--width", type=int, metavar="W", help="in pixels; none: twice the native size")
    group.add_argument("--height", type=int, metavar="H", help="in pixels; none: twice the native size")
    group.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="of the first picture")
    group.add_argument("--num-images", type=int, default=1, metavar="K", help="pictures, with seeds S, S+1, …")


def _add_model(group: Group, defaults: Settings) -> None:
    group.add_argument("--model", metavar="PATH", help="folder, .safetensors file or hub id; none: the embedded one")
    group.add_argument("--config", metavar="PATH", help="folder with a single file's tokenizers and schedule")
    group.add_argument("--vae", metavar="PATH", help="folder or file whose VAE replaces the model's")
    group.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="PATH[:SCALE]", dest="loras",
        help="file to merge into the model, times SCALE (none: 1); may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="what the network predicts; none: as the model says"
    )
    group.add_argument(
        "--zero-terminal-snr", action=argparse.BooleanOptionalAction,
        help="whether the model was trained with noise that ends at zero SNR; none: as the model says",
    )  # fmt: skip
    group.add_argument(
        "--timestep-spacing", choices=SPACINGS,
        help="how timesteps are picked; few-step models want trailing; none: as the model says",
    )  # fmt: skip
    group.add_argument(
        "--clip-skip", type=int, metavar="N",
        help="the layer of the text encoders that is read, 1 the last; none: as the model was trained",
    )  # fmt: skip
    group.add_argument(
        "--check-weights",
        action="store_true",
        help="read all weights first, and name NaN and zeros of a broken download",
    )


def add_method(group: Group, defaults: Settings) -> None:
    group.add_argument(
        "--method", default=defaults.method, choices=METHOD_NAMES, metavar="NAME", help=", ".join(METHOD_NAMES)
    )
    group.add_argument(
        "--steps", type=int, default=defaults.num_steps, metavar="N", dest="num_steps",
        help="of each phase, where a method draws a cascade of sizes",
    )  # fmt: skip
    group.add_argument("--guidance-scale", type=float, default=defaults.guidance_scale, metavar="G", help="1 is off")
    group.add_argument(
        "--detail-guidance-scale", type=float, metavar="G",
        help="in the detail stage; none: 1 for magnify, else that of the run",
    )  # fmt: skip
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, default=defaults.guidance_interval, metavar=("FROM", "TO"),
        help="shares of the steps between which guidance is on; outside a step costs half",
    )  # fmt: skip
    group.add_argument("--solver", default=defaults.solver, choices=SOLVER_NAMES, help="of the steps")
    group.add_argument("--eta", type=float, default=defaults.eta, metavar="E", help="fresh noise of ddim, 0 to 1")
    group.add_argument(
        "--structure-fraction", type=float, metavar="F",
        help="where in the steps the detail stage begins; none: 0.5 for cutdiffusion, 0.3 for magnify",
    )  # fmt: skip
    group.add_argument("--stride", type=int, metavar="L", help="between views, in latents; none: half a window")
    group.add_argument(
        "--interaction", default=defaults.interaction, choices=INTERACTIONS, help="how patches exchange pixels"
    )
    group.add_argument(
        "--size-conditioning", default=defaults.size_conditioning, choices=SIZE_CONDITIONINGS,
        help="what the network is told of sizes; target: as the published code",
    )  # fmt: skip
    group.add_argument(
        "--cosine-scales", type=float, nargs=3, default=defaults.cosine_scales, metavar=("SKIP", "DILATED", "BLUR"),
        help="how fast DemoFusion's guides fade",
    )  # fmt: skip
    group.add_argument(
        "--word-threshold", type=float, default=defaults.word_threshold, metavar="C",
        help="share of a view that a word must fill for AccDiffusion",
    )  # fmt: skip


def _add_run(group: Group, defaults: Settings) -> None:
    group.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="where the pictures go")
    group.add_argument("--overwrite", action="store_true", help="draw over other pictures of the same names")
    group.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")
    group.add_argument(
        "--data-parallel", type=int, default=1, metavar="D",
        help="groups of torchrun's processes that draw different pictures; those of a group share the work of each",
    )  # fmt: skip
    group.add_argument(
        "--rank-timeout", type=_seconds, default=1800.0, metavar="S",
        help="seconds after which the run ends where one process hangs and others wait for it",
    )  # fmt: skip
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="of the networks")
    group.add_argument(
        "--fp8", action="store_true",
        help="multiply the transformers' linear layers in 8 bits; with bfloat16, on a GPU (Ada, Hopper or later)",
    )  # fmt: skip
    group.add_argument(
        "--offload", action="store_true", help="keep the text encoders off the GPU but for the time of encoding"
    )
    group.add_argument(
        "--view-batch-size", type=int, metavar="V",
        help="patches or views that go through the network at once; none: 16 on a CPU, all of a step on a GPU",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the network first, which takes minutes")
    group.add_argument(
        "--cuda-graphs", action="store_true",
        help="with --compile, on a GPU: record the network for each number of rows, for small batches",
    )  # fmt: skip
    group.add_argument(
        "--backend", default=defaults.backend, choices=BACKENDS, help="of the operators around the network"
    )
    group.add_argument("--log-json", action="store_true", help="print a JSON object for each picture, not its path")
    group.add_argument("-v", "--verbose", action="store_true", help="tell what was read and what it cost")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE]. What is a file is PATH, even with a colon in its name."""
    path, _, scale = text.rpartition(":")
    if os.path.isfile(text):
        return text, 1.0
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{text} is no file: give PATH or PATH:SCALE")
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_FLOAT32:
        raise argparse.ArgumentTypeError(f"{text} has the scale {scale!r}: it must be a finite number (of float32)")
    return path, value
