"""A file of prompts, with a prompt on each line or a JSON object of a prompt and its own options. Imports no torch.

A line that begins with { is JSON; a line that is blank or begins with # is skipped. Options have the names of
`Settings`, which checks them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from cutdiff.files import contents

MAX_BYTES = 1 << 24
"""The size of the largest file that is read."""


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines that hold prompts and their numbers, counted from 1. The errors are those of `contents`, and ValueError
    where the file is one of another kind."""
    content = contents(path, MAX_BYTES).removeprefix(b"\xef\xbb\xbf")
    if problem := _other_format(content.strip()):
        raise ValueError(f"{path} cannot be read ({problem}): give a text file")
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
    if not text.startswith("{"):
        return text, {}
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a line that begins with {{ must be a JSON object ({error})") from None
    options: dict[str, Any] = {}
    for name, value in cast(list[tuple[str, Any]], pairs):
        known = {"steps": "num_steps"}.get(name, name.replace("-", "_"))
        if known in options:
            raise ValueError(f"{name} is given twice")
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            raise ValueError(f"{name} must be a text, a number or a list of numbers, not an object")
        options[known] = value
    prompt = options.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ValueError('an object needs "prompt", a text')
    return prompt, options
