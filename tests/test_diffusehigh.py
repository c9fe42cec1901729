"""DiffuseHigh: the published runs, the canvases on the way, sharpening, and what is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from published_diffusehigh import GUIDANCE, RUNS, SEED, VAE_CONFIG, published_latents
from published_unet_methods import CONFIG, noise, states, weights
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import GivenText
from cutdiff.models.text import TextStates
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.noise import NoiseConfig

PROMPT = "a red house at night"


# ---- The published code


@dataclass(frozen=True)
class TwoTexts(GivenText):
    """A text that reads the states of the published runs: the negative ones where there is no prompt."""

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        return states()[prompts == [""]].repeat(len(prompts))


class GivenNoise(Draws):
    def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
        return noise((shape[2], shape[3]))


def published_model(native: int) -> Model:
    networks = UNet(replace(CONFIG, native_size=native)), VAE(VAE_CONFIG)
    for network in networks:
        network.load_state_dict(weights(network.state_dict()))
        network.eval().requires_grad_(False)
    text: Any = TwoTexts(states()[0])
    return Model(*networks, text, NoiseConfig(), zeros_for_empty_negative=False, source="published", files={})


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    run = RUNS[name]
    height, width = (8 * side for side in run.sizes[-1])
    drawn = list(
        cutdiff.denoise(
            published_model(run.native),
            PROMPT,
            method=run.method,
            num_steps=run.num_steps,
            height=height,
            width=width,
            guidance_scale=GUIDANCE,
            solver="euler",
            draws=GivenNoise((SEED,)),
        )
    )
    sizes = list(dict.fromkeys((step.stage, *step.latents.shape[2:]) for step in drawn))
    assert sizes == [(f"phase {i}", *size) for i, size in enumerate([(run.native, run.native), *run.sizes], start=1)]
    assert relative_error(drawn[-1].latents, published_latents(name)) < 1e-4, relative_error(
        drawn[-1].latents, published_latents(name)
    )
