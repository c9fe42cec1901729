"""Resizing in latents and through the VAE, and the noise of a new start."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_split import TOLERANCE, canvases, close, sides
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.magnify import Magnify
from cutdiff.methods.shared import Run
from cutdiff.pipeline import prepare
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.resize import Resampling, renoise, resize, resize_pixels
from cutdiff.sampling.split import Gaussian, sharpened
from cutdiff.scenes.render import render
from cutdiff.scenes.world import sample
from cutdiff.settings import Settings

KINDS: tuple[Resampling, ...] = get_args(Resampling)
sizes = st.tuples(sides, sides)


# ---- In latents


@pytest.mark.parametrize("kind", KINDS)
@given(x=canvases(), size=sizes, antialias=st.booleans(), value=st.floats(-5, 5))
def test_any_size_keeps_a_constant_and_the_own_size_keeps_all(
    kind: Resampling, x: Tensor, size: tuple[int, int], antialias: bool, value: float
) -> None:
    flat = resize(torch.full_like(x, value), size, kind, antialias=antialias)
    assert (flat.shape, flat.dtype) == ((*x.shape[:2], *size), x.dtype)
    close(flat, torch.full_like(flat, value))
    assert torch.equal(resize(x, (x.shape[2], x.shape[3]), kind, antialias=antialias), x)
    if kind in ("nearest", "area"):
        resized = resize(x, size, kind)
        assert resized.amax() <= x.amax()
        assert resized.amin() >= x.amin()


@pytest.mark.parametrize("kind", KINDS)
@given(x=canvases(), size=sizes, antialias=st.booleans())
@example(x=torch.arange(3.0).view(1, 1, 3, 1), size=(2, 1), antialias=True)
def test_axes_are_resized_apart(kind: Resampling, x: Tensor, size: tuple[int, int], antialias: bool) -> None:
    rows_first = resize(resize(x, (size[0], x.shape[3]), kind, antialias=antialias), size, kind, antialias=antialias)
    close(resize(x, size, kind, antialias=antialias), rows_first)
    turned = resize(x.mT.contiguous(), (size[1], size[0]), kind, antialias=antialias).mT
    close(resize(x, size, kind, antialias=antialias), turned.contiguous())


@given(x=canvases(), size=sizes)
def test_catmull_rom_is_the_kernel_of_pil(x: Tensor, size: tuple[int, int]) -> None:
    rows = [
        Image.fromarray(row.float().numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for row in x.flatten(0, 1)
    ]
    expected = torch.from_numpy(np.stack([np.array(row) for row in rows])).view(*x.shape[:2], *size)
    close(resize(x.float(), size, "catmull_rom"), expected)


@given(x=canvases(), factors=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_nearest_up_then_area_down_is_the_identity(x: Tensor, factors: tuple[int, int]) -> None:
    size = (x.shape[2] * factors[0], x.shape[3] * factors[1])
    larger = resize(x, size, "nearest")
    assert torch.equal(larger, x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3))
    close(resize(larger, (x.shape[2], x.shape[3]), "area"), x)
    mixed = larger + torch.arange(size[1])
    close(resize(mixed, (x.shape[2], x.shape[3]), "area"), F.avg_pool2d(mixed, factors))


@given(n=st.integers(1, 40), m=st.integers(1, 40))
def test_nearest_takes_the_pixel_that_it_says(n: int, m: int) -> None:
    x = torch.arange(n, dtype=torch.float64).expand(1, 1, n, n)
    assert resize(x, (n, m), "nearest")[0, 0, 0].tolist() == [i * n // m for i in range(m)]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_what_a_smaller_canvas_cannot_hold_is_smoothed_away(kind: Resampling) -> None:
    """The middle pixels of a wave of five are a constant, −0.81, unless they are smoothed first."""
    wave = torch.cos(2 * torch.pi * torch.arange(40) / 5).expand(1, 1, 40, 40)
    smooth, plain = (resize(wave, (40, 8), kind, antialias=antialias) for antialias in (True, False))
    assert smooth[..., 1:-1].abs().max() < 0.15
    assert plain.abs().min() > 0.8


@given(x=canvases())
def test_up_is_torchs_without_smoothing(x: Tensor) -> None:
    """All published codes of this field enlarge so; torch smooths with another cubic, which must not come in."""
    size = (x.shape[2] + 3, 2 * x.shape[3])
    assert torch.equal(resize(x, size), F.interpolate(x, size, mode="bicubic"))


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_a_size_of_nothing_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^size=\(.*\) must be at least one pixel on each axis$"):
        resize(torch.zeros(1, 1, 4, 4), size)


# ---- Noise


@given(x=canvases(), sigma=st.floats(0, 20))
def test_renoise_has_the_deviation_of_its_sigma(x: Tensor, sigma: float) -> None:
    noise = torch.randn_like(x)
    noisy = renoise(x, sigma, noise)
    assert noisy.dtype == x.dtype
    torch.testing.assert_close(noisy - x, sigma * noise, rtol=1e-4, atol=20 * TOLERANCE[x.dtype])
    assert torch.equal(renoise(x, 0.0, noise), x)


# ---- Through the VAE


@pytest.fixture(scope="module")
def run(tiny_model: Model) -> Run:
    """A run of two images at twice the native size."""
    runs: list[Run] = []

    def spy(run: Run) -> list[Any]:
        runs.append(run)
        return Magnify().stages(run)

    prepare(tiny_model, ["a", "b"], Settings(method=spy, num_steps=2, height=128, width=128))
    return runs[0]


def latents(*size: int, images: int = 2) -> Tensor:
    return torch.randn(images, 4, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_decoding_resizing_and_encoding(
    tiny_model: Model, run: Run, size: tuple[int, int], kind: Resampling
) -> None:
    x = latents(8, 7)
    ours = resize_pixels(x, size, run.decode, run.encode, resampling=kind)
    images = cutdiff.decode(tiny_model, x)
    theirs = cutdiff.encode(tiny_model, resize(images, (8 * size[0], 8 * size[1]), kind))
    assert (ours.shape, ours.dtype, ours.requires_grad) == ((2, 4, *size), torch.float32, False)
    assert relative_error(ours, theirs) < 1e-5
    alone = torch.cat([resize_pixels(one, size, run.decode, run.encode, resampling=kind) for one in x.split(1)])
    assert torch.equal(ours, alone)


def test_at_the_same_size_it_is_the_vae_alone(tiny_model: Model, run: Run) -> None:
    x = latents(6, 5)
    theirs = cutdiff.encode(tiny_model, cutdiff.decode(tiny_model, x))
    assert relative_error(resize_pixels(x, (6, 5), run.decode, run.encode), theirs) < 1e-6


def test_a_change_is_made_of_the_larger_images(tiny_model: Model, run: Run) -> None:
    sharpen = partial(sharpened, amount=1, split=Gaussian(sigma=1, radius=1))
    x = latents(6, 5)
    images = resize(cutdiff.decode(tiny_model, x), (96, 80))
    theirs = cutdiff.encode(tiny_model, sharpen(images))
    ours = resize_pixels(x, (12, 10), run.decode, run.encode, change=sharpen)
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, resize_pixels(x, (12, 10), run.decode, run.encode)) > 1e-3


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_corrections_give_back_what_the_vae_takes(tiny_model: Model, run: Run, corrections: int) -> None:
    x = latents(6, 5)
    wanted = theirs = cutdiff.encode(tiny_model, resize(cutdiff.decode(tiny_model, x), (96, 80)))
    for _ in range(corrections):
        theirs = theirs + wanted - cutdiff.encode(tiny_model, cutdiff.decode(tiny_model, theirs))
    ours = resize_pixels(x, (12, 10), run.decode, run.encode, corrections=corrections)
    assert relative_error(ours, theirs) < 1e-5


def test_a_correction_brings_the_embedded_vae_nearer_to_the_picture(model: Model) -> None:
    images = render(sample(8, torch.Generator().manual_seed(1)), 128)
    decode, encode = partial(cutdiff.decode, model), partial(cutdiff.encode, model)
    larger = resize(decode(encode(images)), (256, 256))
    errors = [
        (decode(resize_pixels(encode(images), (32, 32), decode, encode, corrections=k)) - larger).square().mean()
        for k in range(3)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_one_image_goes_through_at_a_time() -> None:
    shapes = []

    def decode(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    def encode(images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return F.avg_pool2d(images, 8)

    x = latents(4, 3, images=3)
    larger = resize_pixels(x.clone().requires_grad_(), (8, 6), decode, encode, resampling="nearest")
    assert not larger.requires_grad
    assert shapes == [(1, 4, 4, 3), (1, 3, 64, 48)] * 3
    torch.testing.assert_close(larger, resize(x[:, :3], (8, 6), "nearest"))


def test_a_sample_of_the_encoder_is_drawn_with_explicit_noise(tiny_model: Model, run: Run) -> None:
    x = latents(8, 8)
    state = torch.get_rng_state()
    noise = run.draws.encoder_noise((2, 4, 12, 12), 2)
    mean, sample, same = (
        resize_pixels(x, (12, 12), run.decode, run.encode, noise=z) for z in (None, noise, noise.clone())
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample, same)
    images = resize(cutdiff.decode(tiny_model, x), (96, 96))
    posterior = tiny_model.vae.encode(2 * images - 1)
    assert relative_error(mean, posterior.mean) < 1e-5
    assert relative_error(sample, posterior.mean + posterior.std * noise) < 1e-5
    assert relative_error(sample, mean) > 1e-3
    assert torch.equal(cutdiff.encode(tiny_model, images, torch.zeros_like(noise)), cutdiff.encode(tiny_model, images))


def test_decoded_images_are_clamped_unless_asked(run: Run) -> None:
    x = 30 * latents(4, 4)
    clamped, free = run.decode(x), run.decode(x, clamp=False)
    assert torch.equal(free.clamp(0, 1), clamped)
    assert not torch.equal(free, clamped)
    passed = resize_pixels(x, (4, 4), partial(run.decode, clamp=False), run.encode)
    assert relative_error(passed, run.encode(free)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4, 12, 12), (2, 4, 12, 11), (2, 3, 12, 12)])
def test_noise_of_another_shape_is_an_error(tiny_model: Model, shape: tuple[int, ...]) -> None:
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^noise of {given} cannot sample latents of \(2, 4, 12, 12\)$"):
        cutdiff.encode(tiny_model, torch.rand(2, 3, 96, 96), torch.zeros(shape))


def test_noise_of_the_encoder_is_no_other_noise() -> None:
    draws, shape = Draws((3, 4)), (2, 4, 8, 8)
    drawn = [draws.encoder_noise(shape, 2), draws.encoder_noise(shape, 3), draws.phase_noise(shape, 2)]
    drawn += [draws.noise(shape), draws.noise(shape, 1)]
    for i, one in enumerate(drawn):
        assert (one.shape, one.dtype) == (shape, torch.float32)
        assert one.std().item() == pytest.approx(1, abs=0.15)
        for other in drawn[:i]:
            assert (one * other).mean().abs() < 0.2
    assert torch.equal(drawn[0][1:], Draws((4,)).encoder_noise((1, *shape[1:]), 2))


def test_nearest_is_exact_where_float32_would_round() -> None:
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert resize(x, (1, 82), "nearest")[0, 0, 0].tolist() == [i * 2 // 82 for i in range(82)]
