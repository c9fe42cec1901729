"""Attention scaling (Jin et al. 2023, arXiv 2306.08645): the entropy of self-attention stays what it was in training.

More tokens flatten the softmax; a larger scale sharpens it again. The paper derives sqrt(log_T N / d) in place of
sqrt(1 / d), for N tokens now, T in training and heads of width d, in every self-attention and at every step; attention
over the text, whose number of tokens does not change, keeps its scale.

There is no code of the authors. ScaleCrafter's (github.com/YingqingHe/ScaleCrafter) has the method as a baseline; there
the scale has no effect in fused attention, its default, which does not read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from cutdiff.methods.shared import Run, on_whole_inside
from cutdiff.models.inside import replaced, self_attentions, size_at
from cutdiff.models.positions import entropy_factor
from cutdiff.models.unet import UNet, as_unet
from cutdiff.options import Options
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.stages import Size, Stage


@dataclass(frozen=True)
class AttentionScaling(Options):
    """D'(x) at every step, its scales those of the canvas; a canvas smaller than native gets smaller scales."""

    changes_network: ClassVar[bool] = True
    unet_only: ClassVar[str] = "scales the self-attentions on each level"

    def stages(self, run: Run) -> list[Stage]:
        @contextmanager
        def changed(step: int) -> Iterator[Denoiser]:
            with scaled_attention(as_unet(run.denoiser.unet), run.size):
                yield run.denoiser

        return [Stage("attention_scaling", range(run.num_steps), on_whole_inside(changed))]


@contextmanager
def scaled_attention(unet: UNet, size: Size) -> Iterator[None]:
    """Scale the self-attentions of every level for a canvas of `size` latents."""
    native = unet.config.native_size
    with ExitStack() as changes:
        for level, attention in self_attentions(unet):
            factor = entropy_factor(math.prod(size_at(size, level)), math.prod(size_at((native, native), level)))
            changes.enter_context(replaced(attention, scale=factor * attention.scale))
        yield
