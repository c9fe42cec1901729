"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): overlapping views of the native size, averaged."""

from __future__ import annotations

from torch import Tensor

from cutdiff.methods.shared import Run
from cutdiff.models.text import TextStates
from cutdiff.sampling.denoiser import Size
from cutdiff.sampling.operators import Views
from cutdiff.sampling.solvers import CanvasDenoiser, Stage


def multidiffusion(run: Run) -> list[Stage]:
    """average ∘ D ∘ views at every step, without jitter."""
    return [Stage("views", range(run.num_steps), denoise_views(run, jitter=(0, 0)))]


def denoise_views(run: Run, jitter: Size, weights: Tensor | None = None) -> CanvasDenoiser:
    """average ∘ D ∘ views, which stand elsewhere at every step where there is jitter; `weights` as in `Views`."""

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        origins = run.draws.view_origins(step, run.size, run.window, run.strides, jitter)
        return denoise_at(run, origins, jitter, latents, sigma, weights=weights)

    return denoise


def denoise_at(
    run: Run,
    origins: Tensor,
    jitter: Size,
    latents: Tensor,
    sigma: float,
    *,
    positive: TextStates | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """average ∘ D ∘ views at `origins` (B, V, 2) or (V, 2): every view is conditioned as the crop that it is.

    Size conditioning "native": original size = the canvas, crop = the view's origin, not below 0, target = the window.
    "target", as the published CutDiffusion code has it: original = target = the finished picture, and the crop is
    counted from the corner of a canvas that is padded by the jitter's range. `positive`: text states of each view.
    """
    origins = origins.expand(len(latents), *origins.shape[-2:])  # (B, V, 2)
    corner = origins.flatten(0, 1).cpu()
    if run.size_conditioning == "native":
        crops, original, target = corner.clamp(min=0), run.size, run.window
    else:
        crops, original, target = corner + corner.new_tensor(jitter), run.target_size, run.target_size
    return run.denoiser.through(
        Views(origins, run.window, run.size, weights, device=latents.device),
        latents,
        sigma,
        positive=positive,
        crop_origins=crops,
        original_size=original,
        target_size=target,
    )
