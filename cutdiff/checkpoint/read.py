"""Reading files: JSON, tensors, which stay memory-mapped until they are used, and the shards that an index names."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cutdiff.checkpoint.files import START, impostor, listed, quoted
from cutdiff.checkpoint.header import MAX_MEMBERS, read_header
from cutdiff.files import contents

MAX_TEXT = 8 * 2**20
"""The most bytes of a JSON or text file: twice those of the largest in an SDXL folder, its tokenizer. Once parsed it
may take 30 times as much memory."""
SMALL = 1024
"""The most elements of a tensor at the end of a file that may all be zero."""
MAX_DEPTH = 64
"""The most levels of nested JSON; a tokenizer has six."""
PATH = re.compile(r"[/\\:\0]")
"""The characters of a name that leads out of its folder, on one system or another."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped: their bytes are read when their values are used.

    Raises FileNotFoundError where there is no such file; ValueError, in one line that says what the file is instead,
    where it is no complete safetensors file.
    """
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, as `read_tensors` gives them, and the metadata in the header, which is read once."""
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in header.tensors}, header.metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be mapped into memory ({error}): check its disk") from None


def check_end(path: Path) -> None:
    """Raise ValueError where a safetensors file ends in matrices or kernels of zeros, as after a broken download.

    Some programs give a file its full size first and fill it as the download goes on. Biases, norms and small tensors
    may be zero.
    """
    tensors, entries = read_tensors(path), read_header(path).tensors
    last_first = sorted(entries, key=lambda name: entries[name].end, reverse=True)
    zeros = takewhile(lambda name: not tensors[name].flatten().view(torch.uint8).any(), last_first)
    if large := [name for name in zeros if tensors[name].ndim > 1 and tensors[name].numel() > SMALL]:
        raise ValueError(f"{path} ends in {len(large)} tensors of zeros: {listed(large)}: download it again")


def find_weights(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The weight files of one network: of the variant that is asked for, else `stem`.safetensors, else fp16.

    Each may be one file or shards. Raises ValueError where there is none, or where the headers of the shards contradict
    their index.
    """
    for name in (*([f"{stem}.{variant}"] if variant else []), stem, f"{stem}.fp16"):
        if (folder / f"{name}.safetensors").exists():
            return [folder / f"{name}.safetensors"]
        # The variant's place in the index's name changed over the releases of diffusers.
        for index in (f"{name}.safetensors.index.json", f"{stem}.safetensors.index{name.removeprefix(stem)}.json"):
            if (folder / index).exists():
                return _shards(folder / index)
    if others := variants(folder, stem):
        hint = f"only the variants {', '.join(others)}: choose one with --variant"
    elif any(folder.glob("*.bin")):
        hint = "only pickled ones: save it with safe_serialization=True"
    else:
        hint = "the model is incomplete: download it"
    raise ValueError(f"{folder} holds no {stem}.safetensors, {hint}")


def variants(folder: Path, stem: str) -> list[str]:
    """The names of the variants in which a network's weights lie in a folder, such as fp16 or non_ema."""
    pattern = re.compile(
        re.escape(stem)
        + r"(?:\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?|\.safetensors\.index\.([\w-]+)\.json)"
    )
    matches = (pattern.fullmatch(path.name) for path in folder.glob(f"{glob.escape(stem)}*"))
    return sorted({match[1] or match[2] for match in matches if match})


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map, so it is no index of a sharded checkpoint: download it again")
    if len(places) > MAX_MEMBERS:
        raise ValueError(f"{index} lists {len(places)} keys, more than {MAX_MEMBERS}, so it is no model's: remove it")
    for key, name in places.items():
        if problem := _no_shard(name):
            raise ValueError(f"{index} puts {quoted(key)} in {quoted(name)}, {problem}")
    names = sorted(set(places.values()))
    missing = [quoted(name) for name in names if not os.path.exists(index.parent / name)]  # any text may be a name
    if missing:
        raise ValueError(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing: {listed(missing)}: download them"
        )
    _check_shards(index, places, names)
    return [index.parent / name for name in names]


def _no_shard(name: object) -> str | None:
    """The reason not to open a file that an index names so; None where there is none."""
    if not isinstance(name, str) or PATH.search(name):
        return "which is no plain file name: a shard lies beside its index, so download both again"
    if not name.endswith(".safetensors"):
        return "which is no safetensors file, so it is not opened: convert the model to safetensors"
    return None


def _check_shards(index: Path, places: Mapping[str, str], names: list[str]) -> None:
    """Raise ValueError unless each key is in the shard that `places` names for it, and no other key in any shard."""
    shard_of: dict[str, str] = {}
    for name in names:
        for key in read_header(index.parent / name).tensors:
            if key in shard_of:
                raise ValueError(
                    f"{index}: {key!r} is in two shards, {shard_of[key]!r} and {name!r}: download them again"
                )
            shard_of[key] = name
        if len(shard_of) > MAX_MEMBERS:
            raise ValueError(f"{index} names shards of more than {MAX_MEMBERS} tensors, so it is no model's: remove it")
    absent = [f"{quoted(key)} from {quoted(name)}" for key, name in places.items() if shard_of.get(key) != name]
    if absent:
        raise ValueError(
            f"{index}: {len(absent)} keys are absent from their shard: {listed(absent)}: download it again"
        )
    extra = [f"{quoted(key)} in {quoted(name)}" for key, name in shard_of.items() if key not in places]
    if extra:
        raise ValueError(f"{index} does not list {len(extra)} keys of its shards: {listed(extra)}: download it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. ValueError where the file is missing, too large, names a key twice or is something else."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, so the model is incomplete: download it") from None
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
        _check_depth(content)
    except RecursionError:
        raise ValueError(f"{path} nests more than {MAX_DEPTH} levels deep: download it again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON as a model has it ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object belongs: download it again")
    return content


def read_text(path: Path) -> str:
    """Read a small text file. FileNotFoundError where there is none, ValueError where it is too large or no text."""
    content = contents(path, MAX_TEXT, "so it is no part of a model: remove it")
    if problem := impostor(content[:START]):
        raise ValueError(f"{path} {problem}")
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # a byte order mark, which some editors write
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (at byte {error.start}): download it again") from None


def _check_depth(content: object) -> None:
    """Raise RecursionError for JSON that is nested so deeply that printing it might raise one too."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise RecursionError


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(key)} stands twice")
    return members
