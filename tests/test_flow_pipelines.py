"""Whole pictures of FLUX.1 and SD3 beside diffusers' pipelines, from the same folders of small random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from test_models import make_encoder, make_tokenizer
from test_transformers import FLUX, SD3_TINY, build
from tiny import relative_error
from torch import Tensor
from transformers import CLIPTextModelWithProjection

import cutdiff
from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import VAEConfig
from cutdiff.models.flux import FluxConfig
from cutdiff.models.joint_text import FluxText, NoT5, SD3Text
from cutdiff.models.sd3 import SD3Config
from cutdiff.models.vae import VAE
from cutdiff.sampling.flow import FlowConfig
from cutdiff.scenes.vocabulary import WIDTH, make_flow_text

PROMPT, NEGATIVE = "a red tent", "the moon"
RUN: dict[str, Any] = {"height": 96, "width": 192}
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


def save(folder: Path, config: FluxConfig | SD3Config, text: FluxText | SD3Text, noise: FlowConfig) -> Path:
    vae = VAE(QUICK_VAE)
    for seed, network in enumerate([vae, *text.encoders]):
        randomise(network, seed)
    save_folder(
        folder,
        unet=build(config),
        vae=vae,
        text=text,
        noise=noise,
        zeros_for_empty_negative=False,
        dtype=torch.float32,
    )
    return folder


def opened(pipeline: Any, folder: Path, **without: None) -> Any:
    """diffusers' pipeline from a folder, which wants to be told of the parts that the folder is without."""
    made = pipeline.from_pretrained(folder, local_files_only=True, **without)
    made.set_progress_bar_config(disable=True)
    return made


def assert_same_pictures(ours: Any, theirs: Tensor, pipeline: Any) -> None:
    """The latents, in the VAE's scale, and the pixels from 0 to 1, which a random VAE makes differ more."""
    assert relative_error(ours.latents, theirs) <= TOLERANCE
    unscaled = theirs / QUICK_VAE.scaling_factor + QUICK_VAE.shift_factor
    pixels = pipeline.vae.decode(unscaled, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(ours.images, pixels.clamp(0, 1), rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("noise", [FlowConfig(), FlowConfig(shift=2.5), DYNAMIC], ids=["1", "2.5", "dynamic"])
@pytest.mark.parametrize("reads_guidance", [False, True], ids=["true guidance", "distilled"])
@torch.no_grad()
def test_flux_draws_the_picture_of_its_pipeline(tmp_path: Path, noise: FlowConfig, reads_guidance: bool) -> None:
    config = replace(FLUX, context_dim=WIDTH, pooled_dim=WIDTH, reads_guidance=reads_guidance)
    model = cutdiff.load(save(tmp_path, config, make_flow_text(), noise))
    pipeline = opened(FluxPipeline, tmp_path)
    h, w = RUN["height"] // 8, RUN["width"] // 8
    start = cutdiff.Draws((SEED,)).noise((1, config.latent_channels, h, w))
    true = {"true_cfg_scale": 3.5, "negative_prompt": NEGATIVE}
    packed = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        latents=FluxPipeline._pack_latents(start, 1, config.latent_channels, h, w),
        max_sequence_length=model.text.length(PROMPT),
        output_type="latent",
        **RUN,
        **({"guidance_scale": 3.5} if reads_guidance else true),
    ).images
    ours = cutdiff.generate(
        model,
        PROMPT,
        negative_prompt="" if reads_guidance else NEGATIVE,
        method="direct",
        num_steps=STEPS,
        guidance_scale=3.5,
        shift="canvas" if noise.use_dynamic_shifting else None,
        seed=SEED,
        **RUN,
    )
    assert_same_pictures(ours, FluxPipeline._unpack_latents(packed, RUN["height"], RUN["width"], 8), pipeline)


@pytest.mark.parametrize(
    ("shift", "guidance_scale", "has_t5"), [(1.0, 4.5, True), (3.0, 4.5, False), (3.0, 1.0, True)], ids=str
)
@torch.no_grad()
def test_sd3_draws_the_picture_of_its_pipeline(
    tmp_path: Path, shift: float, guidance_scale: float, has_t5: bool
) -> None:
    kind: Any = CLIPTextModelWithProjection
    clips: Any = (make_encoder(kind, 16, 3, "quick_gelu"), make_encoder(kind, 24, 4, "gelu"))
    t5 = make_flow_text().t5 if has_t5 else NoT5(WIDTH, 256, torch.float32)
    text = SD3Text(make_tokenizer("<|endoftext|>"), make_tokenizer("!</w>"), *clips, t5=t5)
    config = replace(SD3_TINY, context_dim=WIDTH, pooled_dim=40)
    noise = FlowConfig(shift=shift, timestep_spacing="linspace")
    model = cutdiff.load(save(tmp_path, config, text, noise))
    pipeline = opened(
        StableDiffusion3Pipeline, tmp_path, **({} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None})
    )
    start = cutdiff.Draws((SEED,)).noise((1, config.latent_channels, RUN["height"] // 8, RUN["width"] // 8))
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=model.text.t5.length,
        latents=start,
        output_type="latent",
        **RUN,
    ).images
    ours = cutdiff.generate(
        model,
        PROMPT,
        negative_prompt=NEGATIVE,
        method="direct",
        num_steps=STEPS,
        guidance_scale=guidance_scale,
        seed=SEED,
        **RUN,
    )
    assert_same_pictures(ours, theirs, pipeline)
