"""A file of prompts, each line a prompt, a prompt with options, or a JSON object of both.

A line that begins with { is JSON; a line that is blank or begins with # is skipped. Options have the names of
`Settings`, which checks them. A line with options is as A1111's "prompts from file" has it, `--prompt "a tent" --steps
20 --cfg_scale 4`, where a prompt may go on without quotes to the next option, or begins with the prompt itself: `a tent
--width 136`.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, cast

from cutdiff import specs
from cutdiff.files import BadFile, contents, json_object
from cutdiff.given.controls import CONTROL_FILES
from cutdiff.options import nearest, options_of, read
from cutdiff.settings import FILES, Settings

MAX_BYTES = 1 << 24
"""The size of the largest file that is read."""
NAMES = {"steps": "num_steps", "cfg_scale": "guidance_scale"}
"""The names of `Settings` for those that lines may have beside them."""
TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
ELSEWHERE = {
    *("sd_model", "outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed_strength", "subseed"),
    *("seed_resize_from_h", "seed_resize_from_w", "sampler_index", "batch_size", "n_iter", "restore_faces", "tiling"),
    *("do_not_save_samples", "do_not_save_grid"),
}
"""The options of A1111's lines that mean nothing here."""
OPTION = re.compile(r"(?:^|[ \t])--(?=[A-Za-z])")


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines that hold prompts and their numbers, counted from 1. The errors are those of `contents`, and BadFile
    where the file is one of another kind."""
    content = contents(path, MAX_BYTES).removeprefix(b"\xef\xbb\xbf")
    if problem := _other_format(content.strip()):
        raise BadFile(f"{path} cannot be read ({problem}): give a text file")
    lines = content.split(b"\n")
    stripped = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return [(number, line) for number, line in stripped if line and not line.startswith(b"#")]


def _other_format(content: bytes) -> str | None:
    """A sentence on the format of a file whose lines are no prompts by themselves; None if they are."""
    if content[:20].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page or XML"
    if not content.startswith((b"[", b"{")):
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) or b"\n" in content:
        return "it is one JSON value, where each prompt's object has a line of its own"
    return None


def parse_line(line: bytes) -> tuple[str, dict[str, Any]]:
    """The prompt of a line and its own options. ValueError if the line cannot be read."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    if OPTION.search(text) and not text.startswith("{"):
        return _with_options(text)
    if not text.startswith("{"):
        return text, {}
    try:
        given = json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a line that begins with {{ must be a JSON object ({error})") from None
    options: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], given).items():
        known = _known(name, options)
        if isinstance(value, dict) and known != "regions":
            raise ValueError(f"{name} must be a text, a number or a list, not an object")
        options[known] = value
    prompt = options.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ValueError('an object needs "prompt", a text')
    return prompt, options


def _known(name: str, options: dict[str, Any]) -> str:
    """The name of `Settings` for one that a line has. ValueError where it is among the options already."""
    known = name.replace("-", "_")
    known = NAMES.get(known, known)
    if known in options:
        raise ValueError(f"{name} is given twice")
    return known


def _with_options(text: str) -> tuple[str, dict[str, Any]]:
    """The prompt and the options of a line that has them as a command line would."""
    match = OPTION.search(text)
    assert match is not None
    try:
        words = shlex.split(text[match.start() :])
    except ValueError as error:
        raise ValueError(f"its options cannot be read ({error}): close quotes, or write \\' for one") from None
    options: dict[str, Any] = {"prompt": text[: match.start()]} if text[: match.start()] else {}
    own = options_of(Settings)
    while words:
        name, *words = words
        end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        name, separator, value = name.partition("=")
        values, words = [value] * bool(separator) + words[:end], words[end:]
        known = _known(name.removeprefix("--"), options)
        if not values and known in own and own[known].type is bool:
            values = ["True"]
        if not values:
            raise ValueError(f'{name} has no value; a prompt that holds it is written as {{"prompt": …}}')
        if known in ELSEWHERE:
            raise ValueError(f"{name} is an option of A1111's that is not built here: leave it out")
        if known in CONTROL_FILES:
            options[known] = values
        elif known in TEXTS:
            options[known] = " ".join(values)
        elif known == "sampler_name":
            options |= _sampler(" ".join(values))
        else:
            options[known] = _read(known, values[0] if len(values) == 1 else f"({','.join(values)})")
    if "prompt" not in options:
        raise ValueError('a line of options needs a prompt: begin with it, or give --prompt "…"')
    return options.pop("prompt"), options


def _read(name: str, text: str) -> Any:
    """The value of an option of the run; that of another option stays a text until its owner is known."""
    own = options_of(Settings)
    if name in FILES:
        return text
    return read(name, text, own[name].type) if name in own and name != "strength" else specs.Text(text)


def _sampler(name: str) -> dict[str, str]:
    """The solver, and the schedule where the name has one as A1111's once had, of A1111's name of a sampler."""
    from cutdiff.output.parameters import SAMPLERS, SCHEDULE_TYPES

    solvers = {label: solver for solver, label in SAMPLERS.items()}
    spacings = {SCHEDULE_TYPES[key]: key for key in reversed(SCHEDULE_TYPES) if key in specs.SCHEDULES}
    known = {label.lower(): {"solver": solver} for label, solver in solvers.items()}
    for label, solver in solvers.items():
        known |= {f"{label} {end}".lower(): {"solver": solver, "schedule": key} for end, key in spacings.items()}
    if name.lower() not in known:
        raise ValueError(f"--sampler_name {name!r} is not one of {', '.join(solvers)}{nearest(name, solvers)}")
    return known[name.lower()]
