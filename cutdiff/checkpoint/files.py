"""Files that stand in the place of others, which are recognised by their first bytes; and words of errors."""

from __future__ import annotations

import re
from collections.abc import Iterable

START = 512
"""The number of bytes at the start of a file by which it is recognised."""
LISTED = 10
"""The number of keys or names that an error lists before it only counts them."""

PICKLED = "which could run code as it is opened, so it is not: convert it to safetensors"
IMPOSTORS = (
    (rb"\Z", "is empty: download it again"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<", "is a web page or XML, often an error or a login page: download the file itself"),
    (rb"PK(\x03\x04|\x05\x06)", f"is a zip archive, most likely a pickled checkpoint, {PICKLED}"),
    (rb"\x80[\x00-\x05]", f"is a pickled checkpoint, {PICKLED}"),
    (rb"\((dp|lp)\d+\n|c[\w.]+\n\w+\n|[}\]]q\x00", f"is a pickled checkpoint, {PICKLED}"),
    (rb"(?s:.{257}ustar)", f"is a tar archive, most likely an old pickled checkpoint, {PICKLED}"),
    (rb"\x89PNG|\xff\xd8\xff", "is a picture: download the model itself"),
    (rb"\xff\xfe|\xfe\xff", "is UTF-16 text, a web page perhaps: download the file itself"),
    (rb"\x08[\x01-\x1f]\x12", "is an ONNX file: take the model's safetensors instead"),
    (rb"GGUF", "is a GGUF file, made for llama.cpp and its kin: take the model's safetensors instead"),
    (rb"\x89HDF|\x93NUMPY", "is an HDF5 or NumPy file: take the model's safetensors instead"),
    (rb"\x1f\x8b|7z\xbc\xaf|\xfd7zXZ|\x28\xb5\x2f\xfd|Rar!", "is a compressed archive: unpack it"),
    (rb"\x00{8}", "begins with zeros, as a download that never finished: download it again"),
)
"""The first bytes of what often stands in a file's place, what it is, and what to do about it."""


def impostor(start: bytes) -> str | None:
    """A description of a file that begins so, if it is known to be neither safetensors nor a configuration."""
    return next((problem for pattern, problem in IMPOSTORS if re.match(pattern, start)), None)


def listed(keys: Iterable[str]) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more


def quoted(value: object) -> str:
    """A value from a file, which may be long or unprintable, as an error shows it."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return f"{text[:100]}…" if len(text) > 100 else text
