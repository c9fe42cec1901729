"""The latents of a version that was measured: later ones must still draw them.

fixtures/latents.npz holds, for each run by the name METHOD-SOLVER-HEIGHTxWIDTH, the latents' norm and evenly spaced
values of them. They are those of the last version whose methods were plain functions, with one solver class for all:
how a run is put together has changed since then, and what it draws has not. Where a method is meant to draw something
else, its runs are replaced by the `fingerprint` of what it draws then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model

FIXTURE = Path(__file__).parent / "fixtures" / "latents.npz"
NUM_VALUES = 128
PROMPTS = ["a red house at night", "a blue tree"]
OPTIONS: dict[str, Any] = {"num_steps": 5, "guidance_scale": 4.0, "seed": 3}

with np.load(FIXTURE) as stored:
    RUNS = {name: stored[name] for name in stored.files}


def fingerprint(latents: Tensor) -> Tensor:
    """The norm of latents, and values of them at even distances, the first and the last included."""
    flat = latents.flatten()
    places = torch.linspace(0, len(flat) - 1, NUM_VALUES, dtype=torch.float64).round().long()
    return torch.cat([flat.norm()[None], flat[places]])


def drawn(model: Model, name: str) -> Tensor:
    method, solver, size = name.rsplit("-", 2)
    height, width = map(int, size.split("x"))
    *_, last = cutdiff.denoise(model, PROMPTS, method=method, solver=solver, height=height, width=width, **OPTIONS)
    return last.latents


def test_all_runs_are_there() -> None:
    assert len(RUNS) == 9 * 2 * 3
    assert all(values.shape == (1 + NUM_VALUES,) for values in RUNS.values())
    assert FIXTURE.stat().st_size < 60_000


@pytest.mark.parametrize("name", RUNS)
def test_the_same_latents_are_drawn(tiny_model: Model, name: str) -> None:
    ours, theirs = fingerprint(drawn(tiny_model, name)), torch.from_numpy(RUNS[name])
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-4)
    assert relative_error(ours[1:], theirs[1:]) < 1e-4
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-4 * float(theirs[1:].abs().max()))
