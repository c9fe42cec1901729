"""CutDiffusion and magnify with one part taken out or changed: for the ablations and sweeps.

Every one is a method, a plain function of a run; the name of the function is the name of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cutdiff.methods.cutdiffusion import CutDiffusion
from cutdiff.methods.direct import direct
from cutdiff.methods.magnify import Magnify
from cutdiff.methods.shared import Run, stages_of
from cutdiff.models.unet import Context, UNet
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import CanvasDenoiser, Phase, Stage
from cutdiff.specs import name_of

Method = Callable[[Run], Sequence[Stage | Phase]]


def contiguous_patches(run: Run) -> list[Stage]:
    """No relocation: patches are tiles of the canvas, which exchange pixels as the interleaved ones do."""
    structure, detail = CutDiffusion().stages(run)
    rows, columns = grid_for(run.size, run.native_size)
    sides = {"rows": rows, "columns": columns}

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        woven = rearrange(latents, "b c (rows h) (columns w) -> b c (h rows) (w columns)", **sides)
        denoised = structure.denoise(woven, sigma, step)
        return rearrange(denoised, "b c (h rows) (w columns) -> b c (rows h) (columns w)", **sides)

    return [replace(structure, denoise=denoise), detail]


def interaction_every(k: int) -> Method:
    """Patches exchange pixels at steps 0, k, 2k … only."""

    def method(run: Run) -> list[Stage]:
        structure, detail = CutDiffusion().stages(run)
        still, _ = CutDiffusion(interaction="none").stages(run)

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            return (still if step % k else structure).denoise(latents, sigma, step)

        return [replace(structure, denoise=denoise), detail]

    return _named(method, f"interaction_every_{k}")


def conditioned(structure: Any, detail: Any) -> Method:
    """Size conditioning "native" or "target", for each stage by itself."""

    def method(run: Run) -> list[Stage]:
        stages = [CutDiffusion(size_conditioning=sizes).stages(run) for sizes in (structure, detail)]
        return [stages[0][0], stages[1][1]]

    return _named(method, f"structure_{structure}_detail_{detail}")


def without_jitter(run: Run) -> list[Stage]:
    """Views stand on the same grid at every step."""
    structure, detail = CutDiffusion().stages(run)
    return [structure, replace(detail, denoise=CutDiffusion().on_views(run, jitter=(0, 0)))]


def cosine_weights(run: Run) -> list[Stage]:
    """A view counts less towards its border: sin² of the way across it, on both axes."""
    structure, detail = CutDiffusion().stages(run)
    rise = [torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() for side in run.window]
    return [structure, replace(detail, denoise=CutDiffusion().on_views(run, weights=torch.outer(*rise)))]


def deep_reused(k: int, *stages: str) -> Method:
    """DeepCache (Ma et al. 2023, arXiv 2312.00858) in some stages of CutDiffusion: of k steps one runs the whole
    network; the others only its finest level, on what the levels below gave at that step to the patch or view of the
    same number. Views stand still for it: a patch's pixels come from elsewhere at every step all the same."""

    def method(run: Run) -> list[Stage]:
        plain = without_jitter if "detail" in stages else CutDiffusion().stages
        reusing = [plain(replace(run, denoiser=reusing_denoiser(run, k, stage))) for stage in plain(run)]
        return [reusing[number][number] if stage.name in stages else stage for number, stage in enumerate(plain(run))]

    return _named(method, f"deep_reused_every_{k}_{'_and_'.join(stages)}")


def deep_reused_direct(k: int) -> Method:
    """The same in direct inference: what it was made for, at native size."""

    def method(run: Run) -> list[Stage]:
        (stage,) = direct(run)
        return direct(replace(run, denoiser=reusing_denoiser(run, k, stage)))

    return _named(method, f"deep_reused_every_{k}_direct")


def reusing_denoiser(run: Run, k: int, stage: Stage) -> Denoiser:
    """The denoiser of a stage, which runs the levels below the finest one in its first of every `k` steps."""
    unet = run.denoiser.unet
    kept: dict[int, Tensor] = {}  # by the number of a pass in its step
    passes, last = count(), -1

    def network(call: Call) -> Tensor:
        nonlocal passes, last
        if call.step != last:
            passes, last = count(), call.step
        number = next(passes)
        if (call.step - stage.steps.start) % k and number in kept and len(kept[number]) == len(call.inputs[0]):
            return _finest(unet, kept[number], *call.inputs)
        outputs: list[Any] = []
        hook = unet.up_blocks[-2].register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            prediction = run.denoiser.evaluate(call.inputs)
        finally:
            hook.remove()
        kept[number] = outputs[0]
        return prediction

    return replace(run.denoiser, network=network)


def _finest(unet: UNet, below: Tensor, x: Tensor, timesteps: Tensor, context: Context, *added: Tensor) -> Tensor:
    """The network's output with `below` in the place of all that its finest level gets from the others."""
    time = unet.embed_conditions(timesteps, *added).to(x.dtype)
    x = unet.conv_in(x)
    *skips, _ = [x, *unet.down_blocks[0](x, time, context)]
    x = unet.up_blocks[-1](below, skips, time, context, None)
    return unet.conv_out(unet.conv_norm_out(x))


def not_held(run: Run) -> Sequence[Stage | Phase]:
    """Magnify, whose estimates may leave the native picture."""

    class NotHeld(Magnify):
        def hold(self, run: Run, picture: Tensor, denoise: CanvasDenoiser) -> CanvasDenoiser:
            return denoise

    return NotHeld().stages(run)


@dataclass(frozen=True)
class Native(Denoiser):
    """A denoiser whose network is told that it draws a picture of native size, whatever it draws."""

    def through(self, *args: Any, **options: Any) -> Tensor:
        native = (self.native_size, self.native_size)
        return super().through(*args, **{**options, "original_size": native, "target_size": native})


def told_native(method: Method | Any) -> Method:
    """A method on the whole canvas, whose network is told that it draws a picture of native size.

    What "original size: twice the native one" means, a network learned from its training pictures: SDXL a large picture
    that was shrunk, the embedded model a crop that was magnified.
    """

    def variant(run: Run) -> Sequence[Stage | Phase]:
        native = replace(run, denoiser=Native(**vars(run.denoiser)))
        return stages_of(method, native)

    return _named(variant, f"{name_of('method', method)}_told_native")


def _named(method: Method, name: str) -> Any:
    method.__name__ = name
    return method
