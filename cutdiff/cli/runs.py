"""The pictures that a command line asks for, their names, and which of them exist already.

The pictures of --prompts, --images or --num-images are a set: each is named by its line or given picture, method, size
and seed and is finished or absent, and a name that another picture has is an error. If PROMPT alone is drawn, a number
is added to such a name.
torch is imported only by functions that are given a model or read records, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category

from cutdiff import specs
from cutdiff.cli.arguments import (
    DEMO_PROMPT,
    MAX_PICTURES,
    BadArgument,
    UnusableFile,
    errors_by_flag,
    flag_of,
    of_flag,
)
from cutdiff.cli.promptfile import parse_line, read_lines
from cutdiff.files import reworded
from cutdiff.given.controls import CONTROL_FILES
from cutdiff.parallel.lines import say
from cutdiff.parallel.process import process
from cutdiff.settings import FILES, PICTURES, Settings, check_owned, left_to_model

if TYPE_CHECKING:
    from cutdiff.checkpoint.model import Model

_HASHED = (*PICTURES, *CONTROL_FILES)
"""The options whose files a record has by name and hash."""
LONGEST_LABEL = 120
"""The most bytes of a given picture's name in that of a drawn one; a name of a file, of which parts are written under a
hidden name first, has at most 255."""


class Request(NamedTuple):
    """A prompt and the options of its pictures: one of the command line, of a line of a file, or for a given picture of
    a folder."""

    prompt: str
    settings: Settings
    line: int = 0
    """The number of its line, or of its given picture, counted from 1; 0 if there is neither file nor folder."""
    own: Mapping[str, Any] = MappingProxyType({})
    """The options that its line has of its own."""


@dataclass(frozen=True)
class Picture:
    """One picture of the run, which must be drawn unless it is finished."""

    prompt: str
    settings: Settings
    line: int
    path: Path
    finished: bool


class BadLine(BadArgument):
    """A line of the file of prompts, or a given picture of the folder, that cannot be drawn."""

    def __init__(self, args: argparse.Namespace, line: int, error: Exception) -> None:
        place = f"{args.prompts}, line {line}" if args.images is None else str(args.files[line - 1])
        names_it = str(error).startswith(f"--image {place} ")
        super().__init__(str(error) if names_it else f"{place}: {error}")
        self.line, self.status = line, getattr(error, "status", self.status)


def read_requests(args: argparse.Namespace) -> tuple[list[Request], list[BadLine]]:
    """The prompt of the command line, or those of the file, or that for each picture of the folder, each checked, and
    those that cannot be drawn."""
    if args.prompts is None:
        usual = "" if args.images is not None or {"image", "regions"} & args.options.keys() else DEMO_PROMPT
        prompt = usual if args.prompt is None else args.prompt
        if args.images is None:
            return [Request(prompt, _settings(prompt, args, {}))], []
        return _of_pictures(args, prompt)
    try:
        lines = read_lines(args.prompts)
    except (FileNotFoundError, ValueError) as error:
        raise of_flag(reworded(error, f"prompts={error}")) from None
    if not lines:
        raise UnusableFile(f"--prompts {args.prompts} holds no prompt: give at least one line")
    if (num := len(lines) * args.num_images) > MAX_PICTURES:
        raise BadArgument(f"--prompts {args.prompts} asks for {num} pictures, more than {MAX_PICTURES}: split the file")
    requests, bad = [], []
    of_run = {*vars(args), "lora", "embedding"} - {"options"}
    for number, line in lines:
        try:
            with errors_by_flag():
                prompt, own = parse_line(line)
            if whole := next((name for name in own if name in of_run), None):
                raise BadArgument(f"{whole} is for all lines: give {flag_of(whole)} on the command line")
            own |= {name: _beside(args.prompts.parent, name, own[name]) for name in FILES if name in own}
            requests.append(Request(prompt, _settings(prompt, args, own), number, own))
        except (ValueError, BadArgument) as error:
            bad.append(BadLine(args, number, error))
    return requests, bad


def _of_pictures(args: argparse.Namespace, prompt: str) -> tuple[list[Request], list[BadLine]]:
    """A request for each picture of the folder --images, and those that cannot be read. Of the arguments, `files` are
    then these pictures.
    """
    args.files = picture_files(args.images)
    if args.out.is_dir() and args.out.samefile(args.images):
        args.files = _not_drawn_here(args.files)
    if (num := len(args.files) * args.num_images) > MAX_PICTURES:
        raise BadArgument(f"--images {args.images} asks for {num} pictures, more than {MAX_PICTURES}: divide it")
    requests, bad = [], []
    for number, path in enumerate(args.files, 1):
        own = {"image": path}
        try:
            requests.append(Request(prompt, _settings(prompt, args, own), number, own))
        except BadArgument as error:
            bad.append(BadLine(args, number, error))
    return requests, bad


def picture_files(folder: Path) -> list[Path]:
    """The files of a folder that have the ending of a picture, by name. BadArgument where there is none."""
    from PIL import Image

    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadArgument(f"--images {folder} cannot be read ({error.strerror}): give a folder of pictures") from None
    known = Image.registered_extensions()
    files = [path for path in files if path.suffix.lower() in known and not path.is_dir()]
    if not files:
        raise BadArgument(f"--images {folder} holds no file with the ending of a picture, such as .png: give another")
    return files


def _not_drawn_here(files: list[Path]) -> list[Path]:
    """The files without those that were drawn of others among them, which is said. BadArgument where there are no
    others."""
    from cutdiff.output.images import read_record

    images = {path: read_record(path).get("image") for path in files}
    names = {path.name for path in files}
    drawn = {path for path, image in images.items() if isinstance(image, dict) and str(image.get("name")) in names}
    drawn_here = "drawn of others there, as their records say"
    if len(drawn) == len(files):
        raise BadArgument(
            f"--images {files[0].parent} holds only pictures that were {drawn_here}: choose another --out"
        )
    if drawn and process() == 0:
        say(f"{len(drawn)} pictures of --images were {drawn_here}, and are left out")
    return [path for path in files if path not in drawn]


def _label(name: str) -> str:
    """A given picture's name, with its ending, as that of a drawn one begins, whatever lies beside it: one that is long
    is cut, control characters are replaced, and then a hash tells it from others that look the same."""
    label = "".join("_" if category(character) == "Cc" else character for character in name)
    while len(os.fsencode(label)) > LONGEST_LABEL:
        label = label[:-1]
    return label if label == name else f"{label}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def take_preferred(
    model: Model, args: argparse.Namespace, requests: list[Request]
) -> tuple[list[Request], dict[str, Any]]:
    """The requests with those of the model's preferences that they leave open, and these preferences."""
    taken: dict[str, Any] = {}
    given: list[Request] = []
    for request in requests:
        left = left_to_model({**args.options, **request.own}, model.preferred)
        with errors_by_flag():
            given.append(request._replace(settings=replace(request.settings, **left)) if left else request)
        taken |= left
    return given, taken


