"""Weights of overlapping views, and windows side by side on a torus."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.multidiffusion import MultiDiffusion
from cutdiff.methods.shared import Run
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import Torus, Views, ViewWeights, check_operator, items_of, view_grid, view_weights
from cutdiff.sampling.stages import Stage
from cutdiff.specs import METHODS, options_of, resolve

WEIGHTS: tuple[ViewWeights, ...] = get_args(ViewWeights)
RUN: dict[str, Any] = {"num_steps": 3, "height": 104, "width": 128, "seed": 3}
PROMPTS = ["a red house at night", "a blue tree"]


def latents(model: Model, prompt: str | list[str] = PROMPTS, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, **{**RUN, **options}))[-1].latents


# ---- Weights


@pytest.mark.parametrize("kind", ["gaussian", "cosine"])
@given(height=st.integers(1, 130), width=st.integers(1, 130))
def test_weights_are_positive_symmetric_and_largest_in_the_middle(kind: ViewWeights, height: int, width: int) -> None:
    weights = view_weights(kind, (height, width))
    assert weights is not None
    assert (weights.shape, weights.dtype) == ((height, width), torch.float32)
    assert weights.min() > 0
    assert torch.equal(weights, weights.flip(0, 1))
    assert weights[height // 2, width // 2] == weights.max()
    assert weights[: (height + 1) // 2].diff(dim=0).ge(0).all()
    assert weights[:, (width - 1) // 2 :].diff(dim=1).le(0).all()


@pytest.mark.parametrize("side", [8, 9, 128])
def test_weights_are_those_that_are_said(side: int) -> None:
    assert view_weights("uniform", (side, side)) is None
    place = (torch.arange(side) - (side - 1) / 2) / side
    gaussian = torch.distributions.Normal(0, 0.1).log_prob(place).exp()
    ours = view_weights("gaussian", (side, 1))
    assert ours is not None
    torch.testing.assert_close(ours[:, 0] / ours.max(), gaussian / gaussian.max())


def test_cosines_at_half_a_window_weigh_1_together() -> None:
    weights = view_weights("cosine", (16, 1))
    assert weights is not None
    torch.testing.assert_close(weights[:8] + weights[8:], torch.ones(8, 1))


@pytest.mark.parametrize("method", METHODS)
def test_weights_belong_to_methods_with_views(tiny_model: Model, method: str) -> None:
    options = {"method": method, "height": 128}
    if "view_weights" in options_of(resolve("method", method)):
        plain = latents(tiny_model, **options)
        uniform, gaussian, cosine = (latents(tiny_model, view_weights=kind, **options) for kind in WEIGHTS)
        assert torch.equal(uniform, plain)
        for weighted, other in ((gaussian, plain), (cosine, plain), (gaussian, cosine)):
            assert relative_error(weighted, other) > 1e-5
    else:
        assert method in ("direct", "attention_scaling", "scalecrafter", "hidiffusion", "freescale")
        with pytest.raises(ValueError, match=r"^view_weights='cosine' is no option of method"):
            latents(tiny_model, view_weights="cosine", **options)


def test_a_run_with_weights_is_that_of_the_tensor(tiny_model: Model) -> None:
    def by_hand(run: Run) -> list[Stage]:
        weights = view_weights("gaussian", run.window)
        denoise = MultiDiffusion().on_views(run, jitter=(0, 0), weights=weights)
        return [Stage("views", range(run.num_steps), denoise)]

    ours = latents(tiny_model, method="multidiffusion,view_weights=gaussian")
    assert torch.equal(ours, latents(tiny_model, method=by_hand))


def test_weights_that_are_none_are_an_error(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^view_weights='hann' is not one of uniform, gaussian, cosine"):
        latents(tiny_model, method="multidiffusion", view_weights="hann")


# ---- The torus


@st.composite
def tori(draw: st.DrawFn) -> Torus:
    size = draw(st.tuples(st.integers(1, 13), st.integers(1, 13)))
    window = (draw(st.integers(1, size[0])), draw(st.integers(1, size[1])))
    seeds = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    return Torus(Draws(seeds).torus_shifts(draw(st.integers(0, 9)), size, window), window, size)


@given(torus=tori())
def test_it_keeps_the_promises_of_an_operator(torus: Torus) -> None:
    canvas = torch.zeros(len(torus.shifts), 2, *torus.size)
    check_operator(torus, canvas)
    check_operator(torus, canvas.double())
    (height, width), (rows, columns) = torus.size, torus.window
    number = len(canvas) * -(-height // rows) * -(-width // columns)
    assert items_of(torus, canvas) == (number, torus.window)


@given(torus=tori())
def test_windows_show_what_stands_at_their_origins_around_the_border(torus: Torus) -> None:
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randn(len(torus.shifts), 2, *torus.size, generator=generator)
    windows = torus.gather(canvas).unflatten(0, (len(canvas), -1))
    for image, origins in enumerate(torus.origins):
        for window, (top, left) in zip(windows[image], origins.tolist(), strict=True):
            rows = (top + torch.arange(torus.window[0])) % torus.size[0]
            columns = (left + torch.arange(torus.window[1])) % torus.size[1]
            assert torch.equal(window, canvas[image][:, rows][:, :, columns])


@given(torus=tori())
def test_windows_that_fill_the_canvas_do_not_overlap(torus: Torus) -> None:
    (height, width), (rows, columns) = torus.size, torus.window
    ones = torch.ones(items_of(torus, torch.zeros(len(torus.shifts), 1, height, width))[0], 1, rows, columns)
    if height % rows == width % columns == 0:
        assert ones.numel() == len(torus.shifts) * height * width
    assert torch.equal(torus.scatter(ones), torch.ones(len(torus.shifts), 1, height, width))


def test_shifts_are_uniform_over_the_axis_and_none_where_a_window_spans_it() -> None:
    draws, size, window = Draws((5, 6)), (8, 24), (8, 8)
    shifts = torch.stack([draws.torus_shifts(step, size, window) for step in range(1200)])  # (steps, 2, 2)
    assert (shifts.shape[1:], shifts.dtype) == ((2, 2), torch.int64)
    assert shifts[..., 0].eq(0).all()
    counts = shifts[..., 1].flatten().bincount(minlength=24)
    assert len(counts) == 24
    assert counts.min() > 60
    assert counts.max() < 140
    assert torch.equal(draws.torus_shifts(3, size, window)[1:], Draws((6,)).torus_shifts(3, size, window))
    assert not torch.equal(shifts[:, 0], shifts[:, 1])


def on_torus(run: Run) -> list[Stage]:
    """SpotDiffusion in a few lines."""

    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        shifts = run.draws.torus_shifts(step, run.size, run.window)
        return run.denoiser.through(Torus(shifts, run.window, run.size, device=x.device), x, sigma, step)

    return [Stage("torus", range(run.num_steps), denoise)]


@pytest.mark.parametrize("guidance", ["cfg", "by_band"])
def test_a_method_may_draw_on_a_torus(tiny_model: Model, guidance: str) -> None:
    result = cutdiff.generate(tiny_model, PROMPTS, method=on_torus, guidance=guidance, **RUN)
    assert result.latents.isfinite().all()
    assert result.record["network_evaluations"] == 3 * 2 * 2 * (2 * 2)  # steps, images, a pair, 13×16 latents in 8×8
    for i, prompt in enumerate(PROMPTS):
        alone = latents(tiny_model, prompt, method=on_torus, guidance=guidance, seed=RUN["seed"] + i)
        assert relative_error(result.latents[i], alone[0]) < 1e-4


def test_without_a_shift_it_is_views_at_a_window_s_distance() -> None:
    canvas = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    torus = Torus(torch.zeros(2, 2, dtype=torch.int64), (4, 4), (9, 8))
    views = Views(view_grid((9, 8), (4, 4), (4, 4)).expand(2, -1, -1), (4, 4), (9, 8))
    assert torch.equal(torus.gather(canvas), views.gather(canvas))
    assert torch.equal(torus.scatter(views.gather(canvas)), views.scatter(views.gather(canvas)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Torus(torch.zeros(2, 3, dtype=torch.int64), (4, 4), (8, 8)),
            r"shifts \(2, 3\) of torch.int64 must",
        ),
        (lambda: Torus(torch.zeros(2, 2), (4, 4), (8, 8)), r"shifts \(2, 2\) of torch.float32 must be int64 \(B, 2\)"),
        (lambda: Torus(torch.zeros(1, 2, dtype=torch.int64), (9, 4), (8, 8)), "views need 1 ≤ stride ≤ window ≤ size"),
        (
            lambda: Torus(torch.zeros(1, 2, dtype=torch.int64), (4, 4), (8, 8)).gather(torch.zeros(2, 1, 8, 8)),
            "a canvas of 2 images does not fit the shifts of 1",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
