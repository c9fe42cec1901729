"""RectifiedHR (Yang et al. 2025, arXiv 2503.02537): one trajectory whose canvas grows on its way.

At some steps the canvas grows (noise refresh): the estimate of x0 is decoded, enlarged, encoded and noised again, and
the same network draws on with the steps that are left. After each refresh the latents' energy falls, which blurs, and
which a larger guidance scale makes up for (energy rectification). Of N canvases the first has the native size. Refresh
i of 1 … N − 1 comes after Tmin + (T − Tmin)·((i − 1)/(N − 1))^M_T of T steps, rounded down, and then the guidance scale
is wmin + (wmax − wmin)·(i/(N − 1))^M_w, where wmin is the run's: 5 in the published code, with a negative prompt.

Defaults are those of the published code (github.com/EnVision-Research/RectifiedHR), up to three times the native size
those for 2048 pixels, and past it those for 4096. It departs from the paper:
- The paper divides i − 1 by N, so that the refreshes of 4096 pixels are after 40 and 45 of 50 steps, in the code after
  40 and 47 (`refresh_power=0.8` gives the paper's). That of 2048 pixels is after 30 steps, in the paper after 40.
- The estimate is that of the last step before the refresh, and is noised to the sigma of the first one after it.
- Pictures are resized by PIL's bicubic kernel, of −1/2; the paper says bilinearly.
Where it is not followed:
- At each refresh it rounds pictures to 8 bits, at first down, and the networks to bfloat16, and the VAE takes large
  pictures in tiles that are blended; where the steps do not divide the timesteps, it comes a step or more early.
- At 4096 × 2048 pixels it begins with 1536 × 768, 1.5 times the native size: `first_size=0.375`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from cutdiff.methods.picture import canvases, first_picture
from cutdiff.methods.shared import Kept, Power, Run, Space, Stages, enlarge, step_at, with_guidance_scale
from cutdiff.options import Between, Options, Scale, Share
from cutdiff.sampling.resize import Resampling, renoise
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.settings import Settings


class Published(NamedTuple):
    num_sizes: int
    first_refresh: float
    max_guidance_scale: float


def published(run: Run) -> Published:
    """The published settings: for 2048 pixels up to three times the native side, past it those for 4096."""
    return Published(2, 0.6, 30.0) if max(run.size) <= 3 * run.native_size else Published(3, 0.8, 50.0)


@dataclass(frozen=True, kw_only=True)
class RectifiedHR(Options):
    """The steps of a run on canvases of growing size; direct inference where the canvas is nowhere past native."""

    takes_picture: ClassVar[bool] = True

    num_sizes: Annotated[int, Between(2, 1000)] | None = None
    """The number N of canvases; None: 2 up to three times the native size, and 3 past it."""
    first_size: Share | None = None
    """The sides of the first canvas as a share of the finished one's; None: the longer side is the native one."""
    first_refresh: Share | None = None
    """The share Tmin of steps before the first refresh; None: 0.6 up to three times the native size, past it 0.8."""
    refresh_power: Power = 0.5
    """The power M_T that spaces the refreshes: below 1, later ones follow more closely on each other."""
    max_guidance_scale: Scale | Literal["published"] | None = "published"
    """The guidance scale wmax on the finished canvas; "published": 30 up to three times the native size, past it 50,
    but 1 where that of the run is 1; None: that of the run on every canvas."""
    guidance_power: Power = 0.5
    """The power M_w by which the guidance scale grows from the run's to the greatest."""
    enlarged_in: Space = "pixels"
    """The space that an estimate is enlarged in: "pixels" through the VAE, or "latents"."""
    resampling: Resampling = "catmull_rom"
    """The interpolation by which it is enlarged."""

    def check_settings(self, settings: Settings) -> None:
        """ValueError where there is no step left for what comes after a given picture."""
        if settings.image is not None and settings.num_steps < 2:
            raise ValueError(f"num_steps={settings.num_steps} has no step after the image: give at least 2")

    @staticmethod
    def of_strength(share: float) -> dict[str, Any]:
        """The options that let the canvases after the first take a share of the steps."""
        return {"first_refresh": 1 - share}

    def stages(self, run: Run) -> Stages:
        sizes = self.sizes(run)
        parts = zip(sizes, self.steps(run, len(sizes)), self.guidance_scales(run, len(sizes)), strict=True)
        stages: Stages = []
        before: Kept | None = None
        for number, (size, steps, scale) in enumerate(parts, 1):
            if steps:
                on_canvas = with_guidance_scale(replace(run, size=size), scale, "max_guidance_scale")
                denoise = on_canvas.denoiser if number > 1 else first_picture(on_canvas, on_canvas.denoiser)
                stage = Stage(f"phase {number}", steps, kept := Kept(denoise), size)
                stages.append(self.refreshed(on_canvas, before, number, stage) if before else stage)
                before = kept
        return stages

    def refreshed(self, run: Run, before: Kept, number: int, stage: Stage) -> Phase:
        """Noise refresh: `stage`, of phase `number`, from the last estimate `before` on the canvas of `run`."""

        def begin(_: Tensor) -> tuple[Tensor, Stage]:
            x0 = before.estimate
            if x0.shape[2:] != run.size:
                x0 = enlarge(run, x0, self.enlarged_in, self.resampling, change=lambda image: image.clamp(0, 1))
            noise = run.draws.phase_noise(tuple(x0.shape), number).to(x0)
            return renoise(x0, run.schedule.sigmas[stage.steps.start], noise), stage

        return Phase(stage.steps, run.size, begin)

    def sizes(self, run: Run) -> list[Size]:
        """The canvases, whose sides grow evenly, rounded up; without a given picture, one where that of the run is no
        larger than native."""
        first = self.first_size
        if first is None and run.image is not None:
            first = max(canvases(run, ())[0]) / max(run.size)
        elif first is None:
            first = run.native_size / max(run.size)
            if first >= 1:
                return [run.size]
        count = self.num_sizes or published(run).num_sizes
        shares = [first + (1 - first) * i / (count - 1) for i in range(count - 1)]
        height, width = ([max(1, step_at(share, side)) for share in shares] for side in run.size)
        return [*zip(height, width, strict=True), run.size]

    def steps(self, run: Run, count: int) -> list[range]:
        """The steps on each of `count` canvases; at least the last one is on the finished canvas."""
        first = published(run).first_refresh if self.first_refresh is None else self.first_refresh
        shares = [first + (1 - first) * (i / (count - 1)) ** self.refresh_power for i in range(count - 1)]
        least = 0 if run.image is None else 1  # the first canvas then has a step, by which it is the picture
        refreshes = [
            max(min(math.floor(round(share * run.num_steps, 9)), run.num_steps - 1), least) for share in shares
        ]
        return [range(*ends) for ends in pairwise([0, *refreshes, run.num_steps])]

    def guidance_scales(self, run: Run, count: int) -> list[float | None]:
        """Energy rectification: the guidance scale on each of `count` canvases; None: that of the run."""
        own, most = getattr(run.denoiser.guidance, "guidance_scale", None), self.max_guidance_scale
        if most == "published":
            most = None if own == 1 else published(run).max_guidance_scale
        if most is None:
            return [None] * count
        least = most if own is None else own
        return [None, *(least + (most - least) * (i / (count - 1)) ** self.guidance_power for i in range(1, count))]
