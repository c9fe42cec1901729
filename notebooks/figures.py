"""Tables and plots of results/ for the notebooks, in which every number has its 95% interval."""

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
from cutdiff.evaluation.report import table
from cutdiff.evaluation.score import SHARES

MAIN = ("one of each", "right caption", "kernel whole", "kernel crops", "seams", "detail", "agreement")
"""The scores that the tables show; the JSON files have all of them."""
Row = dict[str, Any]


def rows(cells: Iterable[Cell], results: Path = RESULTS) -> list[Row]:
    """The results of those cells that were measured."""
    paths = [result_path(cell, results) for cell in cells]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def truth(side: int, results: Path = RESULTS) -> list[Row]:
    """The result of other true renders at a size, in a list that is empty if it was not measured."""
    path = results / f"truth-{side}.json"
    return [json.loads(path.read_text())] if path.exists() else []


def show(results: Sequence[Row], scores: Sequence[str] = MAIN) -> Markdown:
    """A table of results without the seconds, which say little because the processes shared two cores."""
    return Markdown(table(results, scores, costs=("evaluations", "TFLOP")))


def missing(cells: Iterable[Cell], results: Path = RESULTS) -> str:
    """A sentence that names the cells without a result."""
    names = [f"{cell.name} {cell.side}" for cell in cells if not result_path(cell, results).exists()]
    return f"not measured yet: {', '.join(names) or 'none'}"


def bars(results: Sequence[Row], score: str, axis: Axes | None = None, names: Sequence[str] | None = None) -> None:
    """Draw one bar for each result, from top to bottom."""
    axis = plt.subplots(figsize=(6, 0.3 * len(results) + 0.6))[1] if axis is None else axis
    values, errors = _values(results, score)
    labels = [row["name"] for row in results] if names is None else names
    axis.barh(range(len(results)), values, xerr=errors, color="0.75", ecolor="0.2", capsize=2)
    axis.set_yticks(range(len(results)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(_label(score), fontsize=8)


def curve(x: Sequence[float], results: Sequence[Row], score: str, axis: Axes, label: str | None = None) -> None:
    """Plot a score of the results over the numbers `x`."""
    values, errors = _values(results, score)
    axis.errorbar(x, values, yerr=errors, marker="o", markersize=3, capsize=2, label=label)
    axis.set_ylabel(_label(score), fontsize=8)


def _values(results: Sequence[Row], score: str) -> tuple[list[float], list[list[float]]]:
    """The values of a score, and how far their intervals reach below and above them."""
    factor = 100 if score in SHARES else 1
    scores = [{key: factor * row["scores"][score][key] for key in ("value", "low", "high")} for row in results]
    low = [max(0.0, s["value"] - s["low"]) for s in scores]
    high = [max(0.0, s["high"] - s["value"]) for s in scores]
    return [s["value"] for s in scores], [low, high]


def _label(score: str) -> str:
    return f"{score}, %" if score in SHARES else score
