"""The report of an evaluation: a Markdown table of scores, and a contact sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cutdiff.evaluation.cells import pictures
from cutdiff.evaluation.score import SHARES
from cutdiff.output.images import write_atomically

COSTS = ("evaluations", "TFLOP", "seconds", "peak MB")


def table(cells: Sequence[Mapping], names: Sequence[str] | None = None, costs: Sequence[str] = COSTS) -> str:
    """A Markdown table with a row for each cell of an evaluation's JSON.

    Shares are percentages, intervals are in brackets, and "–" stands where there is no number.

    names, costs: the scores and costs that are shown, by default all that there are.
    """
    if names is None:
        names = list(dict.fromkeys(name for cell in cells for name in cell["scores"]))
    heads = ["size", "method", "pictures", *names, *costs]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for cell in cells:
        scores = [_score(name, cell["scores"].get(name)) for name in names]
        spent = [_cost(cell["cost"].get(name)) for name in costs]
        lines.append(_line([f"{cell['size']} px", cell["name"], str(cell["num"]), *scores, *spent]))
    return "\n".join(lines)


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def few_pictures(num: int, name: str, features: int) -> str:
    """The notice on a distance between Gaussians that is fitted to the `features` of too few pictures."""
    return (
        f"{name} whole is fitted to {num} pictures, no more than the {features} features of each, and tells little: "
        "compare by the kernel distance, or draw more pictures"
    )


def save_sheet(path: Path, folders: Sequence[Path], num: int, columns: int = 8) -> None:
    """Save a contact sheet with a row for each folder of an evaluation, of the first of its `num` pictures."""
    sheet = contact_sheet([pictures(folder, min(num, columns)) for folder in folders], columns)
    image = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    write_atomically(path, partial(image.save, format="PNG"))


def contact_sheet(rows: Sequence[Tensor], columns: int = 8, side: int = 160, gap: int = 4) -> Tensor:
    """Tile the first pictures of each row, one seed a column: [(N, 3, H, W) uint8] -> (3, H', W') uint8."""
    columns = min(columns, *(len(row) for row in rows))
    pitch = side + gap
    sheet = torch.full((3, len(rows) * pitch + gap, columns * pitch + gap), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        scale = side / max(row.shape[2:])
        small = F.interpolate(row[:columns].float(), scale_factor=scale, mode="bilinear", antialias=True)
        for j, picture in enumerate(small.round().clamp(0, 255).to(torch.uint8)):
            top, left = gap + i * pitch, gap + j * pitch
            sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return sheet


def _score(name: str, score: Mapping[str, float] | None) -> str:
    if score is None:
        return "–"
    form = "{:.1%}" if name in SHARES else "{:.3g}"
    value, *ends = (form.format(score[key]) for key in ("value", "low", "high") if score[key] is not None)
    return f"{value} [{', '.join(ends)}]" if ends else value


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
