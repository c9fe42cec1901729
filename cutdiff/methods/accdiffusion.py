"""AccDiffusion (Lin et al. 2024, arXiv 2407.10738): DemoFusion whose views have prompts of what they show.

While the picture of native size is drawn, cross-attention tells where it shows each word; a view of a larger canvas
gets those words for a prompt that fill enough of it (patch-content-aware prompts). The interleaved patches exchange
pixels before the network and after it (dilated sampling with window interaction).

Defaults are those of the published code. As there:
- Maps are averaged over all steps and over the layers at the coarsest level, without the middle.
- A mask is where a map exceeds its mean, opened with 3×3 pixels as often as its side has sixteenths.
- Views are drawn once a phase, so that their prompts hold.
Where it is not followed:
- Its views stand at every fourth latent, the grain of the maps; here they may stand at any.
- It divides a word's area in a view by the area of the native picture; here by that of the view.
- It prompts with the pieces of a word of several tokens; here the word stays whole, and keeps its weight.
- It swaps the sides of maps that are not square; here they are read as they lie.
- It makes prompts only where the last timestep of the first phase is 1; here always.
- It takes no given picture; here the network reads such a one at every step, noised, for the maps.
- It lets the patches of one view batch exchange pixels; here all do. It moves each channel of a pixel by itself, which
  is `interaction="channel"`.

AccDiffusion v2 (Lin et al. 2024, arXiv 2412.02099) is `hints="edges"`: views are drawn with a ControlNet whose hint are
the edges of the picture of the phase before, against what is distorted in them. The first phase and the patches are
drawn without. Its example scales the ControlNet by 0.6, which is `control_scale=0.6`; here it is 1 where nobody says.
Edges are found in the picture of the phase before, decoded, as in its code (OpenCV's Canny, whose thresholds lie 0.6 of
the picture's median from it), and enlarged; by bilinear interpolation, where its code takes a bicubic one.
The head of `demofusion` on the network's input, padding, moments and sizes holds here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.methods.shared import Run, Stages
from cutdiff.methods.tiled import Cascade, Grain
from cutdiff.models.attention import map_level, recorded_attention
from cutdiff.models.text import TextStates
from cutdiff.models.unet import as_unet
from cutdiff.options import Between, Share
from cutdiff.sampling.controls import Control
from cutdiff.sampling.edges import edges
from cutdiff.sampling.operators import views
from cutdiff.sampling.stages import CanvasDenoiser, Size
from cutdiff.settings import Settings


@dataclass(frozen=True, kw_only=True)
class AccDiffusion(Cascade):
    """A cascade of sizes whose patches exchange pixels, and whose views have prompts of their own. Every phase takes
    num_steps steps."""

    changes_network: ClassVar[bool] = True
    unet_only: ClassVar[str] = "reads the attention over the text"

    interaction: Grain = "channel"
    """The unit that patches exchange: each "channel" of a pixel by itself, as in the published code, every "pixel" as a
    whole, or "none"."""
    word_threshold: Share = 0.3
    """The share of a view that a word must fill to stand in its prompt: the paper's c."""
    hints: Literal["given", "edges"] = "given"
    """The hints of ControlNets: those that are "given" with them, or the "edges" of the picture of the phase before,
    for views alone, as AccDiffusion v2 has them."""
    edge_spread: Annotated[float, Between(0, 1)] = 0.6
    """The distance of an edge's thresholds from the picture's median, as a share of that."""

    @property
    def makes_hints(self) -> bool:
        """True where ControlNets come without hints, which are made on the way."""
        return self.hints == "edges"

    def check_settings(self, settings: Settings) -> None:
        """ValueError where the run has a second prompt: a view gets the words of one. So where hints are to be made and
        there is no ControlNet, or their option is given and they are not."""
        if self.makes_hints and not settings.control:
            raise ValueError("hints='edges' are for a ControlNet, and none is given: give control, or leave it out")
        if not self.makes_hints and self.edge_spread != AccDiffusion.edge_spread:
            raise ValueError(f"edge_spread={self.edge_spread:g} is for hints='edges': give that, or leave it out")
        if settings.prompt_2 is not None:
            raise ValueError(
                f"prompt_2={settings.prompt_2!r} is not for accdiffusion, whose views have words of one prompt"
            )

    def stages(self, run: Run) -> Stages:
        if not isinstance(run.denoiser.positive, TextStates):
            raise ValueError(
                "draws each view with words of one prompt that stays the same: leave AND, [a:b:0.5] and [a|b] out of "
                "it, or choose another method"
            )
        maps, controls = WordMaps(), run.denoiser.controls
        if self.makes_hints:
            run = replace(run, denoiser=replace(run.denoiser, controls=()))
        return self.cascade(
            run,
            lambda first: record(self.on_whole, first, maps),
            lambda phase, steps, previous: self.on_prompted_views(
                self.with_hints(phase, controls, previous), steps.start, maps
            ),
            self.interaction,
            looks=lambda step: True,
        )

    def with_hints(self, run: Run, controls: tuple[Control, ...], previous: Tensor) -> Run:
        """The run with these controls, whose hint are the edges of the picture of the phase before, if it is to be."""
        if not self.makes_hints:
            return run
        hint = edges(run.decode(previous), self.edge_spread)
        return replace(run, denoiser=replace(run.denoiser, controls=tuple(replace(c, hint=hint) for c in controls)))

    def on_prompted_views(self, run: Run, step: int, maps: WordMaps) -> CanvasDenoiser:
        """average ∘ D ∘ views, drawn for `step` and kept, each with a prompt of its own."""
        jitter = self.jitter(run)
        origins = run.draws.view_origins(step, run.size, run.window, self.strides(run), jitter)
        origins = origins.expand(len(run.prompts), *origins.shape[-2:])  # (B, V, 2)
        words = [run.text.words(prompt) for prompt in run.prompts]
        masks = F.interpolate(maps.masks(), run.size, mode="nearest")
        prompts = view_prompts(words, masks, origins, run.window, self.word_threshold)
        # As long as the negative prompt's. Broken at commas, fewer words could take more chunks than all of them.
        length = run.denoiser.text_at(step).negative.context.shape[1]
        positive = run.text.encode(prompts, min_length=length, comma_window=0)

        def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
            return self.denoise_views(run, origins, jitter, latents, sigma, step, positive=positive)

        return denoise


