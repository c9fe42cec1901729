"""The pictures of an evaluation, drawn into a folder for each cell, a batch at a time; a second start resumes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.cli.arguments import DTYPES
from cutdiff.files import MAX_LOG, contents, json_lines, json_of
from cutdiff.output.images import State, check_pixels, pixels_sha256, save_json, to_pil, write_atomically
from cutdiff.output.record import describe, fingerprint
from cutdiff.parallel.lines import say
from cutdiff.pipeline import canvas_and_schedule, generate
from cutdiff.planning.meter import Meter
from cutdiff.sampling.draws import Draws
from cutdiff.settings import Settings

LOG = "batches.jsonl"
"""The name of a cell's log."""
LINE = {"first": int, "captions": list, "evaluations": int}
COST = {"seconds", "flops", "peak_memory_bytes"}
"""The fields that every line of a log has, the former of one type."""
MAX_NAME = 200
"""The most bytes of a folder's name."""


@dataclass(frozen=True)
class Cell:
    """A way of drawing at one size."""

    name: str
    settings: Settings
    """The options of the run, with height and width; the seed is that of the first picture."""

    @property
    def side(self) -> int:
        """The side of its square pictures, in pixels."""
        assert self.settings.width is not None
        return self.settings.width


def draw(
    model: Model,
    cell: Cell,
    captions: Sequence[str],
    folder: Path,
    *,
    batch: int,
    on_batch: Callable[[int], object] = lambda count: None,
) -> None:
    """Draw a picture for each caption, with seeds that count on from the cell's, as `folder`/0000.png and so on.

    `folder`/cell.json holds all that determines the pictures except their captions. `folder`/batches.jsonl has a line
    for each finished batch, with its captions and its cost; a batch whose pictures are whole is not drawn again.
    ValueError if the folder holds other pictures, also if another process draws them at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = (side * model.factor for side in cell.settings.canvas_size(model.native_size, model.factor))
    described = describe(
        model, "", cell.settings, Draws((cell.settings.seed,)), canvas_and_schedule(model, cell.settings)[1]
    )
    plan = {"name": cell.name, "settings": cell.settings.described(), "sources": cell.settings.sources()}
    plan |= {"batch": batch, "dtype": dtype_name(model.dtype), "fingerprint": fingerprint(described)}
    plan = json.loads(json.dumps(plan))  # as it will be read back
    with _locked(folder):
        if not (folder / "cell.json").exists():
            save_json(folder / "cell.json", plan)
        finished = _finished(folder, plan, captions)
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        if not _whole(folder, finished.get(first), len(part), (width, height)):
            images, line = _draw_batch(model, replace(cell.settings, seed=cell.settings.seed + first), part, first)
            with _locked(folder) as log:
                if not _whole(folder, _finished(folder, plan, captions).get(first), len(part), (width, height)):
                    for path, image in zip(_batch_paths(folder, first, len(part)), images, strict=True):
                        write_atomically(path, partial(image.save, format="PNG"))
                    log.write(json.dumps(line) + "\n")
        on_batch(len(part))


@contextmanager
def _locked(folder: Path) -> Iterator[TextIO]:
    """Keep other processes from writing to a cell until the block ends, or this process does; yields the log, to which
    lines are added. A line that a full disk has cut is removed from it."""
    if os.path.lexists(folder / LOG):
        contents(folder / LOG, MAX_LOG)  # which refuses what could not be opened to write, as a pipe
    with (folder / LOG).open("a+", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        text = contents(folder / LOG, MAX_LOG)
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            log.truncate(len(whole))
        yield log


def _finished(folder: Path, plan: dict[str, Any], captions: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The lines of a cell's log by the numbers of their first pictures; ValueError if it holds other pictures."""
    before = json_of(folder / "cell.json")
    if not isinstance(before, dict):
        raise ValueError(f"{folder / 'cell.json'} is no cell's: remove the folder, or take another --out")
    if (dtype := before.get("dtype")) in DTYPES and dtype != plan["dtype"]:
        raise ValueError(f"{folder} was drawn in {dtype}: pass --dtype {dtype}, or another --out")
    finished = {line["first"]: line for line in _lines(folder)}
    known = all(a == b for i, line in finished.items() for a, b in zip(line["captions"], captions[i:], strict=False))
    if before != plan or not known:
        raise ValueError(f"{folder} holds pictures that were drawn otherwise: take another --out, or delete it")
    return finished


