"""The embedded world, the measures that read it, and the embedded model measured by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cutdiff
from cutdiff.model import Model
from cutdiff.scenes import world
from cutdiff.scenes.measure import count_blobs, psnr, read
from cutdiff.scenes.render import BODY, SUBJECT, Crop, render
from cutdiff.scenes.world import Scenes


def scenes(n: int, seed: int = 0) -> Scenes:
    return world.sample(n, torch.Generator().manual_seed(seed))


def pictures(drawn: Scenes, size: int) -> Tensor:
    """True renders in [0, 1]."""
    return render(drawn, size) / 2 + 0.5


@pytest.fixture(scope="module")
def model() -> Model:
    return cutdiff.load()


def test_captions_name_what_is_drawn() -> None:
    assert world.captions(torch.tensor([[0, 0, 1, 0, 1]])) == ["a red house with mountains over a meadow at sunset"]
    keep = torch.tensor([[False, True, False]])
    assert world.captions(torch.tensor([[4, 3, 0, 3, 2]]), keep) == ["a pink balloon over a lake"]


def test_a_crop_is_the_same_part_of_the_whole_picture_drawn_larger() -> None:
    """Both put their pixels at the same places: 64 px of a quarter are those of the whole at 128 px, to rounding."""
    drawn = scenes(8)
    corner = Crop(torch.full((8,), 0.5), torch.full((8,), 0.25), torch.full((8,), 0.5))
    part = render(drawn, 64, corner)
    torch.testing.assert_close(part, render(drawn, 128)[:, :, 32:96, 64:], atol=1e-4, rtol=0)


def test_resolutions_agree() -> None:
    """A picture drawn at 256 px and averaged down is the one drawn at 128 px, but for the corners of shapes."""
    drawn = scenes(16)
    error = (F.avg_pool2d(render(drawn, 256), 2) - render(drawn, 128)).abs()
    assert error.mean() < 2e-3
    assert (error > 0.1).float().mean() < 5e-3


@pytest.mark.parametrize("size", [128, 256])
def test_measures_are_right_on_true_renders(size: int) -> None:
    drawn = scenes(200, seed=11)
    assert read(pictures(drawn, size)).matches(drawn.choices).float().mean() >= 0.99


def test_measures_catch_a_second_body() -> None:
    """Paste a second sun where the sky is free: opposite of the first one, above the ridge."""
    drawn = scenes(100, seed=12)
    side = torch.where(drawn.body_x < 0.5, 0.93, 0.07)
    y, x = torch.meshgrid(*(torch.arange(128) / 128,) * 2, indexing="ij")
    disc = torch.hypot(x - side[:, None, None], y - 0.08) < 0.06
    color = torch.tensor([BODY[name] for name in world.TIMES])[drawn.time]
    pasted = torch.where(disc[:, None], color[:, :, None, None], pictures(drawn, 128))
    assert (read(pasted).bodies == 2).float().mean() >= 0.99


def test_measures_catch_a_missing_body_and_a_second_subject() -> None:
    drawn = scenes(100, seed=13)
    none = replace(drawn, body_radius=torch.zeros(100))
    assert (read(pictures(none, 128)).bodies == 0).float().mean() >= 0.99
    twice = pictures(drawn, 128)
    color = torch.tensor([SUBJECT[name] for name in world.COLORS])[drawn.color]
    twice[:, :, 108:124, 4:20] = color[:, :, None, None]
    assert (read(twice).subjects == 2).float().mean() >= 0.99


def test_measures_catch_a_wrong_colour() -> None:
    drawn = scenes(100, seed=14)
    other = replace(drawn, color=(drawn.color + 1) % len(world.COLORS))
    assert not read(pictures(other, 128)).matches(drawn.choices).any()


def test_blobs_are_counted_by_connection_and_size() -> None:
    mask = torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[0, :5, :5] = mask[0, 5:9, 5:9] = True  # joined at a corner
    mask[0, 15:, 15:] = True
    mask[0, 0, 19] = True  # too small
    assert count_blobs(mask).tolist() == [2, 0]


def test_the_embedded_vae_reconstructs_true_scenes(model: Model) -> None:
    truth = pictures(scenes(48, seed=21), 128)
    decoded = model.vae.decode(model.vae.encode(truth * 2 - 1).mean) / 2 + 0.5
    assert psnr(decoded.clamp(0, 1), truth) >= 30


def test_the_embedded_model_draws_what_captions_name(model: Model) -> None:
    """64 pictures at native size: one body and one subject in the caption's colour, in at least 90% of them."""
    choices = scenes(64, seed=22).choices
    images = cutdiff.generate(
        model,
        world.captions(choices),
        method="direct",
        height=128,
        width=128,
        num_steps=20,
        guidance_scale=4.0,
        view_batch_size=32,
    ).images
    assert read(images).matches(choices).float().mean() >= 0.9


def test_the_embedded_folder_is_small_and_its_hashes_are_those_written_beside_it(model: Model) -> None:
    folder = Path(model.source)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 30e6
    readme = (folder / "README.md").read_text()
    for name, digest in model.hashes.items():
        assert f"{digest}  {name}" in readme


def test_direct_at_native_size_is_what_diffusers_draws(model: Model) -> None:
    """Same folder, same noise, same prompt, float32: mean absolute difference at most one level of 255."""
    from diffusers import StableDiffusionXLPipeline

    from cutdiff.draws import Draws

    pipe = StableDiffusionXLPipeline.from_pretrained(model.source)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a purple house with hills over a lake at night"
    options = {"guidance_scale": 7.5, "num_inference_steps": 20, "height": 128, "width": 128}
    noise = Draws((3,)).noise((1, 4, 16, 16))
    expected: Any = pipe(prompt, latents=noise, output_type="pt", **options).images
    ours = cutdiff.generate(model, prompt, method="direct", height=128, width=128, num_steps=20, seed=3).images
    assert (ours - expected).abs().mean() <= 1 / 255
