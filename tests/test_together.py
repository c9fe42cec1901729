"""A picture, a mask, regions and a ControlNet in one run: each does what it does alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import with_nine

import cutdiff
from cutdiff.checkpoint.control import save_control
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.controlnet import ControlNet, ControlNetConfig
from cutdiff.output.record import fingerprint
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.settings import Settings

PROMPT = "a red house at night"


@pytest.fixture(scope="module")
def given(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run that is given all."""
    path = tmp_path_factory.mktemp("control") / "edges.safetensors"
    network = ControlNet(ControlNetConfig(tiny_model.unet.config, (4, 4, 4, 8)))
    randomise(network, 0)
    save_control(path, network)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 96, 3), dtype="u1")
    return {
        "image": pixels[0],
        "mask": np.tril(np.full((128, 96), 255, dtype="u1"), -8),
        "regions": [cutdiff.Region("a tent", (0, 0, 0.5, 1)), cutdiff.Region("a tree", (0.25, 0, 1, 1), weight=2.0)],
        "control": str(path),
        "control_image": pixels[1],
        "height": 128,
        "width": 96,
        "num_steps": 4,
    }


@pytest.mark.parametrize("inpaints", [False, True], ids=["four channels", "nine channels"])
@pytest.mark.parametrize("method", ["direct", "cutdiffusion", "magnify", "demofusion", "diffusehigh"])
def test_each_does_what_it_does_alone(tiny_model: Model, given: dict[str, Any], method: str, inpaints: bool) -> None:
    """The picture comes back outside of the mask, everything else changes what is drawn, and the plan counts it."""
    model = replace(tiny_model, unet=with_nine(tiny_model.unet)) if inpaints else tiny_model
    settings = Settings(method=method, **given)
    result = cutdiff.generate(model, PROMPT, settings)
    drawn = (result.images[0].permute(1, 2, 0) * 255).round().byte().numpy()
    kept = np.triu(np.ones((128, 96), dtype=bool), 32)  # farther than the feather from the mask
    assert np.array_equal(drawn[kept], given["image"][kept])
    assert not np.array_equal(drawn, given["image"])
    for left_out in ({"regions": None}, {"control": None, "control_image": None}, {"image": 255 - given["image"]}):
        other = cutdiff.generate(model, PROMPT, Settings(method=method, **{**given, **left_out}))
        assert (other.latents - result.latents).norm() > 1e-3 * result.latents.norm(), left_out
        assert fingerprint(other.record) != fingerprint(result.record)
    planned = walk(sized(SDXL._replace(network=model.unet.config, vae=model.vae.config), model.dtype), settings)
    assert sum(stage.total.evaluations for stage in planned.stages) == result.record["network_evaluations"]
    again = cutdiff.generate(model, PROMPT, replace(settings, view_batch_size=3))
    torch.testing.assert_close(again.latents, result.latents, rtol=1e-4, atol=1e-4)
