"""AccDiffusion (Lin et al. 2024, arXiv 2407.10738): DemoFusion whose views are told only of what they show.

While the picture of native size is drawn, cross-attention tells where it shows each word; a view of a larger canvas
gets those words for a prompt that fill enough of it (patch-content-aware prompts). The interleaved patches exchange
pixels before the network and after it (dilated sampling with window interaction).

As in the published code, whose defaults these are: maps are averaged over all steps and over the layers at the coarsest
level, without the middle; a mask is where a map exceeds its mean, opened with 3×3 pixels as often as its side has
sixteenths; views are drawn once a phase, so that their prompts hold. Unlike it: views may stand at any latent, there at
every fourth, the grain of the maps; a word of several tokens stays whole, where that code prompts with the pieces; maps
that are not square are read as they lie, where that code swaps their sides; prompts are found after the first phase
whatever its last timestep, there only where it is 1; all patches exchange pixels, there those of one view batch; a word
keeps its weight (`models.prompts`), there are none. What is said of the network's input, padding, moments and sizes in
`demofusion` holds here too. That code moves each channel of a pixel by itself, which is `interaction="channel"`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.demofusion import cascade, denoise_picture
from cutdiff.methods.multidiffusion import denoise_at
from cutdiff.methods.shared import Run
from cutdiff.models.attention import map_level, recorded_attention
from cutdiff.models.inside import replaced
from cutdiff.sampling.denoiser import Size
from cutdiff.sampling.operators import views
from cutdiff.sampling.solvers import CanvasDenoiser, Phase, Stage


def accdiffusion(run: Run) -> list[Stage | Phase]:
    """Every phase takes num_steps steps."""
    maps = WordMaps()
    return cascade(
        run,
        lambda first: record(first, maps),
        lambda phase, steps: denoise_prompted_views(phase, steps.start, maps),
        run.interaction,
    )


@dataclass(frozen=True)
class WordMaps:
    """What the first phase leaves to those after it: a map (B, tokens, h, w) for every step."""

    steps: list[Tensor] = field(default_factory=list)

    def masks(self) -> Tensor:
        """Where the picture shows each token: (B, tokens, h, w) of 0 and 1."""
        return responsive(torch.stack(self.steps).mean(dim=0))


def record(run: Run, maps: WordMaps) -> CanvasDenoiser:
    """D on the whole canvas; what the prompt's half of the guidance pair looks at goes to `maps`."""
    denoise_whole = denoise_picture(run)
    scale = 2 ** map_level(run.denoiser.unet)
    height, width = (-(-side // scale) for side in run.size)

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        with replaced(run.denoiser, divided=False), recorded_attention(run.denoiser.unet) as recorded:
            denoised = denoise_whole(latents, sigma, step)
        copies = run.denoiser.copies
        prompted = recorded.mean()[copies - 1 :: copies]  # (B, h·w, tokens)
        maps.steps.append(prompted.mT.unflatten(2, (height, width)))
        return denoised

    return denoise


def denoise_prompted_views(run: Run, step: int, maps: WordMaps) -> CanvasDenoiser:
    """average ∘ D ∘ views, drawn for `step` and kept, each with a prompt of its own."""
    origins = run.draws.view_origins(step, run.size, run.window, run.strides, run.jitter)
    origins = origins.expand(len(run.prompts), *origins.shape[-2:])  # (B, V, 2)
    words = [run.text.words(prompt) for prompt in run.prompts]
    masks = F.interpolate(maps.masks(), run.size, mode="nearest")
    prompts = view_prompts(words, masks, origins, run.window, run.word_threshold)
    # As long as the negative prompt's. Broken at commas, fewer words could take more chunks than all of them.
    positive = run.text.encode(prompts, min_length=run.denoiser.negative.context.shape[1], comma_window=0)

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        return denoise_at(run, origins, run.jitter, latents, sigma, positive=positive)

    return denoise


def view_prompts(
    words: list[list[tuple[str, list[int]]]], masks: Tensor, origins: Tensor, window: Size, threshold: float
) -> list[str]:
    """The words, in their order, that fill at least `threshold` of each view; images first, views in their order.

    words: of each image, with the tokens of each · masks (B, tokens, H, W), 0 and 1 · origins (B, V, 2). A word is
    where any of its tokens is, and nowhere outside of the canvas.
    """
    prompts = []
    for image, mask, at in zip(words, masks, origins, strict=True):
        if not image:
            prompts += [""] * len(at)
            continue
        shown = torch.stack([mask[tokens].amax(dim=0) for _, tokens in image])  # (words, H, W)
        shares = views(shown[None], at, window).mean(dim=(2, 3))  # (V, words)
        for share in shares.tolist():
            kept = [word for (word, _), filled in zip(image, share, strict=True) if filled >= threshold]
            prompts.append(" ".join(kept))
    return prompts


def responsive(maps: Tensor) -> Tensor:
    """Where each map (B, tokens, h, w) exceeds its mean, without specks: 0 and 1, eroded, then dilated."""
    masks = (maps > maps.mean(dim=(2, 3), keepdim=True)).to(maps)
    radius = max(maps.shape[2:]) // 16
    eroded = -F.max_pool2d(-masks, 2 * radius + 1, stride=1, padding=radius)
    return F.max_pool2d(eroded, 2 * radius + 1, stride=1, padding=radius)
