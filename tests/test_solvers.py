"""Whole trajectories against the published schedulers, and the properties of every step and of the loop over them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published import drawing, in_float64, published_ancestral, published_ddim, published_dpmpp_2m, published_euler
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import BETA_SCHEDULES, NoiseConfig
from cutdiff.sampling.operators import average, views
from cutdiff.sampling.schedules import (
    Karras,
    ModelSchedule,
    Schedule,
    SigmaSchedule,
    ddim_schedule,
    euler_schedule,
    make_schedule,
)
from cutdiff.sampling.solvers import (
    DDIM,
    DPMpp2M,
    Euler,
    EulerAncestral,
    Solver,
    adds_noise,
    euler_step,
    finished,
    noise_scale,
    noisy_step,
)
from cutdiff.sampling.stages import Phase, Stage, Step, solve
from cutdiff.settings import Settings
from cutdiff.specs import SOLVERS, resolve

# The published Euler turns tensors into arrays in a way that numpy 2 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 5, 3)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2
TOLERANCE = 1e-5
MODEL = ModelSchedule()

PREDICTIONS = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
ZERO_SNR = pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero-snr"])
# The offset matters to "leading" alone.
SPACINGS = pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 1)]
)


def network(x: Tensor, timestep: float) -> Tensor:
    """A stand-in for a U-Net: smooth, not linear, mixing channels, and depending on the timestep."""
    return torch.einsum("ij,bjhw->bihw", MIX.to(x), torch.tanh(x)) + 0.3 * x + math.sin(timestep / 200)


def estimate(x: Tensor, sigma: float, timestep: float, prediction_type: str) -> Tensor:
    """The network's estimate of x0, as it is defined in sigma space."""
    prediction = network(x / math.sqrt(sigma**2 + 1), timestep)
    if prediction_type == "epsilon":
        return x - sigma * prediction
    return x / (sigma**2 + 1) - prediction * sigma / math.sqrt(sigma**2 + 1)


class Trajectory(NamedTuple):
    """The latents after each step, in the state that the next step's network reads: VP, or sigma space for Euler."""

    start: Tensor
    latents: list[Tensor]


def solve_ours(
    config: NoiseConfig, solver: Solver, num_steps: int, fresh: Tensor, sigmas: SigmaSchedule = MODEL
) -> tuple[Schedule, list[Step]]:
    schedule = make_schedule(sigmas, solver, config, num_steps)

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        return estimate(x, sigma, schedule.timestep(sigma), config.prediction_type)

    stages = [Stage("all", range(num_steps), denoise)]
    return schedule, list(solve(stages, NOISE * schedule.init_scale, schedule, solver, lambda shape, i: fresh[i]))


def ours_euler(config: NoiseConfig, num_steps: int) -> Trajectory:
    schedule, steps = solve_ours(config, Euler(), num_steps, NOISE[:0])
    return Trajectory(NOISE * schedule.init_scale, [step.latents for step in steps])


def theirs_euler(config: NoiseConfig, num_steps: int, dtype: torch.dtype) -> Trajectory:
    scheduler = published_euler(config)
    scheduler.set_timesteps(num_steps)
    start = NOISE.to(dtype) * scheduler.init_noise_sigma
    return Trajectory(start, walked(scheduler, start, num_steps))


def walked(scheduler: Any, start: Tensor, num_steps: int | None = None) -> list[Tensor]:
    """The states after each of the steps of a published scheduler, all of them or the first."""
    x, latents = start, []
    for t in scheduler.timesteps[:num_steps]:
        prediction = network(scheduler.scale_model_input(x, t), t.item())
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
        latents.append(x)
    return latents


def in_vp(schedule: Schedule, steps: list[Step]) -> Trajectory:
    """Our states over sqrt(1 + sigma²), which are those of the published DDIM and DPM-Solver++."""
    latents = [step.latents / math.sqrt(1 + schedule.sigmas[step.index + 1] ** 2) for step in steps]
    return Trajectory(NOISE * schedule.init_scale / math.sqrt(1 + schedule.sigmas[0] ** 2), latents)


