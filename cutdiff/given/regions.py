"""Regions of a picture: prompts, and where each of them is drawn. `sampling.regions` draws them.

A file of regions is a JSON list of objects: {"prompt": "a red house", "box": [0, 0, 0.5, 1], "weight": 1,
"negative_prompt": ""} or, with a picture that is white where the region is, {"prompt": …, "mask": "left.png"}. This
module imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cutdiff.files import BadFile, contents, json_object, reworded
from cutdiff.given.pictures import Picture, as_picture
from cutdiff.options import Between, Options, nearest, short

if TYPE_CHECKING:
    import numpy as np

MAX_REGIONS = 32
"""The most regions of a picture: the network is evaluated for each of them at every step."""
MAX_BYTES = 1 << 20
"""The size of the largest file of regions that is read."""
REFUSED, TOLD = 0.1, 0.7
"""The shares of what a region covers that are its own: with less than the first its prompt has no say and is refused,
and with less than the second the user is told of the others there. Two regions of one place have half of it each."""
GRID = (256, 256)
"""The pixels on which the overlap of regions is measured."""
EXAMPLE = '[{"prompt": "a red house", "box": [0, 0, 0.5, 1]}, …]'


@dataclass(frozen=True)
class Region(Options):
    """A prompt of its own, in a box or a mask of the picture."""

    prompt: str
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom, as shares of the picture's width and height."""
    mask: Any = None
    """A picture that is white where the region is, stretched to the canvas, as `given.as_picture` takes it."""
    weight: Annotated[float, Between(0.001, 1000)] = 1.0
    """The weight by which the region counts where others overlap it; the background counts 1."""
    negative_prompt: str | None = None
    """The negative prompt; None: that of the run."""

    def __post_init__(self) -> None:
        import numpy as np

        if self.box is not None and not _is_box(self.box):
            raise ValueError(
                f"box={short(self.box)} must be [left, top, right, bottom] in shares of the picture, in 0 … 1 and "
                "rising: divide pixels by its width and height"
            )
        object.__setattr__(self, "mask", as_picture("mask", self.mask))
        super().__post_init__()
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name) or ""
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{name}={short(text)} holds a NUL or is not valid UTF-8: leave that out")
        if not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r} is empty: say what the region shows")
        if (self.box is None) == (self.mask is None):
            raise ValueError(f"box={self.box} and mask={self.mask and self.mask.name}: a region has one of the two")
        if isinstance(self.mask, Picture):
            if self.mask.count > 1:
                raise ValueError(f"mask={self.mask.name} holds {self.mask.count} pictures: give one for all images")
            low, high = (extreme(_gray(self.mask)) for extreme in (np.min, np.max))
            if low == high:
                raise BadFile(
                    f"mask={self.mask.name} has one value throughout: paint the region white on black, or give "
                    "box=[0, 0, 1, 1] for the whole picture"
                )

    def described(self) -> dict[str, Any]:
        """The region as a record has it: what differs from the defaults."""
        own = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        kept = {name: value for name, (value, default) in own.items() if value != default}
        made = {"box": list, "mask": Picture.described}
        return {name: made.get(name, lambda kept: kept)(value) for name, value in kept.items()}


def as_regions(value: Any) -> tuple[Region, ...] | None:
    """The regions of an option: None, a file of them, or a list of `Region` or of such objects as a file has.

    ValueError, which names the region and what is wrong with it, where they are none or cannot be drawn; BadFile where
    those of a file are.
    """
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        if not os.fspath(value):
            raise ValueError(f"regions='' names no file: give one of regions, such as {EXAMPLE}")
        path = Path(value)
        entries = _read(path)
        try:
            return _checked(entries, path.parent, f"regions={path}: ")
        except ValueError as error:
            raise BadFile(str(error)) from None
    return _checked(value, Path(), "regions=")


