"""The stages of a run, and the loop that goes through them and yields every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cutdiff.models.config import Size
from cutdiff.sampling.flags import Flags
from cutdiff.sampling.schedules import Schedule
from cutdiff.sampling.solvers import Noise, Solver, TakeStep, finished

CanvasDenoiser = Callable[[Tensor, float, int], Tensor]
"""(latents (B, C, H, W), sigma, step) -> the estimate of x0 (B, C, H, W). A solver may ask for several in one step, at
other sigmas than the step's own."""


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that share one canvas denoiser."""

    name: str
    steps: range
    """The numbers of its steps, by which they draw. Step i of a run of n steps stands at sigma i % n of the schedule,
    so that a run that goes through the schedule more than once counts on; with `sigmas`, the first step stands at the
    first of these."""
    denoise: CanvasDenoiser
    size: Size | None = None
    """The size of its canvas in latents; None: that of the finished picture."""
    before: CanvasDenoiser | None = None
    """Makes the state that a step starts from, of the one that the step before ended with; None: it is the same."""
    end: Callable[[Tensor], Tensor] | None = None
    """Changes the state after the last step."""
    sigmas: tuple[float, ...] | None = None
    """Sigmas of its own, one more than it has steps, falling; None: those of the run."""
    targets: tuple[float, ...] | None = None
    """The sigmas that its steps go to with DDIM, as `Schedule.targets` has them; None: the next ones of `sigmas`."""
    cost: Callable[[int], Hashable] | None = None
    """A key for each step: steps with the same one cost the same. None: all steps of the stage do."""


@dataclass(frozen=True)
class Phase:
    """A stage that is made of what came before it, for instance on a larger canvas."""

    steps: range
    size: Size
    begin: Callable[[Tensor], tuple[Tensor, Stage]]
    """The state that the stage before ended with (B, C, H, W), or the first noise of a run -> the state to go on from,
    of `size`, and the stage."""


@dataclass(frozen=True)
class Step:
    """One step of a run, after it was taken."""

    index: int
    stage: str
    sigma: float
    """The sigma that the step was taken from."""
    latents: Tensor
    """The canvas after the step, (B, C, H, W), float32."""
    denoised: Tensor
    """The estimate of x0 at that sigma, (B, C, H, W), float32, the first one that the step was taken with."""


class NotFinite(FloatingPointError):
    """An estimate of x0 that holds NaN or infinity, and what it was made from."""

    def __init__(self, stage: Stage, latents: Tensor, sigma: float, step: int, denoised: Tensor) -> None:
        super().__init__(f"step {step} ({stage.name}, sigma {sigma:.4g}) gave NaN or infinity")
        self.stage, self.latents, self.sigma, self.step, self.denoised = stage, latents, sigma, step, denoised


def check_stages(stages: Sequence[Stage | Phase], num_steps: int) -> None:
    """ValueError where stages do not lead to the end of a schedule, so that what they end with would still be noise."""
    parts = [part for part in stages if part.steps]
    taken = [step for part in parts for step in part.steps]
    for before, part in zip([None, *parts], parts, strict=False):
        stop = part.steps.start if before is None else before.steps.stop
        goes_on = isinstance(part, Stage) and part.sigmas is None
        if part.steps.step != 1 or (part.steps.start != stop if goes_on else part.steps.start < stop):
            raise ValueError(
                f"takes the steps {taken}: its stages must take them in order, each once; only a phase leaves some out"
            )
    for part in parts:
        if isinstance(part, Stage) and (fault := _fault(part, num_steps)):
            raise ValueError(f"cannot run: {fault}")
    if not parts:
        raise ValueError(f"takes the steps {taken}: its stages must take them in order, to the last of {num_steps}")
    if fault := _unfinished(parts[-1], num_steps, taken):
        raise ValueError(fault)


def _unfinished(last: Stage | Phase, num_steps: int, taken: list[int]) -> str:
    """The fault of the last stage of a run where it does not go to sigma 0; "" where there is none, or it shows when a
    phase begins. `taken` are the steps."""
    if isinstance(last, Phase):
        return ""
    if last.sigmas is not None:
        end = last.sigmas[-1]
        return "" if end == 0 else f"ends with the sigmas {last.sigmas} of stage {last.name}: the last one must be 0"
    if (taken[-1] + 1) % num_steps == 0:
        return ""
    return f"takes the steps {taken}: its stages must take them in order, to the last of {num_steps}"


def _fault(stage: Stage, num_steps: int) -> str:
    """The fault of a stage whose steps do not stand at sigmas that fall; "" where there is none."""
    steps, sigmas = stage.steps, stage.sigmas
    if stage.targets is not None and sigmas is None:
        return f"stage {stage.name} has {len(stage.targets)} targets and no sigmas: give both or neither"
    if stage.targets is not None and len(stage.targets) != len(steps):
        return f"stage {stage.name} has {len(stage.targets)} targets, where {len(steps)} steps take one each"
    if sigmas is None:
        if not steps or steps[0] // num_steps == steps[-1] // num_steps:
            return ""
        return f"stage {stage.name} takes {steps}, past the end of a schedule of {num_steps}: divide it there"
    if len(sigmas) != len(steps) + 1:
        return f"stage {stage.name} has {len(sigmas)} sigmas, where {len(steps)} steps take one more"
    if not sigmas[-1] >= 0 or not all(math.inf > a > b for a, b in pairwise(sigmas)):
        return f"stage {stage.name} has the sigmas {sigmas}, which must fall at every step"
    return ""


@torch.no_grad()
def solve(
    stages: Sequence[Stage | Phase],
    x: Tensor,
    schedule: Schedule,
    solver: Solver,
    noise: Noise,
    flags: Flags | None = None,
    on_start: Callable[[Schedule], None] = lambda schedule: None,
) -> Iterator[Step]:
    """Run the stages one after another from x (B, C, H, W), float32, and yield every step.

    Raises NotFinite where an estimate of x0 is not, FloatingPointError where a solver makes it so, and ValueError where
    a stage or the solver gives another canvas than it says. On a GPU the first two come one step late, but before a
    phase begins and before a stage's `end`. `flags` are
    those that the stages' denoisers set, if any do. `on_start` hears of each schedule that the solver is started on.
    """
    flags = flags or Flags()
    try:
        yield from _steps(stages, x, schedule, solver, noise, flags, on_start)
        flags.end()
    finally:
        flags.abandon()


def _steps(
    stages: Sequence[Stage | Phase],
    x: Tensor,
    schedule: Schedule,
    solver: Solver,
    noise: Noise,
    flags: Flags,
    on_start: Callable[[Schedule], None],
) -> Iterator[Step]:
    """The steps of `solve`."""
    take: TakeStep | None = None
    started: tuple[Schedule, int] | None = None  # what the solver was started on, and the number of its first step
    for part in stages:
        stage = part
        if isinstance(part, Phase):
            flags.end()
            x, stage = _begun(part, x, schedule.num_steps, is_last=part is stages[-1])
        assert isinstance(stage, Stage)
        own, first = standing(stage, schedule)
        if take is None or isinstance(part, Phase) or started != (own, first):
            take, started = solver.start(own, partial(_counted, noise, first)), (own, first)
            on_start(own)
        shape = x.shape
        for i in stage.steps:
            sigma = own.sigmas[i - first]
            if stage.before is not None:
                x = _of_shape(stage.before(x, sigma, i), shape, f"stage {stage.name}, before step {i},")
            denoised = _estimate(stage, flags, i, shape, x, sigma)
            taken = finished(take(x, denoised, i - first), partial(_estimate, stage, flags, i, shape))
            x = _of_shape(taken, shape, "the solver").to(denoised.dtype)
            if stage.end is not None and i == stage.steps[-1]:
                flags.end()
                x = _of_shape(stage.end(x), shape, f"stage {stage.name} at its end")
            yield Step(i, stage.name, sigma, x, denoised)


def standing(stage: Stage, schedule: Schedule) -> tuple[Schedule, int]:
    """The schedule that the steps of a stage go through, and the number of the step that is its first."""
    start, sigmas = stage.steps.start, stage.sigmas
    if sigmas is None:
        return schedule, start // schedule.num_steps * schedule.num_steps
    return schedule.visiting(sigmas, stage.targets), start


def _estimate(stage: Stage, flags: Flags, step: int, shape: tuple[int, ...], x: Tensor, sigma: float) -> Tensor:
    """The stage's estimate of x0 for a state of that shape, which must be finite."""
    flags.begin(_of_shape(x, shape, "the solver").device)
    denoised = _of_shape(stage.denoise(x, sigma, step), shape, f"stage {stage.name}")
    flags.check(denoised, partial(_not_finite, stage, x, sigma, step, denoised))
    return denoised


