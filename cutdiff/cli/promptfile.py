"""A file of prompts: a prompt a line, or a JSON object with a prompt and options of its own. Imports no torch.

A line that begins with { is JSON; one that is blank or begins with # is skipped. Options become arguments of the
command line, so that they are read and checked in one place.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

from cutdiff.settings import Settings, nearest

FIELDS = Settings.__dataclass_fields__
NAMES = ["prompt", *("steps" if name == "num_steps" else name for name in FIELDS)]
MAX_BYTES = 1 << 24
LISTS = [name for name, field in FIELDS.items() if isinstance(field.default, tuple)]


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines that hold prompts, and their numbers, counted from 1. OSError where the file cannot be read."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES} bytes")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if problem := _other_format(content.strip()):
        raise OSError(errno.EINVAL, problem)
    lines = content.split(b"\n")
    stripped = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return [(number, line) for number, line in stripped if line and not line.startswith(b"#")]


def _other_format(content: bytes) -> str | None:
    """What the whole of a file is where its lines are no prompts by themselves."""
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


def parse_line(line: bytes) -> tuple[str, list[str]]:
    """The prompt and its options as arguments of the command line. ValueError where the line cannot be read."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    if not text.startswith("{"):
        return text, []
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a line that begins with {{ must be a JSON object ({error})") from None
    options = {}
    for name, value in pairs:
        known = _known(name)
        if known in options:
            raise ValueError(f"{name} is given twice")
        options[known] = value
    prompt = options.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ValueError('an object needs "prompt", a text')
    return prompt, [argument for name, value in options.items() for argument in _arguments(name, value)]


def _known(name: str) -> str:
    """An option's name as in `NAMES`, whichever way it is spelt."""
    known = "steps" if name == "num_steps" else name.replace("-", "_")
    if known not in NAMES:
        raise ValueError(f"{name!r} is no option of a prompt{nearest(known, NAMES) or ', only ' + ', '.join(NAMES)}")
    return known


def _arguments(name: str, value: object) -> list[str]:
    """An option as arguments; a value starts no option of its own."""
    flag = f"--{name.replace('_', '-')}"
    if name not in LISTS and type(value) in (str, int, float):
        return [f"{flag}={value}"]
    if name in LISTS and isinstance(value, list) and all(type(number) in (int, float) for number in value):
        return [flag, *map(str, value)]
    raise ValueError(f"{name} must be {'a list of numbers' if name in LISTS else 'a text or a number'}, not {value!r}")
