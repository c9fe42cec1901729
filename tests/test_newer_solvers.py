"""Heun, DPM-Solver++ with fresh noise, UniPC and LCM: step by step against what is published, and their orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import drawing, in_float64, published_dpmpp_2m, published_heun, published_lcm, published_unipc
from test_solvers import (
    MODEL,
    NOISE,
    PREDICTIONS,
    SHAPE,
    TOLERANCE,
    ZERO_SNR,
    Trajectory,
    assert_same,
    estimate,
    fresh_noise,
    in_vp,
    no_noise,
    solve_ours,
    walked,
)
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sampling.draws import Draws, solver_noise
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import Karras, Listed, Schedule, SigmaSchedule, lcm_schedule, make_schedule
from cutdiff.sampling.solvers import LCM, DPMpp2M, DPMpp2MSDE, DPMppSDE, Heun, Solver, UniPC, finished
from cutdiff.sampling.stages import NotFinite, Stage, solve
from cutdiff.specs import SOLVERS, resolve

SIGMAS = pytest.mark.parametrize("sigmas", [MODEL, Karras()], ids=["plain", "karras"])
LENGTHS = (1, 2, 3, 7, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")


def configs(prediction_type: str, zero_snr: bool) -> list[tuple[NoiseConfig, int]]:
    """Models of each spacing, and numbers of steps."""
    base = NoiseConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    return [(replace(base, timestep_spacing=spacing), n) for spacing, n in itertools.product(SPACINGS, LENGTHS)]


# ---- Against the published schedulers, ours in float32 and theirs in float64 (`in_float64` says why)


@PREDICTIONS
@ZERO_SNR
@SIGMAS
def test_heun_goes_where_the_published_one_goes(prediction_type: str, zero_snr: bool, sigmas: SigmaSchedule) -> None:
    for config, num_steps in configs(prediction_type, zero_snr):
        schedule, steps = solve_ours(config, Heun(), num_steps, NOISE[:0], sigmas)
        start = NOISE * schedule.init_scale
        with in_float64():
            states = walked(published_heun(config, schedule), start.double())
        latents = [*states[1:-1:2], states[-1]]  # it counts both halves of a step, of which the last has one
        assert_same(
            Trajectory(start, [step.latents for step in steps]), Trajectory(start, latents), (config, num_steps)
        )


@PREDICTIONS
@ZERO_SNR
@SIGMAS
def test_unipc_goes_where_the_published_one_goes(prediction_type: str, zero_snr: bool, sigmas: SigmaSchedule) -> None:
    for config, num_steps in configs(prediction_type, zero_snr):
        schedule, steps = solve_ours(config, UniPC(), num_steps, NOISE[:0], sigmas)
        ours = in_vp(schedule, steps)
        with in_float64():
            scheduler = published_unipc(config, schedule)
            assert (scheduler.config.solver_order, scheduler.config.solver_type) == (2, "bh2")
            latents = walked(scheduler, ours.start.double())
        assert_same(ours, Trajectory(ours.start, latents), (config, num_steps))


@PREDICTIONS
@ZERO_SNR
@SIGMAS
def test_dpmpp_2m_sde_goes_where_the_published_one_goes(
    prediction_type: str, zero_snr: bool, sigmas: SigmaSchedule
) -> None:
    for config, num_steps in configs(prediction_type, zero_snr):
        fresh = fresh_noise(num_steps)
        schedule, steps = solve_ours(config, DPMpp2MSDE(), num_steps, fresh, sigmas)
        ours = in_vp(schedule, steps)
        with in_float64(), drawing(fresh):
            latents = walked(published_dpmpp_2m(config, schedule, "sde-dpmsolver++"), ours.start.double())
        assert_same(ours, Trajectory(ours.start, latents), (config, num_steps))


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 13, 50])
def test_lcm_goes_where_the_published_one_goes(prediction_type: str, zero_snr: bool, num_steps: int) -> None:
    """On its own timesteps. Its share of x, which ours leaves out, is below the tolerance."""
    config, fresh = (
        NoiseConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr),
        fresh_noise(num_steps),
    )
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("the published one divides by an alpha of 0")
    schedule, steps = solve_ours(config, LCM(), num_steps, fresh)
    ours = in_vp(schedule, steps)
    with in_float64(), drawing(fresh):
        scheduler = published_lcm(config)
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == [*schedule.timesteps]
        latents = walked(scheduler, NOISE.double() * scheduler.init_noise_sigma)
    assert_same(ours, Trajectory(NOISE, latents), num_steps)


@pytest.mark.parametrize("timesteps", [1000, 777, 50])
def test_lcm_picks_the_published_timesteps_at_every_length(timesteps: int) -> None:
    config = NoiseConfig(num_train_timesteps=timesteps)
    scheduler = published_lcm(config)
    for num_steps in range(1, 51):
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == [*lcm_schedule(config, num_steps).timesteps]


# ---- Against k-diffusion's formulas, which are written here in its terms


def k_diffusion_sde(
    x: Tensor, sigmas: tuple[float, ...], model: Callable[[Tensor, float], Tensor], eta: float, paths: list[Any]
) -> list[Tensor]:
    """`sample_dpmpp_sde` at r = 1/2, in t = -log sigma; `paths[i]` is a Brownian path's W at three sigmas of step i."""
    states = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, sigma)
        if sigma_next == 0:
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
        else:
            t, t_next = -math.log(sigma), -math.log(sigma_next)
            s = t + (t_next - t) / 2
            w = paths[i]

            def ancestral(high: float, low: float) -> tuple[float, float]:
                up = min(low, eta * math.sqrt(low**2 * (high**2 - low**2) / high**2))
                return math.sqrt(low**2 - up**2), up

            down, up = ancestral(math.exp(-t), math.exp(-s))
            s_ = -math.log(down) if down else math.inf
            x_2 = math.exp(-s_) / math.exp(-t) * x - math.expm1(t - s_) * denoised
            x_2 = x_2 + (w[1] - w[0]) / math.sqrt(sigma - math.exp(-s)) * up
            denoised_2 = model(x_2, math.exp(-s))
            down, up = ancestral(math.exp(-t), math.exp(-t_next))
            t_next_ = -math.log(down)
            x = math.exp(-t_next_) / math.exp(-t) * x - math.expm1(t - t_next_) * denoised_2
            x = x + (w[2] - w[0]) / math.sqrt(sigma - sigma_next) * up
        states.append(x)
    return states


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@PREDICTIONS
@SIGMAS
@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_dpmpp_sde_goes_where_k_diffusion_goes(
    eta: float, prediction_type: str, sigmas: SigmaSchedule, num_steps: int
) -> None:
    config = NoiseConfig(prediction_type=prediction_type)
    fresh = torch.randn((num_steps, 2, *SHAPE), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    schedule = make_schedule(sigmas, DPMppSDE(), config, num_steps)

    def model(x: Tensor, sigma: float) -> Tensor:
        return estimate(x, sigma, schedule.timestep(sigma), prediction_type)

    paths = []
    for i, (high, low) in enumerate(itertools.pairwise(schedule.sigmas[:-1])):
        middle = math.sqrt(high * low)
        first = math.sqrt(high - middle) * fresh[i, 0]
        paths.append([0.0, first, first + math.sqrt(middle - low) * fresh[i, 1]])
    start = NOISE * schedule.init_scale
    stages = [Stage("all", range(num_steps), lambda x, sigma, i: model(x, sigma))]
    noise = lambda shape, i, part=0: fresh[i, part]  # noqa: E731
    steps = list(solve(stages, start, schedule, DPMppSDE(eta), noise))
    theirs = k_diffusion_sde(start.double(), schedule.sigmas, model, eta, paths)
    assert_same(Trajectory(start, [step.latents for step in steps]), Trajectory(start, theirs), num_steps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_dpmpp_2m_sde_goes_where_k_diffusion_goes(eta: float) -> None:
    """`sample_dpmpp_2m_sde` with the midpoint, for shares of noise that diffusers has not."""
    config, fresh = NoiseConfig(), fresh_noise(9).double()
    schedule, steps = solve_ours(config, DPMpp2MSDE(eta), 9, fresh, Karras())
    x, old, h_last = (NOISE * schedule.init_scale).double(), None, 0.0
    for step, (sigma, sigma_next) in zip(steps, itertools.pairwise(schedule.sigmas), strict=True):
        denoised = estimate(x, sigma, schedule.timestep(sigma), "epsilon")
        if sigma_next == 0:
            x = denoised
        else:
            h = math.log(sigma) - math.log(sigma_next)
            eta_h = eta * h
            x = sigma_next / sigma * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * denoised
            if old is not None:
                x = x - 0.5 * math.expm1(-h - eta_h) * (h / h_last) * (denoised - old)
            if eta:
                x = x + fresh[step.index] * sigma_next * math.sqrt(-math.expm1(-2 * eta_h))
            old, h_last = denoised, h
        assert ((step.latents - x).norm() / x.norm()).item() < TOLERANCE


def test_dpmpp_2m_is_its_stochastic_form_without_noise() -> None:
    plain, without = (solve_ours(NoiseConfig(), s, 8, NOISE[:0])[1] for s in (DPMpp2M(), DPMpp2MSDE(eta=0.0)))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, without, strict=True))