@dataclass(frozen=True)
class WordMaps:
    """The first phase's legacy to those after it: a map (B, tokens, h, w) for every step, of its first estimate."""

    steps: dict[int, Tensor] = field(default_factory=dict)

    def masks(self) -> Tensor:
        """A mask for each token, 1 where the picture shows it: (B, tokens, h, w)."""
        return responsive(torch.stack([*self.steps.values()]).mean(dim=0))


def record(draw: Callable[[Run], CanvasDenoiser], run: Run, maps: WordMaps) -> CanvasDenoiser:
    """D on the whole canvas, as `draw` makes it; the maps of the prompt's half of the guidance pair go to `maps`."""
    denoiser = replace(run.denoiser, shares_rows=False)  # every rank reads the maps of all rows
    denoise_whole = draw(replace(run, denoiser=denoiser))
    unet = as_unet(denoiser.unet)
    scale = 2 ** map_level(unet)
    height, width = (-(-side // scale) for side in run.size)

    def denoise(latents: Tensor, sigma: float, step: int) -> Tensor:
        with recorded_attention(unet) as recorded:
            denoised = denoise_whole(latents, sigma, step)
        copies = denoiser.copies_at(sigma, step)
        prompted = recorded.mean(copies * len(latents))[copies - 1 :: copies]  # (B, h·w, tokens)
        maps.steps.setdefault(step, prompted.mT.unflatten(2, (height, width)))
        return denoised

    return denoise


def view_prompts(
    words: list[list[tuple[str, list[int]]]], masks: Tensor, origins: Tensor, window: Size, threshold: float
) -> list[str]:
    """The words, in their order, that fill at least `threshold` of each view; images first, views in their order.

    words: for each image its words with their tokens · masks (B, tokens, H, W), 0 and 1 · origins (B, V, 2). A word is
    where any of its tokens is, and nowhere outside of the canvas.
    """
    prompts = []
    for image, mask, corners in zip(words, masks, origins, strict=True):
        if not image:
            prompts += [""] * len(corners)
            continue
        shown = torch.stack([mask[tokens].amax(dim=0) for _, tokens in image])  # (words, H, W)
        shares = views(shown[None], corners, window).mean(dim=(2, 3))  # (V, words)
        for share in shares.tolist():
            kept = [word for (word, _), filled in zip(image, share, strict=True) if filled >= threshold]
            prompts.append(" ".join(kept))
    return prompts


def responsive(maps: Tensor) -> Tensor:
    """Masks of where each map (B, tokens, h, w) exceeds its mean, without specks: 0 and 1, eroded, then dilated."""
    masks = (maps > maps.mean(dim=(2, 3), keepdim=True)).to(maps)
    radius = max(maps.shape[2:]) // 16
    eroded = -F.max_pool2d(-masks, 2 * radius + 1, stride=1, padding=radius)
    return F.max_pool2d(eroded, 2 * radius + 1, stride=1, padding=radius)
