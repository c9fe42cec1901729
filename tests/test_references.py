"""Pictures against a folder of reference images: a maintained library's metrics, with networks of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from cutdiff.evaluate import main
from cutdiff.evaluation import score
from cutdiff.evaluation.metrics import frechet_distance
from cutdiff.evaluation.references import CROPS, References, _load_clip, _parts, clip_scores, compare

PROMPTS = ["a red house at night", "a blue tree at day", "a pink tent"]


class Moments(nn.Module):
    """A stand-in for Inception: its features are means and deviations of colours, its probabilities shares of them."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        pixels = images.float().flatten(2) / 255
        features = torch.cat([pixels.mean(2), pixels.std(2)], dim=1)
        return features if return_features else features / features.sum(1, keepdim=True)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    path = tmp_path / "moments.pt"
    torch.jit.script(Moments()).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A random CLIP of a few hundred thousand parameters."""
    folder = tmp_path / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "weights/scenes/tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(2)
    for part in (CLIPModel(config), tokenizer, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)):
        part.save_pretrained(folder)
    return folder


def save_renders(folder: Path, num: int, size: int, seed: int) -> list[Path]:
    folder.mkdir()
    images = score.true_renders(score.scenes(num, seed), size).permute(0, 2, 3, 1).numpy()
    paths = [folder / f"{i:04}.png" for i in range(num)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_distances_are_those_of_the_features(tmp_path: Path, features: Path) -> None:
    ours, truth = (save_renders(tmp_path / name, 24, 64, seed) for name, seed in (("ours", 1), ("truth", 2)))
    references = References.load(tmp_path / "truth", features, None)
    scores = compare(ours, ["a scene"] * 24, references, native=32)
    pixels = [np.stack([np.asarray(Image.open(path)) for path in paths]) for paths in (ours, truth)]
    ours_features, truth_features = (
        Moments()(torch.from_numpy(p).permute(0, 3, 1, 2), return_features=True) for p in pixels
    )
    assert scores["FID whole"].value == pytest.approx(frechet_distance(ours_features, truth_features), rel=1e-3)
    assert set(scores) == {f"{name} {part}" for name in ("FID", "KID", "IS") for part in ("whole", "crops")}
    assert scores["IS whole"].value > 1
    assert scores == compare(ours, ["a scene"] * 24, references, native=32), "the same every time"
    assert scores["IS whole"].low is None, "of few pictures there is one split"
    assert scores["KID crops"].low is not None, "240 crops are more than a subset"

    itself = compare(truth, ["a scene"] * 24, references, native=32)
    assert itself["FID whole"].value == pytest.approx(0, abs=1e-5)
    assert itself["KID crops"].value < scores["KID crops"].value


def test_references_of_any_size_are_fitted_to_the_pictures(tmp_path: Path, features: Path) -> None:
    ours = save_renders(tmp_path / "ours", 8, 64, 1)
    save_renders(tmp_path / "larger", 8, 128, 1)
    references = References.load(tmp_path / "larger", features, None)
    assert compare(ours, ["a scene"] * 8, references, native=64)["FID whole"].value < 1e-3


@pytest.mark.parametrize("processor_saves", [False, True])
def test_a_clip_model_is_read_as_transformers_does(clip: Path, processor_saves: bool) -> None:
    theirs = CLIPProcessor.from_pretrained(clip)
    if processor_saves:
        (clip / "preprocessor_config.json").unlink()
        theirs.save_pretrained(clip)
    (clip / "special_tokens_map.json").write_text(json.dumps({"vocab_file": "/etc/passwd", "gguf_file": "/etc/passwd"}))
    _, ours = _load_clip(clip, "cpu")
    given = {"text": PROMPTS[:1], "images": Image.new("RGB", (50, 40), "red"), "return_tensors": "pt"}
    mine, expected = ours(**given), theirs(**given)
    assert torch.equal(mine["input_ids"], expected["input_ids"])
    assert torch.equal(mine["pixel_values"], expected["pixel_values"])


def test_the_clip_score_is_a_cosine_of_embeddings(tmp_path: Path, clip: Path) -> None:
    model, processor = _load_clip(clip, "cpu")
    pictures = save_renders(tmp_path / "ours", 3, 64, 1)
    scores = clip_scores(pictures, PROMPTS, model, processor)
    images = [Image.open(path).copy() for path in pictures]
    with torch.no_grad():
        given = {"text": PROMPTS, "images": images, "return_tensors": "pt", "padding": True}
        output = model(**processor(**given))
    cosines = (output.logits_per_image / model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(scores, 100 * cosines.clamp(min=0), rtol=1e-3, atol=1e-3)
    assert scores.max() > 0


def test_the_command_compares_any_model_with_images_of_ones_own(
    tmp_path: Path, features: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_renders(tmp_path / "references", 4, 160, 1)
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    out = tmp_path / "out"
    arguments = ["--methods", "direct", "--sizes", "128", "--steps", "1", "--out", str(out)]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--references", str(tmp_path / "references")]
    assert main([*arguments, "--features", str(features), "--clip", str(clip)]) == 0
    assert "| 128 px | direct |" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["prompts"] == PROMPTS
    (cell,) = results["cells"]
    assert cell["num"] == 3
    assert {"FID whole", "KID crops", "IS whole", "CLIP"} <= set(cell["scores"])
    assert (out / "contact-128.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "prompts.txt"], "--references, --features must be given too"),
        (["--clip", "clip"], "--clip goes with"),
        (
            ["--prompts", "prompts.txt", "--references", "none", "--features", "f.pt"],
            "--references none does not exist",
        ),
        (["--prompts", "prompts.txt", "--references", ".", "--features", "f.pt"], "--features f.pt does not exist"),
        (["--prompts", "one.txt", "--references", ".", "--features", "one.txt"], "one.txt holds 1 prompts"),
        (["--prompts", "prompts.txt", "--references", ".", "--features", "one.txt"], "one.txt is no TorchScript file"),
        (["--prompts", "prompts.txt", "--references", ".", "--features", "moments.pt"], ". holds 0 images"),
        (["--prompts", "prompts.txt", "--references", "bad", "--features", "moments.pt"], "a.png is no image"),
        (
            ["--prompts", "prompts.txt", "--references", "good", "--features", "moments.pt", "--clip", "bad"],
            "--clip bad is no CLIP model",
        ),
        (
            ["--prompts", "prompts.txt", "--references", "good", "--features", "moments.pt", "--sizes", "64"],
            "--sizes 64: a picture smaller than the native 128 px",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_drawn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    features: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    for i in "ab":
        Path(f"bad/{i}.png").write_text("a page that says that the picture was not found")
    save_renders(Path("good"), 2, 128, 1)
    Path("prompts.txt").write_text("a\nb\n")
    Path("one.txt").write_text("a\n")
    assert main([*arguments, "--out", "out"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()


def test_every_picture_gives_its_crops(tmp_path: Path) -> None:
    paths = save_renders(tmp_path / "ours", 2, 64, 1)
    crops = list(_parts(paths, (64, 64), 32))
    assert [part.shape for part in crops] == [(CROPS, 3, 32, 32)] * 2
    assert [part.shape for part in _parts(paths, (48, 32), None)] == [(1, 3, 32, 48)] * 2
