"""Objects of a researcher's own in every form: what they hold counts, and their faults have a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own import OwnModules
from torch import Tensor

import cutdiff
from cutdiff import Draws, Settings
from cutdiff.checkpoint.model import Model
from cutdiff.methods.multidiffusion import MultiDiffusion
from cutdiff.methods.shared import Run
from cutdiff.planning.forecast import walk
from cutdiff.sample import main
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.sources import source_hash

OPTIONS: dict[str, Any] = {"height": 64, "width": 64, "num_steps": 4, "method": "direct"}
OWN = """
from dataclasses import dataclass, field
from typing import Literal

import own_helper
from cutdiff.methods.multidiffusion import MultiDiffusion
from cutdiff.sampling.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Mine(MultiDiffusion):
    centred: bool = True
    pair: tuple[Literal["a", "b"], float] = ("a", 0.5)
    shares: list[float] = field(default_factory=lambda: [1.0])
    mode: int = 3
    num: int = 1


@dataclass(frozen=True, kw_only=True)
class Needy(MultiDiffusion):
    strength: int


@dataclass(frozen=True, kw_only=True)
class Taken(MultiDiffusion):
    seed: int = 5


half, full = (lambda run: MultiDiffusion().stages(run)), (lambda run: MultiDiffusion(stride=2).stages(run))


def scaled(conditional, unconditional, sigma, step):
    return unconditional + own_helper.SCALE * (conditional - unconditional)


def unfinished(run):
    return MultiDiffusion().stages(run)[0]


class Counting:
    def __init__(self):
        self.steps = 0

    def start(self, schedule, noise):
        def step(x, denoised, i):
            self.steps += 1
            return denoised + (x - denoised) * schedule.sigmas[i + 1] / schedule.sigmas[i]

        return step


counting = Counting()
"""


@pytest.fixture
def mine(own: OwnModules) -> OwnModules:
    own.write("own_helper", "SCALE = 3.0\n")
    own.write("own_kinds", OWN)
    return own


def latents(model: Model, **options: Any) -> Tensor:
    *_, last = cutdiff.denoise(model, "a red house", **{**OPTIONS, **options})
    return last.latents


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class Derived:
    power: int = 2
    table: Any = field(init=False, default=None)

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return conditional


def derived(table: Any) -> Derived:
    made = Derived()
    object.__setattr__(made, "table", table)
    return made


class Correlated(Draws):
    pass


def correlated(rho: float) -> Correlated:
    draws = Correlated((1,))
    object.__setattr__(draws, "rho", rho)
    return draws


class Weak(MultiDiffusion):
    def __init__(self, strength: float) -> None:
        super().__init__()
        object.__setattr__(self, "strength", strength)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Slotted(1.0), Slotted(9.0)),
        (derived(1), derived(2)),
        (correlated(0.5), correlated(1.0)),
        (Weak(0.2), Weak(0.9)),
        (derived(partial(np.interp, xp=[0, 1])), derived(partial(np.interp, xp=[0, 2]))),
        (derived(np.random.default_rng(1)), derived(np.random.default_rng(2))),
        (derived(bytearray(300)), derived(bytearray(301))),
    ],
    ids=["slots", "a field that is no option", "draws", "an attribute", "partials", "generators", "long values"],
)
def test_what_an_object_holds_counts(a: Any, b: Any) -> None:
    assert source_hash(a) is not None
    assert source_hash(a) == source_hash(a)
    assert source_hash(a) != source_hash(b)


def test_two_lambdas_of_a_line_are_two(mine: OwnModules) -> None:
    half, full = (Settings(method=f"own_kinds:{name}") for name in ("half", "full"))
    assert half.method_name == full.method_name == "<lambda>"
    assert half.sources() != full.sources()


def test_an_edited_helper_module_counts(mine: OwnModules) -> None:
    before = Settings(guidance="own_kinds:scaled").sources()
    mine.write("own_helper", "SCALE = 5.0\n")
    assert Settings(guidance="own_kinds:scaled").sources() != before


def test_a_set_of_an_object_that_changes_as_it_draws_is_finished_by_a_second_start(
    mine: OwnModules, quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "x",
        "--model",
        str(quick_folder),
        "--steps",
        "2",
        "--width",
        "64",
        "--height",
        "64",
        "--num-images",
        "2",
    ]
    command += ["--solver", "own_kinds:counting", "--out", str(tmp_path)]
    assert main(command) == 0
    mine.forget()
    capsys.readouterr()
    assert main(command) == 0
    assert "2 of 2 pictures are finished already" in capsys.readouterr().err


def test_flags_of_every_type(
    mine: OwnModules, quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag is taken whole: --mode is not --model, nor --num --num-images."""
    size = ["--steps", "1", "--width", "64", "--height", "64", "--out", str(tmp_path)]
    flags = ["--no-centred", "--pair", "b", "0.7", "--shares", "1,2", "--mode", "4", "--num", "2"]
    assert main(["x", "--model", str(quick_folder), "--method", "own_kinds:Mine", *flags, *size]) == 0
    record = next(tmp_path.glob("Mine*.json")).read_text()
    assert "centred=False,pair=('b',0.7),shares=(1.0,2.0),mode=4,num=2" in record
    assert main(["x", "--model", str(quick_folder), "--method", "own_kinds:Needy", "--strength", "3", *size]) == 0
    assert main(["x", "--model", str(quick_folder), "--method", "own_kinds:Needy", *size]) == 2
    assert "--method Needy needs strength: give NAME,strength=value" in capsys.readouterr().err


