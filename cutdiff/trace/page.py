"""The page of a trace: one HTML file that holds everything, written step by step, so that it opens at any moment.

After the head, which has the style and the scripts, every line is a block of JSON: first the run, then each step, at
last the end. A file that was cut off is a page of the steps that it holds. `blocks` reads them back.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cutdiff.output.page import json_text
from cutdiff.trace.recorder import Items, Moment

ASSETS = Path(__file__).parent / "assets"
MODULES = ("tensors", "colours", "paint", "runs", "player", "charts", "panels", "patches", "views", "words", "main")
"""The scripts in the order in which they import each other."""
OPEN, CLOSE = '<script type="application/json" class="block" data-run="{run}">', "</script>\n"
BLOCK = re.compile(rb'<script type="application/json" class="block" data-run="\d">(.*?)</script>\n', re.DOTALL)
Block = dict[str, Any]
FORMAT = 2
"""The number of the form of the blocks, which a page of another version may have otherwise."""


def head(title: str) -> bytes:
    """The page up to its first block."""
    text = (ASSETS / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (ASSETS / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": script(),
    }
    return re.sub("<!--(TITLE|STYLE|SCRIPT)-->", lambda match: parts[match[1]], text).encode()


@cache
def script() -> str:
    """The modules as one, without their imports and exports."""
    texts = ((ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in MODULES)
    return "\n".join(re.sub(r"^import .*?;\n|^export ", "", text, flags=re.MULTILINE | re.DOTALL) for text in texts)


def block(value: Block, run: int = 0) -> bytes:
    """A block as it stands in the page: no text inside can end it, and NaN is null."""
    return f"{OPEN.format(run=run)}{json_text(value)}{CLOSE}".encode()


def blocks(page: bytes) -> list[Block]:
    """The blocks of the page of one run, but for one that was cut off. ValueError, which goes on from the page's name,
    where it is another file."""
    try:
        read = [json.loads(match[1]) for match in BLOCK.finditer(page)]
    except ValueError:
        raise ValueError("is damaged: draw it again with --trace") from None
    infos = [part for part in read if part["kind"] == "run"]
    if not infos:
        raise ValueError("is no page of a trace: name one that --trace wrote")
    if len(infos) > 1:
        raise ValueError("compares two runs: name the page of one")
    if infos[0].get("format") != FORMAT:
        raise ValueError(f"is a page of another version, {infos[0].get('version')}: draw it again")
    return read


def compared(pages: Iterable[Iterable[Block]], title: str) -> Iterator[bytes]:
    """A page of several runs side by side, in parts."""
    yield head(title)
    for run, parts in enumerate(pages):
        yield from (block(part, run) for part in parts)


def of_moment(moment: Moment) -> Block:
    """The block of a step. The canvas of a flow is the one of its own, (1 - t)·x0 + t·noise."""
    scale = 1.0 if moment.time is None else 1 + moment.sigma
    canvases = {"state": None if moment.state is None else moment.state / scale, "denoised": moment.denoised}
    kept = {name: half(canvas) for name, canvas in canvases.items() if canvas is not None}
    return {
        "kind": "step",
        "index": moment.index,
        "stage": moment.stage,
        "sigma": moment.sigma,
        "time": moment.time,
        "failed": moment.failed,
        "evaluations": moment.evaluations,
        "seconds": round(moment.seconds, 5),
        "curves": moment.curves,
        "items": [of_items(items) for items in moment.items],
        "attention": None if moment.attention is None else bytes_of(moment.attention, low=0.0),
        "digest": moment.digest,
        **kept,
    }


def of_items(items: Items) -> Block:
    """The part of a step's block that tells of its items. A whole canvas predicts what the step estimates."""
    whole = items.kind == "whole"
    return {
        "kind": items.kind,
        "number": len(items.estimates),
        "size": [*items.estimates.shape[2:]],
        "estimates": None if whole else half(items.estimates),
        "distances": items.distances.tolist(),
        "guidance": None if items.guidance is None else items.guidance.tolist(),
        "not_finite": (~items.estimates.isfinite()).flatten(1).sum(dim=1).tolist(),
        "grid": items.grid,
        "permutation": None if items.permutation is None else whole_numbers(items.permutation),
        "origins": None if items.origins is None else items.origins.tolist(),
        "wraps": items.wraps,
    }


def half(values: Tensor) -> Block:
    """Values as float16; what is finite stays so."""
    most = torch.finfo(torch.float16).max
    clamped = torch.where(values.isfinite(), values.clamp(-most, most), values)
    return _encoded("float16", clamped.half(), values.shape)


def bytes_of(values: Tensor, low: float | None = None) -> Block:
    """Values (N, C, …) as one byte each, 0 to 254 between their least and greatest; 255 is one that is not finite."""
    finite = values.isfinite()
    some = values[finite] if bool(finite.any()) else values.new_zeros(1)
    low, high = float(some.min()) if low is None else low, float(some.max())
    levels = ((values - low) / max(high - low, 1e-12) * 254).nan_to_num(0, 0, 0).clamp(0, 254).round()
    return _encoded("bytes", torch.where(finite, levels, 255.0).byte(), values.shape) | {"low": low, "high": high}


def whole_numbers(values: Tensor) -> Block:
    """Numbers that are not negative, as bytes, or as two each where one does not suffice."""
    small = int(values.max()) < 256
    array = values.to(torch.int32).numpy().astype("u1" if small else "<u2")
    return _encoded("uint8" if small else "uint16", array, values.shape)


def picture(image: Image.Image) -> str:
    """A picture as the address of its own bytes, WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _encoded(kind: str, values: Tensor | np.ndarray, shape: torch.Size) -> Block:
    array = values.contiguous().numpy() if isinstance(values, Tensor) else np.ascontiguousarray(values)
    return {"as": kind, "shape": [*shape], "data": base64.b64encode(array.tobytes()).decode()}


def write(file: BinaryIO, part: bytes) -> int:
    """Write a part of a page so that it is on its way to the disk at once; returns its bytes."""
    file.write(part)
    file.flush()
    return len(part)
