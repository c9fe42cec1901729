"""PNG files with their parameters and JSON sidecars, written atomically: a file appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cutdiff import specs
from cutdiff.files import contents

SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "heun": "Heun",
    "lcm": "LCM",
}
"""A1111's names of solvers."""
SPACINGS = {"karras": " Karras", "exponential": " Exponential", "beta": " Beta"}
"""The words that A1111 adds to them for the spacing of the sigmas."""

MAX_RECORD = 1 << 25
"""The most bytes of a record that is read: twice those of a file of prompts."""


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] -> 8-bit RGB."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))


def save_image(image: Tensor, record: dict[str, Any], folder: Path, stem: str, *, overwrite: bool = False) -> Path:
    """Write an image (3, H, W) in [0, 1] as `stem`.png with its record as `stem`.json; returns the PNG's path.

    The folder is made where there is none. Where the name is taken, a number is added, or with `overwrite` the picture
    takes the other's place. The PNG comes last and the old one goes first, so that a PNG is never seen beside another's
    record. ValueError where the record is of several prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = numbered(folder, stem)
    path = next(paths) if overwrite else next(path for path in paths if not path.exists())
    text = PngInfo()
    text.add_text("parameters", parameters_text(record))
    sidecar = json.dumps(record, indent=2).encode() + b"\n"
    parts: list[tuple[str, Path]] = []
    try:
        parts.append((_fill(path.with_suffix(".json"), lambda file: file.write(sidecar)), path.with_suffix(".json")))
        parts.append((_fill(path, lambda file: to_pil(image).save(file, format="PNG", pnginfo=text)), path))
        if overwrite:
            path.unlink(missing_ok=True)
        for part, target in parts:
            os.replace(part, target)
    finally:
        for part, _ in parts:
            Path(part).unlink(missing_ok=True)
    return path


def numbered(folder: Path, stem: str) -> Iterator[Path]:
    """The names that a picture may get, the first without a number."""
    yield folder / f"{stem}.png"
    yield from (folder / f"{stem}-{number}.png" for number in count(1))


def read_record(path: Path) -> dict[str, Any]:
    """The record beside a PNG; empty where there is none that can be read."""
    try:
        record = json.loads(contents(path.with_suffix(".json"), MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def remove_parts(folder: Path, stems: Collection[str]) -> None:
    """Remove what a killed process left of pictures of these names."""
    for part in folder.glob(".*.part"):
        name = re.fullmatch(r"\.(.+?)(-\d+)?\.(png|json)\.\w+\.part", part.name)
        if name and name[1] in stems:
            part.unlink(missing_ok=True)


def parameters_text(record: dict[str, Any]) -> str:
    """The record in the A1111 convention: the prompt, the negative prompt, and one line of `Name: value` pairs."""
    if not isinstance(record["prompt"], str):
        raise ValueError("a picture's record names one prompt, not a list: generate pictures to be saved one by one")
    hashes = record["model"]["sha256"]
    unet = next((value for name, value in hashes.items() if name.startswith("unet")), next(iter(hashes.values()), ""))
    guidance = specs.parse("guidance", record["guidance"])[1]
    pairs = {
        "Steps": record["num_steps"],
        "Sampler": _sampler(record),
        "CFG scale": guidance.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": unet[:10],
        "Model": Path(record["model"]["source"]).stem,
        "Loras": ", ".join(f"{Path(lora['path']).stem}: {lora['scale']}" for lora in record["model"]["loras"]) or None,
        **{kind.capitalize(): record[kind] for kind in specs.TABLES},
        "Version": f"cutdiff {record['versions']['cutdiff']}",
        "Clip skip": record["clip_skip"],
    }
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    said = (f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    return "\n".join([*lines, ", ".join(said)])


def _sampler(record: dict[str, Any]) -> str:
    """A1111's name of the solver and of the spacing of its sigmas; of another solver than those, its own name."""
    solver, schedule = (specs.parse(kind, record[kind])[0] for kind in ("solver", "schedule"))
    if solver not in SAMPLERS:
        return solver
    if schedule == "model" and record["noise"].get("use_karras_sigmas") and solver != "ddim":
        schedule = "karras"
    return f"{SAMPLERS[solver]}{SPACINGS.get(schedule, '')}"


def _quoted(value: Any) -> str:
    """A value as A1111 writes it, who reads up to the next comma what is not in quotes."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ',:"\n') else text


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
            file.flush()
            os.fsync(file.fileno())  # a name must not reach the disk before its contents, nor a full disk be told late
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return part
