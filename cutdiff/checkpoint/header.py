"""Reading the header of a safetensors file, which is checked in full before any tensor is touched.

A file is 8 bytes with the length of the header (little-endian), the header in JSON, then the tensors' bytes, which
cover the rest of the file without holes or overlaps: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cutdiff.checkpoint.files import START, impostor, quoted
from cutdiff.files import opened, size_of

MAX_HEADER = 100_000_000
"""The most bytes of a header that the format allows. It takes a few times as much memory when it is read."""
MAX_MEMBERS = 20_000
"""The most tensors, and the most lines of metadata, each of which takes time; SDXL has 2,515 tensors."""
MAX_NAME = 1000
"""The most characters of a tensor's name; names are printed in errors."""
MAX_RANK = 64
"""The most dimensions of a tensor that torch allows."""
JSON = re.compile(rb"(\xef\xbb\xbf)?\s*[{\[]")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The types of the format that have whole bytes; others have 4 or 6 bits, and are not read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place in the file: bytes `begin` to `end`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header: tensors by name, and free text by key, such as `modelspec.title`."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, but none of its tensors.

    Raises FileNotFoundError where there is no such file; ValueError, in one line that says what the file is instead or
    what is wrong with it and what to do, where it is no complete safetensors file.
    """
    with opened(path) as file:
        size = size_of(file)
        start = file.read(min(START, size))
        length = int.from_bytes(start[:8], "little")
        if problem := _what_is_wrong(start, length, size):
            raise ValueError(f"{path} {problem}")
        file.seek(8)
        text = file.read(length)
    try:
        header = _parse(text)
        _check_layout(header.tensors, 8 + length, size)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return header


def _what_is_wrong(start: bytes, length: int, size: int) -> str | None:
    """The reason why a file of `size` bytes that begins so has no header of `length` bytes; None where it may have."""
    if size >= 8 and length <= MAX_HEADER and start[8:9] in (b"{", b""):
        if size >= 8 + length:
            return None
        return f"is truncated: it has {size} bytes where its header alone takes {8 + length}: download it again"
    # Only now, since a header's length may begin as another format does.
    if other := impostor(start):
        return other
    if JSON.match(start):
        return (
            "is JSON text, an index or a server's error message perhaps: pass the model's folder, or download the "
            "weights themselves"
        )
    if text := _as_text(start):
        return f"is no safetensors file but text ({quoted(text)}), a server's answer perhaps: download the file itself"
    if size < 8:
        return f"is no safetensors file, or cut off after {size} of the 8 bytes of its length: download it again"
    if length > MAX_HEADER:
        return f"is no safetensors file: {length} bytes of header are more than {MAX_HEADER}: download it again"
    return "is no safetensors file: its header does not begin with {: download it again"


def _as_text(start: bytes) -> str:
    """The first line of a file that begins so; empty if the file is no ASCII text."""
    first, *rest = start.decode("ascii", "replace").splitlines() or [""]
    return first if all(line.isprintable() and "\ufffd" not in line for line in (first, *rest)) else ""


def _parse(text: bytes) -> Header:
    scanner, tensors, metadata = _Scanner(text), dict[str, Entry](), dict[str, str]()
    for name in scanner.members():
        if name == "__metadata__":
            metadata = {key: scanner.string() for key in scanner.members()}
        elif len(name) > MAX_NAME or not name.isprintable():
            raise _damaged(f"names a tensor {quoted(name)}, with unprintable or more than {MAX_NAME} characters")
        else:
            tensors[name] = _parse_entry(scanner, name)
    scanner.end()
    return Header(tensors, metadata)


def _parse_entry(scanner: _Scanner, name: str) -> Entry:
    readers = {"dtype": scanner.string, "shape": scanner.integers, "data_offsets": scanner.integers}
    fields: dict[str, Any] = {}
    for field in scanner.members():
        if field not in readers:
            raise _damaged(f"gives {quoted(name)} the field {quoted(field)}, which the format does not have")
        fields[field] = readers[field]()
    if missing := readers.keys() - fields:
        raise _damaged(f"gives {quoted(name)} no {min(missing)}")
    dtype, shape, offsets = (fields[field] for field in readers)
    if dtype not in DTYPES:
        raise ValueError(
            f"gives {quoted(name)} the dtype {quoted(dtype)}, which is not read: convert it to F16, BF16 or F32"
        )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(f"gives {quoted(name)} the data_offsets {quoted(offsets)}, which are no begin and end")
    # A tensor without elements has strides all the same, so a zero does not hide an overflow.
    if math.prod(max(1, side) for side in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise _damaged(f"gives {quoted(name)} the shape {quoted(shape)}, which takes 2⁶³ bytes or more")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(
            f"gives {quoted(name)} {offsets[1] - offsets[0]} bytes where {dtype} {quoted(shape)} takes {nbytes}"
        )
    return Entry(DTYPES[dtype], shape, *offsets)


def _check_layout(tensors: Mapping[str, Entry], start: int, size: int) -> None:
    """Raise ValueError unless the tensors cover the bytes from `start` to `size` of the file, every byte once."""
    end, previous = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _damaged(f"has tensors that overlap, {quoted(previous)} and {quoted(name)}")
        if entry.begin > end:
            raise _damaged(f"has a hole of {entry.begin - end} bytes before {quoted(name)}")
        end, previous = entry.end, name
    if size < start + end:
        raise _damaged(f"is truncated: it has {size} of {start + end} bytes")
    if size > start + end:
        raise _damaged(f"goes on for {size - start - end} bytes after its last tensor, at byte {start + end}")


class _Scanner:
    """A reader of the JSON that a header may hold, and of nothing else.

    A general reader would take any depth and any number of values into memory, repeated keys, and NaN.
    """

    SPACE = re.compile(rb"[ \t\n\r]*+")
    SYMBOL = re.compile(SPACE.pattern + rb"([{}\[\]:,])")
    STRING = re.compile(SPACE.pattern + rb'("(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+")')
    WORD = re.compile(SPACE.pattern + rb"([-+.\w]{1,40}+)")
    INTEGER = re.compile(rb"0|[1-9][0-9]{0,18}")

    def __init__(self, text: bytes) -> None:
        self.text, self.position = text, 0

    def members(self) -> Iterator[str]:
        """Yield the keys of an object; the caller reads each value before it asks for the next key."""
        names: set[str] = set()
        for _ in self._items(b"{", b"}"):
            key = self.string()
            if key in names:
                raise _damaged(f"names {quoted(key)} twice")
            if len(names) == MAX_MEMBERS:
                raise _damaged(f"names more than {MAX_MEMBERS} tensors or lines of metadata")
            names.add(key)
            self._take(b":")
            yield key

    def integers(self) -> tuple[int, ...]:
        """Read a list of integers that are not negative."""
        values: list[int] = []
        for _ in self._items(b"[", b"]"):
            if len(values) == MAX_RANK:
                raise _damaged(f"has a list of more than {MAX_RANK} numbers, the most dimensions of a tensor")
            values.append(self._integer())
        return tuple(values)

    def string(self) -> str:
        match = self.STRING.match(self.text, self.position)
        if match is None:
            raise self._wrong("a string")
        try:
            text = match[1].decode("utf-8")
            value = json.loads(text) if "\\" in text else text[1:-1]  # most have no escapes
            value.encode("utf-8")  # which half a surrogate pair, written as an escape, cannot be
        except UnicodeError:
            raise self._wrong("UTF-8") from None
        except ValueError:
            raise self._wrong("a string") from None
        self.position = match.end()
        return value

    def end(self) -> None:
        """Raise ValueError if anything but space is left."""
        if self._after_space() < len(self.text):
            raise self._wrong("nothing but space")

    def _integer(self) -> int:
        match = self.WORD.match(self.text, self.position)
        if match is None or not self.INTEGER.fullmatch(match[1]):
            raise self._wrong("an integer from 0 to 10¹⁹")
        self.position = match.end()
        return int(match[1])

    def _items(self, opening: bytes, closing: bytes) -> Iterator[None]:
        """Yield once for each item of a list or an object; the caller reads the item before it goes on."""
        self._take(opening)
        if self.text.startswith(closing, self._after_space()):
            self._take(closing)
            return
        yield
        while self._take(b",", closing) != closing:
            yield

    def _take(self, *symbols: bytes) -> bytes:
        match = self.SYMBOL.match(self.text, self.position)
        if match is None or match[1] not in symbols:
            raise self._wrong(b" or ".join(symbols).decode())
        self.position = match.end()
        return match[1]

    def _after_space(self) -> int:
        match = self.SPACE.match(self.text, self.position)
        assert match  # the pattern matches an empty text too
        return match.end()

    def _wrong(self, expected: str) -> ValueError:
        position = self._after_space()
        excerpt = self.text[position : position + 20].decode("utf-8", "replace")
        return _damaged(f"has a broken header: at byte {8 + position} stands {excerpt!r} where {expected} belongs")


def _damaged(problem: str) -> ValueError:
    return ValueError(f"{problem}: download it again")