# ---- Properties

QUIET = ("euler", "ddim", "heun", "dpmpp_2m", "unipc", "dpmpp_2m_sde,eta=0", "dpmpp_sde,eta=0", "euler_ancestral,eta=0")
"""The solvers without fresh noise."""
ORDERS = {
    "euler": 1,
    "ddim": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "unipc": 3,  # a corrector adds one to the order of the predictor
    "dpmpp_2m_sde,eta=0": 2,
    "dpmpp_sde,eta=0": 2,
}


@pytest.mark.parametrize("spec", QUIET)
@settings(max_examples=25)
@given(st.lists(st.floats(0.03, 300), min_size=1, max_size=12, unique_by=lambda s: round(math.log(s), 2)))
def test_a_solver_without_noise_is_exact_where_the_estimate_is_constant(spec: str, sigmas: list[float]) -> None:
    """The state then lies on the line from the start to the estimate, whatever the sigmas."""
    falling = (*sorted(sigmas, reverse=True), 0.0)
    schedule = make_schedule(Listed(falling), resolve("solver", spec), NoiseConfig(), len(sigmas))
    start, target = NOISE.double() * falling[0], NOISE.double().flip(0)
    stages = [Stage("all", range(len(sigmas)), lambda x, sigma, i: target)]
    for step in solve(stages, start, schedule, resolve("solver", spec), no_noise):
        share = falling[step.index + 1] / falling[0]
        torch.testing.assert_close(step.latents, target + share * (start - target), rtol=1e-9, atol=1e-9)


