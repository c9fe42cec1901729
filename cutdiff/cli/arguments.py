"""The arguments of command lines. Imports no torch before an option of a method, solver, schedule or guidance is given.

Flags of these are made from the fields of the objects that the command line names; `--method NAME --help` lists them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from cutdiff import specs
from cutdiff.files import BadFile
from cutdiff.given.controls import CONTROLS
from cutdiff.options import MAX_FLOAT32, Between, Option, nearest, not_one_of, options_of, read
from cutdiff.parallel.lines import write
from cutdiff.settings import FILES, PREDICTION_TYPES, SPACINGS, Settings
from cutdiff.specs import TABLES

DEMO_PROMPT = "a red house with mountains over a meadow at day"
Group = argparse._ArgumentGroup
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""The --dtype that the machine chooses. Only measurements have it: a picture is to be the same on every machine."""
MAX_PICTURES = 100_000
"""The most pictures of a run; each takes time and memory before the first is drawn."""
YEAR = 365 * 24 * 3600
"""The seconds that --rank-timeout may have at most."""
SHARED = ("strength",)
"""The options of a run that a method may have too, whose text is read for the one that has it."""
OF_IMAGE = ("strength", "fit", "invert", "mask", "feather", "place")
"""The options of a run that say what is done with its image."""
OTHERS = r"(?:(?<=goes with )|(?<=goes with mask or )|(?<=, and )(?=place puts)|(?<=give )(?=control_image))[a-z_]+\b"
"""The names of other options in errors, where they are no other words."""
HOW = (*TABLES, "positions", "num_steps", "shift", "guidance_interval")
"""The options of a run that say how a picture is drawn, and neither which one nor where."""


class BadArgument(Exception):
    """An argument that cannot be used; its message is the line that the user reads."""

    status = 2
    """The exit status of the command line."""


class UnusableFile(BadArgument):
    """An argument that names a file which is no good."""

    status = 1


def of_flag(error: Exception) -> BadArgument:
    """`name=value …` as `--name value …`, and `name=True …` as `--name …` where the value may be True. A message that
    names no option stays as it is."""
    kind = UnusableFile if isinstance(error, BadFile) else BadArgument
    name, separator, rest = str(error).partition("=")
    if not (separator and name.isidentifier()):
        return kind(str(error))
    words = re.sub("^True (?!must be )", "", rest).replace("num_steps=", f"{flag_of('num_steps')} ")
    words = re.sub(r", and (mask|place)=", lambda match: f", and {flag_of(match[1])} ", words)
    words = re.sub(OTHERS, lambda match: flag_of(match[0]), words)
    return kind(f"{flag_of(name)} {words}")


@contextmanager
def errors_by_flag() -> Iterator[None]:
    """Let errors name an option as the command line does."""
    try:
        yield
    except ValueError as error:
        raise of_flag(error) from None


