"""The page of an evaluation, report.html: the table of scores, contact sheets, and the record of every picture.

It is one file, which can be sent to others without its folder: pictures are in it as WebP of at most `SIDE` pixels, for
as many seeds as `MOST_BYTES` holds. Beside its folder it links to the PNGs.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from cutdiff.evaluation.cells import picture_paths, pictures_of
from cutdiff.evaluation.report import COSTS
from cutdiff.evaluation.score import SHARES
from cutdiff.evaluation.testbed import FLOOR
from cutdiff.files import json_of
from cutdiff.options import split
from cutdiff.output.page import save_page
from cutdiff.specs import TABLES

SIDE, QUALITY = 512, 90
"""The longest side of a picture in the page, in pixels, and its quality as WebP."""
MOST_SEEDS, MOST_BYTES = 48, 16_000_000
"""The most seeds whose pictures are in the page, and the most bytes of these with their captions and scores."""
MEANINGS = {
    "bodies not one": "Share of the pictures with no sun or moon, or with several. 0% is best.",
    "subjects not one": "Share of the pictures with no house, tree, tent or balloon, or with several. 0% is best.",
    "one of each": "Share of the pictures with exactly one sun or moon and one subject. 100% is best.",
    "right subject": "Share of the pictures with one subject, of the kind and colour of the caption. 100% is best.",
    "right caption": "Share of the pictures in which all that the caption says is right. 100% is best.",
    "Fréchet whole": "Distance between Gaussians fitted to features of whole pictures and of true ones. Compare it with"
    " that of other truth, which is above 0 for few pictures.",
    "Fréchet crops": "The same of crops of native size.",
    "kernel whole": "Kernel distance of features of whole pictures to those of true ones. 0 is best; it is unbiased, so"
    " that it may fall below.",
    "kernel crops": "The same of crops of native size.",
    "seams": "Gradients across the borders of views over those elsewhere. About 1 where no seam shows.",
    "detail": "Spectral energy that only a large picture can hold, as a share of the truth's. 1 is best: less is blur,"
    " more is noise or invented texture.",
    "agreement": "PSNR in dB between the picture averaged down and the native picture of the same seed.",
    "FID whole": "Fréchet distance of the features of whole pictures to those of the references. Lower is better.",
    "FID crops": "The same of crops of native size.",
    "KID whole": "Kernel distance of the features of whole pictures to those of the references. 0 is best.",
    "KID crops": "The same of crops of native size.",
    "IS whole": "Inception score of whole pictures. Higher is better.",
    "IS crops": "The same of crops of native size.",
    "CLIP": "100 times the cosine between picture and prompt. Higher is better.",
    "evaluations": "Network evaluations for one picture.",
    "TFLOP": "Floating-point operations for one picture, in 10¹².",
    "seconds": "Time for one picture, without the first batch: none where all were drawn in one.",
    "peak MB": "Most memory that a batch took.",
}
"""The meanings of the columns of the table."""


def save_report(path: Path, title: str, result: Mapping[str, Any], folders: Mapping[tuple[str, int], Path]) -> None:
    """Write the page of an evaluation whole, or leave `path` as it was.

    result: the evaluation's JSON; its "cells" are the rows of the table, and all else but the prompts is shown.
    folders: the pictures' folders, by the name and the size of their cells; they lie beside the page.
    """
    rows = result["cells"]
    known = [folders.get((row["name"], row["size"])) for row in rows]
    data = {
        "title": title,
        "rows": [_row(row, folder) for row, folder in zip(rows, known, strict=True)],
        "scores": list(dict.fromkeys(name for row in rows for name in row["scores"])),
        "costs": [name for name in COSTS if any(name in row["cost"] for row in rows)],
        "shares": SHARES,
        "meanings": MEANINGS,
        "seeds": _seeds(rows, known, path.parent),
        "drawn": max(row["num"] for row in rows),
        "run": {
            **{name: value for name, value in result.items() if name not in ("cells", "prompts")},
            "settings of all rows": _shared([row["settings"] for row in rows if row["settings"]]),
        },
    }
    save_page(path, title, Path(__file__), data)


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all rows have."""
    first, *others = settings
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _row(row: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    scores = {name: [score[key] for key in ("value", "low", "high")] for name, score in row["scores"].items()}
    kept = {name: row[name] for name in ("name", "size", "num", "cost")}
    cell = {"settings": row["settings"]} if folder is None else json_of(folder / "cell.json")
    options = _options(row["settings"])
    return {**kept, "truth": row["name"] == FLOOR, "scores": scores, "options": options, "cell": cell}


def _options(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run one by one, with those of its method, solver, schedule and guidance under their names."""
    options = {}
    for name, value in settings.items():
        spec, *given = split(value) if name in TABLES else [value]
        options[name] = spec if isinstance(spec, str) else json.dumps(spec)
        for option in given:
            key, _, text = option.partition("=")
            options[f"{name}: {key.strip()}"] = text.strip()
    return options


def _seeds(rows: Sequence[Mapping[str, Any]], folders: Sequence[Path | None], beside: Path) -> list[list[Any]]:
    """The pictures of the first seeds, as many as the page holds; for each seed one for each row, or None."""
    logs = [{} if folder is None else pictures_of(folder) for folder in folders]
    seeds, left = [], MOST_BYTES
    for i in range(min(MOST_SEEDS, max(row["num"] for row in rows))):
        pictures = [
            _picture(row, i, log[i], folder, beside) if folder and i in log and i < row["num"] else None
            for row, folder, log in zip(rows, folders, logs, strict=True)
        ]
        left -= len(json.dumps(pictures))
        if left < 0:
            break
        seeds.append(pictures)
    return seeds


def _picture(row: Mapping[str, Any], i: int, known: Mapping[str, Any], folder: Path, beside: Path) -> dict[str, Any]:
    """A picture of a row, and what is known of it alone."""
    (path,) = picture_paths(folder, i + 1)[i:]
    small = BytesIO()
    with Image.open(path) as image:
        width, height = image.size
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(small, format="WEBP", quality=QUALITY)
    values = {name: score["values"][i] for name, score in row["scores"].items() if score.get("values")}
    file = path.relative_to(beside)
    return {
        "webp": base64.b64encode(small.getvalue()).decode(),
        "href": f"./{quote(os.fsencode(file))}",
        "record": {
            "caption": known["caption"],
            "seed": row["settings"]["seed"] + i,
            "width": width,
            "height": height,
            "scores": values,
            "file": os.fsencode(file).decode(errors="backslashreplace"),
            "pixels_sha256": known["pixels_sha256"],
        },
    }
