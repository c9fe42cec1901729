"""CutDiffusion (Lin et al. 2024, arXiv 2404.15141): structure on interleaved patches, then detail on views."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cutdiff.methods.multidiffusion import denoise_views
from cutdiff.methods.shared import Run, guided, step_at
from cutdiff.sampling.denoiser import Size
from cutdiff.sampling.operators import Patches, grid_for, pad_to_grid
from cutdiff.sampling.solvers import CanvasDenoiser, Stage

STRUCTURE_FRACTION = 0.5
"""The paper's T' = T / 2."""


def cutdiffusion(run: Run) -> list[Stage]:
    """The structure stage takes the first ceil(structure_fraction · num_steps) steps, the detail stage the others."""
    switch = switch_step(run, STRUCTURE_FRACTION)
    grid = grid_for(run.size, run.denoiser.native_size)
    detail = guided(run, run.detail_guidance_scale, denoise_views(run, run.jitter))
    return [
        Stage("structure", range(switch), denoise_patches(run, grid, run.interaction)),
        Stage("detail", range(switch, run.num_steps), detail),
    ]


def switch_step(run: Run, default: float) -> int:
    """The first step of the detail stage: where the run says, or the `default` of its method."""
    share = default if run.structure_fraction is None else run.structure_fraction
    return step_at(share, run.num_steps)


def denoise_patches(
    run: Run, grid: Size, interaction: str, show: Callable[[Tensor, float], Tensor] | None = None
) -> CanvasDenoiser:
    """relocate ∘ permute⁻¹ ∘ D ∘ permute ∘ cut: all patches draw one picture, because they keep exchanging pixels.

    A canvas that the grid does not divide is padded for the cut and cropped after the relocation. Size conditioning
    "native": every patch is a whole picture of its own size. "target": original = target = the finished picture.
    `show(canvas, sigma)` is what the network is shown in place of the canvas.
    """

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        canvas = pad_to_grid(latents, grid)
        batch, channels, height, width = canvas.shape
        shape = (batch, channels, height // grid[0], width // grid[1])
        patches = Patches(grid, run.draws.permutation(step, grid, shape, interaction))
        seen = None if show is None else show(canvas, sigma)
        told = run.told_size
        denoised = run.denoiser.through(patches, canvas, sigma, seen=seen, original_size=told, target_size=told)
        return denoised[:, :, : run.size[0], : run.size[1]]

    return denoise
