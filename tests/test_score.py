"""The scores of pictures: those that are means keep the values of the single pictures, also in the results' JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import figures
import pytest
import studies
import torch

from cutdiff.checkpoint.model import Model
from cutdiff.evaluation import score
from cutdiff.evaluation.features import load_features
from cutdiff.evaluation.report import table
from cutdiff.evaluation.score import SHARES, Score
from cutdiff.evaluation.testbed import Testbed
from cutdiff.settings import Settings

NUM, SIZE, NATIVE = 6, 256, 128
MEANS = (*SHARES, "seams", "detail", "agreement")


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    """Scores of true renders of other scenes than the truth's, the second of which lost its right half."""
    drawn, others, network = score.scenes(NUM), score.scenes(NUM, score.FLOOR_SEED), load_features()
    images, natives = score.true_renders(others, SIZE), score.true_renders(others, NATIVE)
    images[1, :, :, SIZE // 2 :] = 0
    facts = score.gather_facts(images, network, NATIVE)
    truth = score.gather_facts(score.true_renders(drawn, SIZE), network, NATIVE)
    return score.score(images, others.choices, facts, truth, natives, native=NATIVE, borders=[64, 128, 192])


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_keeps_the_values_of_the_pictures(scores: dict[str, Score], name: str) -> None:
    values = scores[name].values
    assert values is not None
    assert len(values) == NUM
    assert fmean(values) == pytest.approx(scores[name].value, rel=1e-5)
    assert len(set(values)) > 1 or name in SHARES


def test_values_are_in_the_order_of_the_pictures(scores: dict[str, Score]) -> None:
    """The second picture is the spoilt one."""
    for name, spoilt in (("right caption", 0), ("one of each", 0)):
        assert scores[name].values == [1, spoilt, 1, 1, 1, 1]
    agreement = scores["agreement"].values
    assert agreement is not None
    assert min(agreement) == agreement[1]


def test_a_distance_between_sets_has_no_values(scores: dict[str, Score]) -> None:
    assert {name for name, one in scores.items() if one.values is None} == set(scores) - set(MEANS)


def test_results_are_read_with_values_and_without(scores: dict[str, Score], tmp_path: Path) -> None:
    """Older results have three numbers for each score: they give the same tables and plots."""
    cell = studies.cell("direct", SIZE)
    kept = {"name": cell.name, "size": SIZE, "num": NUM, "cost": {}, "settings": {}}
    kept["scores"] = {name: asdict(one) for name, one in scores.items()}
    older = json.loads(json.dumps(kept))
    for one in older["scores"].values():
        del one["values"]
    tables, plotted = [], []
    for name, result in (("new", kept), ("old", older)):
        path = studies.result_path(cell, tmp_path / name)
        path.parent.mkdir()
        path.write_text(json.dumps(result))
        rows = figures.rows([cell], tmp_path / name)
        tables.append(table(rows))
        plotted.append([figures._values(rows, name) for name in scores])
    assert tables[0] == tables[1]
    assert plotted[0] == plotted[1]


def test_values_have_six_digits() -> None:
    assert score.mean_score(torch.tensor([1 / 3, 200 / 3], dtype=torch.float64)).values == [0.333333, 66.6667]


@pytest.mark.parametrize(
    ("side", "stride", "borders"),
    [(256, 8, [64, 128, 192]), (256, 12, [96, 128, 224]), (192, 8, [64, 128]), (128, 8, [64]), (72, 8, [32])],
)
def test_seams_are_looked_for_where_views_begin_or_end(
    model: Model, tmp_path: Path, side: int, stride: int, borders: list[int]
) -> None:
    """The last view is moved back to the border of the canvas; a picture of a single view has its middle."""
    assert Testbed(model, Settings(), 1, tmp_path, 1).borders(side, stride) == borders