def check_fit(model: Model, args: argparse.Namespace, requests: list[Request]) -> tuple[list[Request], list[BadLine]]:
    """The requests that this model can draw, and the lines that it cannot; BadArgument if there is no file of lines."""
    from cutdiff.pipeline import canvas_and_schedule

    fit, bad = [], []
    for request in requests:
        try:
            with errors_by_flag():
                canvas_and_schedule(model, request.settings)
            fit.append(request)
        except BadArgument as error:
            if not request.line:
                raise
            bad.append(BadLine(args, request.line, error))
    return fit, bad


def plan_pictures(model: Model, args: argparse.Namespace, requests: list[Request]) -> list[Picture]:
    """The pictures of the run, in order. BadArgument if another picture has the name of one of a set."""
    return [
        _plan_picture(model, args, request, request.settings.seed + index)
        for request in requests
        for index in range(args.num_images)
    ]


def is_set(args: argparse.Namespace) -> bool:
    """True if the pictures belong together, so that each keeps its name."""
    return args.prompts is not None or args.images is not None or args.num_images > 1


def _plan_picture(model: Model, args: argparse.Namespace, request: Request, seed: int) -> Picture:
    """The picture of a request and a seed, with a name that no other picture has, finished if it exists already."""
    from cutdiff.output.images import State, numbered, read_record, state_of
    from cutdiff.output.record import describe, is_of
    from cutdiff.pipeline import canvas_and_schedule
    from cutdiff.sampling.draws import Draws

    settings = replace(request.settings, seed=seed)
    height, width = (side * model.factor for side in settings.canvas_size(model.native_size, model.factor))
    stem = f"{settings.method_name}-{width}x{height}-seed{seed}"
    if request.line:
        label = f"{request.line:04}" if args.images is None else _label(args.files[request.line - 1].name)
        stem = f"{label}-{stem}"
    picture = Picture(request.prompt, settings, request.line, args.out / f"{stem}.png", finished=False)
    if not picture.path.exists():
        return picture
    described = describe(model, request.prompt, settings, Draws((seed,)), canvas_and_schedule(model, settings)[1])
    for path in numbered(args.out, stem):
        state = state_of(path, partial(is_of, described))
        if state is State.FINISHED:
            return replace(picture, path=path, finished=True)
        if state is not State.OTHER or args.overwrite:
            break
        if is_set(args):
            difference = _difference(described, read_record(path))
            raise BadArgument(f"{path} {difference}: pass --overwrite to draw over it, or choose another --out")
    return picture