def error_on_gaussian(spec: str, num_steps: int) -> float:
    """The error on x0 = mean + deviation·normal, whose estimate is known and whose path is
    x(sigma) = mean + (x(sigma_0) - mean)·sqrt((sigma² + deviation²) / (sigma_0² + deviation²)), in even steps of log
    sigma from 10 to 0.1, before a last one to 0."""
    mean, deviation, high, low = 0.7, 0.6, 10.0, 0.1
    sigmas = (*np.exp(np.linspace(math.log(high), math.log(low), num_steps + 1)).tolist(), 0.0)
    schedule = make_schedule(Listed(sigmas), resolve("solver", spec), NoiseConfig(), num_steps + 1)

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        return mean + (x - mean) * deviation**2 / (deviation**2 + sigma**2)

    start = NOISE.double() * high
    stages = [Stage("all", range(num_steps + 1), denoise)]
    states = [step.latents for step in solve(stages, start, schedule, resolve("solver", spec), no_noise)]
    exact = mean + (start - mean) * math.sqrt((low**2 + deviation**2) / (high**2 + deviation**2))
    return float((states[-2] - exact).norm() / exact.norm())


@pytest.mark.parametrize("spec", ORDERS)
def test_the_error_falls_with_the_order_of_the_solver(spec: str) -> None:
    lengths = (40, 80, 160, 320)
    errors = [error_on_gaussian(spec, n) for n in lengths]
    slope = -np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDERS[spec], abs=0.2), errors


def test_unipc_keeps_what_a_method_does_to_the_state_between_two_steps() -> None:
    """Its correction is added, so that the state moves as far as `before` moved it."""
    schedule, push = make_schedule(MODEL, UniPC(), NoiseConfig(), 6), 0.5

    def last(*moves: int) -> Tensor:
        stage = Stage(
            "all",
            range(6),
            lambda x, sigma, i: NOISE.double() * (1 + 0.1 * i),
            before=lambda x, sigma, i: x + push if i in moves else x,
        )
        *_, step, _ = solve([stage], NOISE.double() * schedule.init_scale, schedule, UniPC(), no_noise)
        return step.latents

    moved = last(3) - last()
    torch.testing.assert_close(moved, torch.full_like(moved, push * schedule.sigmas[5] / schedule.sigmas[3]))


# ---- Noise


@given(st.integers(0, 2**63), st.integers(0, 2000))
@settings(max_examples=25)
def test_a_second_noise_of_a_step_is_another_stream(seed: int, step: int) -> None:
    draws, shape = Draws((seed, 7)), (2, 4, 8, 8)
    first, second = (solver_noise(draws, shape, step, part) for part in (0, 1))
    assert torch.equal(first, draws.noise(shape, step))
    assert torch.equal(second[1], Draws((7,)).second_noise((1, *shape[1:]), step)[0])
    others = [draws.noise(shape), draws.noise(shape, step + 1), draws.phase_noise(shape, 1 + step), first]
    assert all(abs(torch.corrcoef(torch.stack([second.flatten(), x.flatten()]))[0, 1]) < 0.35 for x in others)


