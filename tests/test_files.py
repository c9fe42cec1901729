"""Every file that is read may be anything: whatever reads it refuses what would block, never end or fill the memory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_read import limits

from cutdiff.checkpoint.header import read_header
from cutdiff.checkpoint.lora.file import read_lora
from cutdiff.checkpoint.model import sha256
from cutdiff.checkpoint.read import read_json, read_text
from cutdiff.cli.promptfile import read_lines
from cutdiff.evaluation.cells import LOG, _finished, _lines, _locked
from cutdiff.evaluation.measure import _prompts
from cutdiff.evaluation.references import References, _images
from cutdiff.files import contents, json_of, opened
from cutdiff.output.images import read_record
from cutdiff.training.card import phase

KMSG = Path("/proc/kmsg")
"""The kernel's log: a regular file that has 0 bytes, and of which a read waits for the next message."""
LARGE = 3 * 2**30


def folder(path: Path) -> None:
    path.mkdir()


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, LARGE)


MADE: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "endless": link("/dev/zero"),
    "terminal": link("/dev/tty"),
    "kernel": link(str(KMSG)),
    "folder": folder,
    "link to itself": lambda path: path.symlink_to(path),
    "large": large,
}
"""The things that stand in the place of a file."""


def prompts(path: Path) -> None:
    """A file of prompts, which holds at least one."""
    if not read_lines(path):
        raise ValueError(path)


def references(path: Path) -> None:
    """A folder of two references, of which one is the file."""
    path.rename(path.with_suffix(".png"))
    (path.parent / "b.png").touch()
    _images(path.parent)


def plan_of_cell(path: Path) -> None:
    path.rename(path.with_name("cell.json"))
    _finished(path.parent, {}, [])


def log_of_cell(path: Path) -> None:
    """The log of a cell, which has at least one line."""
    path.rename(path.with_name(LOG))
    with _locked(path.parent):
        if not _lines(path.parent):
            raise ValueError(path)


def log_of_training(path: Path) -> None:
    phase("U-Net", "loss", path, data="pictures", device=torch.device("cpu"), dtype="float32")


READ: dict[str, Callable[[Path], object]] = {
    "header": read_header,
    "LoRA": lambda path: read_lora(path, {}, 64),
    "configuration": read_json,
    "merges": read_text,
    "prompts": prompts,
    "prompts of evaluate": lambda path: _prompts(argparse.Namespace(prompts=path, num=9)),
    "references": references,
    "plan of a cell": plan_of_cell,
    "log of a cell": log_of_cell,
    "log of a training": log_of_training,
    "history of a training": lambda path: json_of(path),
    "features": lambda path: References.load(path.parent, path, None),
}
"""The functions that read a file, and raise ValueError, or FileNotFoundError, where it cannot."""


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("made", MADE)
def test_what_is_no_file_of_sensible_size_is_not_read(made: str, read: str, tmp_path: Path) -> None:
    if made == "kernel" and not os.access(KMSG, os.R_OK):
        pytest.skip("there is no log of the kernel that may be read")
    path = tmp_path / "file"
    MADE[made](path)
    with limits(2**26), pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        READ[read](path)


@pytest.mark.parametrize("content", [b"{\n", b"\xff\n", b"[" * 10**5 + b"\n", b"[]\n", b'{"a": 1} x\n'])
@pytest.mark.parametrize("read", ["plan of a cell", "log of a cell", "log of a training"])
def test_what_is_damaged_is_named(content: bytes, read: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*(remove|another --out)"):
        READ[read](tmp_path / "file")


@pytest.mark.parametrize("made", MADE)
def test_no_record_is_read_from_anything_else(made: str, tmp_path: Path) -> None:
    if made == "kernel" and not os.access(KMSG, os.R_OK):
        pytest.skip("there is no log of the kernel that may be read")
    MADE[made](tmp_path / "picture.json")
    with limits(2**26):
        assert read_record(tmp_path / "picture.png") == {}


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert contents(path, 3) == b"abc"
    with pytest.raises(ValueError, match=f"{path} has 3 bytes, more than 2, which are all that is read"):
        contents(path, 2)
    with opened(path) as file:
        assert file.read() == b"abc"
    assert len(sha256(path)) == 64