def ours_ddim(config: NoiseConfig, num_steps: int, eta: float, fresh: Tensor) -> Trajectory:
    schedule, steps = solve_ours(config, DDIM(eta), num_steps, fresh)
    return in_vp(schedule, steps)


def theirs_ddim(config: NoiseConfig, num_steps: int, eta: float, fresh: Tensor, dtype: torch.dtype) -> Trajectory:
    scheduler = published_ddim(config)
    scheduler.set_timesteps(num_steps)
    x = start = NOISE.to(dtype) * scheduler.init_noise_sigma
    latents = []
    for i, t in enumerate(scheduler.timesteps[:num_steps].tolist()):
        noise = fresh[i].to(dtype) if eta else None
        x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        latents.append(x)
    return Trajectory(start, latents)


def assert_same(ours: Trajectory, theirs: Trajectory, case: object) -> None:
    assert len(ours.latents) == len(theirs.latents)
    for i, (a, b) in enumerate(zip((ours.start, *ours.latents), (theirs.start, *theirs.latents), strict=True)):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= TOLERANCE, f"{case}: relative error {error:.1e} after {i} steps"


def fresh_noise(num_steps: int) -> Tensor:
    return torch.randn((num_steps, *SHAPE), generator=torch.Generator().manual_seed(2))