def _difference(described: dict[str, Any], record: dict[str, Any]) -> str:
    """The words of an error for what a record's picture was drawn with, other than the described one."""
    from cutdiff.output.record import changes

    if not record:
        return "has no record of how it was drawn"
    differing = changes(described, record)
    if len(differing) > 1:
        differing.pop("noise schedule", None)  # the sigmas follow from options, or from the noise of the model
    differences = [
        _of_files(name, record.get(name), described.get(name)) if name in _HASHED else _change(name, *values)
        for name, values in differing.items()
    ]
    return f"was drawn with {', '.join(differences)}" if differences else "is not the picture that its record tells of"


def _of_files(name: str, then: Any, now: Any) -> str:
    """One or several files that differ, as an error tells them: by their names."""
    before, after = (", ".join(str(file["name"]) for file in _listed(files)) or "none" for files in (then, now))
    return f"{flag_of(name)} {before} (now {after if before != after else 'with other contents'})"


def _listed(files: Any) -> list[dict[str, Any]]:
    """The files of a record's option, which has one, several or none."""
    return [files] if isinstance(files, dict) else files or []


def _change(name: str, then: Any, now: Any) -> str:
    """One value that differs, as an error tells it; of a method or the like only its options that differ."""
    if name in ("model", "noise schedule"):
        return "another model" if name == "model" else "other sigmas"
    if name.startswith("prompt_terms "):
        return f"another reading of its {name.removeprefix('prompt_terms ')}"
    if name.startswith("sources "):
        return f"another source of its {name.removeprefix('sources ')}"
    if name in specs.TABLES and (parsed := _parsed(name, then)):
        (old, before), (new, after) = parsed, specs.parse(name, now)
        if old != new:
            return f"{flag_of(name)} {old} (now {new})"
        options = [option for option in {**after, **before} if before.get(option) != after.get(option)]
        return ", ".join(f"{flag_of(o)} {before.get(o)} (now {after.get(o)})" for o in options)
    label = flag_of(name) if name in Settings.__dataclass_fields__ or name == "dtype" else name
    return f"{label} {reprlib.repr(then)} (now {reprlib.repr(now)})"


def _parsed(name: str, spec: Any) -> tuple[str, dict[str, Any]] | None:
    """The parts of a spec in a record; None where it is none."""
    try:
        return specs.parse(name, spec) if isinstance(spec, str) else None
    except ValueError:
        return None


def _beside(folder: Path, option: str, value: Any) -> Any:
    """The paths of files whose names, one or a list, or those of the masks of regions, stand in a file of prompts."""
    if isinstance(value, list):
        return [each if (option, type(each)) == ("regions", str) else _beside(folder, option, each) for each in value]
    if isinstance(value, dict):
        return {**value, "mask": _beside(folder, "mask", value["mask"])} if "mask" in value else value
    return folder / value if isinstance(value, str) and value else value


def _settings(prompt: str, args: argparse.Namespace, own: dict[str, Any]) -> Settings:
    """The options of the run from the arguments, replaced by those that a line has of its own, and checked."""
    options = {**args.options, **own}
    for text in (prompt, *(v for name, v in options.items() if isinstance(v, str) and name not in FILES)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadArgument(f"the prompt {text!r} is not valid UTF-8: check the terminal's encoding")
        if "\0" in text:
            raise BadArgument(f"the prompt {text!r} holds a NUL, which a PNG's text cannot hold: leave it out")
    with errors_by_flag():
        check_owned(options, options)
        settings = Settings(**options)
        replace(settings, seed=settings.seed + args.num_images - 1)
    return settings