def test_an_option_that_every_run_has_is_refused(mine: OwnModules) -> None:
    with pytest.raises(ValueError, match=r"^method=Taken has an option 'seed', which every run has: rename it"):
        Settings(method="own_kinds:Taken")


def test_a_line_whose_method_fails_is_left_out(
    mine: OwnModules, quick_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    line = '{"prompt": "b", "method": "own_kinds:unfinished"}'
    prompts.write_text(f"a\n{line}\nc\n")
    out = tmp_path / "out"
    size = ["--steps", "1", "--width", "64", "--height", "64", "--out", str(out)]
    assert main(["--prompts", str(prompts), "--model", str(quick_folder), *size]) == 1
    printed = capsys.readouterr().err
    assert "line 2: --method unfinished gives Stage where a list of stages is needed" in printed
    assert "left out: 2" in printed
    assert len(list(out.glob("*.png"))) == 2


def test_a_guidance_with_a_memory_begins_anew_in_every_run(tiny_model: Model) -> None:
    class Momentum:
        def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
            raise AssertionError("its begin gives the function of a run")

        def begin(self, schedule: Any) -> Any:
            before: list[Tensor] = []

            def guide(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
                difference = conditional - unconditional - 0.5 * (before.pop() if before else 0)
                before.append(difference)
                return unconditional + 2 * difference

            return guide

    guidance = Momentum()
    first, second = (latents(tiny_model, guidance=guidance) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, latents(tiny_model, guidance="cfg,guidance_scale=2"))


def test_the_interval_of_guidance_goes_by_sigma_also_in_a_stage_with_sigmas_of_its_own(tiny_model: Model) -> None:
    guided: list[float] = []

    def guide(conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        guided.append(sigma)
        return conditional

    def method(run: Run) -> list[Stage]:
        own = (*(run.schedule.sigmas[0] * share for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)), 0.0)
        return [Stage("own", range(6), run.denoiser, sigmas=own)]

    options = {**OPTIONS, "method": method, "guidance": guide, "guidance_interval": (0.0, 0.5)}
    list(cutdiff.denoise(tiny_model, "a red house", **options))
    end = cutdiff.denoise(tiny_model, "a red house", **OPTIONS)
    assert guided
    assert min(guided) > [step.sigma for step in end][2]
    assert guided == sorted(guided, reverse=True)


def faulty(name: str) -> Any:
    """A method of that fault."""

    def method(run: Run) -> Any:
        denoise = run.denoiser
        half = (run.size[0] // 2, run.size[1])
        whole = range(run.num_steps)
        early = range(2, 3)
        return {
            "a last phase that stops early": [
                Stage("a", range(2), denoise),
                Phase(early, run.size, lambda x: (x, Stage("b", early, denoise))),
            ],
            "a last phase whose sigmas stop early": [
                Stage("a", range(2), denoise),
                Phase(early, run.size, lambda x: (x, Stage("b", early, denoise, sigmas=(2.0, 1.0)))),
            ],
            "a last stage of another size": [Stage("a", whole, denoise, size=half)],
            "an end that crops": [Stage("a", whole, denoise, end=lambda x: x[:, :, :4])],
            "steps in a list": [Stage("a", [0, 1, 2, 3], denoise)],  # pyright: ignore[reportArgumentType]
            "nothing": None,
        }[name]

    return method


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a last phase that stops early", r"the method takes the steps \[2\]: .* to the last of 4"),
        ("a last phase whose sigmas stop early", r"the method ends with the sigmas \(2.0, 1.0\) of stage b"),
        ("a last stage of another size", r"method=method ends on a canvas of \(4, 8\) latents"),
        ("an end that crops", r"stage a at its end gave \(1, 4, 4, 8\) for a canvas of \(1, 4, 8, 8\)"),
        ("steps in a list", r"method=method gives a stage the steps \[0, 1, 2, 3\] where a range is needed"),
        ("nothing", r"method=method gives NoneType where a list of stages is needed"),
    ],
)
def test_a_method_that_would_end_in_noise_or_in_another_size_is_an_error(
    name: str, words: str, tiny_model: Model
) -> None:
    with pytest.raises(ValueError, match=words):
        latents(tiny_model, method=faulty(name))


def test_a_method_may_be_a_generator(tiny_model: Model) -> None:
    def method(run: Run) -> Iterator[Stage]:
        yield from MultiDiffusion().stages(run)

    assert torch.equal(latents(tiny_model, method=method), latents(tiny_model, method="multidiffusion"))


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_solver_that_fails_is_named(value: float | None, tiny_model: Model) -> None:
    class Failing:
        def start(self, schedule: Any, noise: Any) -> Any:
            return lambda x, denoised, i: None if value is None else x * value

    with pytest.raises((ValueError, FloatingPointError), match=r"solver|the state before step 1"):
        cutdiff.generate(tiny_model, "a", replace(Settings(**OPTIONS), solver=Failing()))


def test_what_a_phase_begins_and_a_stage_ends_with_is_planned(tiny_model: Model) -> None:
    def method(run: Run) -> list[Stage | Phase]:
        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            end = lambda state: run.denoiser(state, 1.0, 0)  # noqa: E731
            return run.denoiser(x, 2.0, 0), Stage("b", range(4, 8), run.denoiser, end=end)

        return [Stage("a", range(4), run.denoiser), Phase(range(4, 8), run.size, begin)]

    settings = Settings(**{**OPTIONS, "method": method})
    real = cutdiff.generate(tiny_model, "", settings).record["network_evaluations"]
    from test_plan import sizes_of

    planned = walk(sizes_of(tiny_model), settings)
    assert sum(stage.total.evaluations for stage in planned.stages) == real == 2 * (8 + 2)


def test_draws_that_change_as_they_draw_are_recorded_as_they_were(tiny_model: Model) -> None:
    class Counting(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            object.__setattr__(self, "calls", vars(self).get("calls", 0) + 1)
            return super().noise(shape, step)

    draws, before = Counting((1,)), source_hash(Counting((1,)))
    record = cutdiff.generate(tiny_model, "a", Settings(**OPTIONS), draws=draws).record
    assert record["sources"] == {"draws": before}
    assert source_hash(draws) != before