@PREDICTIONS
@ZERO_SNR
@SPACINGS
def test_euler_goes_where_the_published_one_goes(
    prediction_type: str, zero_snr: bool, spacing: str, offset: int
) -> None:
    """Every step of ours in float32 against theirs computed in float64 (`in_float64` says why)."""
    base = NoiseConfig(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    for beta_schedule, karras, num_steps in itertools.product(BETA_SCHEDULES, (False, True), (1, 2, 7, 20, 50)):
        config = replace(base, beta_schedule=beta_schedule, use_karras_sigmas=karras)
        with in_float64():
            theirs = theirs_euler(config, num_steps, torch.float64)
        assert_same(ours_euler(config, num_steps), theirs, (config, num_steps))


@PREDICTIONS
@ZERO_SNR
@SPACINGS
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_goes_where_the_published_one_goes(
    prediction_type: str, zero_snr: bool, spacing: str, offset: int, set_alpha_to_one: bool
) -> None:
    """Every step of ours in float32 against theirs computed in float64 (`in_float64` says why)."""
    base = NoiseConfig(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=set_alpha_to_one,
    )
    for beta_schedule, num_steps, eta in itertools.product(BETA_SCHEDULES, (1, 2, 7, 30), (0.0, 0.5, 1.0)):
        config, fresh = replace(base, beta_schedule=beta_schedule), fresh_noise(num_steps)
        if begins_without_signal(config, num_steps):
            if prediction_type == "epsilon":
                continue  # they divide by alpha = 0; see the test below
            # At eta = 1 their direction is the root of a difference that is exactly 0, NaN where rounding makes it < 0.
            eta = min(eta, 0.99)
        with in_float64():
            theirs = theirs_ddim(config, num_steps, eta, fresh, torch.float64)
        assert_same(ours_ddim(config, num_steps, eta, fresh), theirs, (config, num_steps, eta))


def begins_without_signal(config: NoiseConfig, num_steps: int) -> bool:
    """Tell whether the first step reads the last timestep and that has a signal-to-noise ratio of zero."""
    first = ddim_schedule(config, num_steps).timesteps[0]
    return config.rescale_betas_zero_snr and first == config.num_train_timesteps - 1


@PREDICTIONS
@ZERO_SNR
@pytest.mark.parametrize("sigmas", [MODEL, Karras()], ids=["plain", "karras"])
def test_dpmpp_2m_goes_where_the_published_one_goes(
    prediction_type: str, zero_snr: bool, sigmas: SigmaSchedule
) -> None:
    """Every step of ours in float32 against theirs computed in float64; both end with a step of first order."""
    base = NoiseConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    for spacing, num_steps in itertools.product(("leading", "trailing"), (1, 2, 3, 7, 20, 50)):
        config = replace(base, timestep_spacing=spacing)
        schedule, steps = solve_ours(config, DPMpp2M(), num_steps, NOISE[:0], sigmas)
        ours = in_vp(schedule, steps)
        with in_float64():
            latents = walked(published_dpmpp_2m(config, schedule), ours.start.double())
        assert_same(ours, Trajectory(ours.start, latents), (config, num_steps))


@PREDICTIONS
@ZERO_SNR
@pytest.mark.parametrize("sigmas", [MODEL, Karras()], ids=["plain", "karras"])
def test_the_ancestral_solver_goes_where_the_published_one_goes(
    prediction_type: str, zero_snr: bool, sigmas: SigmaSchedule
) -> None:
    """Every step of ours in float32 against theirs computed in float64, with the same noise."""
    base = NoiseConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    for spacing, num_steps in itertools.product(("leading", "trailing"), (1, 2, 7, 20, 50)):
        config, fresh = replace(base, timestep_spacing=spacing), fresh_noise(num_steps)
        schedule, steps = solve_ours(config, EulerAncestral(), num_steps, fresh, sigmas)
        with in_float64(), drawing(fresh):
            scheduler = published_ancestral(config, schedule)
            start = NOISE.double() * scheduler.init_noise_sigma
            latents = walked(scheduler, start)
        ours = Trajectory(NOISE * schedule.init_scale, [step.latents for step in steps])
        assert_same(ours, Trajectory(start, latents), (config, num_steps))


@PREDICTIONS
@SPACINGS
@pytest.mark.parametrize("num_steps", [20, 50])
def test_solvers_go_where_the_published_ones_go_as_shipped(
    prediction_type: str, spacing: str, offset: int, num_steps: int
) -> None:
    """SDXL's betas and usual lengths: the published schedulers' own float32 is good enough to compare with."""
    base = NoiseConfig(prediction_type=prediction_type, timestep_spacing=spacing, steps_offset=offset)
    for zero_snr, karras in itertools.product((False, True), (False, True)):
        config = replace(base, rescale_betas_zero_snr=zero_snr, use_karras_sigmas=karras)
        theirs = theirs_euler(config, num_steps, torch.float32)
        assert_same(ours_euler(config, num_steps), theirs, (config, num_steps))
    fresh = fresh_noise(num_steps)
    for set_alpha_to_one, eta in itertools.product((False, True), (0.0, 0.5, 1.0)):
        config = replace(base, set_alpha_to_one=set_alpha_to_one)
        theirs = theirs_ddim(config, num_steps, eta, fresh, torch.float32)
        assert_same(ours_ddim(config, num_steps, eta, fresh), theirs, (config, num_steps, eta))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_long_runs_do_not_drift(spacing: str) -> None:
    config, num_steps = NoiseConfig(timestep_spacing=spacing), 999
    with in_float64():
        euler = theirs_euler(config, num_steps, torch.float64)
        ddim = theirs_ddim(config, num_steps, 0.0, NOISE[:0], torch.float64)
    assert_same(ours_euler(config, num_steps), euler, spacing)
    assert_same(ours_ddim(config, num_steps, 0.0, NOISE[:0]), ddim, spacing)


def test_ddim_stays_finite_where_the_published_one_divides_by_zero() -> None:
    config = NoiseConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    fresh = fresh_noise(10)
    assert not theirs_ddim(config, 10, 0.0, fresh, torch.float32).latents[-1].isfinite().any()
    assert ours_ddim(config, 10, 0.0, fresh).latents[-1].isfinite().all()


def test_ddim_without_eta_is_euler_on_the_same_timesteps() -> None:
    """Spacing "leading" fits DDIM's stride; alpha one makes both end at sigma 0."""
    config = NoiseConfig(set_alpha_to_one=True, steps_offset=0)
    euler, ddim = (make_schedule(MODEL, solver, config, 20) for solver in (Euler(), DDIM()))
    assert euler.timesteps == ddim.timesteps
    np.testing.assert_allclose(euler.sigmas, ddim.sigmas, rtol=1e-12)
    np.testing.assert_allclose(euler.targets, ddim.targets, rtol=1e-12)
    assert all(ddim.rescale(i) == 1 for i in range(20))


def no_noise(shape: tuple[int, ...], step: int) -> Tensor:
    raise AssertionError(f"noise of step {step} was asked for")


sigmas = st.floats(1e-2, 1e3)
fractions = st.floats(0, 1)
weights = st.floats(-3, 3)


def randn(seed: int, count: int) -> list[Tensor]:
    """Standard normal tensors in float64, so that exact properties hold to 1e-12."""
    return list(torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(st.integers(0, 2**32), sigmas, fractions, weights)
def test_a_step_is_affine_in_denoised(seed: int, sigma: float, fraction: float, weight: float) -> None:
    """Averaging estimates and stepping once therefore equals stepping each and averaging."""
    x, a, b = randn(seed, 3)
    target = sigma * fraction
    mixed = euler_step(x, weight * a + (1 - weight) * b, sigma, target)
    apart = weight * euler_step(x, a, sigma, target) + (1 - weight) * euler_step(x, b, sigma, target)
    torch.testing.assert_close(mixed, apart, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), sigmas, fractions)
def test_a_step_keeps_x0_and_noise_where_denoised_is_true(seed: int, sigma: float, fraction: float) -> None:
    x0, noise = randn(seed, 2)
    target = sigma * fraction
    torch.testing.assert_close(
        euler_step(x0 + sigma * noise, x0, sigma, target), x0 + target * noise, rtol=1e-9, atol=1e-9
    )


@given(st.integers(0, 2**32), sigmas, fractions, fractions)
def test_two_steps_along_one_line_are_one(seed: int, sigma: float, first: float, second: float) -> None:
    x, denoised = randn(seed, 2)
    middle = sigma * max(first, second, 1e-3)
    target = sigma * min(first, second)
    twice = euler_step(euler_step(x, denoised, sigma, middle), denoised, middle, target)
    torch.testing.assert_close(twice, euler_step(x, denoised, sigma, target), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), sigmas, fractions)
