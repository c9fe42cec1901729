"""Values that are not finite: the part of a run that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cutdiff.sampling.denoiser import Call, Denoiser, Observer
from cutdiff.sampling.stages import NotFinite, Step


def explained(steps: Iterator[Step], denoiser: Denoiser, cause: Callable[[], str]) -> Iterator[Step]:
    """The steps of a run; FloatingPointError names step, stage, view and `cause` where something is not finite."""
    try:
        yield from steps
    except NotFinite as error:
        raise FloatingPointError(f"{error}{_first_item(error, denoiser)}; {cause()}") from None


class _FirstBad(Observer):
    """Notes the first item, counted from 1, whose prediction is not finite; 0 where all are."""

    item = 0
    per_image = 1

    def call(self, call: Call, prediction: Tensor) -> None:
        finite = prediction.flatten(1).isfinite().all(dim=1)
        self.per_image = call.num_rows // call.copies // call.num_images
        if not self.item and not finite.all():
            self.item = (call.first + int(finite.int().argmin())) // call.copies + 1


@torch.no_grad()
def _first_item(error: NotFinite, denoiser: Denoiser) -> str:
    """The patch or view that the network fails on, found by taking the step's estimate once more."""
    bad = _FirstBad()
    with denoiser.work.heard_by(bad):
        error.stage.denoise(error.latents, error.sigma, error.step)
    items = [item for item in denoiser.ranks.values(bad.item) if item]
    if not items:
        return ", although the network's output is finite"
    image, item = divmod(min(items) - 1, bad.per_image)
    return f", first in patch or view {item + 1} of {bad.per_image} of picture {image + 1}"
