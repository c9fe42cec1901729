"""Weights of overlapping views, windows side by side on a torus, and views that are swapped, not averaged."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WITHOUT_VIEWS, relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.multidiffusion import MultiDiffusion
from cutdiff.methods.shared import Run
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import Views, ViewWeights, check_operator, items_of, view_grid, view_weights
from cutdiff.sampling.overlaps import Swapped, Torus
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


def with_views(method: str) -> str:
    """The method as it has overlapping views, if it ever does."""
    return f"{method},detail=views" if method == "upsample_guidance" else method


@pytest.mark.parametrize("method", METHODS)
def test_weights_belong_to_methods_with_views(tiny_model: Model, method: str) -> None:
    options = {"method": with_views(method), "height": 128}
    if "view_weights" in options_of(resolve("method", method)):
        plain = latents(tiny_model, **options)
        uniform, gaussian, cosine = (latents(tiny_model, view_weights=kind, **options) for kind in WEIGHTS)
        assert torch.equal(uniform, plain)
        for weighted, other in ((gaussian, plain), (cosine, plain), (gaussian, cosine)):
            assert relative_error(weighted, other) > 1e-5
    else:
        assert method in WITHOUT_VIEWS
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


# ---- Swapped windows


@st.composite
def swaps(draw: st.DrawFn) -> Swapped:
    """Windows of one or two images, jittered, so that some reach past the canvas, or all wherever a draw puts them."""
    size = (draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    window = (draw(st.integers(1, size[0])), draw(st.integers(1, size[1])))
    stride = (draw(st.integers(1, window[0])), draw(st.integers(1, window[1])))
    seeds, jitter = tuple(range(draw(st.integers(1, 2)))), (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    jitter = (min(jitter[0], (window[0] - stride[0]) // 2), min(jitter[1], (window[1] - stride[1]) // 2))
    origins = Draws(seeds).view_origins(draw(st.integers(0, 9)), size, window, stride, jitter)
    stray = draw(st.lists(st.tuples(st.integers(-12, 12), st.integers(-12, 12)), max_size=2))
    extra = torch.tensor(stray, dtype=torch.int64).view(1, -1, 2).expand(len(seeds), -1, -1)
    return Swapped(torch.cat([origins, extra], dim=1), window, size)


def takers(swapped: Swapped) -> Tensor:
    """The number of the window that each pixel is taken from, (B, H, W)."""
    batch, number = swapped.origins.shape[:2]
    values = torch.arange(float(number)).repeat(batch).view(-1, 1, 1, 1).expand(-1, 1, *swapped.window)
    return swapped.scatter(values)[:, 0].long()


@given(swapped=swaps())
def test_a_swap_keeps_the_promises_of_an_operator(swapped: Swapped) -> None:
    canvas = torch.zeros(len(swapped.origins), 2, *swapped.size)
    check_operator(swapped, canvas)
    check_operator(swapped, canvas.double())
    x = torch.randn(canvas.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(swapped.scatter(swapped.gather(x)), x), "to the bit, as nothing is added"
    assert torch.equal(swapped.gather(x), swapped.views.gather(x))


@given(swapped=swaps())
def test_a_pixel_is_taken_from_the_window_whose_turn_it_is(swapped: Swapped) -> None:
    for origins, taken in zip(swapped.origins.tolist(), takers(swapped), strict=True):
        for i in range(swapped.size[0]):
            for j in range(swapped.size[1]):
                covering = [
                    v
                    for v, (top, left) in enumerate(origins)
                    if top <= i < top + swapped.window[0] and left <= j < left + swapped.window[1]
                ]
                k = len(covering)
                assert taken[i, j] == covering[(i * round(math.sqrt(k)) + j) % k]


def test_two_windows_make_a_chessboard_and_four_give_a_pixel_each_to_every_block() -> None:
    beside = Swapped(torch.tensor([[[0, 0], [0, 4]]]), (6, 8), (6, 12))
    i, j = torch.arange(6)[:, None], torch.arange(12)
    expected = torch.where(j < 4, 0, torch.where(j < 8, (i + j) % 2, 1))
    assert torch.equal(takers(beside)[0], expected)
    four = Swapped(torch.tensor([[[0, 0], [0, 2], [2, 0], [2, 2]]]), (8, 8), (10, 10))
    inside = takers(four)[0, 2:8, 2:8]
    for rows in inside.unfold(0, 2, 2).unfold(1, 2, 2).flatten(0, 1):
        assert sorted(rows.flatten().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("k", range(1, 13))
def test_pixels_of_one_window_lie_as_far_apart_as_those_of_a_lattice_can(k: int) -> None:
    def nearest(factor: int) -> int:
        steps = [(i, j) for i in range(-k, k + 1) for j in range(-k, k + 1) if (i, j) != (0, 0)]
        return min(i * i + j * j for i, j in steps if (i * factor + j) % k == 0)

    assert nearest(round(math.sqrt(k))) == max(map(nearest, range(k)))
    same = Swapped(torch.zeros(1, k, 2, dtype=torch.int64), (2 * k, 2 * k), (2 * k, 2 * k))
    places = takers(same)[0].eq(0).nonzero().tolist()
    apart = min((a - c) ** 2 + (b - d) ** 2 for a, b in places for c, d in places if (a, b) != (c, d))
    assert apart == nearest(round(math.sqrt(k)))
    assert takers(same).flatten().bincount().eq(4 * k).all(), "all take as many"


def test_a_swap_keeps_the_deviation_that_an_average_loses() -> None:
    origins = Draws((0,)).view_origins(0, (64, 64), (32, 32), (16, 16), (0, 0))
    swapped = Swapped(origins, (32, 32), (64, 64))
    noise = torch.randn(9, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert swapped.scatter(noise).std().item() == pytest.approx(1, abs=0.05)
    assert swapped.views.scatter(noise).std() < 0.8


def test_a_swap_of_sizes_without_values() -> None:
    origins = Draws((0, 1)).view_origins(0, (9, 16), (8, 8), (4, 4), (1, 1))
    swapped = Swapped(origins, (8, 8), (9, 16), "meta")
    number, size = items_of(swapped, torch.empty(2, 4, 9, 16, device="meta"))
    assert (number, size) == (origins.shape[0] * origins.shape[1], (8, 8))
    canvas = swapped.scatter(torch.empty(2 * number, 4, 8, 8, device="meta"), copies=2, guidance_scale=3.0)
    assert (canvas.device.type, canvas.shape) == ("meta", (2, 4, 9, 16))


def test_what_a_swap_cannot_take_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^views of \(4, 4\) at these origins leave pixels of the \(8, 8\) canvas"):
        Swapped(torch.zeros(1, 3, 2, dtype=torch.int64), (4, 4), (8, 8))
    swapped = Swapped(torch.zeros(1, 2, 2, dtype=torch.int64), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"^3 items in 1 copies do not fit origins \(B, V, 2\) of \(1, 2, 2\)"):
        swapped.scatter(torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize("method", METHODS)
def test_a_swap_belongs_to_methods_with_views(tiny_model: Model, method: str) -> None:
    if "overlaps" not in options_of(resolve("method", method)):
        assert "stride" not in options_of(resolve("method", method))
        return
    method = with_views(method)
    plain, average, swap = (
        latents(tiny_model, method=method, **options) for options in ({}, {"overlaps": "average"}, {"overlaps": "swap"})
    )
    assert torch.equal(average, plain)
    assert relative_error(swap, plain) > 1e-5
    for i, prompt in enumerate(PROMPTS):
        alone = latents(tiny_model, prompt, method=method, overlaps="swap", seed=RUN["seed"] + i)
        assert relative_error(swap[i], alone[0]) < 1e-4
    settings = cutdiff.Settings(method=method, overlaps="swap", **{**RUN, "height": 128})
    record = cutdiff.generate(tiny_model, PROMPTS[0], settings).record
    planned = walk(
        sized(SDXL._replace(network=tiny_model.unet.config, vae=tiny_model.vae.config), tiny_model.dtype), settings
    )
    assert sum(stage.total.evaluations for stage in planned.stages) == record["network_evaluations"]


def test_a_run_with_a_swap_is_that_of_the_operator(tiny_model: Model) -> None:
    def by_hand(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            origins = run.draws.view_origins(step, run.size, run.window, (4, 4), (0, 0))
            corners = {"crop_origins": origins.flatten(0, 1), "original_size": run.size, "target_size": run.window}
            swapped = Swapped(origins, run.window, run.size)
            items = swapped.gather(x)
            return swapped.scatter(run.denoiser(items, sigma, step, **corners))

        return [Stage("views", range(run.num_steps), denoise)]

    ours = latents(tiny_model, method="multidiffusion", overlaps="swap")
    assert relative_error(ours, latents(tiny_model, method=by_hand)) < 1e-4


def test_weights_and_a_swap_exclude_one_another(tiny_model: Model) -> None:
    words = r"^view_weights='cosine' weigh an average, and overlaps='swap' takes none: leave one out"
    with pytest.raises(ValueError, match=words):
        cutdiff.Settings(method="magnify", overlaps="swap", view_weights="cosine")

    def by_hand(run: Run) -> list[Stage]:
        method = MultiDiffusion(overlaps="swap")
        return [Stage("", range(run.num_steps), method.on_views(run, weights=torch.ones(run.window)))]

    with pytest.raises(ValueError, match=r"^weights of views weigh an average, and overlaps='swap' takes none"):
        latents(tiny_model, method=by_hand)
