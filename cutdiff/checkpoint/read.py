"""Reading files: JSON, and tensors that stay memory-mapped until they are used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

NOT_SAFETENSORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"<", "is a web page or XML, not weights: download the file itself"),
    (b"PK\x03\x04", "is a pickled checkpoint, which could run code: convert it to safetensors"),
    (b"\x80", "is a pickled checkpoint, which could run code: convert it to safetensors"),
)
"""First bytes of what often stands in a weight file's place, and what to do about it. A safetensors file begins with
the length of its header, 8 bytes of which the first can be any of these, so they are looked at only after it failed."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped: nothing is read before a tensor's values are.

    Raises ValueError, in one line that says what the file is instead, where it is no complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {_what_is_wrong(path, error)}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, such as `modelspec.…`."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _what_is_wrong(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "is a folder, not a weight file"
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
    if not start:
        return "is empty: download it again"
    for magic, problem in NOT_SAFETENSORS:
        if start.startswith(magic):
            return problem
    return f"is no safetensors file, or a truncated one: download it again ({error})"


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The weight files of one network: `stem`.safetensors or its shards; the fp16 variant where there is no other.

    Raises ValueError where there is none, where shards are missing, or where an index names a file outside the folder.
    """
    for name in (stem, f"{stem}.fp16"):
        if (folder / f"{name}.safetensors").exists():
            return [folder / f"{name}.safetensors"]
        # The variant's place in the index's name changed over the releases of diffusers.
        for index in (f"{name}.safetensors.index.json", f"{stem}.safetensors.index{name.removeprefix(stem)}.json"):
            if (folder / index).exists():
                return _shards(folder / index)
    pickled = any(folder.glob("*.bin"))
    hint = "only pickled ones: save it with safe_serialization=True" if pickled else "the model is incomplete"
    raise ValueError(f"{folder} holds no {stem}.safetensors, {hint}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map, so it is no index of a sharded checkpoint")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}, which is not a plain file name")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing, one of {len(names)} shards: download it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, so the model is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object belongs")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
