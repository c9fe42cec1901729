"""The features: their shapes, their training, and the embedded weights, which must tell true sets from spoilt ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from renders import pictures, random_pictures, scenes
from torch import Tensor

from cutdiff.checkpoint.locate import embedded
from cutdiff.evaluation.features import (
    DIM,
    PIXELS,
    WEIGHTS,
    FeatureNet,
    blur,
    crop_features,
    grid_crops,
    load_features,
    whole_features,
)
from cutdiff.evaluation.metrics import frechet_distance, kernel_distance
from cutdiff.scenes import world
from cutdiff.scenes.render import Crop
from cutdiff.training import features as train_features
from cutdiff.training.features import UNSEEN, targets


@pytest.fixture(scope="module")
def network() -> FeatureNet:
    return load_features()


def test_the_embedded_features_know_the_world(network: FeatureNet) -> None:
    drawn = scenes(200, seed=50)
    with torch.no_grad():
        *logits, visible, measures = network.answers(pictures(drawn, PIXELS))
    guesses = torch.stack([guess.argmax(1) for guess in logits], dim=1)
    assert ((guesses == drawn.choices).float().mean(0) >= 0.97).all()
    assert (visible > 0).float().mean() >= 0.99
    assert (measures[:, 0] - drawn.subject_x).abs().mean() < 0.03
    assert (measures[:, 6] - drawn.horizon).abs().mean() < 0.03


def test_true_sets_are_close_and_spoilt_ones_are_not(network: FeatureNet) -> None:
    """The spoilt sets of 100 pictures have their halves exchanged, or are never at night."""
    first, second = random_pictures(100, PIXELS, seed=51), random_pictures(100, PIXELS, seed=52)
    drawn = scenes(150, seed=53)
    daylight = pictures(drawn[drawn.time != world.TIMES.index("night")][:100], PIXELS)
    truth = whole_features(network, first)
    for distance in (frechet_distance, kernel_distance):
        floor = distance(truth, whole_features(network, second))
        for spoilt in (second.roll(PIXELS // 2, dims=3), daylight):
            assert distance(truth, whole_features(network, spoilt)) > floor + 0.03


def test_crops_tell_an_enlarged_and_a_repeated_picture_from_the_truth(network: FeatureNet) -> None:
    def features(images: Tensor) -> Tensor:
        return crop_features(network, images).flatten(0, 1)

    first, second = random_pictures(60, 256, seed=54), random_pictures(60, 256, seed=55)
    native = random_pictures(60, PIXELS, seed=55)
    truth = features(first)
    for distance in (frechet_distance, kernel_distance):
        floor = distance(truth, features(second))
        assert distance(truth, features(blur(second, 2))) > 1.5 * floor
        assert distance(truth, features(native.repeat(1, 1, 2, 2))) > 10 * floor


def test_features_are_scaled_and_do_not_depend_on_the_batch(network: FeatureNet) -> None:
    images = random_pictures(256, PIXELS, seed=56)
    features = whole_features(network, images)
    assert features.shape == (256, DIM)
    assert features.mean(0).abs().max() < 0.3
    assert 0.7 < features.std(0).min() < features.std(0).max() < 1.3
    torch.testing.assert_close(whole_features(network, images[:9], part=4), features[:9], rtol=1e-4, atol=1e-4)


def test_crops_of_a_native_picture_are_the_picture(network: FeatureNet) -> None:
    images = random_pictures(3, PIXELS, seed=57)
    torch.testing.assert_close(crop_features(network, images)[:, 0], whole_features(network, images))


@given(st.integers(8, 40), st.integers(8, 40))
def test_the_grid_covers_the_picture_evenly(height: int, width: int) -> None:
    numbers = torch.arange(height * width).view(1, 1, height, width).expand(2, 3, -1, -1)
    crops = grid_crops(numbers, size=8)
    assert crops.shape == (2, -(-height // 8) * -(-width // 8), 3, 8, 8)
    assert len(crops.unique()) == height * width


def test_pictures_of_a_wrong_size_are_refused(network: FeatureNet) -> None:
    with pytest.raises(ValueError, match="smaller than a window"):
        grid_crops(torch.zeros(1, 3, 100, 256))
    with pytest.raises(ValueError, match="pictures are"):
        network(torch.zeros(1, 3, 64, 64))


def test_targets_are_what_a_crop_shows() -> None:
    """The crop is the upper left quarter of a scene whose subject is at the right and whose sun is at the left."""
    drawn = scenes(64)
    drawn = drawn[(drawn.subject_x > 0.6) & (drawn.body_x > 0.1) & (drawn.horizon > 0.6)][:1]
    half = torch.full((1,), 0.5)
    wanted = targets(drawn, Crop(half - 0.5, half - 0.5, half), torch.tensor([1]))
    assert wanted.choices.tolist() == [[UNSEEN, UNSEEN, UNSEEN, UNSEEN, drawn.time.item()]]
    assert wanted.visible.tolist() == [[0, 1]]
    assert wanted.measured.tolist() == [[0, 0, 0, 1, 1, 1, 0, 1, 1]]
    x, y, radius, _, side, blurred = wanted.measures[0, 3:].tolist()
    assert (x, y, radius) == pytest.approx(
        (2 * drawn.body_x.item(), 2 * drawn.body_y.item(), 2 * drawn.body_radius.item())
    )
    assert (side, blurred) == (-1, 1)


def test_training_runs_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps from the command line give weights that load and a README that describes them."""
    monkeypatch.setattr("cutdiff.training.features_card.SET_PAIRS", 1)
    arguments = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--device", "cpu", "--batch", "4"]
    for steps in ("2", "3"):
        train_features.main([*arguments, "--steps", steps, "--set-size", "8"])
    network = load_features(tmp_path / "out")
    features = whole_features(network, random_pictures(2, PIXELS, seed=0))
    assert features.isfinite().all()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "3 steps of 4 pictures" in readme
    assert hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest() in readme


def test_the_embedded_features_are_small_and_those_of_the_readme() -> None:
    folder = embedded(WEIGHTS)
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) <= 3e6
    assert f"{hashlib.sha256(weights).hexdigest()}  model.safetensors" in (folder / "README.md").read_text()
