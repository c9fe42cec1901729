"""Whole pictures of transformers beside diffusers' pipelines, on small models with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from test_transformers import FLUX, SD3_TINY, build, published_flux, published_sd3
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.bench.baselines import with_weights_of
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import GivenText, randomise
from cutdiff.checkpoint.schedulers import noise_to_diffusers
from cutdiff.models.config import VAEConfig
from cutdiff.models.flux import FluxConfig
from cutdiff.models.sd3 import SD3Config
from cutdiff.models.text import TextStates
from cutdiff.models.vae import VAE
from cutdiff.sampling.flow import FlowConfig
from cutdiff.scenes.vocabulary import WIDTH, make_flow_text

PROMPT, NEGATIVE = "a red house at sunset", "a tent"
SEED, STEPS = 3, 4
QUICK_VAE = VAEConfig(
    channels=(8, 8, 8, 16),
    layers_per_block=1,
    norm_groups=4,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    quant_conv=False,
)
DYNAMIC = FlowConfig(shift=3.0, use_dynamic_shifting=True, base_shift=0.3, base_image_seq_len=16)
TOLERANCE = 1e-5


def small_model(config: FluxConfig | SD3Config, text: Any, noise: FlowConfig) -> Model:
    network, vae = build(config).requires_grad_(False), VAE(QUICK_VAE).requires_grad_(False)
    randomise(vae, seed=1)
    return Model(network, vae, text, noise, zeros_for_empty_negative=False, source="random weights", files={})


def scheduler(noise: FlowConfig) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_config(noise_to_diffusers(noise))


def assert_same_pictures(ours: Any, theirs: Tensor, model: Model) -> None:
    """The latents, in the VAE's scale, and the pixels from 0 to 1."""
    assert relative_error(ours.latents, theirs) <= TOLERANCE
    published = with_weights_of(model.vae, torch.float32)
    unscaled = theirs / published.config.scaling_factor + published.config.shift_factor
    pixels = published.decode(unscaled, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(ours.images, pixels.clamp(0, 1), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def flux_text() -> Any:
    text = make_flow_text()
    for seed, encoder in enumerate(text.encoders):
        randomise(encoder, seed)
        encoder.requires_grad_(False)
    return text


@pytest.mark.parametrize("noise", [FlowConfig(), FlowConfig(shift=2.5), DYNAMIC], ids=["1", "2.5", "dynamic"])
@pytest.mark.parametrize("reads_guidance", [False, True], ids=["true guidance", "distilled"])
@pytest.mark.parametrize("size", [(128, 128), (96, 208)], ids=str)
@torch.no_grad()
def test_flux_draws_the_picture_of_its_pipeline(
    flux_text: Any, noise: FlowConfig, reads_guidance: bool, size: tuple[int, int]
) -> None:
    config = replace(FLUX, context_dim=WIDTH, pooled_dim=WIDTH, reads_guidance=reads_guidance)
    model = small_model(config, flux_text, noise)
    transformer = published_flux(config).eval()
    transformer.load_state_dict(model.unet.state_dict(), strict=True)
    pipeline: Any = FluxPipeline(
        scheduler(noise),
        with_weights_of(model.vae, torch.float32),
        flux_text.text_encoder,
        flux_text.tokenizer,
        flux_text.t5.encoder,
        flux_text.t5.tokenizer,
        transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    h, w = (side // 8 for side in size)
    start = cutdiff.Draws((SEED,)).noise((1, config.latent_channels, h, w))
    guidance: dict[str, Any] = {"guidance_scale": 3.5}
    if not reads_guidance:
        guidance = {"true_cfg_scale": 3.5, "negative_prompt": NEGATIVE}
    packed = pipeline(
        PROMPT,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        latents=FluxPipeline._pack_latents(start, 1, config.latent_channels, h, w),
        max_sequence_length=flux_text.t5.length,
        output_type="latent",
        **guidance,
    ).images
    theirs = FluxPipeline._unpack_latents(packed, *size, 8)
    ours = cutdiff.generate(
        model,
        PROMPT,
        negative_prompt="" if reads_guidance else NEGATIVE,
        height=size[0],
        width=size[1],
        method="direct",
        num_steps=STEPS,
        guidance_scale=3.5,
        shift="canvas" if noise.use_dynamic_shifting else None,
        seed=SEED,
    )
    assert_same_pictures(ours, theirs, model)


@dataclass(frozen=True)
class TextOf(GivenText):
    """The stand-in for text that has states of its own for the negative prompt."""

    negative: TextStates = None  # type: ignore[assignment]  # follows a field with a default

    def encode(self, prompts: Sequence[str], *args: Any, **options: Any) -> TextStates:
        (prompt,) = prompts
        return self.negative if prompt == NEGATIVE else self.states


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("size", [(128, 128), (96, 192)], ids=str)
@torch.no_grad()
def test_sd3_draws_the_picture_of_its_pipeline(shift: float, guidance_scale: float, size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    states, negative = (
        TextStates(
            torch.randn(1, 9, SD3_TINY.context_dim, generator=rng), torch.randn(1, SD3_TINY.pooled_dim, generator=rng)
        )
        for _ in range(2)
    )
    noise = FlowConfig(shift=shift, timestep_spacing="linspace")
    model = small_model(SD3_TINY, TextOf(states, negative=negative), noise)
    transformer = published_sd3(SD3_TINY).eval()
    transformer.load_state_dict(model.unet.state_dict(), strict=True)
    parts = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    vae = with_weights_of(model.vae, torch.float32)
    pipeline: Any = StableDiffusion3Pipeline(transformer, scheduler(noise), vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    start = cutdiff.Draws((SEED,)).noise((1, SD3_TINY.latent_channels, size[0] // 8, size[1] // 8))
    theirs = pipeline(
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        prompt_embeds=states.context,
        pooled_prompt_embeds=states.pooled,
        negative_prompt_embeds=negative.context,
        negative_pooled_prompt_embeds=negative.pooled,
        latents=start,
        output_type="latent",
    ).images
    ours = cutdiff.generate(
        model,
        PROMPT,
        negative_prompt=NEGATIVE,
        height=size[0],
        width=size[1],
        method="direct",
        num_steps=STEPS,
        guidance_scale=guidance_scale,
        seed=SEED,
    )
    assert_same_pictures(ours, theirs, model)
