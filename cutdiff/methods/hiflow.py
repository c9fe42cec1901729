"""HiFlow (Bu et al. 2025, arXiv 2504.06232): pictures that grow, led by the way on which the smaller one came about.

The estimates of x0 at each step of a smaller picture, enlarged, are the reference. A larger picture is aligned to it in
three ways (section 3.3): it begins with the enlarged picture and noise; the low band of each estimate is moved to that
of the reference by a weight α, and its change from step to step to that of the reference by a weight β. The paper has
the latter for velocities, (state − x0) / t. For the distance δ from the reference that is δ + β·(t / t'·δ' − δ), with
t' and δ' of the step before. With t = σ / (1 + σ) both suit any noise. α and β fall by equal parts, to 0 at the end.

Positions of a transformer are not a part of it: give `--positions ntk,factor=10,proportional=True`, near to the code's.
Defaults are those of the published code (github.com/Bujiazi/HiFlow) for 2048 and 4096 pixels with FLUX.1-dev: 16 and 10
of 30 steps. As there, the reference is enlarged in latents, and is what the network says, without the alignment; the
picture is enlarged in pixels and sharpened by a blur that is drawn. Its padding of the canvas in every other step is
not here. A larger picture that takes more steps than the one before has the first reference there was in these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Run, Stages, enlarge, falling, on_whole, phase_sizes, step_at, with_guidance_scale
from cutdiff.methods.trajectory import Trajectory
from cutdiff.options import Between, Options, Scale, Share
from cutdiff.sampling.resize import renoise
from cutdiff.sampling.split import Gaussian, Split, sharpened
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.specs import part, resolve

DOUBLED = tuple(2.0**k for k in range(1, 32))
BLURS = 0.1, 2.0
"""The bounds of the drawn deviation of the blur, of 3×3 pixels."""


@dataclass(frozen=True, kw_only=True)
class HiFlow(Options):
    """All steps on the native picture, then the last ones on every larger canvas."""

    takes_picture: ClassVar[bool] = True

    factors: tuple[Annotated[float, Between(1)], ...] | None = None
    """The longer sides of the canvases on the way, in native ones. None: 2, 4, 8, …"""
    strengths: tuple[Share, Share] = (0.53, 0.33)
    """The share of the steps, rounded up and at least one, that the first larger canvas takes, and each further one."""
    direction: tuple[Share, Share] = (1.0, 0.25)
    """The weight α at the first step of the first larger canvas, and of each further one."""
    acceleration: tuple[Share, Share] = (0.5, 0.5)
    """The weight β, likewise."""
    held_band: str | Split = "butterworth"
    """The split whose low band is moved: a spec of down_up, gaussian, butterworth or wavelet, or an object."""
    sharpness: Annotated[float, Between(0, 1000)] = 1.0
    """The share of what the blur takes from an enlarged picture that is added to it."""
    detail_guidance_scale: Scale | None = None
    """The guidance scale of the larger canvases; None: that of the run. Published: 4.5 and 6 after 3.5."""
    size_conditioning: Literal["native", "canvas"] = "native"
    """The size that a network which reads one is told: the "native" picture's, or that of the "canvas"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "held_band", part("split", "held_band", self.held_band))

    @staticmethod
    def of_strength(share: float) -> dict[str, Any]:
        """The options that let every larger canvas take a share of the steps."""
        return {"strengths": (share, share)}

    def stages(self, run: Run) -> Stages:
        first, larger = canvases(run, DOUBLED if self.factors is None else self.factors)
        conditioning_size = phase_sizes(run.size, run.native_size)[0] if self.size_conditioning == "native" else None
        denoise = first_picture(replace(run, size=first), on_whole(run, conditioning_size))
        before = Trajectory(denoise, run.num_steps, keeps=bool(larger))
        stages: Stages = [Stage("phase 1", range(run.num_steps), before, first)]
        run = with_guidance_scale(run, self.detail_guidance_scale)
        for number, size in larger:
            own = Trajectory(on_whole(run, conditioning_size), run.num_steps, keeps=size != run.size)
            stages.append(self.phase(replace(run, size=size), number, min(len(stages) - 1, 1), before, own))
            before = own
        return stages

    def phase(self, run: Run, number: int, which: int, before: Trajectory, own: Trajectory) -> Phase:
        """Phase `number`, counted from 1, on the run's canvas; `which` tells of the options' two values the one."""
        steps = range(number * run.num_steps)[-max(1, step_at(self.strengths[which], run.num_steps)) :]
        alpha, beta = (falling(values[which], steps) for values in (self.direction, self.acceleration))
        split = resolve("split", self.held_band)

        def begin(picture: Tensor) -> tuple[Tensor, Stage]:
            blurs = (Gaussian(width, radius=1) for width in run.draws.blurs(number, *BLURS).tolist())
            changes = (partial(sharpened, amount=self.sharpness, split=blur) for blur in blurs)
            each = zip(picture.split(1), changes, strict=True)
            guide = torch.cat([enlarge(run, x, "pixels", change=change) for x, change in each])
            noise = run.draws.phase_noise(tuple(guide.shape), number).to(guide)
            taken: dict[int, tuple[float, Tensor]] = {}  # t and δ of each step

            def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
                denoised, t = own(x, sigma, step), sigma / (1 + sigma)
                reference = own.reference(before, sigma, step, run.size)
                distance = denoised - reference
                distance = distance - alpha(sigma, step) * split.low(distance)
                if step - 1 in taken:
                    t_before, before_it = taken[step - 1]
                    distance = torch.lerp(distance, t / t_before * before_it, beta(sigma, step))
                taken[step] = t, distance
                return reference + distance

            start = renoise(guide, run.schedule.sigmas[steps.start % run.num_steps], noise)
            return start, Stage(f"phase {number}", steps, denoise, run.size)

        return Phase(steps, run.size, begin)
