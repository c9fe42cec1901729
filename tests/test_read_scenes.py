"""The reader of scenes: right on true renders of every size, and not fooled by what goes wrong in generated ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from renders import pictures, scenes
from torch import Tensor

from cutdiff.checkpoint.model import Model
from cutdiff.scenes import world
from cutdiff.scenes.blobs import count_blobs, label_blobs, largest_blob, opened
from cutdiff.scenes.read import read
from cutdiff.scenes.render import BODY
from cutdiff.scenes.world import Scenes

SIZE = 128


def bare(drawn: Scenes) -> Scenes:
    """The same scenes without their subjects."""
    return replace(drawn, subject_size=torch.full((len(drawn),), 1e-6))


def with_second_subject(drawn: Scenes, color: Tensor) -> Tensor:
    """Pictures with a second, smaller subject of the same kind in `color` beside the first."""
    aside = drawn.subject_x + torch.where(drawn.subject_x < 0.5, 0.38, -0.38)
    second = replace(drawn, subject_x=aside, subject_size=torch.full((len(drawn),), 0.11), color=color)
    drawn_over = pictures(second)
    changed = (drawn_over - pictures(bare(second))).abs().amax(1, keepdim=True) > 0.02
    return torch.where(changed, drawn_over, pictures(drawn))


def share(right: Tensor) -> float:
    return right.float().mean().item()


@pytest.mark.parametrize("size", [128, 256, 384, 512])
def test_everything_is_read_off_true_renders(size: int) -> None:
    drawn = scenes(200, seed=size)
    reading, choices = read(pictures(drawn, size)), drawn.choices
    assert share(reading.bodies == 1) >= 0.99
    assert share(reading.subjects == 1) >= 0.99
    for index, name in enumerate(("color", "subject", "ridge", "ground", "time")):
        assert share(getattr(reading, name) == choices[:, index]) >= 0.99
    assert share(reading.caption_right(choices)) >= 0.99


def test_a_picture_of_another_shape_is_read() -> None:
    """A picture is made twice as wide by repetition, so that everything is there twice."""
    drawn = scenes(20, seed=1)
    reading = read(pictures(drawn).repeat(1, 1, 1, 2))
    assert (reading.bodies == 2).all()
    assert (reading.subjects == 2).all()
    assert torch.equal(reading.ground, drawn.ground)


@pytest.mark.parametrize("times", [2, 4])
def test_repetition_at_native_scale_is_counted(times: int) -> None:
    """A native picture, repeated over a large one as direct inference would, shows n² bodies and n² subjects."""
    drawn = scenes(20, seed=2)
    reading = read(pictures(drawn).repeat(1, 1, times, times))
    assert share(reading.bodies == times**2) >= 0.95
    assert share(reading.subjects == times**2) >= 0.95


def test_a_second_body_is_caught() -> None:
    """A second sun is painted where the sky is free: opposite of the first one, above the ridge."""
    drawn = scenes(200, seed=3)
    side = torch.where(drawn.body_x < 0.5, 0.93, 0.07)
    y, x = torch.meshgrid(*(torch.arange(SIZE) / SIZE,) * 2, indexing="ij")
    disc = torch.hypot(x - side[:, None, None], y - 0.08) < 0.06
    color = torch.tensor([BODY[name] for name in world.TIMES])[drawn.time]
    reading = read(torch.where(disc[:, None], color[:, :, None, None], pictures(drawn)))
    assert share(reading.bodies == 2) >= 0.99
    assert not reading.matches(drawn.choices)[reading.bodies == 2].any()


def test_a_missing_body_is_caught() -> None:
    drawn = scenes(200, seed=4)
    reading = read(pictures(replace(drawn, body_radius=torch.zeros(200))))
    assert share((reading.bodies == 0) & ~reading.matches(drawn.choices)) >= 0.99


def test_a_missing_subject_is_caught() -> None:
    drawn = scenes(200, seed=5)
    reading = read(pictures(bare(drawn)))
    assert share((reading.subjects == 0) & (reading.color == -1) & (reading.subject == -1)) >= 0.99


@pytest.mark.parametrize("shift", [0, 1], ids=["same colour", "other colour"])
def test_a_second_subject_is_caught(shift: int) -> None:
    drawn = scenes(200, seed=6)
    reading = read(with_second_subject(drawn, (drawn.color + shift) % len(world.COLORS)))
    assert share((reading.subjects == 2) & ~reading.matches(drawn.choices)) >= 0.99
    # The kind and colour that are read are those of the larger one.
    assert share((reading.color == drawn.color) & (reading.subject == drawn.subject)) >= 0.99


@pytest.mark.parametrize("size", [128, 256])
def test_a_split_house_is_caught(size: int) -> None:
    """A gap of a sixteenth of the picture runs down through the middle of the house."""
    drawn = scenes(200, seed=7)
    drawn = replace(drawn, subject=torch.full((200,), world.SUBJECTS.index("house")))
    x = (torch.arange(size) + 0.5) / size
    gap = ((x - drawn.subject_x[:, None]).abs() < 1 / 32)[:, None, None]
    reading = read(torch.where(gap, pictures(bare(drawn), size), pictures(drawn, size)))
    assert share((reading.subjects == 2) & ~reading.matches(drawn.choices)) >= 0.99


@pytest.mark.parametrize("name", ["color", "subject", "ridge", "ground", "time"])
def test_what_the_caption_does_not_say_is_caught(name: str) -> None:
    drawn = scenes(200, seed=8)
    options = {"color": 5, "subject": 4, "ridge": 2, "ground": 4, "time": 3}
    other = replace(drawn, **{name: (getattr(drawn, name) + 1) % options[name]})
    reading = read(pictures(other))
    assert share(~reading.caption_right(drawn.choices)) >= 0.99
    assert share(reading.matches(drawn.choices)) <= 0.01 or name not in ("color", "subject")


def test_blur_and_noise_do_not_change_the_reading(model: Model) -> None:
    """The pictures are true renders that passed through the VAE, with noise of two levels of 255 on top."""
    drawn = scenes(96, seed=9)
    decoded = model.vae.decode(model.vae.encode(pictures(drawn) * 2 - 1).mean) / 2 + 0.5
    noise = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0)) * 2 / 255
    assert share(read((decoded + noise).clamp(0, 1)).caption_right(drawn.choices)) >= 0.97


def test_nothing_is_read_off_an_empty_picture() -> None:
    reading = read(torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(2, 3, 96, 128))
    assert (reading.bodies == 0).all()
    assert (reading.subjects == 0).all()
    for name in ("color", "subject", "ridge", "ground", "time"):
        assert (getattr(reading, name) == -1).all()


def test_only_pictures_are_read() -> None:
    with pytest.raises(ValueError, match=r"pictures are \(N, 3, H, W\)"):
        read(torch.zeros(3, 128, 128))


def test_blobs_are_counted_by_connection_and_size() -> None:
    mask = torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[0, :5, :5] = mask[0, 5:9, 5:9] = True  # joined at a corner
    mask[0, 15:, 15:] = True
    mask[0, 0, 19] = True  # too small
    assert count_blobs(mask, smallest=2).tolist() == [2, 0]
    assert largest_blob(mask).sum((1, 2)).tolist() == [25 + 16, 0]


def test_opening_removes_what_is_thin() -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, 5:12, :7] = True
    block = mask.clone()
    mask[0, 8:10, 7:] = True
    assert torch.equal(opened(mask), block)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(0.2, 0.8))
def test_labels_are_those_of_a_flood(height: int, width: int, seed: int, density: float) -> None:
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < density
    for picture, labels in zip(mask.tolist(), label_blobs(mask).tolist(), strict=True):
        assert labels == flood(picture)


def flood(mask: list[list[bool]]) -> list[list[int]]:
    """Label regions by walking each from its last pixel."""
    height, width = len(mask), len(mask[0])
    labels = [[0] * width for _ in range(height)]
    for number in range(height * width, 0, -1):
        pending = [divmod(number - 1, width)]
        while pending:
            y, x = pending.pop()
            if 0 <= y < height and 0 <= x < width and mask[y][x] and labels[y][x] == 0:
                labels[y][x] = number
                pending += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels
