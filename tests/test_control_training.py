"""The ControlNet of the scenes: its hints, its training, its file, and how well pictures stand where it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from renders import scenes
from safetensors.torch import load_file

import cutdiff
from cutdiff.checkpoint.control import load_control
from cutdiff.checkpoint.model import Model
from cutdiff.scenes import world
from cutdiff.scenes.read import places
from cutdiff.scenes.render import Crop, outlines, render

CONTROL = Path(__file__).parents[1] / "weights" / "scenes-control.safetensors"


def test_lines_lie_where_the_picture_changes() -> None:
    """Where a line is drawn there is an edge within a few pixels, and no shape has its edge elsewhere."""
    some = scenes(12, seed=3)
    picture, lines = render(some, 128) / 2 + 0.5, outlines(some, 128)
    assert lines.shape == picture.shape
    assert (lines.min(), lines.max()) == (0, 1)
    assert torch.equal(lines[:, 0], lines[:, 2])
    change = torch.zeros_like(picture[:, 0])
    change[:, 1:] = (picture[:, :, 1:] - picture[:, :, :-1]).abs().amax(1)
    change[:, :, 1:] = torch.maximum(change[:, :, 1:], (picture[:, :, :, 1:] - picture[:, :, :, :-1]).abs().amax(1))
    near = torch.nn.functional.max_pool2d(lines[:, :1], 5, stride=1, padding=2)[:, 0] > 0
    assert not (change[~near] > 0.2).any(), "every hard edge has a line"
    found = torch.nn.functional.max_pool2d(change[:, None], 5, stride=1, padding=2)[:, 0] > 0.01
    assert found[lines[:, 0] > 0.9].float().mean() > 0.97


def test_a_crop_has_the_lines_of_what_it_shows() -> None:
    some = scenes(6, seed=4)
    part = Crop(torch.full((6,), 0.25), torch.full((6,), 0.5), torch.full((6,), 0.5))
    whole = outlines(some, 256, width=2.0)[:, :, 128:, 64:192]
    torch.testing.assert_close(outlines(some, 128, part, width=2.0), whole, rtol=0, atol=2e-3)
    thin, wide = (outlines(some, 128, width=width).sum() for width in (1.0, 3.0))
    assert 2 * thin < wide
    each = outlines(some, 128, width=torch.tensor([1.0, 3.0] * 3))
    assert torch.equal(each[1::2], outlines(some[1::2], 128, width=3.0))


def test_places_are_where_a_scene_has_them() -> None:
    some = scenes(12, seed=5)
    masks = places(render(some, 128) / 2 + 0.5)
    y = (torch.arange(128) + 0.5) / 128
    true = (y[None, :, None] > some.horizon[:, None, None]).expand(-1, -1, 128)
    outside = ~masks["subject"]
    shared = (masks["ground"] & true & outside).sum((1, 2)) / ((masks["ground"] | true) & outside).sum((1, 2))
    assert (shared > 0.9).all()
    assert ((masks["subject"].sum((1, 2)) > 200) & (masks["ridge"].sum((1, 2)) > 100)).all()
    assert not any((masks[a] & masks[b]).any() for a, b in (("subject", "ridge"), ("ridge", "ground")))
    center = (masks["subject"] * torch.arange(128)).sum((1, 2)) / masks["subject"].sum((1, 2)) / 128
    torch.testing.assert_close(center, some.subject_x, rtol=0, atol=0.02)


def test_the_embedded_control_is_small_and_of_the_embedded_model(model: Model) -> None:
    written = CONTROL.read_bytes()
    assert len(written) <= 6e6
    card = CONTROL.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{hashlib.sha256(written).hexdigest()}  {CONTROL.name}" in card
    name = "unet/diffusion_pytorch_model.safetensors"
    assert f"{model.hashes[name]}  weights/scenes/{name}" in card
    theirs = ControlNetModel.from_config(json.loads(CONTROL.with_suffix(".json").read_text(encoding="utf-8")))
    theirs.load_state_dict(load_file(CONTROL))
    load_control(CONTROL, model)


def test_a_scene_stands_where_the_embedded_control_says(model: Model) -> None:
    some = replace(scenes(4, seed=6), subject=torch.arange(4))
    options: dict[str, Any] = {"method": "direct", "height": 128, "width": 128, "num_steps": 8, "seed": 1}
    options |= {"guidance_scale": 4.0}
    captions, truth = world.captions(some.choices), places(render(some, 128) / 2 + 0.5)
    shared = []
    for own in ({}, {"control": str(CONTROL), "control_image": outlines(some, 128)}):
        masks = places(cutdiff.generate(model, captions, **options, **own).images)
        both, either = ((masks["subject"] & truth["subject"]), (masks["subject"] | truth["subject"]))
        shared.append(both.sum((1, 2)) / either.sum((1, 2)))
    assert shared[1].min() > 0.8
    assert shared[0].mean() < 0.5
