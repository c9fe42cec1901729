"""The study of the solvers' orders: slopes of errors, draws that are one path, and the committed results."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import order
import pytest
import torch
from order import INTERVALS, NOISY, QUIET, STILL, OnePath, StillDraws, sigmas_of, slopes

from cutdiff.checkpoint.model import Model
from cutdiff.sampling.draws import Draws, solver_noise

SHAPE = (2, 4, 3, 5)


@pytest.mark.parametrize("power", [1, 2])
def test_the_slope_of_errors_is_the_order_of_a_solver(power: int) -> None:
    errors = {str(n): [factor * (n + 1) ** -power for factor in (0.5, 3.0)] for n in INTERVALS}
    assert slopes(errors) == pytest.approx((power, power, power))
    assert slopes({**errors, "4": [1e3, 1e-3]}, first=1) == pytest.approx((power, power, power))


def test_runs_of_more_steps_divide_the_same_path_of_noise() -> None:
    """The increments between two sigmas are the same however many steps lie between, and those of halves add up."""

    def path(intervals: int, *, halved: bool) -> torch.Tensor:
        sigmas = sigmas_of(intervals)
        draws, total = OnePath((3, 4), sigmas=sigmas, halved=halved), torch.zeros(SHAPE)
        for i, (high, low) in enumerate(pairwise(sigmas[:-1])):
            middle = math.sqrt(high * low)
            parts = [(high, middle), (middle, low)] if halved else [(high, low)]
            for part, (a, b) in enumerate(parts):
                total += solver_noise(draws, SHAPE, i, part) * math.sqrt(a - b)
        return total

    expected = path(4, halved=False)
    for intervals, halved in ((4, True), (8, False), (20, True)):
        torch.testing.assert_close(path(intervals, halved=halved), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1])


def test_still_draws_are_those_of_the_first_step() -> None:
    still, plain = StillDraws((1, 2)), Draws((1, 2))
    views = ((32, 16), (16, 16), (8, 8), (2, 2))
    for step in (0, 7):
        assert still.permutation(step, (2, 1), SHAPE, "channel") == plain.permutation(0, (2, 1), SHAPE, "channel")
        assert torch.equal(still.view_origins(step, *views), plain.view_origins(0, *views))
    assert not torch.equal(plain.view_origins(7, *views), plain.view_origins(0, *views))


@pytest.mark.parametrize("variant", order.VARIANTS)
def test_the_results_are_whole_and_of_the_embedded_model(model: Model, variant: str) -> None:
    result = json.loads((order.ORDERS / f"{variant}.json").read_text())
    solvers = QUIET if variant.endswith(STILL) else (*QUIET, *NOISY)
    assert tuple(result["errors"]) == solvers
    assert all([*errors] == [str(n) for n in INTERVALS] for errors in result["errors"].values())
    assert all(len(values) == result["num"] >= 6 for errors in result["errors"].values() for values in errors.values())
    assert result["model"]["sha256"] == model.hashes