def test_a_step_to_zero_returns_denoised_to_the_bit(seed: int, sigma: float, eta: float) -> None:
    x, denoised = (tensor.float() for tensor in randn(seed, 2))
    assert torch.equal(euler_step(x, denoised, sigma, 0.0), denoised)
    assert torch.equal(noisy_step(x, denoised, sigma, 0.0, eta, no_noise, 0), denoised)


@given(sigmas, fractions, fractions)
def test_fresh_noise_has_the_deviation_of_ddim_equation_16(sigma: float, fraction: float, eta: float) -> None:
    target = sigma * fraction
    alpha, alpha_next = 1 / (1 + sigma**2), 1 / (1 + target**2)
    published = eta * math.sqrt((1 - alpha_next) / (1 - alpha)) * math.sqrt(max(0.0, 1 - alpha / alpha_next))
    # Theirs is added to the VP state, which is ours over sqrt(1 + target²).
    assert noise_scale(sigma, target, eta) == pytest.approx(published * math.sqrt(1 + target**2), rel=1e-6, abs=1e-9)


@given(st.integers(0, 2**32), sigmas, fractions, fractions)
def test_eta_trades_old_noise_for_fresh_and_keeps_the_variance(
    seed: int, sigma: float, fraction: float, eta: float
) -> None:
    x0, old, fresh = randn(seed, 3)
    target = sigma * fraction
    x = noisy_step(x0 + sigma * old, x0, sigma, target, eta, lambda shape, step: fresh, 0)
    up = noise_scale(sigma, target, eta)
    assert up <= target
    kept = math.sqrt(max(0.0, target**2 - up**2))
    torch.testing.assert_close(x, x0 + kept * old + up * fresh, rtol=1e-9, atol=1e-9)


