"""Damaged files, and a record of the files that are opened."""

from __future__ import annotations

import json
import os
import pickle
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from fuzz_read import packed

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6938040682\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
DEEP = 10_000
"""The number of nested levels of JSON."""
OPENED: list[Path] = []
"""Every file that Python opened; an audit hook cannot be taken away again."""


@sys.addaudithook
def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        OPENED.append(Path(os.fsdecode(arguments[0])))


def entry(**fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}


def file(header: Any, data: bytes = bytes(8)) -> bytes:
    """A safetensors file with a header of any JSON, or of any bytes."""
    return packed(header if isinstance(header, bytes) else json.dumps(header).encode(), data)


def written(text: str) -> bytes:
    """A file with one tensor, whose entry has text that JSON's own writer would not write."""
    return file(b'{"a":{"dtype":"F32",%s}}' % text.encode())


def two(first: tuple[int, int], second: tuple[int, int], size: int = 16) -> bytes:
    """A file of two tensors at these places."""
    return file({"a": entry(data_offsets=first), "b": entry(data_offsets=second)}, bytes(size))


def pickled(value: object, *, zipped: bool, **options: Any) -> bytes:
    """Pickle a value as torch does, in the format of today or without a zip archive around it."""
    if not zipped:
        return pickle.dumps(value, **options)
    buffer = BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()
