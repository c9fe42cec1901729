"""SpotDiffusion: the published code, where windows stand, and what the network is told of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_spotdiffusion import CONFIG, RUNS, PublishedDraws, published_latents
from test_unet_methods import latents as drawn
from test_unet_methods import make_run
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.overlaps import Torus

PROMPTS = ["a red house at night", "a blue tree"]


class Heard(Observer):
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.calls.append(call)


def calls(model: Model, **options: Any) -> list[Call]:
    heard = Heard()
    list(cutdiff.denoise(model, PROMPTS, method="spotdiffusion", observer=heard, guidance_scale=1.0, **options))
    return heard.calls


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    size, native = RUNS[name]
    run = make_run(size, config=replace(CONFIG, native_size=native))
    published = replace(run, draws=PublishedDraws((0,)))
    assert relative_error(drawn("spotdiffusion", published), published_latents(name)) < 1e-4
    if name != "one_window":
        assert relative_error(drawn("multidiffusion", published), published_latents(name)) > 0.01


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_one_window_is_direct_to_the_bit(tiny_model: Model, height: int, width: int) -> None:
    options = {"num_steps": 3, "height": height, "width": width}
    ours, direct = (
        list(cutdiff.denoise(tiny_model, PROMPTS, method=method, **options))[-1].latents
        for method in ("spotdiffusion", "direct")
    )
    assert torch.equal(ours, direct)


def test_every_pixel_is_shown_once_a_step_where_windows_fill_the_canvas(tiny_model: Model) -> None:
    record = cutdiff.generate(tiny_model, PROMPTS, method="spotdiffusion", num_steps=3, height=128, width=192).record
    assert record["network_evaluations"] == 3 * 2 * 2 * (2 * 3)


def test_windows_wander(tiny_model: Model) -> None:
    heard = calls(tiny_model, num_steps=4, height=128, width=64)
    origins = [call.operator.origins for call in heard]  # pyright: ignore[reportAttributeAccessIssue]
    assert len({tuple(of_step.flatten().tolist()) for of_step in origins}) == 4
    for step, of_step in enumerate(origins):
        assert torch.equal(of_step[:, 0], Draws((0, 1)).torus_shifts(step, (16, 8), (8, 8)))
        assert of_step[:, :, 1].eq(0).all(), "the axis that one window spans stays"


@pytest.mark.parametrize("size_conditioning", ["native", "target"])
def test_windows_are_said_to_be_the_nearest_crops(tiny_model: Model, size_conditioning: str) -> None:
    heard = calls(tiny_model, num_steps=2, height=128, width=192, size_conditioning=size_conditioning)
    for call in heard:
        assert isinstance(call.operator, Torus)
        original, crops, target = call.inputs[4].split(2, dim=1)
        assert torch.equal(crops, 8 * call.operator.crops.flatten(0, 1).float())
        assert original.eq(torch.tensor([128, 192])).all()
        assert target.eq(torch.tensor([128, 192] if size_conditioning == "target" else [64, 64])).all()


@given(
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_the_crop_of_a_window_over_a_border_is_the_one_with_most_of_its_rows_and_columns(
    size: tuple[int, int], window: tuple[int, int], seed: int
) -> None:
    torus = Torus(Draws((seed,)).torus_shifts(0, size, window), window, size)
    assert torus.crops.shape == torus.origins.shape
    for corner, crop in zip(torus.origins[0].tolist(), torus.crops[0].tolist(), strict=True):
        for side, inner, start, said in zip(size, window, corner, crop, strict=True):
            assert 0 <= said <= side - inner
            shown = {(start + i) % side for i in range(inner)}
            kept = [len(shown & {*range(other, other + inner)}) for other in range(side - inner + 1)]
            assert kept[said] == max(kept)
