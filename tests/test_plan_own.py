"""Methods and operators of a researcher's own are planned: evaluations and FLOPs of every step are those of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Unpack

import pytest
import torch
from own import METHODS, OwnModules
from test_plan import CPU, UNET, sizes_of
from tiny import QUICK_VAE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import random_model
from cutdiff.methods.shared import Run, with_guidance_scale
from cutdiff.methods.tiled import Tiled
from cutdiff.options import Share
from cutdiff.plan import main
from cutdiff.planning.forecast import walk
from cutdiff.sampling.operators import FromNetwork, Operator, Patches, ToNetwork, carry_back, check_operator, to_network
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.settings import Settings


@pytest.fixture(scope="module")
def small() -> Model:
    return random_model(UNET, QUICK_VAE, CPU)


class Halves:
    """The left half of the canvas and the right one."""

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        return to_network(torch.stack(canvas.chunk(2, dim=3), dim=1).flatten(0, 1), **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        return carry_back(values, lambda items: torch.cat([*items.unflatten(0, (-1, 2)).unbind(1)], dim=3), **how)


class ToldHalves(Halves):
    """Halves that say how many they are."""

    def items(self, canvas: Tensor) -> tuple[int, tuple[int, int]]:
        return 2 * len(canvas), (canvas.shape[2], canvas.shape[3] // 2)


class SignedHalves(Halves):
    """Halves that look at the values of the canvas, as an operator may that goes by its content."""

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        assert canvas.isfinite().all().item()
        return super().gather(canvas, backend, **how)


@dataclass(frozen=True)
class InHalves(Tiled):
    operator: Any = None

    def stages(self, run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            return run.denoiser.through(self.operator, x, sigma, step)

        return [Stage("halves", range(run.num_steps), denoise)]


@dataclass(frozen=True)
class InTurns(Tiled):
    """Whole, views without guidance, and patches in turns, of which each costs another amount."""

    def stages(self, run: Run) -> list[Stage]:
        whole, patches = self.on_whole(run), self.on_patches(run, (2, 2), "none")
        views = self.on_views(with_guidance_scale(run, 1.0))

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            return (whole, views, patches)[step % 3](x, sigma, step)

        return [Stage("in turns", range(run.num_steps), denoise, cost=lambda step: step % 3)]


@dataclass(frozen=True)
class FromPicture(Tiled):
    """SDEdit on an enlarged picture, which goes through the VAE."""

    start: Share = 0.5

    def stages(self, run: Run) -> list[Stage | Phase]:
        small = (run.size[0] // 2, run.size[1] // 2)
        steps = range(run.num_steps + int(self.start * run.num_steps), 2 * run.num_steps)

        def begin(latents: Tensor) -> tuple[Tensor, Stage]:
            pixels = run.decode(latents)
            larger = torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(0, 1)
            guide = run.encode(larger)
            sigma = run.schedule.sigmas[steps.start % run.num_steps]
            x = guide + sigma * run.draws.phase_noise(tuple(guide.shape), 2).to(guide)
            return x, Stage("detail", steps, self.on_views(run), run.size)

        return [Stage("picture", range(run.num_steps), run.denoiser, small), Phase(steps, run.size, begin)]


@dataclass(frozen=True)
class OwnSigmas(Tiled):
    """Sigmas of its own, and guidance where the noise is high."""

    def stages(self, run: Run) -> list[Stage]:
        return [Stage("own", range(3), run.denoiser, sigmas=(9.0, 4.0, 1.0, 0.0))]


class AboveTwo:
    """Guidance that is on while sigma is above 2."""

    def scale_at(self, sigma: float, step: int) -> float:
        return 3.0 if sigma > 2 else 1.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.scale_at(sigma, step) * (conditional - unconditional)


def everything(run: Run) -> list[Stage]:
    return [Stage("patches", range(run.num_steps), lambda *args: run.denoiser.through(Patches((2, 2)), *args))]


SETTINGS: dict[str, dict[str, Any]] = {
    "an operator without items": {"method": InHalves(operator=Halves())},
    "an operator with items": {"method": InHalves(operator=ToldHalves())},
    "an operator that reads values": {"method": InHalves(operator=SignedHalves())},
    "a function": {"method": everything},
    "steps in turns": {"method": InTurns(), "num_steps": 7},
    "steps in turns, guided in part": {"method": InTurns(), "num_steps": 9, "guidance_interval": (0.3, 0.8)},
    "a method that goes through the VAE": {"method": FromPicture()},
    "sigmas of its own": {"method": OwnSigmas(), "num_steps": 3},
    "sigmas of its own, guided in part": {"method": OwnSigmas(), "num_steps": 3, "guidance": AboveTwo()},
    "a guidance by sigma": {"method": "magnify", "guidance": AboveTwo(), "num_steps": 6},
    "a guidance that is not linear": {"method": "cutdiffusion", "guidance": "rescale"},
    "a list of sigmas": {"method": "magnify", "schedule": [5, 4, 3, 2, 0]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_counts_of_every_step_are_those_of_the_run(name: str, small: Model) -> None:
    settings = Settings(**{"height": 128, "width": 128, "num_steps": 4} | SETTINGS[name])
    flops: list[int] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counts = counted(settings.method, counter, flops)
        record = cutdiff.generate(small, "", replace(settings, method=counts)).record
    planned = walk(sizes_of(small), settings)
    costs = [cost for stage in planned.stages for cost in stage.steps]
    assert [cost.flops for cost in costs] == flops
    assert sum(cost.evaluations for cost in costs) == record["network_evaluations"]


def counted(method: Any, counter: FlopCounterMode, flops: list[int]) -> Callable[[Run], list[Stage | Phase]]:
    """The method, with the FLOPs of each step's denoiser, and of the beginning of a phase in its first step, put into
    `flops`."""
    beginning = [0]

    def of(stage: Stage) -> Stage:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            before = counter.get_total_flops()
            denoised = stage.denoise(x, sigma, step)
            flops.append(counter.get_total_flops() - before + beginning[0])
            beginning[0] = 0
            return denoised

        return replace(stage, denoise=denoise)

    def begun(phase: Phase) -> Phase:
        def begin(x: Tensor) -> tuple[Tensor, Stage]:
            before = counter.get_total_flops()
            x, stage = phase.begin(x)
            beginning[0] = counter.get_total_flops() - before
            return x, of(stage)

        return replace(phase, begin=begin)

    def stages(run: Run) -> list[Stage | Phase]:
        parts = method.stages(run) if hasattr(method, "stages") else method(run)
        return [begun(part) if isinstance(part, Phase) else of(part) for part in parts]

    return stages


def test_the_counts_of_a_table_are_those_of_two_sizes(small: Model) -> None:
    """The reference of this file, on a method that ships: its steps between hearing are its denoiser's."""
    settings = Settings(method="multidiffusion", height=128, width=128, num_steps=2)
    totals, flops = [0], []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method = counted(settings.method, counter, flops)
        cutdiff.generate(
            small, "", replace(settings, method=method), on_step=lambda *_: totals.append(counter.get_total_flops())
        )
    assert flops == [b - a for a, b in pairwise(totals)]


@pytest.mark.parametrize("operator", [Halves(), ToldHalves(), SignedHalves()])
def test_the_operators_keep_their_promises(operator: Operator) -> None:
    check_operator(operator, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_share_the_items_of_an_operator(devices: int, small: Model) -> None:
    settings = Settings(method=InHalves(operator=Halves()), height=128, width=128, num_steps=2)
    (stage,) = walk(sizes_of(small), settings, devices).stages
    assert [cost.evaluations for cost in stage.steps] == [2] * 2


def test_a_method_by_module_and_object_is_planned(own: OwnModules, capsys: pytest.CaptureFixture[str]) -> None:
    own.write("mine_methods", METHODS)
    assert main(["--method", "mine_methods:Mine,strength=2", "--number", "3", "--steps", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "Mine"
    assert plan["settings"]["method"].startswith("Mine,strength=2.0,number=3,")
    assert [stage["stage"] for stage in plan["stages"]] == ["mine"]
    assert plan["network"]["evaluations"] == 4 * 2
