"""Masks: what lies outside is held at every step, and comes back to the bit; what lies inside is drawn."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from refusal import CommandLine
from tiny import QUICK_UNET, QUICK_VAE, with_nine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import random_model
from cutdiff.methods.given import masked_picture
from cutdiff.pipeline import prepare
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.sample import main
from cutdiff.sampling.denoiser import Call
from cutdiff.sampling.masks import MaskedPicture, feathered
from cutdiff.settings import Settings
from cutdiff.specs import METHODS, SOLVERS

PROMPT = "a red house at night"


def as_image(picture: np.ndarray) -> Tensor:
    """A picture (H, W, 3) of 8 bits as an image (1, 3, H, W)."""
    return torch.from_numpy(picture).movedim(2, 0)[None] / 255


def drawn_mask(seed: int, height: int, width: int) -> Tensor:
    """One white rectangle and some white pixels, (1, 1, H, W)."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(height, width, generator=rng) > 0.995).float()
    top, left = (int(torch.randint(side, (1,), generator=rng)) for side in (height, width))
    mask[top : top + height // 3, left : left + width // 3] = 1
    return mask[None, None]


def distances(mask: Tensor) -> Tensor:
    """The distance of each pixel to the nearest white one in a straight line, (H, W), one by one."""
    rows, columns = torch.nonzero(mask[0, 0], as_tuple=True)
    y, x = (torch.arange(side) for side in mask.shape[2:])
    squares = (y[:, None, None] - rows).square() + (x[None, :, None] - columns).square()
    return squares.amin(dim=2).double().sqrt()


class TestFeather:
    @hypothesis_settings(max_examples=30)
    @given(seed=st.integers(0, 99), width=st.integers(0, 20), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
    def test_is_1_where_the_mask_is_and_0_from_its_width_on(self, seed: int, width: int, size: tuple[int, int]) -> None:
        mask = drawn_mask(seed, *size)
        mask[0, 0, 0, 0] = 1
        weights, apart = feathered(mask, width)[0, 0], distances(mask)
        assert torch.equal(weights[apart == 0], torch.ones(int((apart == 0).sum())))
        assert bool((weights[apart >= max(width, 1)] == 0).all())
        assert bool((weights[apart < max(width, 1)] > 0).all())

    def test_falls_evenly_beside_a_straight_border(self) -> None:
        mask = torch.zeros(1, 1, 4, 20)
        mask[..., :6] = 1
        weights = feathered(mask, 8)[0, 0, 2]
        assert weights[:6].tolist() == [1] * 6
        falls = weights[5:15].diff()
        assert bool((falls <= 0).all())
        assert falls.min() > -0.2
        assert weights[13:].tolist() == [0] * 7

    def test_is_round(self) -> None:
        """It reaches as far from a corner as from a side."""
        mask = torch.zeros(1, 1, 41, 41)
        mask[0, 0, 20, 20] = 1
        weights = feathered(mask, 15)[0, 0]
        for y, x in ((20, 30), (10, 20), (26, 28), (14, 12)):
            assert weights[y, x] == pytest.approx(1 / 3)
        assert weights[20 + 11, 20 + 11] == 0, "15.6 pixels away"

    @given(seed=st.integers(0, 99), feather=st.integers(0, 9))
    def test_the_picture_is_kept_to_the_bit(self, seed: int, feather: int) -> None:
        mask = drawn_mask(seed, 24, 33)
        images, picture = (torch.rand(n, 3, 24, 33, generator=torch.Generator().manual_seed(n)) for n in (2, 1))
        laid = MaskedPicture(picture, mask, lambda x: x, 1).laid_onto(images, feather)
        far, inside = distances(mask) >= max(feather, 1), mask[0, 0] > 0
        assert torch.equal(laid[:, :, far], picture[:, :, far].expand(2, -1, -1))
        assert torch.equal(laid[:, :, inside], images[:, :, inside])


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """A picture of smooth colours and a little noise, (H, W, 3), of 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((a * y + b * x) / 20 + c) for a, b, c in rng.normal(size=(3, 3))]
    return (127 + 100 * np.stack(waves, axis=2) + rng.uniform(-20, 20, (height, width, 3))).clip(0, 255).astype("u1")


def in_8_bits(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) as their files have them, (B, H, W, 3)."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def as_mask(mask: Tensor) -> np.ndarray:
    return (255 * mask[0, 0]).byte().numpy()


HELD: Any = [
    *((method, "euler", {}, inpaints) for method in METHODS for inpaints in (False, True)),
    *(("direct", solver, {}, False) for solver in SOLVERS),
    ("magnify", "dpmpp_sde", {"hold": "trajectory"}, False),
    ("cutdiffusion", "euler", {"guidance": "pag", "interaction": "pixel", "guidance_scale": 3.0}, True),
]


@pytest.mark.parametrize(("method", "solver", "options", "inpaints"), HELD)
def test_the_picture_comes_back_to_the_bit_outside_of_the_mask(
    tiny_model: Model, method: str, solver: str, options: dict[str, Any], inpaints: bool
) -> None:
    model = replace(tiny_model, unet=with_nine(tiny_model.unet)) if inpaints else tiny_model
    mask, picture = drawn_mask(3, 136, 96), pixels(1, 136, 96)
    run = {"method": method, "solver": solver, "num_steps": 3, "height": 136, "width": 96, **options}
    given = {"image": picture, "mask": as_mask(mask), "feather": 5}
    drawn = cutdiff.generate(model, PROMPT, **run, **given)
    far, inside = distances(mask) >= 5, (mask[0, 0] > 0).numpy()
    assert drawn.latents.isfinite().all()
    assert np.array_equal(in_8_bits(drawn.images)[0][far], picture[far])
    assert (in_8_bits(drawn.images)[0][inside] != picture[inside]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_the_picture_is_held_at_every_step_on_every_canvas(tiny_model: Model, method: str) -> None:
    mask, picture = drawn_mask(4, 128, 192), pixels(2, 128, 192)
    options = {"method": method, "num_steps": 3, "height": 128, "width": 192, "seed": 5}
    given = MaskedPicture(as_image(picture), mask, partial(cutdiff.encode, tiny_model), 8)
    sizes = set[tuple[int, ...]]()
    end = held = latents = torch.empty(0)
    for step in cutdiff.denoise(tiny_model, PROMPT, image=picture, mask=as_mask(mask), **options):
        end, size = step.latents, (step.latents.shape[2], step.latents.shape[3])
        redrawn, latents = given.on_canvas(size)
        held = ~redrawn.expand_as(latents)
        torch.testing.assert_close(step.denoised[held], latents[held], rtol=0, atol=1e-5, msg=step.stage)
        assert not torch.isclose(step.denoised[~held], latents[~held]).any()
        sizes.add(size)
    assert (16, 24) in sizes
    torch.testing.assert_close(end[held], latents[held], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["direct", "cutdiffusion", "magnify", "demofusion", "frecas", "diffusehigh"])
def test_the_state_stands_at_the_picture_with_the_noise_of_its_sigma(tiny_model: Model, method: str) -> None:
    """On the first canvas it is the run's noise, on later ones that of the phase; before the step, and so after it."""
    mask, picture = drawn_mask(4, 128, 128), pixels(2, 128, 128)
    options = {"method": method, "num_steps": 4, "height": 128, "width": 128, "seed": 5}
    settings = Settings(image=picture, mask=as_mask(mask), **options)
    run = prepare(tiny_model, PROMPT, settings)
    given = MaskedPicture(as_image(picture), mask, partial(cutdiff.encode, tiny_model), 8)
    draws, number, steps = cutdiff.Draws((5,)), 0, list(run.steps)
    for before, step in pairwise([None, *steps]):
        assert step is not None
        shape = tuple(step.latents.shape)
        number += before is None or tuple(before.latents.shape) != shape
        noise = draws.noise(shape) if number == 1 else draws.phase_noise(shape, number)
        redrawn, latents = given.on_canvas((shape[2], shape[3]))
        held = ~redrawn.expand_as(latents)
        following = next((s for s in steps if s.index == step.index + 1 and s.latents.shape == shape), None)
        if following is not None:
            expected = latents + following.sigma * noise
            torch.testing.assert_close(step.latents[held], expected[held], rtol=1e-4, atol=1e-4)


@hypothesis_settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    method=st.sampled_from(["direct", "multidiffusion", "cutdiffusion", "spotdiffusion", "magnify"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    feather=st.integers(0, 40),
)
def test_any_size_and_mask(tiny_model: Model, seed: int, method: str, size: tuple[int, int], feather: int) -> None:
    height, width = (8 * side for side in size)
    mask, picture = drawn_mask(seed, height, width), pixels(seed, height, width)
    if mask.mean() in (0, 1):
        return
    options = {"method": method, "num_steps": 2, "height": height, "width": width, "feather": feather}
    drawn = cutdiff.generate(tiny_model, PROMPT, image=picture, mask=as_mask(mask), **options)
    far = distances(mask) >= max(feather, 1)
    assert np.array_equal(in_8_bits(drawn.images)[0][far], picture[far])


def test_each_of_several_pictures_has_its_mask(tiny_model: Model) -> None:
    pictures, masks = np.stack([pixels(1, 64, 80), pixels(2, 64, 80)]), [drawn_mask(n, 64, 80) for n in (1, 2)]
    options = {"method": "multidiffusion", "num_steps": 2, "height": 64, "width": 80}
    both = np.stack([as_mask(mask) for mask in masks])[..., None]
    drawn = cutdiff.generate(tiny_model, [PROMPT, "a pink tent"], image=pictures, mask=both, **options)
    for n, prompt in enumerate([PROMPT, "a pink tent"]):
        alone = cutdiff.generate(tiny_model, prompt, image=pictures[n], mask=as_mask(masks[n]), seed=n, **options)
        torch.testing.assert_close(drawn.images[n], alone.images[0], rtol=1e-4, atol=1e-4)


class TestStrength:
    OPTIONS: ClassVar[dict[str, Any]] = {"num_steps": 10, "height": 128, "width": 128, "seed": 2}

    @pytest.mark.parametrize("method", ["direct", "cutdiffusion", "magnify", "diffusehigh", "frecas"])
    @pytest.mark.parametrize("inpaints", [False, True])
    def test_the_last_steps_begin_with_the_picture(self, tiny_model: Model, method: str, inpaints: bool) -> None:
        """The share is that of the steps on the first canvas, of every method alike."""
        model = replace(tiny_model, unet=with_nine(tiny_model.unet)) if inpaints else tiny_model
        mask, picture = drawn_mask(4, 128, 128), pixels(2, 128, 128)
        options = {**self.OPTIONS, "method": method, "image": picture, "mask": as_mask(mask)}
        shown: list[Call] = []

        class Ear(cutdiff.Observer):
            def call(self, call: Call, prediction: Tensor) -> None:
                shown.append(call)

        steps = list(cutdiff.denoise(model, PROMPT, strength=0.4, observer=Ear(), **options))
        whole = list(cutdiff.denoise(model, PROMPT, **options))
        kept = [step for step in whole if step.index >= 6]
        assert [(s.index, s.sigma) for s in steps] == [(s.index, s.sigma) for s in kept]
        if method == "direct":
            c_in, *_ = model.noise.coefficients(steps[0].sigma)
            noise = cutdiff.Draws((2,)).noise((1, 4, 16, 16))
            state = cutdiff.encode(model, as_image(picture)) + steps[0].sigma * noise
            torch.testing.assert_close(shown[0].inputs[0][:1, :4], c_in * state, rtol=1e-4, atol=1e-4)

    def test_a_method_with_a_strength_of_its_own_keeps_that(self, tiny_model: Model) -> None:
        mask, picture = drawn_mask(4, 128, 128), pixels(2, 128, 128)
        options = {**self.OPTIONS, "method": "diffusehigh,strength=0.2", "image": picture, "mask": as_mask(mask)}
        settings = Settings(strength=0.5, **options)
        assert settings.described()["strength"] == 0.5
        assert "strength=0.2" in settings.described()["method"]
        counts = [step.latents.shape[2] for step in cutdiff.denoise(tiny_model, PROMPT, settings)]
        assert [counts.count(size) for size in (8, 12, 16)] == [5, 2, 2]

    def test_all_of_them_is_what_a_mask_takes_anyway(self, tiny_model: Model) -> None:
        mask, picture = drawn_mask(4, 128, 128), pixels(2, 128, 128)
        options = {**self.OPTIONS, "method": "direct", "image": picture, "mask": as_mask(mask)}
        usual, full = (cutdiff.generate(tiny_model, PROMPT, **options, **more) for more in ({}, {"strength": 1.0}))
        assert torch.equal(usual.latents, full.latents)
        assert usual.record["fingerprint"] == full.record["fingerprint"]

    @pytest.mark.parametrize(("method", "least"), [("rectifiedhr", 0.5), ("frecas", 0.3)])
    def test_at_least_one_step_is_on_the_first_canvas(self, tiny_model: Model, method: str, least: float) -> None:
        mask, picture = drawn_mask(4, 128, 128), pixels(2, 128, 128)
        options = {**self.OPTIONS, "method": method, "image": picture, "mask": as_mask(mask)}
        first = next(cutdiff.denoise(tiny_model, PROMPT, strength=least, **options))
        assert first.latents.shape[2] == 8
        with pytest.raises(ValueError, match=rf"strength=\S+ leaves out the \d steps .*: give at least {least}, or"):
            cutdiff.denoise(tiny_model, PROMPT, strength=least - 0.1, **options)


class TestPlace:
    @pytest.mark.parametrize("method", ["direct", "multidiffusion", "magnify"])
    @pytest.mark.parametrize("inpaints", [False, True])
    @pytest.mark.parametrize("place", [(0, 0), (13, 40), (56, 72)])
    def test_the_picture_lies_where_it_is_put(
        self, tiny_model: Model, method: str, inpaints: bool, place: tuple[int, int]
    ) -> None:
        model = replace(tiny_model, unet=with_nine(tiny_model.unet)) if inpaints else tiny_model
        picture, (x, y) = pixels(3, 64, 72), place
        options = {"method": method, "num_steps": 2, "height": 136, "width": 128, "feather": 6}
        drawn = in_8_bits(cutdiff.generate(model, PROMPT, image=picture, place=place, **options).images)[0]
        top, left = 5 * (y > 0), 5 * (x > 0)  # of the pixels of the image the first is one pixel away from the others
        bottom, right = 64 - 5 * (y + 64 < 136), 72 - 5 * (x + 72 < 128)
        kept = drawn[y : y + 64, x : x + 72]
        assert np.array_equal(kept[top:bottom, left:right], picture[top:bottom, left:right])
        assert (kept != picture).any()
        beside = np.ones((136, 128), dtype=bool)
        beside[y : y + 64, x : x + 72] = False
        assert (drawn[beside].std(axis=0) > 0).all()

    def test_a_mask_is_redrawn_besides(self, tiny_model: Model) -> None:
        picture, mask = pixels(3, 64, 64), drawn_mask(2, 64, 64)
        options = {"method": "direct", "num_steps": 2, "height": 64, "width": 96, "feather": 0}
        drawn = cutdiff.generate(tiny_model, PROMPT, image=picture, place=(32, 0), mask=as_mask(mask), **options)
        is_kept = (drawn.images[0, :, :, 32:] == as_image(picture)[0]).all(dim=0)
        assert torch.equal(is_kept, mask[0, 0] == 0)

    def test_what_is_beside_it_begins_as_its_border_goes_on(self, tiny_model: Model) -> None:
        settings = Settings(image=pixels(3, 64, 64), place=(16, 8), height=128, width=96)
        given = masked_picture(tiny_model, settings, (16, 12), partial(cutdiff.encode, tiny_model))
        assert given is not None
        image = as_image(pixels(3, 64, 64))
        assert torch.equal(given.picture[0, :, 8:72, 16:80], image[0])
        assert torch.equal(given.picture[0, :, 0, :16], image[0, :, :1, 0].expand(-1, 16))
        assert torch.equal(given.picture[0, :, 90, 20], image[0, :, 63, 4])


class TestMask:
    def test_is_fitted_as_its_image(self, tiny_model: Model) -> None:
        picture = np.zeros((40, 60, 3), dtype="u1")
        picture[5:15, 20:50] = 255
        for fit in ("cover", "contain", "stretch"):
            settings = Settings(image=picture, mask=picture, height=64, width=64, fit=fit)
            given = masked_picture(tiny_model, settings, (8, 8), partial(cutdiff.encode, tiny_model))
            assert given is not None
            assert torch.equal(given.mask > 0, given.picture[:, :1] >= 0.5)
            assert 0 < given.mask.mean() < 1

    @pytest.mark.parametrize("hidden", [0, 255])
    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_white_on_nothing_is_white_there(self, mode: str, hidden: int, tmp_path: Path) -> None:
        """Whatever stands in its colours where nothing is seen. Black on nothing is laid on white, as ever."""
        for paint, expected in ((255, 1 / 6), (0, 5 / 6)):
            mask = Image.new("RGBA", (60, 40), (hidden, hidden, hidden, 0))
            mask.paste((paint, paint, paint, 255), (20, 10, 40, 30))
            mask.convert(mode).save(tmp_path / "mask.png")
            settings = Settings(image=pixels(1, 40, 60), mask=tmp_path / "mask.png", method="direct")
            assert settings.mask.white == pytest.approx(expected)
            taken = "which are taken for black" if paint else "which are laid on white"
            assert [notice.endswith(taken) for notice in settings.notices()] == [True]
            assert bool(settings.mask.pixels()[0, 20, 30, 0]) is bool(paint)

    def test_grey_is_white_from_the_middle_on(self, tiny_model: Model) -> None:
        mask = np.full((64, 64), 127, dtype="u1")
        mask[:, 20:] = 128
        settings = Settings(image=pixels(1, 64, 64), mask=mask, height=64, width=64)
        given = masked_picture(tiny_model, settings, (8, 8), partial(cutdiff.encode, tiny_model))
        assert given is not None
        assert torch.equal(given.mask[0, 0] > 0, torch.from_numpy(mask) == 128)

    def test_a_record_has_its_name_and_hash(self, tiny_model: Model, tmp_path: Path) -> None:
        for name, seed in (("mask.png", 1), ("other.png", 2)):
            Image.fromarray(as_mask(drawn_mask(seed, 64, 64))).save(tmp_path / name)
        options = {"image": pixels(1, 64, 64), "method": "direct", "num_steps": 1, "height": 64, "width": 64}
        records = [
            cutdiff.generate(tiny_model, PROMPT, mask=tmp_path / name, **options).record
            for name in ("mask.png", "other.png")
        ]
        digest = hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
        assert records[0]["mask"] == {"name": "mask.png", "sha256": digest}
        assert records[0]["fingerprint"] != records[1]["fingerprint"]
        (tmp_path / "other.png").write_bytes((tmp_path / "mask.png").read_bytes())
        renamed = cutdiff.generate(tiny_model, PROMPT, mask=tmp_path / "other.png", **options).record
        assert renamed["fingerprint"] == records[0]["fingerprint"]
        wider = cutdiff.generate(tiny_model, PROMPT, mask=tmp_path / "mask.png", feather=3, **options).record
        assert wider["fingerprint"] != records[0]["fingerprint"]

    @pytest.mark.parametrize("method", ["multidiffusion", "cutdiffusion", "magnify", "rectifiedhr"])
    @pytest.mark.parametrize("inpaints", [False, True])
    def test_a_plan_counts_what_every_step_takes(self, method: str, inpaints: bool) -> None:
        """With the way of the picture through the encoder, where a canvas is drawn on for the first time."""
        unet = replace(QUICK_UNET, in_channels=9) if inpaints else QUICK_UNET
        model = random_model(unet, QUICK_VAE, torch.device("cpu"))
        mask = as_mask(drawn_mask(3, 136, 96))
        options = {"method": method, "height": 136, "width": 96, "num_steps": 4, "strength": 0.75}
        settings = Settings(image=pixels(1, 136, 96), mask=mask, **options)
        flops = [0]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

            def hear(step: cutdiff.Step, _num_steps: int) -> None:
                flops.append(counter.get_total_flops())

            record = cutdiff.generate(model, PROMPT, settings, on_step=hear).record
        planned = walk(sized(SDXL._replace(network=model.unet.config, vae=model.vae.config), model.dtype), settings)
        costs = [cost for stage in planned.stages for cost in stage.steps]
        assert [cost.flops for cost in costs] == [b - a for a, b in pairwise(flops)]
        assert sum(cost.evaluations for cost in costs) == record["network_evaluations"]


QUICK = ["--steps", "1", "--method", "direct", "--guidance-scale", "4"]
SIZE = ["--width", "128", "--height", "128"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of pictures of 64 × 48 pixels, and masks."""
    folder = tmp_path / "files"
    folder.mkdir()
    Image.fromarray(pixels(1, 48, 64)).save(folder / "image.png")
    Image.fromarray(as_mask(drawn_mask(1, 48, 64))).save(folder / "mask.png")
    Image.fromarray(as_mask(drawn_mask(1, 64, 48))).save(folder / "turned.png")
    for name, grey in (("white.png", 255), ("black.png", 0), ("dark.png", 127)):
        Image.fromarray(np.full((48, 64), grey, dtype="u1")).save(folder / name)
    for name, alpha in (("clear.png", 0), ("veiled.png", 200)):
        Image.new("RGBA", (64, 48), (255, 255, 255, alpha)).save(folder / name)
    Image.new("L", (64, 48), 200).save(folder / "light.png")
    border = np.zeros((48, 64), dtype="u1")
    border[:, :6] = 255
    Image.fromarray(border).save(folder / "border.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "mask.png").read_bytes()[:60])
    return folder


REFUSED: dict[str, tuple[str, str]] = {
    "a mask of another size": (
        "--image image.png --mask turned.png",
        "--mask turned.png has 48×64 pixels, and the image 64×48: give one of the image's size",
    ),
    "a white mask": (
        "--image image.png --mask white.png",
        "--mask white.png is white all over, so that nothing of the image would be held: paint black what is to stay",
    ),
    "a black mask": (
        "--image image.png --mask black.png",
        "--mask black.png is black all over, so that nothing would be redrawn: make that white",
    ),
    "a dark mask": (
        "--image image.png --mask dark.png",
        "--mask dark.png is nowhere lighter than 127 of 255, where white begins at 128, so that nothing would",
    ),
    "a light mask": (
        "--image image.png --mask light.png",
        "--mask light.png is nowhere darker than 200 of 255, where white begins at 128, so that nothing of the image",
    ),
    "a mask of nothing": (
        "--image image.png --mask clear.png",
        "--mask clear.png is white all over, as its transparent parts are laid on white, so that nothing of the image",
    ),
    "a veiled mask": ("--image image.png --mask veiled.png", "white all over, as its transparent parts are laid on wh"),
    "a black mask in its place": ("--image image.png --mask black.png --place 0,0", "--mask black.png is black all"),
    "a mask that is cropped away": (
        "--image image.png --mask border.png",
        "--mask border.png has nothing white where the canvas shows the image, so that nothing would be redrawn",
    ),
    "a mask alone": ("--mask mask.png", "--mask mask.png is of an image, and none is given: give one, or leave"),
    "a place alone": ("--place 8,8", "--place 8,8 is of an image, and none is given: give one, or leave it out"),
    "a feather alone": (
        "--image image.png --feather 4",
        "--feather 4 goes with --mask or --place: give that, or leave it out",
    ),
    "a feather too wide": (
        "--image image.png --mask mask.png --feather 9999",
        "--feather: 9999 must be a whole number in",
    ),
    "the usual feather alone": (
        "--image image.png --feather 16",
        "--feather 16 goes with --mask or --place: give",
    ),
    "half of a place": (
        "--image image.png --place None,3",
        "--place: None, 3 must be 2 values, each a whole number at le",
    ),
    "a mask of 0 bytes": ("--image image.png --mask empty.png", "has 0 bytes: give a picture"),
    "a mask that is cut off": ("--image image.png --mask cut.png", "cut.png cannot be read to its end"),
    "no such mask": ("--image image.png --mask none.png", "none.png does not exist"),
    "a place beside the canvas": (
        "--image image.png --place 65,0",
        "--place 65,0 lies beside the canvas: the image has 64×48 pixels and the canvas 128×128, so that it must be at "
        "most 64,80",
    ),
    "a place below it": ("--image image.png --place 0,81", "--place 0,81 lies beside the canvas"),
    "a canvas smaller than the image": (
        "--image image.png --place 0,0 --width 56",
        "--place 0,0 needs a larger canvas: the image has 64×48 pixels and the canvas 56×128",
    ),
    "a place that leaves nothing": (
        "--image image.png --place 0,0 --width 64 --height 48",
        "--place 0,0 leaves nothing to draw: the image has 64×48 pixels and the canvas 64×48, give a larger width",
    ),
    "an inversion": (
        "--image image.png --mask mask.png --invert",
        "and --mask mask.png draws a part anew: leave one out",
    ),
    "a place and a fit": (
        "--image image.png --place 0,0 --fit stretch",
        "--fit 'stretch' resizes the image, and --place puts",
    ),
    "a place and the usual fit": (
        "--image image.png --place 0,0 --fit cover",
        "--fit 'cover' resizes the image, and --pl",
    ),
    "half a place": ("--image image.png --place 5", "--place: 5 must be 2 values"),
    "a strength of nothing": ("--image image.png --mask mask.png --strength 0", "would draw nothing on the image"),
}


BAD_FILES = (
    "a light mask",
    "a mask of nothing",
    "a veiled mask",
    "a white mask",
    "a black mask",
    "a dark mask",
    "a black mask in its place",
    "a mask of 0 bytes",
    "a mask that is cut off",
)
"""The input of which the mask's file is no good."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_redrawn(name: str, files: Path, command_line: CommandLine) -> None:
    text, message = REFUSED[name]
    arguments = [files / word if word.endswith(".png") else word for word in text.split()]
    command_line.refuses([*QUICK, *SIZE, *arguments], 1 if name in BAD_FILES else 2, message)


def test_a_place_needs_a_canvas(files: Path, command_line: CommandLine) -> None:
    arguments = ["--image", files / "image.png", "--place", "0,0", "--width", 128]
    command_line.refuses([*QUICK, *arguments], 2, "--place 0,0 needs the size of the canvas: give width and height")


def test_a_set_goes_on_and_notices_another_mask(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files stand beside the file of prompts. A finished picture is not drawn again."""
    lines = [
        {"prompt": "a red house", "image": "image.png", "mask": "mask.png", "feather": 4},
        {"prompt": "a red house", "image": "image.png", "place": [8, 16], "width": 96, "height": 64},
    ]
    (files / "prompts.txt").write_text("\n".join(map(json.dumps, lines)))
    arguments = [*QUICK, "--width", "64", "--height", "48", "--prompts", str(files / "prompts.txt")]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    drawn = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in drawn] == ["0001-direct-64x48-seed0.png", "0002-direct-96x64-seed0.png"]
    picture, mask = np.asarray(Image.open(files / "image.png")), drawn_mask(1, 48, 64)
    far = (distances(mask) >= 4).numpy()
    assert np.array_equal(np.asarray(Image.open(drawn[0]))[far], picture[far])
    assert np.array_equal(np.asarray(Image.open(drawn[1]))[32:64, 24:56], picture[16:, 16:48])
    times = [path.stat().st_mtime_ns for path in drawn]
    drawn[1].with_suffix(".json").unlink()
    drawn[1].unlink()
    assert main(arguments) == 0
    assert drawn[0].stat().st_mtime_ns == times[0]
    assert drawn[1].exists()
    record = json.loads(drawn[1].with_suffix(".json").read_text())
    assert (record["place"], "mask" in record) == ([8, 16], False)
    Image.fromarray(as_mask(drawn_mask(2, 48, 64))).save(files / "mask.png")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "was drawn with --mask" in capsys.readouterr().err
    assert drawn[0].stat().st_mtime_ns == times[0]