def _checked(value: Any, folder: Path, place: str) -> tuple[Region, ...]:
    """The regions of a list, whose masks are files in `folder`. Errors begin with `place`."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{place}{short(value)} must be a list of regions, such as {EXAMPLE}")
    if not value:
        raise ValueError(f"{place}[] has no region: give one, such as {EXAMPLE}, or leave regions out")
    if len(value) > MAX_REGIONS:
        raise ValueError(
            f"{place}{len(value)} regions are too many: give at most {MAX_REGIONS}, for each of which the network is "
            "evaluated at every step"
        )
    regions: list[Region] = []
    for number, entry in enumerate(value, start=1):
        try:
            regions.append(entry if isinstance(entry, Region) else _region(entry, folder))
        except ValueError as error:
            raise reworded(error, f"{place}region {number}: {error}") from None
    for number, (region, own) in enumerate(zip(regions, own_shares((*regions,)), strict=True), start=1):
        if own < REFUSED:
            raise ValueError(
                f"{place}region {number} ({region.prompt!r:.60}) has {own:.0%} of what it covers, and other regions "
                "the rest, so that it would hardly show: move them apart, or give it more weight"
            )
    return tuple(regions)


def notices(regions: tuple[Region, ...]) -> list[str]:
    """The things that a user should know of regions that are drawn."""
    if not regions:
        return []
    told = [
        f"regions=region {number} ({region.prompt!r:.60}) has {own:.0%} of what it covers, and others the rest: where "
        "they overlap, both prompts are mixed by weight"
        for number, (region, own) in enumerate(zip(regions, own_shares(regions), strict=True), start=1)
        if own < TOLD
    ]
    return told + [
        f"regions=region {number}: {notice}"
        for number, region in enumerate(regions, start=1)
        if region.mask
        for notice in region.mask.notices
    ]


def check_sizes(regions: Sequence[Region], size: tuple[int, int]) -> None:
    """ValueError where a region covers less than a latent of a canvas of `size`."""
    for number, region in enumerate(regions, start=1):
        if (area := float(coverage(region, size).sum())) < 1 - 1e-4:
            raise ValueError(
                f"regions=region {number} ({region.prompt!r:.60}) covers {area:.2g} of one latent of the canvas of "
                f"{size[0]}×{size[1]}: make the region larger, or the picture"
            )


@lru_cache
def own_shares(regions: tuple[Region, ...]) -> list[float]:
    """The share that each region has of what it covers; the rest is that of others which overlap it."""
    import numpy as np

    masks = np.stack([coverage(region, GRID) for region in regions])
    weighted = masks * np.array([region.weight for region in regions], np.float32)[:, None, None]
    shares = weighted / np.maximum(weighted.sum(0), np.float32(1e-12))
    return [float((mask * share).sum() / max(mask.sum(), 1e-12)) for mask, share in zip(masks, shares, strict=True)]


@lru_cache(256)
def coverage(region: Region, size: tuple[int, int]) -> np.ndarray:
    """The share of each latent of a canvas of `size` that a region covers, (H, W) float32 in 0 … 1."""
    import numpy as np

    if region.box is None:
        from PIL import Image

        gray = Image.fromarray(_gray(region.mask))
        return np.asarray(gray.resize((size[1], size[0]), Image.Resampling.BOX), np.float32).clip(0, 1)
    left, top, right, bottom = region.box
    return np.outer(_covered(top, bottom, size[0]), _covered(left, right, size[1])).astype(np.float32)


def _covered(low: float, high: float, side: int) -> np.ndarray:
    """The share of each of `side` pixels that lies between two shares of the axis."""
    import numpy as np

    first, last = (np.clip(share * side - np.arange(side), 0, 1) for share in (low, high))
    return last - first


def _gray(mask: Picture) -> np.ndarray:
    """The values of a mask (H, W), float32 in [0, 1]."""
    return mask.pixels()[0].mean(axis=2)


def _is_box(box: Any) -> bool:
    """True for left, top, right and bottom in 0 … 1, rising."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return False
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def _read(path: Path) -> Any:
    """The JSON value in a file. BadFile where it is none, or has an object that gives a name twice."""
    try:
        text = contents(path, MAX_BYTES)
    except (FileNotFoundError, ValueError) as error:
        raise reworded(error, f"regions={error}") from None
    try:
        return json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"regions={path} is no JSON ({error}): write {EXAMPLE}") from None


def _region(entry: Any, folder: Path) -> Region:
    """A region of an object as a file has it, whose mask is a file in `folder`."""
    known = [field.name for field in fields(Region)]
    if not isinstance(entry, dict):
        raise ValueError(f"{short(entry)} is no object: write one such as in {EXAMPLE}")
    for name in entry:
        if name not in known:
            raise ValueError(f"{name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    if "prompt" not in entry:
        raise ValueError("it has no prompt: say what the region shows")
    mask = entry.get("mask")
    return Region(**{**entry, "mask": folder / mask if isinstance(mask, str) else mask})
