"""CutDiffusion and magnify with one part taken out or changed: for the ablations and sweeps.

Every one is a method, as those in `cutdiff.methods`; the name of the function is the name of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cutdiff.methods.cutdiffusion import cutdiffusion, denoise_patches
from cutdiff.methods.direct import direct
from cutdiff.methods.magnify import enlarged, magnify
from cutdiff.methods.multidiffusion import denoise_views
from cutdiff.methods.shared import Run
from cutdiff.models.inside import replaced
from cutdiff.models.unet import Context, UNet
from cutdiff.sampling.denoiser import Denoiser, Inputs
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Stage

Method = Callable[[Run], list[Stage]]


def contiguous_patches(run: Run) -> list[Stage]:
    """No relocation: patches are tiles of the canvas, which exchange pixels as the interleaved ones do."""
    structure, detail = cutdiffusion(run)
    rows, columns = grid_for(run.size, run.denoiser.native_size)
    sides = {"rows": rows, "columns": columns}

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        woven = rearrange(latents, "b c (rows h) (columns w) -> b c (h rows) (w columns)", **sides)
        denoised = structure.denoise(woven, sigma, step)
        return rearrange(denoised, "b c (h rows) (w columns) -> b c (rows h) (columns w)", **sides)

    return [replace(structure, denoise=denoise), detail]


def interaction_every(k: int) -> Method:
    """Patches exchange pixels at steps 0, k, 2k … only."""

    def method(run: Run) -> list[Stage]:
        structure, detail = cutdiffusion(run)
        still = denoise_patches(run, grid_for(run.size, run.denoiser.native_size), "none")

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            return (still if step % k else structure.denoise)(latents, sigma, step)

        return [replace(structure, denoise=denoise), detail]

    return _named(method, f"interaction_every_{k}")


def conditioned(structure: str, detail: str) -> Method:
    """Size conditioning "native" or "target", for each stage by itself."""

    def method(run: Run) -> list[Stage]:
        return [
            cutdiffusion(replace(run, size_conditioning=structure))[0],
            cutdiffusion(replace(run, size_conditioning=detail))[1],
        ]

    return _named(method, f"structure_{structure}_detail_{detail}")


def without_jitter(run: Run) -> list[Stage]:
    """Views stand on the same grid at every step."""
    structure, detail = cutdiffusion(run)
    return [structure, replace(detail, denoise=denoise_views(run, (0, 0)))]


def cosine_weights(run: Run) -> list[Stage]:
    """A view counts less towards its border: sin² of the way across it, on both axes."""
    structure, detail = cutdiffusion(run)
    rise = [torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() for side in run.window]
    return [structure, replace(detail, denoise=denoise_views(run, run.jitter, torch.outer(*rise)))]


def deep_reused(k: int, *stages: str) -> Method:
    """DeepCache (Ma et al. 2023, arXiv 2312.00858) in some stages of CutDiffusion: of k steps one runs the whole
    network; the others only its finest level, on what the levels below gave at that step to the patch or view of the
    same number. Views stand still for it: a patch's pixels come from elsewhere at every step all the same."""

    def method(run: Run) -> list[Stage]:
        structure, detail = without_jitter(run) if "detail" in stages else cutdiffusion(run)
        return [
            replace(stage, denoise=_reusing(run, k, stage)) if stage.name in stages else stage
            for stage in (structure, detail)
        ]

    return _named(method, f"deep_reused_every_{k}_{'_and_'.join(stages)}")


def deep_reused_direct(k: int) -> Method:
    """The same in direct inference: what it was made for, at native size."""

    def method(run: Run) -> list[Stage]:
        (stage,) = direct(run)
        return [replace(stage, denoise=_reusing(run, k, stage))]

    return _named(method, f"deep_reused_every_{k}_direct")


def _reusing(run: Run, k: int, stage: Stage) -> CanvasDenoiser:
    unet = run.denoiser.unet
    kept: dict[int, Tensor] = {}  # by the number of a pass in its step

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        whole = (step - stage.steps.start) % k == 0
        passes = count()

        def network(_images: Tensor, rows: Inputs) -> Tensor:
            number = next(passes)
            if not whole and number in kept and len(kept[number]) == len(rows[0]):
                return _finest(unet, kept[number], *rows)
            found: list[Any] = []
            hook = unet.up_blocks[-2].register_forward_hook(lambda _module, _args, output: found.append(output))
            try:
                prediction = run.denoiser.evaluate(rows)
            finally:
                hook.remove()
            kept[number] = found[0]
            return prediction

        with replaced(run.denoiser, network=network):
            return stage.denoise(latents, sigma, step)

    return denoise


def _finest(unet: UNet, below: Tensor, x: Tensor, timesteps: Tensor, context: Context, *added: Tensor) -> Tensor:
    """The network's output with `below` in the place of all that its finest level gets from the others."""
    time = unet.embed_conditions(timesteps, *added).to(x.dtype)
    x = unet.conv_in(x)
    *skips, _ = [x, *unet.down_blocks[0](x, time, context)]
    x = unet.up_blocks[-1](below, skips, time, context, None)
    return unet.conv_out(unet.conv_norm_out(x))


def not_held(run: Run) -> list[Stage | Phase]:
    """Magnify, whose estimates may leave the native picture."""
    structure, detail = magnify(run)
    assert isinstance(structure, Stage)
    return [structure, enlarged(run, detail.steps, hold=lambda run, picture, denoise: denoise)]


def told_native(method: Method) -> Method:
    """A method on the whole canvas, whose network is told that it draws a picture of native size.

    What "original size: twice the native one" means, a network learned from its training pictures: SDXL a large picture
    that was shrunk, the embedded model a crop that was magnified.
    """

    def variant(run: Run) -> list[Stage]:
        native = (run.denoiser.native_size, run.denoiser.native_size)

        def through(*args: Any, **options: Any) -> Tensor:
            told = {**options, "original_size": native, "target_size": native}
            return Denoiser.through(run.denoiser, *args, **told)

        def inside(denoise: CanvasDenoiser) -> CanvasDenoiser:
            def told(latents: Tensor, sigma: float, step: int) -> Tensor:
                with replaced(run.denoiser, through=through):
                    return denoise(latents, sigma, step)

            return told

        return [replace(stage, denoise=inside(stage.denoise)) for stage in method(run)]

    return _named(variant, f"{method.__name__}_told_native")


def _named(method: Method, name: str) -> Method:
    method.__name__ = name
    return method