def test_a_step_changes_none_of_its_arguments() -> None:
    tensors = randn(0, 3)
    before = [tensor.clone() for tensor in tensors]
    x, denoised, noise = tensors
    schedule = make_schedule(resolve("schedule", [2.0, 1.0, 0.0]), Euler(), NoiseConfig(), 2)
    for solver in (*(resolve("solver", name) for name in SOLVERS), DDIM(0.7)):
        take = solver.start(schedule, lambda shape, step, part=0: noise)
        for i in range(2):
            finished(take(x, denoised, i), lambda x, sigma: denoised)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_solver_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"solver='leapfrog' is not one of euler, ddim"):
        resolve("solver", "leapfrog")
    with pytest.raises(
        ValueError, match=r"eta=0.5 is no option of .* solver euler \(none\), .*, but of ddim, euler_ancestral"
    ):
        Settings(solver="euler", eta=0.5)
    for eta in (-0.1, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"eta={eta} must be a finite number in 0 … 1"):
            DDIM(eta)


def test_noise_is_asked_only_for_what_is_needed() -> None:
    """Neither a solver without fresh noise nor a step to sigma 0 draws any."""
    x, denoised = (tensor.float() for tensor in randn(0, 2))
    schedule = make_schedule(resolve("schedule", [2.0, 1.0, 0.0]), Euler(), NoiseConfig(), 2)
    noisy = {"ddim,eta=0.5", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm"}
    quiet = {name for name in SOLVERS if name not in noisy}
    quiet |= {"euler_ancestral,eta=0", "dpmpp_2m_sde,eta=0", "dpmpp_sde,eta=0"}
    for names, adds in ((noisy, True), (quiet, False)):
        assert all(adds_noise(resolve("solver", name), schedule) is adds for name in names)
    for solver in quiet:
        take = resolve("solver", solver).start(schedule, no_noise)
        for i in range(2):
            finished(take(x, denoised, i), lambda x, sigma: denoised)
    for solver in noisy:
        take = resolve("solver", solver).start(schedule, no_noise)
        assert torch.equal(finished(take(x, denoised, 1), lambda x, sigma: x), denoised)
        with pytest.raises(AssertionError, match="was asked for"):
            finished(take(x, denoised, 0), lambda x, sigma: denoised)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum), st.sampled_from([0.0, 0.5]))
def test_solve_yields_every_step_of_every_stage_in_order(lengths: list[int], eta: float) -> None:
    num_steps = sum(lengths)
    ends = list(itertools.accumulate(lengths))
    solver = DDIM(eta)
    schedule = ddim_schedule(NoiseConfig(), num_steps)
    calls, asked = [], []

    def stage(name: str, start: int, stop: int) -> Stage:
        def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
            calls.append((name, sigma, i))
            return 0.5 * x

        return Stage(name, range(start, stop), denoise)

    def noise(shape: tuple[int, ...], i: int) -> Tensor:
        asked.append(i)
        return NOISE

    names = [f"stage {k}" for k in range(len(lengths))]
    stages = [stage(name, end - length, end) for name, end, length in zip(names, ends, lengths, strict=True)]
    steps = list(solve(stages, NOISE * schedule.init_scale, schedule, solver, noise))

    expected = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    assert [(step.stage, step.sigma, step.index) for step in steps] == calls
    assert [step.stage for step in steps] == expected
    assert [step.index for step in steps] == list(range(num_steps))
    assert [step.sigma for step in steps] == list(schedule.sigmas[:-1])
    assert asked == (list(range(num_steps)) if eta else [])


def test_solve_takes_a_step_only_when_it_is_asked_for() -> None:
    """A caller can stop, or look at each step before the next is computed."""
    calls = []

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        calls.append(i)
        return torch.zeros_like(x)

    solver = Euler()
    schedule = euler_schedule(NoiseConfig(), 5)
    steps = solve([Stage("all", range(5), denoise)], NOISE, schedule, solver, lambda shape, i: NOISE)
    assert calls == []
    assert next(steps).index == 0
    assert calls == [0]
    assert next(steps).latents.dtype == torch.float32
    assert calls == [0, 1]


