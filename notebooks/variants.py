"""CutDiffusion and magnify with one part removed or changed, for the ablations and sweeps.

Each variant is a method that is a plain function of a run; the name of the function is the name of the method.
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
from cutdiff.models.unet import Context, UNet, as_unet
from cutdiff.sampling.denoiser import Call, Denoiser
from cutdiff.sampling.operators import grid_for
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.specs import name_of

Method = Callable[[Run], Sequence[Stage | Phase]]


def contiguous_patches(run: Run) -> list[Stage]:
    """CutDiffusion without relocation: patches are tiles of the canvas and exchange pixels as interleaved ones do."""
    structure, detail = CutDiffusion().stages(run)
    rows, columns = grid_for(run.size, run.native_size)
    sides = {"rows": rows, "columns": columns}

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        woven = rearrange(latents, "b c (rows h) (columns w) -> b c (h rows) (w columns)", **sides)
        denoised = structure.denoise(woven, sigma, step)
        return rearrange(denoised, "b c (h rows) (w columns) -> b c (rows h) (columns w)", **sides)

    return [replace(structure, denoise=denoise), detail]


def interaction_every(k: int) -> Method:
    """CutDiffusion whose patches exchange pixels at steps 0, k, 2k … only."""

    def method(run: Run) -> list[Stage]:
        structure, detail = CutDiffusion().stages(run)
        still, _ = CutDiffusion(interaction="none").stages(run)

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            return (still if step % k else structure).denoise(latents, sigma, step)

        return [replace(structure, denoise=denoise), detail]

    return _named(method, f"interaction_every_{k}")


def conditioned(structure: Any, detail: Any) -> Method:
    """CutDiffusion whose stages each have their own size conditioning, "native" or "target"."""

    def method(run: Run) -> list[Stage]:
        stages = [CutDiffusion(size_conditioning=sizes).stages(run) for sizes in (structure, detail)]
        return [stages[0][0], stages[1][1]]

    return _named(method, f"structure_{structure}_detail_{detail}")


def without_jitter(run: Run) -> list[Stage]:
    """CutDiffusion whose views stand on the same grid at every step."""
    structure, detail = CutDiffusion().stages(run)
    return [structure, replace(detail, denoise=CutDiffusion().on_views(run, jitter=(0, 0)))]


def cosine_weights(run: Run) -> list[Stage]:
    """CutDiffusion whose views weigh less towards their borders: sin² of the way across them, on both axes."""
    structure, detail = CutDiffusion().stages(run)
    rise = [torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() for side in run.window]
    return [structure, replace(detail, denoise=CutDiffusion().on_views(run, weights=torch.outer(*rise)))]


def deep_reused(k: int, *stages: str) -> Method:
    """CutDiffusion with DeepCache (Ma et al. 2023, arXiv 2312.00858) in some of its stages.

    One of k steps runs the whole network. The others run its finest level only, on the output that the levels below had
    at that step for the patch or view of the same number. Views stand still for this; the pixels of a patch come from
    elsewhere at every step all the same.
    """

    def method(run: Run) -> list[Stage]:
        plain = without_jitter if "detail" in stages else CutDiffusion().stages
        reusing = [plain(replace(run, denoiser=reusing_denoiser(run, k, stage))) for stage in plain(run)]
        return [reusing[number][number] if stage.name in stages else stage for number, stage in enumerate(plain(run))]

    return _named(method, f"deep_reused_every_{k}_{'_and_'.join(stages)}")


def deep_reused_direct(k: int) -> Method:
    """Direct inference with DeepCache, which was made for that, at native size."""

    def method(run: Run) -> list[Stage]:
        (stage,) = direct(run)
        return direct(replace(run, denoiser=reusing_denoiser(run, k, stage)))

    return _named(method, f"deep_reused_every_{k}_direct")


def reusing_denoiser(run: Run, k: int, stage: Stage) -> Denoiser:
    """A denoiser for a stage that runs the levels below the finest one in the first of every `k` steps only."""
    unet = as_unet(run.denoiser.unet)
    kept: dict[int, Tensor] = {}  # the output of the levels below, by the number of a pass in its step
    passes, last = count(), -1

    def network(call: Call) -> Tensor:
        nonlocal passes, last
        if call.step != last:
            passes, last = count(), call.step
        number = next(passes)
        if (call.step - stage.steps.start) % k and number in kept and len(kept[number]) == len(call.inputs[0]):
            return _finest(unet, kept[number], *call.inputs[:5])
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
    """The output of the network with `below` in the place of what its finest level receives from the others."""
    time = unet.embed_conditions(timesteps, *added).to(x.dtype)
    x = unet.conv_in(x)
    *skips, _ = [x, *unet.down_blocks[0](x, time, context)]
    x = unet.up_blocks[-1](below, skips, time, context, None)
    return unet.conv_out(unet.conv_norm_out(x))


def not_held(run: Run) -> Sequence[Stage | Phase]:
    """Magnify without its hold: estimates may depart from the native picture."""
    return Magnify(hold="none").stages(run)


@dataclass(frozen=True)
class Native(Denoiser):
    """A denoiser whose size conditioning is always that of a picture of native size."""

    def through(self, *args: Any, **options: Any) -> Tensor:
        native = (self.native_size, self.native_size)
        return super().through(*args, **{**options, "original_size": native, "target_size": native})


def told_native(method: Method | Any) -> Method:
    """A method on the whole canvas with the size conditioning of a picture of native size.

    A network learns from its training pictures what an "original size" of twice the native one means: for SDXL it is a
    large picture that was shrunk, for the embedded model a crop that was magnified.
    """

    def variant(run: Run) -> Sequence[Stage | Phase]:
        native = replace(run, denoiser=Native(**vars(run.denoiser)))
        return stages_of(method, native)

    return _named(variant, f"{name_of('method', method)}_told_native")


def _named(method: Method, name: str) -> Any:
    """The method, with another name."""
    method.__name__ = name
    return method