def _whole(folder: Path, line: dict[str, Any] | None, num: int, size: tuple[int, int]) -> bool:
    """True if a batch has a line for at least `num` pictures, and each of these is there as it was drawn."""
    if line is None or len(line["captions"]) < num:
        return False
    digests = line.get("pixels_sha256", [None] * num)  # an old line has none
    paths = _batch_paths(folder, line["first"], num)
    return all(check_pixels(path, digest, size) is State.FINISHED for path, digest in zip(paths, digests, strict=False))


def draw_cells(model: Model, cells: Sequence[Cell], captions: Sequence[str], out: Path, *, batch: int) -> None:
    """Draw the missing pictures of `cells` below `out`. If standard error is no terminal, each cell prints a line."""
    with tqdm(total=len(cells) * len(captions), unit="picture", disable=None) as bar:
        for number, cell in enumerate(cells, start=1):
            bar.set_description(f"{cell.name} {cell.side}", refresh=False)
            began = time.perf_counter()
            draw(model, cell, captions, folder_of(out, cell), batch=batch, on_batch=bar.update)
            if bar.disable:
                seconds = time.perf_counter() - began
                place = f"{number} of {len(cells)}: {cell.name} {cell.side} px"
                say(f"{place}, {len(captions)} pictures in {seconds:.0f} s")


def _draw_batch(
    model: Model, settings: Settings, captions: Sequence[str], first: int
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw a batch; returns its pictures and its line of the log. FLOPs are counted in the first one only, whose time
    does not count."""
    flops = None
    began = time.perf_counter()
    if first == 0:
        with Meter() as meter:
            result = generate(model, captions, settings)
        flops = meter.flops / len(captions)
    else:
        result = generate(model, captions, settings)
    seconds = time.perf_counter() - began
    images = [to_pil(image) for image in result.images]
    return images, {
        "first": first,
        "captions": list(captions),
        "seconds": None if first == 0 else seconds,
        "evaluations": result.record["network_evaluations"],
        "flops": flops,
        "peak_memory_bytes": result.record["peak_memory_bytes"],
        "pixels_sha256": [pixels_sha256(image) for image in images],
    }


def cost(folder: Path) -> dict[str, float | None]:
    """The network evaluations, TFLOP and seconds of one picture, and the peak memory of the batches in MB."""
    lines = _lines(folder)
    timed = [line for line in lines if line["seconds"] is not None]
    pictures, timed_pictures = (sum(len(line["captions"]) for line in some) for some in (lines, timed))
    return {
        "evaluations": sum(line["evaluations"] for line in lines) / pictures,
        "TFLOP": next((line["flops"] / 1e12 for line in lines if line["flops"] is not None), None),
        "seconds": sum(line["seconds"] for line in timed) / timed_pictures if timed else None,
        "peak MB": max(line["peak_memory_bytes"] for line in lines) / 1e6,
    }


def folder_of(out: Path, cell: Cell) -> Path:
    """The folder of a cell's pictures, below `out`: its name, as far as a folder can have it."""
    name = cell.name.replace("/", "_").replace("\0", "_")
    if len(name.encode()) > MAX_NAME:
        name = f"{name[: MAX_NAME // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return out / f"{name}-{cell.side}"


def picture_paths(folder: Path, num: int) -> list[Path]:
    """The files of the first `num` pictures of a folder."""
    return [folder / f"{i:04}.png" for i in range(num)]


def pictures(folder: Path, num: int) -> Tensor:
    """The first `num` pictures of a folder, (N, 3, H, W), uint8."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in picture_paths(folder, num)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def pictures_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The caption and the hash of the pixels of each picture of a folder, by its number; an old log has no hash."""
    known = {}
    for line in _lines(folder):
        digests = line.get("pixels_sha256", [None] * len(line["captions"]))
        for i, (caption, digest) in enumerate(zip(line["captions"], digests, strict=True), start=line["first"]):
            known[i] = {"caption": caption, "pixels_sha256": digest}
    return known


def _batch_paths(folder: Path, first: int, num: int) -> list[Path]:
    return picture_paths(folder, first + num)[first:]


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a cell's log, but for one that is being written."""
    lines = json_lines(folder / LOG)
    if any({name: type(line.get(name)) for name in LINE} != LINE or not line.keys() >= COST for line in lines):
        raise ValueError(f"{folder / LOG} has a line that is no batch's: remove the folder, or take another --out")
    return lines
