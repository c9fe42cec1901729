"""What the notebooks show of results/: tables and plots, every number with its 95% interval."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown
from matplotlib.axes import Axes
from studies import RESULTS, result_path

from cutdiff.evaluation.cells import Cell
from cutdiff.evaluation.report import SHARES, table

MAIN = ("one of each", "right caption", "kernel whole", "kernel crops", "seams", "detail", "agreement")
"""Of the scores, what the tables show; all of them are in the JSON."""
Row = dict[str, Any]


def rows(cells: Iterable[Cell], results: Path = RESULTS) -> list[Row]:
    """The results of those cells that were measured."""
    paths = [result_path(cell, results) for cell in cells]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def truth(side: int, results: Path = RESULTS) -> list[Row]:
    """What other true renders score at a size, where that was measured."""
    path = results / f"truth-{side}.json"
    return [json.loads(path.read_text())] if path.exists() else []


def show(found: Sequence[Row], scores: Sequence[str] = MAIN) -> Markdown:
    """A table of results. Seconds are left out: of processes that share two cores they say little."""
    return Markdown(table(found, scores, costs=("evaluations", "TFLOP")))


def missing(cells: Iterable[Cell], results: Path = RESULTS) -> str:
    """Which of the cells have no result yet."""
    names = [f"{cell.name} {cell.side}" for cell in cells if not result_path(cell, results).exists()]
    return f"not measured yet: {', '.join(names) or 'none'}"


def bars(found: Sequence[Row], score: str, axis: Axes | None = None, names: Sequence[str] | None = None) -> None:
    """One bar a result, from top to bottom."""
    axis = plt.subplots(figsize=(6, 0.3 * len(found) + 0.6))[1] if axis is None else axis
    values, errors = _values(found, score)
    labels = [row["name"] for row in found] if names is None else names
    axis.barh(range(len(found)), values, xerr=errors, color="0.75", ecolor="0.2", capsize=2)
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(_label(score), fontsize=8)


def curve(x: Sequence[float], found: Sequence[Row], score: str, axis: Axes, label: str | None = None) -> None:
    """A score over a number."""
    values, errors = _values(found, score)
    axis.errorbar(x, values, yerr=errors, marker="o", markersize=3, capsize=2, label=label)
    axis.set_ylabel(_label(score), fontsize=8)


def _values(found: Sequence[Row], score: str) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    factor = 100 if score in SHARES else 1
    scores = [{key: factor * value for key, value in row["scores"][score].items()} for row in found]
    low = [max(0.0, s["value"] - s["low"]) for s in scores]
    high = [max(0.0, s["high"] - s["value"]) for s in scores]
    return [s["value"] for s in scores], [low, high]


def _label(score: str) -> str:
    return f"{score}, %" if score in SHARES else score
