"""PNG files and the JSON records beside them: a picture gets a name that no other has, appears whole or not at all, and
is read again to see whether it is finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from cutdiff.files import contents
from cutdiff.output.parameters import parameters_text
from cutdiff.output.record import NO_RECORD, comparable, is_alike

SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
"""The first and the last bytes of every PNG."""
MAX_RECORD = 1 << 24
"""The size of the largest record that is read, in bytes."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""The errors that Pillow raises for a PNG that is broken in one place or another."""


class State(Enum):
    """The file that has the name of a picture which is to be drawn."""

    FREE = auto()
    """There is none."""
    FINISHED = auto()
    """It is this picture."""
    DAMAGED = auto()
    """It is what is left of this picture: empty, cut off or broken."""
    OTHER = auto()
    """It is another picture, or was put in the place of this one."""


class NameTaken(Exception):
    """Another picture has the name; the message is its path."""


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] -> 8-bit RGB."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))


def save_image(
    image: Tensor, record: dict[str, Any], folder: Path, stem: str, *, overwrite: bool = False, numbers: bool = True
) -> Path:
    """Write an image (3, H, W) in [0, 1] as `stem`.png with its record as `stem`.json; returns the PNG's path.

    The folder is made where there is none. If another process has written this picture meanwhile, that one stays. If
    another picture has the name, this one takes its place with `overwrite`; else it gets a number, or without `numbers`
    NameTaken is raised. The PNG comes last and the old one goes first, so that a PNG is never seen beside another's
    record. ValueError where the record is of several prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture, text = to_pil(image), PngInfo()
    text.add_text("parameters", parameters_text(record))
    sidecar = json.dumps({**record, "pixels_sha256": pixels_sha256(picture)}, indent=2).encode() + b"\n"
    for path in numbered(folder, stem):
        with reserved(path) as part:
            state = state_of(path, partial(is_alike, record))
            if state is State.FINISHED:
                return path
            if state is State.OTHER and not overwrite:
                if not numbers:
                    raise NameTaken(path)
                continue
            picture.save(part, format="PNG", pnginfo=text)
            _flush(part)
            json_part = _fill(path.with_suffix(".json"), lambda file: file.write(sidecar))
            try:
                path.unlink(missing_ok=True)
                os.replace(json_part, path.with_suffix(".json"))
                os.replace(part.name, path)
            finally:
                Path(json_part).unlink(missing_ok=True)
            return path
    raise AssertionError("names have no end")


def numbered(folder: Path, stem: str, end: str = ".png") -> Iterator[Path]:
    """The names that a picture, or a file of another `end`, may get, the first without a number."""
    yield folder / f"{stem}{end}"
    yield from (folder / f"{stem}-{number}{end}" for number in count(1))


def state_of(path: Path, is_same: Callable[[dict[str, Any]], bool]) -> State:
    """The state of a name; `is_same` says whether a record is that of the picture which is to be drawn."""
    if not path.exists():
        return State.FREE
    record = read_record(path)
    if not is_same(record):
        return State.OTHER
    return check_pixels(path, record.get("pixels_sha256"), (record.get("width"), record.get("height")))


def check_pixels(path: Path, digest: str | None, size: tuple[Any, Any]) -> State:
    """The state of a file that should be a PNG of this size with these pixels (None: any, as of an old record). If
    another tool has tagged it or packed it anew, the pixels are the same."""
    if not (path.is_file() and os.access(path, os.R_OK)):
        return State.OTHER
    with path.open("rb") as file:
        start = file.read(len(SIGNATURE))
        if any(start) and not SIGNATURE.startswith(start):
            return State.OTHER
        file.seek(max(0, path.stat().st_size - len(END)))
        whole = file.read() == END
        file.seek(0)
        try:  # Image.open would refuse the largest pictures that are drawn here: the size is compared in its place
            with PngImageFile(file) as image:
                same = image.size == size and digest in (None, pixels_sha256(image))
        except UNREADABLE:
            return State.DAMAGED
    return State.DAMAGED if not whole else State.FINISHED if same else State.OTHER


def pixels_sha256(image: Image.Image) -> str:
    """The SHA-256 of a picture's pixels as 8-bit RGB, in hexadecimal."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """The record beside a PNG; empty where there is none that can be read."""
    try:
        record = json.loads(contents(path.with_suffix(".json"), MAX_RECORD))
        comparable(record)
    except (OSError, ValueError, RecursionError, *NO_RECORD):
        return {}
    return record


@contextmanager
def reserved(path: Path) -> Iterator[BinaryIO]:
    """Reserve the name `path` until the block ends, and open the hidden file beside it that may become it.

    The file is locked: another process that wants the name waits, and a process that is killed holds it no longer.
    """
    part = path.with_name(f".{path.name}.part")
    while True:
        with open(part, "ab", opener=_open_here) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _has_name(file, part):  # while this process waited, the file became a picture or was removed
                continue
            try:
                file.truncate(0)  # it may be left of a process that was killed
                yield file
            finally:
                if _has_name(file, part):
                    part.unlink()
            return


def _open_here(path: str, flags: int) -> int:
    """Open a file, but not one elsewhere to which a link of that name leads, nor a pipe, which would block."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _has_name(file: BinaryIO, path: Path) -> bool:
    """True if an open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def remove_parts(folder: Path, stems: Collection[str]) -> None:
    """Remove what killed processes left of pictures of these names; what a living one is writing, it finishes first."""
    for part in folder.glob(".*.part"):
        name = re.fullmatch(r"\.((.+?)(-\d+)?)\.(png|json)(\.\w+)?\.part", part.name)
        if name and {name[1], name[2]} & {*stems}:
            with reserved(folder / f"{name[1]}.png"):
                part.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file `path`, which holds all of it or is as it was before."""
    os.replace(_fill(path, write), path)


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, readable and whole."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _fill(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Let `write` fill a hidden file beside `path`; returns its name, or leaves nothing behind on an error."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            _flush(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return part


def _flush(file: BinaryIO) -> None:
    """Bring the contents to the disk: a name must not come there first, nor an error late."""
    file.flush()
    os.fsync(file.fileno())
