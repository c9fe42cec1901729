"""Values that are not finite: which part of a run they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cutdiff.checkpoint.model import Model, dtype_name
from cutdiff.models.inside import replaced
from cutdiff.sampling.denoiser import Denoiser
from cutdiff.sampling.solvers import NotFinite, Step


def explained(steps: Iterator[Step], denoiser: Denoiser, model: Model) -> Iterator[Step]:
    """The steps of a run; FloatingPointError names step, stage, view and weights where something is not finite."""
    try:
        yield from steps
    except NotFinite as error:
        raise FloatingPointError(f"{error}{_first_item(error, denoiser)}; {_cause(model)}") from None


@torch.no_grad()
def _first_item(error: NotFinite, denoiser: Denoiser) -> str:
    """Which patch or view the network fails on, found by taking the step's estimate once more."""
    found: list[str] = []
    images = len(error.latents)

    def predict(*args: Any) -> Tensor:
        prediction = Denoiser.predict(denoiser, *args)
        finite = prediction.flatten(1).isfinite().all(dim=1)
        if not found and not finite.all():
            item, items = int(finite.int().argmin()) // denoiser.copies, len(finite) // denoiser.copies // images
            found.append(f", first in patch or view {item % items + 1} of {items} of picture {item // items + 1}")
        return prediction

    with replaced(denoiser, predict=predict):
        error.stage.denoise(error.latents, error.sigma, error.step)
    return found[0] if found else ", although the network's output is finite"


def _cause(model: Model) -> str:
    bad = model.bad_weights()
    if bad or model.dtype == torch.float32:
        return bad or "all weights are finite"
    return f"all weights are finite, so {dtype_name(model.dtype)} overflowed: use float32 or bfloat16"