def _not_finite(stage: Stage, latents: Tensor, sigma: float, step: int, denoised: Tensor) -> FloatingPointError:
    """The error of a step whose estimate of x0 is not finite, made from this state."""
    if latents.isfinite().all():
        return NotFinite(stage, latents, sigma, step, denoised)
    return FloatingPointError(f"the state before step {step} ({stage.name}) holds NaN or infinity")


def _begun(phase: Phase, x: Tensor, num_steps: int, *, is_last: bool) -> tuple[Tensor, Stage]:
    """The first state of a phase and its stage, which must be what the phase said."""
    state, stage = phase.begin(x)
    expected = (*x.shape[:2], *phase.size)
    if state.shape != expected or stage.steps != phase.steps or stage.size not in (None, phase.size):
        raise ValueError(
            f"stage {stage.name} begins with {tuple(state.shape)} and takes {stage.steps} on a canvas of {stage.size}, "
            f"where its phase said {expected} and {phase.steps}"
        )
    if fault := _fault(stage, num_steps):
        raise ValueError(fault)
    if is_last and (fault := _unfinished(stage, num_steps, [*stage.steps])):
        raise ValueError(f"the method {fault}")
    return state, stage


def _of_shape(value: Tensor, shape: tuple[int, ...], giver: str) -> Tensor:
    """The value where it is a canvas of that shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{giver} gave {what} for a canvas of {tuple(shape)}")
    return value


def _counted(noise: Noise, first: int, shape: tuple[int, ...], step: int, *part: int) -> Tensor:
    """The noise of a step that is counted from the first of a schedule, by its number in the run."""
    return noise(shape, first + step, *part)
