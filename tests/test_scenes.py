"""The embedded world, and the embedded model measured in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from renders import pictures, scenes

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.evaluation.metrics import psnr
from cutdiff.scenes import world
from cutdiff.scenes.read import read
from cutdiff.scenes.render import Crop, render


def test_captions_name_what_is_drawn() -> None:
    assert world.captions(torch.tensor([[0, 0, 1, 0, 1]])) == ["a red house with mountains over a meadow at sunset"]
    keep = torch.tensor([[False, True, False]])
    assert world.captions(torch.tensor([[4, 3, 0, 3, 2]]), keep) == ["a pink balloon over a lake"]


def test_a_crop_is_the_same_part_of_the_whole_picture_drawn_larger() -> None:
    """Both have their pixels at the same places: the 64 px of a quarter are those of the whole at 128 px, rounded."""
    drawn = scenes(8)
    corner = Crop(torch.full((8,), 0.5), torch.full((8,), 0.25), torch.full((8,), 0.5))
    part = render(drawn, 64, corner)
    torch.testing.assert_close(part, render(drawn, 128)[:, :, 32:96, 64:], atol=1e-4, rtol=0)


def test_resolutions_agree() -> None:
    """A picture drawn at 256 px and averaged down is the one drawn at 128 px except at the corners of shapes."""
    drawn = scenes(16)
    error = (F.avg_pool2d(render(drawn, 256), 2) - render(drawn, 128)).abs()
    assert error.mean() < 2e-3
    assert (error > 0.1).float().mean() < 5e-3


@pytest.mark.parametrize("size", [128, 256])
def test_the_embedded_vae_reconstructs_true_scenes(model: Model, size: int) -> None:
    truth = pictures(scenes(32, seed=21), size)
    decoded = model.vae.decode(model.vae.encode(truth * 2 - 1).mean) / 2 + 0.5
    assert psnr(decoded.clamp(0, 1), truth).mean() >= 34


@pytest.mark.parametrize(("num", "share"), [(64, 0.9), pytest.param(500, 0.97, marks=pytest.mark.large)])
def test_the_embedded_model_draws_what_captions_name(model: Model, num: int, share: float) -> None:
    """Pictures at native size have one body and one subject, of the caption's kind and colour."""
    choices = scenes(num, seed=500).choices
    right = []
    for first in range(0, num, 50):
        part = choices[first : first + 50]
        drawn = cutdiff.generate(
            model,
            world.captions(part),
            method="direct",
            height=128,
            width=128,
            num_steps=20,
            guidance_scale=4.0,
            view_batch_size=50,
            seed=first,
        )
        right.append(read(drawn.images).matches(part))
    assert torch.cat(right).float().mean() >= share


def test_the_embedded_folder_is_small_and_its_hashes_are_those_written_beside_it(model: Model) -> None:
    folder = Path(model.source)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 30e6
    readme = (folder / "README.md").read_text()
    for name, digest in model.hashes.items():
        assert f"{digest}  {name}" in readme


def test_direct_at_native_size_is_what_diffusers_draws(model: Model) -> None:
    """With the same folder, noise and prompt, in float32, pixels differ by one level of 255 at most on average."""
    from diffusers import StableDiffusionXLPipeline

    from cutdiff.sampling.draws import Draws

    pipe = StableDiffusionXLPipeline.from_pretrained(model.source)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a purple house with hills over a lake at night"
    options = {"guidance_scale": 7.5, "num_inference_steps": 20, "height": 128, "width": 128}
    noise = Draws((3,)).noise((1, 4, 16, 16))
    expected: Any = pipe(prompt, latents=noise, output_type="pt", **options).images
    same = {"guidance_scale": 7.5, "num_steps": 20, "height": 128, "width": 128}
    ours = cutdiff.generate(model, prompt, method="direct", **same, seed=3).images
    assert (ours - expected).abs().mean() <= 1 / 255