def test_the_noise_of_dpmpp_sde_is_one_path() -> None:
    """The increment of a step has a variance of one, and that of its first part has its share in it."""
    given_noises = {0: torch.full((1,), 1.0), 1: torch.full((1,), 0.0)}
    zero, schedule = torch.zeros(1), make_schedule(Listed((9.0, 4.0, 0.0)), DPMppSDE(), NoiseConfig(), 2)

    def moved() -> tuple[float, float]:
        take = DPMppSDE().start(schedule, lambda shape, i, part=0: given_noises[part])
        states: list[Tensor] = []
        last = finished(take(zero, zero, 0), lambda x, sigma: states.append(x) or zero)
        return float(states[0]), float(last)

    up = [low * math.sqrt(1 - (low / 9) ** 2) for low in (6.0, 4.0)]
    assert moved() == pytest.approx((up[0], up[1] * math.sqrt(3 / 5)))
    given_noises = {0: torch.zeros(1), 1: torch.ones(1)}
    assert moved() == pytest.approx((0.0, up[1] * math.sqrt(2 / 5)))


# ---- Second estimates in the loop


class Twice:
    """A solver of one's own that asks for one more estimate in every step."""

    def __init__(self, ask: Callable[[Tensor, float], Any] = lambda x, sigma: (x / 2, sigma / 2)) -> None:
        self.ask = ask

    def start(self, schedule: Schedule, noise: Any) -> Any:
        def step(x: Tensor, denoised: Tensor, i: int) -> Any:
            again = yield self.ask(x, schedule.sigmas[i])
            return (denoised + again) / 2

        return step


def stage(denoise: Any, **options: Any) -> list[Stage]:
    return [Stage("mine", range(3), denoise, **options)]


def steps_of(solver: Solver, denoise: Any, **options: Any) -> list[Any]:
    schedule = make_schedule(Listed((4.0, 2.0, 1.0, 0.0)), solver, NoiseConfig(), 3)
    return list(solve(stage(denoise, **options), NOISE, schedule, solver, no_noise))


def test_a_second_estimate_is_one_of_the_same_step() -> None:
    called: list[tuple[Tensor, float, int]] = []
    befores: list[int] = []

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        called.append((x, sigma, i))
        return x * sigma

    steps = steps_of(Twice(), denoise, before=lambda x, sigma, i: befores.append(i) or x)
    assert [(sigma, i) for _, sigma, i in called] == [(4, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0.5, 2)]
    assert befores == [0, 1, 2]
    assert torch.equal(called[1][0], NOISE / 2)
    assert torch.equal(steps[0].denoised, NOISE * 4)
    assert torch.equal(steps[0].latents, (NOISE * 4 + NOISE) / 2)


def test_a_second_estimate_that_is_not_finite_is_named() -> None:
    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        return x * math.nan if (sigma, i) == (1, 1) else x

    with pytest.raises(NotFinite, match=r"^step 1 \(mine, sigma 1\) gave NaN or infinity$") as error:
        steps_of(Twice(), denoise)
    assert error.value.sigma == 1.0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda x, sigma: x, r"^the solver yields Tensor where \(x, sigma\) is needed$"),
        (lambda x, sigma: (x[:1], sigma), r"^the solver gave \(1, 4, 5, 3\) for a canvas of \(2, 4, 5, 3\)$"),
        (lambda x, sigma: (None, sigma), r"^the solver gave NoneType for a canvas of"),
    ],
)
def test_a_solver_that_asks_for_no_estimate(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(Twice(asked), lambda x, sigma, i: x)


# ---- What cannot be


ONE_STEP = {name for name in SOLVERS if hasattr(resolve("solver", name), "check_schedule")}


def no_work(tiny_model: Model, **options: Any) -> Any:
    """The run before its first step; no network is called."""
    return cutdiff.denoise(tiny_model, "a red house", method="direct", **{"num_steps": 3, **options})


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_for_solvers_of_first_order(tiny_model: Model, solver: str) -> None:
    assert {"heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"} == ONE_STEP
    if solver not in ONE_STEP:
        no_work(tiny_model, solver=solver, num_steps=1)
        return
    with pytest.raises(
        ValueError, match=f"^num_steps=1 leaves {solver} the step to sigma 0 alone, which is Euler's: gi"
    ):
        no_work(tiny_model, solver=solver, num_steps=1)


def test_heun_cannot_begin_at_an_infinite_sigma(tiny_model: Model) -> None:
    zero_snr = NoiseConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    model = replace(tiny_model, noise=zero_snr)
    with pytest.raises(ValueError, match=r"^solver=heun cannot step from sigma 4096, which stands for the infinite"):
        no_work(model, solver="heun", num_steps=10)
    no_work(model, solver="heun", num_steps=10, schedule="karras")
    no_work(model, solver="heun", num_steps=50)
    for other in SOLVERS:
        if other != "heun":
            no_work(model, solver=other, num_steps=10)


@pytest.mark.parametrize("num_steps", [0, 51, 1000])
def test_lcm_has_so_many_steps_on_its_own_schedule(tiny_model: Model, num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"^num_steps={num_steps} must be "):
        no_work(tiny_model, solver="lcm", num_steps=num_steps)
    if num_steps:
        no_work(tiny_model, solver="lcm", num_steps=num_steps, schedule="trailing")
