"""A run whose parts have prompts of their own: the stages of its method, made once for each and joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cutdiff.given.regions import Region, coverage
from cutdiff.methods.shared import Run, stages_of, step_at
from cutdiff.models.config import Size
from cutdiff.sampling.conditioning import Prompts
from cutdiff.sampling.denoiser import Denoiser, Memory
from cutdiff.sampling.regions import Bootstrapping, Layout, zipped
from cutdiff.sampling.rows import Text
from cutdiff.sampling.stages import Phase, Stage
from cutdiff.settings import Settings


def in_regions(
    run: Run, stages: list[Stage | Phase], settings: Settings, encoded: Callable[[Prompts], tuple[Text, Text]]
) -> tuple[list[Stage | Phase], list[Denoiser]]:
    """The stages of a run whose parts have prompts of their own, and the denoisers of these parts; those of its own
    prompt are `stages`."""
    regions: Sequence[Region] = settings.regions
    coverages = [partial(_coverage, region) for region in regions]
    layout = Layout(coverages, [region.weight for region in regions], [stage.size or run.size for stage in stages])
    runs = []
    for region in regions:
        prompts = [region.prompt] * len(run.prompts)
        texts = Prompts(prompts, None, settings.negative_prompt, settings.negative_prompt_2)
        if region.negative_prompt is not None:
            texts = Prompts(prompts, negative=region.negative_prompt)
        positive, negative = encoded(texts)
        denoiser = replace(run.denoiser, positive=positive, negative=negative, memory=Memory())
        runs.append(replace(run, denoiser=denoiser, prompts=prompts))
    all_stages = [stages_of(settings.method, each) for each in runs]
    if layout.has_background:
        runs, all_stages = [run, *runs], [stages, *all_stages]
    first = range(step_at(settings.bootstrapped, run.num_steps))
    side = run.native_size * run.denoiser.factor
    bootstrapping = Bootstrapping(first, layout, run.draws, run.encode, side)
    joined = zipped(all_stages, layout, run.size, bootstrapping, run.denoiser.unet.device)
    return joined, [each.denoiser for each in runs]


def _coverage(region: Region, size: Size) -> Tensor:
    return torch.from_numpy(coverage(region, size))