def flag_of(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + {"num_steps": "steps"}.get(name, name).replace("_", "-")


def as_taken(preferred: Mapping[str, Any]) -> str:
    """The line that tells of options which were taken from the model."""
    return f"taken from the model: {', '.join(f'{flag_of(name)} {value}' for name, value in preferred.items())}"


class Parser(argparse.ArgumentParser):
    """Raises BadArgument, which names what was most likely meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, "allow_abbrev": False, **options})
        self.things: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments:(?: | .* )(-[^ ]+)", message)
        hint = ""
        if unknown:
            self._check_owned(unknown[1])
            meant = nearest(unknown[1], self._option_string_actions) if unknown[1].startswith("--") else ""
            message = f"{unknown[1]} is no option{meant}"
        if self._get_positional_actions() and (unknown or "ignored explicit argument" in message):
            hint = '; a prompt that begins with - comes last, after --: -- "-…"'
        elif option := re.search(r"(--[\w-]+): expected one argument", message):
            hint = f"; a value that begins with - is given as {option[1]}=-…"
        raise BadArgument(f"{message} (see --help{hint})")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write --help; argparse itself would swallow the error where nobody reads it."""
        write(message, file or sys.stderr)

    def _check_owned(self, flag: str) -> None:
        """BadArgument where an unknown flag is an option of a method, solver, schedule or guidance not chosen here."""
        name = flag.partition("=")[0].lstrip("-").replace("-", "_")
        if self.things and flag.startswith("--") and specs.owners(name):
            raise BadArgument(f"{flag} {specs.no_option(name, self.things)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(value, action.choices))

    def parse_run(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, those that are options of a run under `options`, with flags for the options of the objects
        that they name. BadArgument where such an object cannot be had."""
        arguments = [*(sys.argv[1:] if argv is None else argv)]
        named = _named_objects(arguments)
        if self._misses_flags(arguments) or (named and {"-h", "--help"} & {*arguments}):
            with errors_by_flag():
                self.things = {kind: specs.named(kind, named.get(kind, kind_default(kind))) for kind in TABLES}
            for kind, thing in self.things.items():
                group = self.add_argument_group(f"options of {kind} {specs.name_of(kind, thing)}")
                for option in options_of(thing).values():
                    if option.name in SHARED and flag_of(option.name) in self._option_string_actions:
                        self._option_string_actions[flag_of(option.name)].help = _help(option)
                    elif flag_of(option.name) in self._option_string_actions:
                        group.description = f"{option.name} is given in the spec: the flag is another option's"
                    else:
                        value = option.default if isinstance(thing, type) else getattr(thing, option.name)
                        add_option(group, option._replace(default=value))
        return self.parse_args(arguments, argparse.Namespace(options={}))

    def _misses_flags(self, arguments: list[str]) -> bool:
        """True where a flag is given that the parser does not have."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        flags = {argument.partition("=")[0] for argument in arguments[:end] if argument.startswith("--")}
        return not flags <= {*self._option_string_actions, "--"}


def _named_objects(arguments: list[str]) -> dict[str, str]:
    """The specs that a command line gives by the flags of methods, solvers, schedules and guidance."""
    specs_given: dict[str, str] = {}
    for argument, after in pairwise([*arguments, ""]):
        flag, separator, value = argument.partition("=")
        for kind in TABLES:
            if flag == flag_of(kind):
                specs_given[kind] = value if separator else after
    return {kind: text for kind, text in specs_given.items() if text and not text.startswith("--")}


def kind_default(kind: str) -> Any:
    """The method, solver, schedule or guidance where none is named."""
    return options_of(Settings)[kind].default


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of `python -m cutdiff.sample`; those that are options of a run, and were given, under `options`."""
    parser = Parser(
        prog="python -m cutdiff.sample",
        usage="%(prog)s [PROMPT] [options]",
        description="Draw a picture past the size that a diffusion model was trained at.",
        epilog="A method, solver, schedule and guidance have options of their own: --method NAME --help lists them.",
    )
    for add, title in ((_add_prompt, "what to draw"), (_add_model, "the model"), (add_how, "how"), (_add_run, "where")):
        add(parser.add_argument_group(title))
    args = parser.parse_run(argv)
    if args.prompt is not None and args.prompts is not None:
        raise BadArgument(f"--prompts {args.prompts} takes the place of PROMPT {args.prompt!r}: give one of them")
    for name in ("image", "prompts"):
        other = args.options.get(name) if name == "image" else args.prompts
        if args.images is not None and other is not None:
            raise BadArgument(f"--images {args.images} takes the place of --{name} {other}: give one of them")
    for name in ("trace_every", "trace_decode", "trace_data"):
        if getattr(args, name) and not args.trace:
            raise BadArgument(f"{flag_of(name)} is a part of --trace: give that, too")
    return args


def add_debug(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flag --debug, which `cutdiff.cli.ending.exit_status` reads."""
    parser.add_argument("--debug", action="store_true", help="where the run fails, print the traceback too")


def add_device(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the argument --device, which `cutdiff.cli.device.device_of` reads."""
    parser.add_argument("--device", help="cpu or cuda; none: cuda where there is one", metavar="NAME")


def add_option(group: Group, option: Option, help: str = "") -> None:
    """A flag for an option of a run, which goes into `options` of the arguments where it is given."""
    settings: dict[str, Any] = {"dest": option.name, "action": _Given, "help": _help(option, help)}
    kinds = get_args(option.type)
    if option.name in FILES:
        group.add_argument(flag_of(option.name), default=argparse.SUPPRESS, metavar="FILE", **settings)
        return
    if option.type is bool:
        flags = [flag_of(option.name), *[f"--no-{flag_of(option.name)[2:]}"] * (option.default is True)]
        group.add_argument(*flags, default=argparse.SUPPRESS, nargs=0, **settings)
        return
    if get_origin(option.type) is tuple and kinds and kinds[-1] is not Ellipsis:
        settings |= {"nargs": len(kinds), "metavar": tuple(map(_metavar, kinds)), "const": option.type}
    else:
        as_text = option.name in SHARED
        reader = specs.Text if as_text else _reader(option.name, option.type)
        settings |= {"type": reader, "metavar": _metavar(option.type)}
    group.add_argument(flag_of(option.name), default=argparse.SUPPRESS, **settings)


def _help(option: Option, help: str = "") -> str:
    """The text of --help: `help`, or the option's own, and the default where it says something."""
    text = help or f"{option.doc[:1].lower()}{option.doc[1:]}".replace("None:", "none:")
    default = "on" if option.default is True else _shown(option.default)
    shown = "" if option.default in (None, False, "") else f" ({default})"
    return f"{text}{shown}".replace("%", "%%").strip()


def add_controls(group: Group) -> None:
    """The options of ControlNets, which may each be given several times."""
    own = options_of(Settings)
    for name, placeholder in zip(CONTROLS, ("PATH", "FILE", "X", ("FROM", "TO")), strict=True):
        several: dict[str, Any] = {"nargs": 2} if isinstance(placeholder, tuple) else {}
        kind = str if name in FILES else _reader(name, float)
        group.add_argument(
            flag_of(name), dest=name, default=argparse.SUPPRESS, action=_Another, type=kind, metavar=placeholder,
            help=_help(own[name]), **several,
        )  # fmt: skip


def add_how(group: Group) -> None:
    """The options of a run that say how a picture is drawn."""
    own = options_of(Settings)
    for kind, table in TABLES.items():
        add_option(group, own[kind]._replace(type=str), f"NAME,option=value of {', '.join(table)}, or module:object")
    for name in HOW:
        if name == "positions":
            known = f"NAME,option=value of {', '.join(specs.POSITIONS)}, or module:object: where a transformer is told"
            add_option(group, own[name]._replace(type=str), f"{known} that tokens lie beyond its native size")
        elif name not in TABLES:
            add_option(group, own[name])


class _Given(argparse.Action):
    """Put a value into `options` of the arguments: True or False for a flag without one; several are read together."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        if self.nargs == 0:
            values = not str(flag).startswith("--no-")
        elif self.const is not None:
            try:
                values = read(self.dest, f"({','.join(values)})", self.const)
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error).partition("=")[2]) from None
        if self.dest in FILES and self.dest in namespace.options:
            raise argparse.ArgumentError(self, f"{namespace.options[self.dest]} and {values} are two files: give one")
        namespace.options = {**namespace.options, self.dest: values}


class _Another(argparse.Action):
    """Put one more value into a list in `options` of the arguments."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        values = tuple(values) if self.nargs else values
        before = namespace.options.get(self.dest, [])
        namespace.options = {**namespace.options, self.dest: [*before, values]}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, argparse.SUPPRESS, "") or action.default == []
        return action.help if silent else super()._get_help_string(action)


def _reader(name: str, kind: Any) -> Any:
    def convert(text: str) -> Any:
        try:
            return read(name, text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).partition("=")[2]) from None

    return convert


def number(low: float, high: float, kind: type = int) -> Any:
    """The type of an argument that is a number from `low` to `high`, and no option of a run."""
    return _reader("", Annotated[kind, Between(low, high)])


def _metavar(kind: Any) -> str:
    """The placeholder of a value: N, X, TEXT, SPEC, or what it may be."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return f"{{{','.join(map(str, get_args(part)))}}}"
        if get_origin(part) is tuple and get_args(part)[-1] is not Ellipsis:
            return ",".join(map(_metavar, get_args(part)))
        if part in (int, float, str):
            return {int: "N", float: "X", str: "TEXT"}[part]
        if get_origin(part) is Annotated:
            return _metavar(get_args(part)[0])
    return "VALUE"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _add_prompt(group: Group) -> None:
    own = options_of(Settings)
    group.add_argument(
        "prompt", nargs="?", metavar="PROMPT",
        help="(word:1.2) and (word) weigh more, [word] less, BREAK begins a new chunk of tokens; [a:b:0.5] and [a|b] "
        f"change by step, a AND b:1.2 adds prompts up; none: {DEMO_PROMPT!r}",
    )  # fmt: skip
    group.add_argument(
        "--prompts", type=_path, metavar="FILE",
        help="in the place of PROMPT, a prompt a line, or a JSON object with a prompt and options of its own: "
        '{"prompt": "a tent", "width": 256, "seed": 7}; blank lines and those that begin with # are skipped',
    )  # fmt: skip
    add_option(group, own["negative_prompt"], "what not to draw")
    add_option(group, own["prompt_2"], "for the second text encoder, which is T5 in FLUX.1; none: PROMPT")
    add_option(group, own["negative_prompt_2"], "for the second; none: the negative prompt")
    add_option(group, own["width"])
    add_option(group, own["height"])
    add_option(group, own["seed"])
    add_option(group, own["image"], "the picture to start from; without PROMPT, the prompt is then empty")
    group.add_argument(
        "--images", type=_path, metavar="DIR", help="in the place of --image, a picture for each one in a folder"
    )
    for name in (*OF_IMAGE, "regions", "bootstrapping"):
        add_option(group, own[name])
    add_controls(group)
    group.add_argument(
        "--num-images", type=number(1, MAX_PICTURES), default=1, metavar="K", help="pictures, with seeds S, S+1, …"
    )


def _add_model(group: Group) -> None:
    group.add_argument("--model", metavar="PATH", help="folder, .safetensors file or hub id; none: the embedded one")
    group.add_argument(
        "--config", metavar="PATH", help="folder with a single file's tokenizers, schedule and what else it lacks"
    )
    group.add_argument("--vae", metavar="PATH", help="folder or file whose VAE replaces the model's")
    group.add_argument("--text-encoder-3", choices=["none"], help="leave out SD3's T5 encoder, of 9.5 GB in 16 bits")
    group.add_argument("--variant", metavar="NAME", help="a folder's weights of that variant, such as bf16 or non_ema")
    group.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="PATH[:SCALE]", dest="loras",
        help="file or PEFT folder to merge into the model, times SCALE (none: 1); may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--embedding", type=_embedding, action="append", default=[], metavar="[TOKEN=]PATH", dest="embeddings",
        help="file of textual inversion that TOKEN (none: the name of the file) stands for in prompts; may be given "
        "several times",
    )  # fmt: skip
    group.add_argument(
        "--lora-dir", type=_path, metavar="DIR", help="folder of the LoRAs that a prompt names: <lora:NAME:SCALE>"
    )
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
    add_option(group, options_of(Settings)["clip_skip"])
    group.add_argument(
        "--check-weights",
        action="store_true",
        help="read all weights first, and name NaN and zeros of a broken download",
    )


def _add_run(group: Group) -> None:
    own = options_of(Settings)
    group.add_argument("--out", type=_path, default=Path("outputs"), metavar="DIR", help="where the pictures go")
    group.add_argument("--overwrite", action="store_true", help="draw over other pictures of the same names")
    group.add_argument(
        "--trace", action="store_true", help="write a page of what happens at each step beside the picture"
    )
    group.add_argument(
        "--trace-every", type=number(1, MAX_PICTURES), metavar="N",
        help="show every N-th step in full; none: all, or as few as 200 MB hold",
    )  # fmt: skip
    group.add_argument("--trace-decode", action="store_true", help="decode the estimates of these steps with the VAE")
    group.add_argument("--trace-data", action="store_true", help="write the tensors of the trace as a folder, too")
    add_device(group)
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
    for name in ("view_batch_size", "compile", "cuda_graphs", "backend"):
        add_option(group, own[name])
    group.add_argument("--log-json", action="store_true", help="print a JSON object for each picture, not its path")
    group.add_argument("-v", "--verbose", action="store_true", help="tell what was read and what it cost")
    add_debug(group)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' names nothing: give a path")
    return Path(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= YEAR:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, at most {YEAR}, a year")
    return value


def _embedding(text: str) -> tuple[str, str]:
    """PATH or TOKEN=PATH. What is a file is PATH, even with = in its name."""
    token, _, path = text.partition("=")
    if os.path.isfile(text):
        return Path(text).stem, text
    if not token.strip() or not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{text} is no file: give PATH or TOKEN=PATH")
    return token.strip(), path


def _lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE]. What exists is PATH, even with a colon in its name."""
    path, _, scale = text.rpartition(":")
    if os.path.isfile(text) or os.path.isdir(text):
        return text, 1.0
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise argparse.ArgumentTypeError(f"{text} is no file or folder: give PATH or PATH:SCALE")
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_FLOAT32:
        raise argparse.ArgumentTypeError(f"{text} has the scale {scale!r}: it must be a finite number (of float32)")
    return path, value
