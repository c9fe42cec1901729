"""The estimates of a stage on its way, to which those of a later one are led: the reference of HiFlow (2504.06232)."""

from __future__ import annotations

from torch import Tensor

from cutdiff.sampling.resize import resize
from cutdiff.sampling.stages import CanvasDenoiser, Size


class Trajectory:
    """A canvas denoiser that keeps, if it is to, its estimates of x0 by their order in a step and its number in the
    schedule."""

    def __init__(self, denoise: CanvasDenoiser, num_steps: int, keeps: bool) -> None:
        self.denoise, self.num_steps, self.keeps = denoise, num_steps, keeps
        self.estimates: list[Tensor] = []
        """The first estimates of all steps of the schedule, (steps, B, C, H, W), then their second ones, and so on;
        those that were not taken are the first that was."""
        self.step, self.sigmas = -1, list[float]()

    def __call__(self, latents: Tensor, sigma: float, step: int) -> Tensor:
        estimate = self.denoise(latents, sigma, step)
        if self.keeps:
            order = self.order(sigma, step)
            if order == len(self.estimates):
                self.estimates.append(estimate.expand(self.num_steps, *estimate.shape).clone())
            self.estimates[order][step % self.num_steps] = estimate
        return estimate

    def order(self, sigma: float, step: int) -> int:
        """The number, from 0 on, of the estimate at a sigma among those of the last step, which is this one."""
        if step != self.step:
            self.step, self.sigmas = step, []
        if sigma not in self.sigmas:
            self.sigmas.append(sigma)
        return self.sigmas.index(sigma)

    def reference(self, before: Trajectory, sigma: float, step: int, size: Size) -> Tensor:
        """The estimate of the stage `before` that goes with the last one of this stage, of the same step and sigma,
        enlarged in latents to a size."""
        order = min(self.order(sigma, step), len(before.estimates) - 1)
        return resize(before.estimates[order][step % self.num_steps], size)