def test_solve_neither_changes_the_start_nor_records_gradients() -> None:
    start = NOISE.clone().requires_grad_()
    solver = Euler()
    schedule = euler_schedule(NoiseConfig(), 3)
    stages = [Stage("all", range(3), lambda x, sigma, i: 0.9 * x)]
    steps = list(solve(stages, start, schedule, solver, lambda shape, i: NOISE))
    assert torch.equal(start, NOISE)
    assert not any(step.latents.requires_grad for step in steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_phase_begins_from_what_came_before_and_goes_through_the_schedule_again(name: str) -> None:
    solver: Solver = resolve("solver", name)
    schedule = make_schedule(MODEL, solver, NoiseConfig(), 3)
    seen: list[tuple[tuple[int, ...], float, int]] = []

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        seen.append((tuple(x.shape), sigma, i))
        return 0.5 * x

    def begin(previous: Tensor) -> tuple[Tensor, Stage]:
        doubled = previous.repeat(1, 1, 2, 2)
        return doubled + 1, Stage(
            "large", range(3, 6), denoise, before=lambda x, sigma, i: x + sigma, end=lambda x: x - doubled
        )

    stages = [Stage("small", range(3), denoise), Phase(range(3, 6), (10, 6), begin)]

    def zeros(shape: tuple[int, ...], *_: int) -> Tensor:
        return torch.zeros(shape)

    steps = list(solve(stages, NOISE, schedule, solver, zeros))

    small, large = (2, 4, 5, 3), (2, 4, 10, 6)
    first = [call for k, call in enumerate(seen) if not k or call[2] != seen[k - 1][2]]
    assert first == [(large if i >= 3 else small, schedule.sigmas[i % 3], i) for i in range(6)]
    assert [step.index for step in steps] == list(range(6))
    assert [step.stage for step in steps] == ["small"] * 3 + ["large"] * 3
    x = steps[2].latents.repeat(1, 1, 2, 2) + 1
    take = solver.start(schedule, zeros)
    for i in range(3):
        x = x + schedule.sigmas[i]
        x = finished(take(x, 0.5 * x, i), lambda x, sigma: 0.5 * x)
        expected = x if i < 2 else x - steps[2].latents.repeat(1, 1, 2, 2)
        torch.testing.assert_close(steps[3 + i].latents, expected)


# ---- The memory of a multistep solver


def test_dpmpp_2m_is_exact_where_the_estimate_is_constant() -> None:
    schedule, target = euler_schedule(NoiseConfig(), 12), NOISE.flip(0)
    start = NOISE * schedule.init_scale
    steps = solve([Stage("all", range(12), lambda x, sigma, i: target)], start, schedule, DPMpp2M(), no_noise)
    for step in steps:
        share = schedule.sigmas[step.index + 1] / schedule.sigmas[0]
        torch.testing.assert_close(step.latents, target + share * (start - target), rtol=1e-5, atol=1e-5)


def second_order(x: Tensor, estimates: list[Tensor], sigmas: tuple[float, ...], i: int) -> Tensor:
    """Lu et al. 2022, algorithm 2, for alpha = 1, in float64: estimates of the steps up to i, from the first that
    counts."""
    x, *estimates = (tensor.double() for tensor in (x, *estimates))
    if sigmas[i + 1] == 0:
        return estimates[-1]
    h = math.log(sigmas[i] / sigmas[i + 1])
    estimate = estimates[-1]
    if len(estimates) > 1:
        r = math.log(sigmas[i - 1] / sigmas[i]) / h
        estimate = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
    return math.exp(-h) * x - math.expm1(-h) * estimate


def test_the_history_of_dpmpp_2m_is_that_of_the_canvas() -> None:
    """Views move at every step, so that a pixel's last estimate is not that of the same views."""
    schedule, draws, size, window = euler_schedule(NoiseConfig(), 6), Draws((0, 1)), (12, 9), (6, 5)

    def denoise(x: Tensor, sigma: float, i: int) -> Tensor:
        origins = draws.view_origins(i, size, window, (4, 3), (1, 1))
        items = views(x, origins, window)
        return average(torch.tanh(items - items.mean(dim=(2, 3), keepdim=True)), origins, size)

    x = draws.noise((2, 4, *size)) * schedule.init_scale
    estimates = []
    for step in solve([Stage("views", range(6), denoise)], x, schedule, DPMpp2M(), no_noise):
        estimates.append(denoise(x, step.sigma, step.index))
        assert torch.equal(step.denoised, estimates[-1])
        expected = second_order(x, estimates, schedule.sigmas, step.index)
        torch.testing.assert_close(step.latents, expected.float(), rtol=1e-5, atol=1e-5)
        x = step.latents


def bend(x: Tensor, sigma: float, i: int) -> Tensor:
    """An estimate that changes from step to step."""
    return torch.tanh(x / math.hypot(sigma, 1)) + 0.1 * i


@pytest.mark.parametrize("spec", ["dpmpp_2m", "euler_ancestral"])
def test_stages_on_one_canvas_share_the_memory_of_the_solver(spec: str) -> None:
    solver, schedule, fresh = resolve("solver", spec), euler_schedule(NoiseConfig(), 6), fresh_noise(6)
    start = NOISE * schedule.init_scale

    def run(*stages: Stage) -> list[Tensor]:
        return [step.latents for step in solve(stages, start, schedule, solver, lambda shape, i: fresh[i])]

    whole = run(Stage("all", range(6), bend))
    parts = run(*(Stage(str(steps), steps, bend) for steps in (range(1), range(1, 1), range(1, 4), range(4, 6))))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("first", [0, 2])
def test_dpmpp_2m_forgets_what_it_estimated_on_another_canvas(first: int) -> None:
    schedule, begun = euler_schedule(NoiseConfig(), 6), 20 * NOISE.repeat(1, 1, 2, 2)
    phase_steps = range(6 + first, 12)
    large = Phase(phase_steps, (10, 6), lambda previous: (begun, Stage("large", phase_steps, bend)))
    stages = [Stage("small", range(6), bend), large]
    *_, last = solve(stages, NOISE * schedule.init_scale, schedule, DPMpp2M(), no_noise)
    x, estimates = begun, []
    for i in range(first, 6):
        estimates.append(bend(x, schedule.sigmas[i], 6 + i))
        x = second_order(x, estimates, schedule.sigmas, i).float()
    torch.testing.assert_close(last.latents, x, rtol=1e-5, atol=1e-5)


# ---- Fresh noise


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm"])
@pytest.mark.parametrize("method", ["direct", "cutdiffusion", "multidiffusion", "magnify", "demofusion"])
def test_fresh_noise_is_drawn_on_the_canvas_once_a_step(tiny_model: Model, method: str, solver: str) -> None:
    """The last step of each canvas goes to sigma 0 and draws none. One solver draws two that differ."""
    asked: list[tuple[tuple[int, ...], int | None]] = []
    second: list[tuple[tuple[int, ...], int | None]] = []

    class Recorded(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            asked.append((shape, step))
            return super().noise(shape, step)

        def second_noise(self, shape: tuple[int, ...], step: int) -> Tensor:
            second.append((shape, step))
            return super().second_noise(shape, step)

    options = {"method": method, "solver": solver, "num_steps": 3, "height": 96, "width": 128}
    prompts = ["a red house", "a blue tree"]
    steps = list(cutdiff.denoise(tiny_model, prompts, draws=Recorded((0, 1)), **options))
    canvases = [tuple(step.latents.shape) for step in steps]
    added = [(shape, step.index) for shape, step in zip(canvases, steps, strict=True) if step.index % 3 < 2]
    assert asked == [(canvases[0], None), *added]
    assert second == (added if solver == "dpmpp_sde" else [])
    other = list(cutdiff.denoise(tiny_model, prompts, draws=Recorded((0, 2)), **options))[-1].latents
    torch.testing.assert_close(other[0], steps[-1].latents[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other[1], steps[-1].latents[1], rtol=0.1)
