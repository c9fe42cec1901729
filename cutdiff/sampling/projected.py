"""Adaptive projected guidance, which has a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

from cutdiff.options import MAX_FLOAT32, Between, Options, Scale, Share
from cutdiff.sampling.guidance import Guidance
from cutdiff.sampling.schedules import Schedule

SDXL_SIDE = 128
"""The side of SDXL's native pictures in latents."""


@dataclass(frozen=True)
class APG(Options):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1): conditional + (scale − 1)·Δ.

    Δ, which is conditional − unconditional, is in turn added to a momentum, cut to a norm, and has the share `eta` of
    its part along the conditional estimate, the part that oversaturates. It takes estimates of x0, as the paper has it
    (diffusers takes predictions). Norms and products are those of a whole image.

    The k-th estimate of a step adds to the k-th of the last step before that was guided, so that with several
    estimates in a step each momentum advances once; where a canvas has another size, it begins anew.
    """

    guidance_scale: Scale = 7.5
    """The scale, as of classifier-free guidance; 1 or less is off."""
    eta: Share = 0.0
    """The share of the parallel part; 1 leaves Δ as it is."""
    norm_threshold: Annotated[float, Between(0, MAX_FLOAT32)] | None = None
    """The most that the norm of Δ may be; 0 is no limit. None: the paper's 15 for SDXL, on canvases that have more or
    fewer than its 128×128 latents in proportion to the root of their number, as norms grow."""
    momentum: Annotated[float, Between(-1, 1)] = -0.5
    """The factor of the sum of the differences before, which is added to each; 0 is none."""

    def begin(self, schedule: Schedule) -> Guidance:
        return Averaging(self)

    def guide(self, conditional: Tensor, unconditional: Tensor, update: Tensor) -> Tensor:
        """The estimate for a Δ to which momentum was added, all (B, C, H, W)."""
        difference, per_image = conditional - unconditional, {"dim": (1, 2, 3), "keepdim": True}
        most = self.norm_threshold
        if most is None:
            most = 15 * math.sqrt(conditional.shape[2] * conditional.shape[3]) / SDXL_SIDE
        if most:
            update = update * (most / update.square().sum(**per_image).sqrt().clamp(min=most))
        if self.eta != 1:
            square = conditional.square().sum(**per_image).clamp(min=1e-24)
            along = (update * conditional).sum(**per_image) / square
            update = update - (1 - self.eta) * along * conditional
        guided = unconditional + self.guidance_scale * difference
        return guided + (self.guidance_scale - 1) * (update - difference)


@dataclass
class Averaging:
    """Adaptive projected guidance in one stage."""

    apg: APG
    step: int | None = None
    """The step under way."""
    count: int = 0
    """The estimates of it so far."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """The sum of the differences, by the number of the estimate in its step."""

    @property
    def is_off(self) -> bool:
        return self.apg.guidance_scale == 1

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        self.step, self.count = step, self.count + 1 if step == self.step else 0
        update = conditional - unconditional
        if self.apg.momentum:
            before = self.sums.get(self.count)
            if before is not None and before.shape == update.shape:
                update = update + self.apg.momentum * before
            self.sums[self.count] = update
        return self.apg.guide(conditional, unconditional, update)
