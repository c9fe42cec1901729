"""FreeScale: the published code's latents, the sizes and steps on the way, and attention that fuses scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from published_freescale import FACTOR, GUIDANCE, RUNS, UNET, VAE, Given, published_latents, sampled
from published_unet_methods import states, weights
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import GivenText
from cutdiff.models import vae as vae_module
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet
from cutdiff.sampling.noise import NoiseConfig


class GivenPair(GivenText):
    """The states of the positive prompt and of the negative one, "no"."""

    def encode(self, prompts: Any, *args: Any, **options: Any) -> TextStates:
        return states()[prompts[0] == "no"].repeat(len(prompts))


def published_model(native: int) -> Model:
    networks = UNet(replace(UNET, native_size=native)), vae_module.VAE(VAE)
    for network in networks:
        network.eval().requires_grad_(False)
        network.load_state_dict(weights(network.state_dict()))
    text: Any = GivenPair(states()[0])
    return Model(*networks, text, NoiseConfig(), zeros_for_empty_negative=False, source="", files={})


def drawn(name: str, **options: Any) -> list[cutdiff.Step]:
    """Our steps of a published run."""
    run = RUNS[name]
    height, width = (FACTOR * side for side in run.canvases[-1])
    settings = {
        "method": "freescale",
        "height": height,
        "width": width,
        "solver": run.solver,
        "num_steps": run.num_steps,
        "guidance_scale": GUIDANCE,
        "negative_prompt": "no",
        **dict(run.options),
        **options,
    }
    return [*cutdiff.denoise(published_model(run.native), "yes", draws=Given((0,)), **settings)]


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_draws_the_same(name: str) -> None:
    ours, published = drawn(name)[-1].latents, published_latents(name)
    assert tuple(ours.shape[2:]) == RUNS[name].canvases[-1]
    assert relative_error(sampled(ours), published) < 1e-4
