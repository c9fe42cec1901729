"""A run that starts from a given picture: upscaling, img2img and inversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from refusal import CommandLine
from torch import Tensor

import cutdiff
from cutdiff import Draws, Settings
from cutdiff.checkpoint.model import Model
from cutdiff.evaluation import score
from cutdiff.methods.picture import canvases
from cutdiff.methods.shared import Run, stages_of
from cutdiff.methods.trajectory import Trajectory
from cutdiff.output.images import to_pil
from cutdiff.planning.forecast import outline, walk
from cutdiff.sample import main
from cutdiff.sampling.fitted import Fitted
from cutdiff.sampling.resize import renoise, resize
from cutdiff.sampling.stages import Phase, Size, Stage
from cutdiff.specs import resolve

STEPS = 3


def psnr(ours: Tensor, theirs: Tensor) -> float:
    return (-10 * (ours - theirs).square().mean().log10()).item()


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """A true scene of native size, (1, 3, 128, 128)."""
    return score.true_renders(score.scenes(2), 128)[:1].float() / 255


LED = ("imax", "hiflow")
OF_NATIVE = {
    "upscale": 2 * STEPS,
    "magnify": 2 * STEPS,
    "climb": 2 * STEPS,
    "demofusion": 2 * STEPS,
    "accdiffusion": 0,
    "diffusehigh": 2 * STEPS,
    **dict.fromkeys(LED, 2 * STEPS),
    "freescale": 2 * STEPS,
    "rectifiedhr": 2,
    "frecas": 2,
}
"""The evaluations that a given native picture saves: accdiffusion and frecas look at it for their maps."""


@pytest.mark.parametrize("method", OF_NATIVE)
def test_a_given_picture_is_the_native_one(method: str, tiny_model: Model) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"method": method, "num_steps": STEPS, "height": 128, "width": 128, "guidance_scale": 3}
    drawn, given = (cutdiff.generate(tiny_model, "a tent", **options, **own) for own in ({}, {"image": image}))
    assert given.images.shape == (1, 3, 128, 128)
    saved = drawn.record["network_evaluations"] - given.record["network_evaluations"]
    assert saved == OF_NATIVE[method]
    other = cutdiff.generate(tiny_model, "a tent", **options, image=1 - image)
    assert not torch.allclose(given.images, other.images, atol=0.01), "the picture is looked at"


@pytest.mark.parametrize("method", ["magnify,hold=trajectory", "climb", "demofusion", "diffusehigh", "freescale", *LED])
def test_it_is_as_if_the_method_had_drawn_it(method: str, tiny_model: Model) -> None:
    """The same large picture comes of a first stage whose estimates are all the picture's latents."""
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    latents = cutdiff.encode(tiny_model, image)

    def as_if_drawn(run: Run) -> list[Stage | Phase]:
        first, *others = stages_of(resolve("method", method), run)
        assert isinstance(first, Stage)
        if isinstance(first.denoise, Trajectory):  # which later stages look back to
            first.denoise.denoise = lambda x, sigma, step: latents
            return [first, *others]
        return [replace(first, denoise=lambda x, sigma, step: latents), *others]

    options: dict[str, Any] = {"num_steps": STEPS, "height": 96, "width": 128}
    given = cutdiff.generate(tiny_model, "a tent", method=method, image=image, **options)
    drawn = cutdiff.generate(tiny_model, "a tent", method=as_if_drawn, **options)
    assert torch.allclose(given.latents, drawn.latents, atol=1e-4)


def test_the_less_is_redrawn_the_nearer_it_stays(model: Model, picture: Tensor) -> None:
    near = []
    for strength in (0.1, 0.4, 0.8):
        options: dict[str, Any] = {"method": "magnify", "num_steps": 10, "height": 192, "width": 192}
        result = cutdiff.generate(model, "", image=picture, strength=strength, **options)
        near.append(psnr(resize(result.images, (128, 128)), picture))
    assert near == sorted(near, reverse=True)
    assert near[0] > 26
    assert near[0] > near[2] + 2


@pytest.mark.parametrize(
    ("side", "size", "first", "larger"),
    [
        (32, (32, 32), (16, 16), [(2, (32, 32))]),
        (128, (64, 64), (16, 16), [(2, (32, 32)), (3, (48, 48)), (4, (64, 64))]),
        (256, (64, 64), (32, 32), [(3, (48, 48)), (4, (64, 64))]),
        (200, (64, 48), (25, 19), [(2, (32, 24)), (3, (48, 36)), (4, (64, 48))]),
        (512, (32, 32), (32, 32), [(2, (32, 32))]),
        (128, (16, 16), (16, 16), [(2, (16, 16))]),
        (512, (8, 8), (8, 8), [(2, (8, 8))]),
    ],
)
def test_canvases_go_on_from_the_size_of_the_picture(
    side: int, size: Size, first: Size, larger: list[tuple[int, Size]], model: Model
) -> None:
    runs: list[Run] = []

    def kept(run: Run) -> list[Stage]:
        runs.append(run)
        return [Stage("direct", range(run.num_steps), run.denoiser)]

    options = {"height": 8 * size[0], "width": 8 * size[1], "method": kept, "num_steps": 2}
    cutdiff.denoise(model, "", image=torch.zeros(3, side, side), **options)
    assert canvases(runs[0]) == (first, larger)


def test_a_picture_as_large_as_the_canvas_is_drawn_on(model: Model, picture: Tensor) -> None:
    large = resize(picture, (192, 192)).clamp(0, 1)
    result = cutdiff.generate(model, "", image=large, height=192, width=192, method="magnify", num_steps=4)
    assert result.record["network_evaluations"] == 4 * 2  # four views, two steps, without guidance
    assert 20 < psnr(result.images, large) < 40


def test_img2img_begins_with_the_noised_picture(tiny_model: Model) -> None:
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    states: list[tuple[int, float, Tensor]] = []

    def heard(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            states.append((step, sigma, x.clone()))
            return run.denoiser(x, sigma, step)

        steps = [range(4), range(4, 10)]
        return [Stage(name, part, denoise) for name, part in zip("ab", steps, strict=True)]

    options: dict[str, Any] = {"height": 64, "width": 96, "num_steps": 10, "seed": 5}
    taken = [*cutdiff.denoise(tiny_model, ["a", "b"], image=image, method=heard, strength=0.62, **options)]
    assert [step.index for step in taken] == [step for step, *_ in states] == [3, 4, 5, 6, 7, 8, 9]
    assert [step.stage for step in taken] == [*"abbbbbb"]
    _, sigma, x = states[0]
    noise = Draws((5, 6)).noise((2, 4, 8, 12))
    assert torch.allclose(x, renoise(cutdiff.encode(tiny_model, image), sigma, noise), atol=1e-4)
    states.clear()
    list(cutdiff.denoise(tiny_model, ["a", "b"], image=image[:1], method=heard, strength=0.99, **options))
    _, sigma, x = states[0]
    assert (len(states), states[0][0]) == (10, 0)
    assert torch.allclose(x, renoise(cutdiff.encode(tiny_model, image[:1]), sigma, noise), atol=1e-3)


def test_half_of_the_steps_are_taken_where_nobody_says(tiny_model: Model) -> None:
    image = torch.zeros(3, 64, 64)
    result = cutdiff.generate(tiny_model, "", image=image, method="direct", height=64, width=64, num_steps=5)
    assert result.record["network_evaluations"] == 2 * 3
    assert result.record["strength"] == 0.5


def test_a_method_that_does_not_say_how_it_takes_a_picture(tiny_model: Model) -> None:
    def phased(run: Run) -> list[Stage | Phase]:
        first, second = Stage("a", range(2), run.denoiser, (4, 4)), Stage("b", range(2, 4), run.denoiser)
        return [first, Phase(range(2, 4), run.size, lambda x: (resize(x, run.size), second))]

    list(cutdiff.denoise(tiny_model, "", method=phased, num_steps=2, height=64, width=64))
    with pytest.raises(ValueError, match=r"^method=phased draws on several canvases and does not say how it takes an"):
        cutdiff.denoise(tiny_model, "", method=phased, num_steps=2, image=torch.zeros(3, 64, 64))


@pytest.mark.parametrize("method", ["direct", "multidiffusion"])
def test_an_inversion_leads_back_to_the_picture(method: str, model: Model, picture: Tensor) -> None:
    side = 128 if method == "direct" else 160
    image = resize(picture, (side, side)).clamp(0, 1)
    passed = cutdiff.decode(model, cutdiff.encode(model, image))
    options: dict[str, Any] = {"method": method, "height": side, "width": side, "num_steps": 10, "guidance_scale": 1}
    back = cutdiff.generate(model, "", image=image, invert=True, strength=1, **options)
    assert psnr(back.images, passed) > 36
    drawn = cutdiff.generate(model, "", image=image, strength=0.9, **options)
    assert psnr(drawn.images, passed) < 25
    assert back.record["network_evaluations"] == 2 * 10 * (1 if method == "direct" else 4)


@pytest.mark.parametrize(
    ("shape", "fit", "corner", "middle"),
    [
        ((40, 80), "cover", 1.0, 1.0),  # the middle 40 × 40 of a picture that is 1 but for its left quarter
        ((40, 80), "contain", 0.0, 1.0),  # its border goes on above and below
        ((40, 80), "stretch", 0.0, 1.0),
    ],
)
def test_a_picture_of_another_shape(shape: Size, fit: Any, corner: float, middle: float) -> None:
    pixels = torch.ones(1, 3, *shape)
    pixels[..., : shape[1] // 4] = 0
    image = Fitted.to((8, 8), pixels, fit, 8)((8, 8))
    assert image.shape == (1, 3, 64, 64)
    assert torch.allclose(image[0, 0, 0, 0], torch.tensor(corner), atol=1e-5)
    assert torch.allclose(image[0, 0, 32, 32], torch.tensor(middle), atol=0.1)
    dark = (image[0, 0, 32] < 0.5).sum().item()
    assert dark == {"cover": 0, "contain": 16, "stretch": 16}[fit]


def test_sides_follow_the_shape_of_the_picture() -> None:
    wide = torch.zeros(3, 60, 100)
    for options, size in (
        ({}, (19, 32)),  # 153.6 pixels high, to whole latents
        ({"width": 512}, (38, 64)),
        ({"height": 120}, (15, 25)),
        ({"height": 120, "width": 120}, (15, 15)),
    ):
        assert Settings(image=wide, **options).canvas_size(16, 8) == size, options
    assert Settings(image=wide.mT, height=512).canvas_size(16, 8) == (64, 38)
    assert Settings(image=wide.mT).canvas_size(16, 8) == (32, 19)


PLANNED: dict[str, Callable[[], dict[str, Any]]] = {
    "magnify": lambda: {"method": "magnify"},
    "frecas": lambda: {"method": "frecas"},
    "img2img": lambda: {"method": "multidiffusion", "strength": 0.4},
    "inverted": lambda: {"method": "direct", "invert": True, "strength": 1.0},
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_counts_what_a_given_picture_saves(name: str, folder: Path) -> None:
    options = PLANNED[name]() | {"height": 96, "width": 128, "num_steps": 5, "image": torch.zeros(3, 48, 64)}
    drawn = cutdiff.generate(cutdiff.load(str(folder)), "", **options)
    planned = walk(outline(str(folder), "float32"), Settings(**options))
    assert sum(stage.total.evaluations for stage in planned.stages) == drawn.record["network_evaluations"]
    if name == "magnify":
        assert planned.stages[0].total.evaluations == 0
        assert planned.stages[0].total.flops > 0  # of the VAE, which encodes it


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_set_of_given_pictures_goes_on(
    quick_folder: Path, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    image = to_pil(picture[0])
    for name in ("a.png", "b.png", "b.jpg", "c.webp"):
        image.rotate(90 * len(files(given))).save(given / name)
    (given / "notes.txt").write_text("none of these")
    (given / "cut.jpg").write_bytes((given / "b.jpg").read_bytes()[:-100])
    command = ["--model", str(quick_folder), "--images", str(given), "--width", "128", "--steps", "2"]
    command += ["--method", "magnify", "--out", str(out), "--device", "cpu"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "cut.jpg cannot be read to its end" in printed.err
    assert printed.err.strip().endswith(f"{given}, left out: cut.jpg; replace these pictures and start again")
    names = [f"{name}-magnify-128x128-seed0" for name in ("a.png", "b.jpg", "b.png", "c.webp")]
    assert sorted(files(out)) == sorted(f"{name}.{ending}" for name in names for ending in ("png", "json"))
    record = json.loads((out / f"{names[0]}.json").read_text())
    assert record["image"].keys() == {"name", "sha256"}
    assert (record["image"]["name"], record["prompt"]) == ("a.png", "")
    (given / "cut.jpg").unlink()
    (out / f"{names[1]}.png").unlink()  # as if the run had been killed before it
    whole = (out / f"{names[3]}.png").read_bytes()
    (out / f"{names[3]}.png").write_bytes(whole[:500])
    before = files(out)
    assert main(command) == 0
    assert "2 of 4 pictures are finished already" in capsys.readouterr().err
    changed = {name for name, time in files(out).items() if before.get(name) != time}
    assert changed == {f"{names[i]}.{ending}" for i in (1, 3) for ending in ("png", "json")}
    (given / "a.png").write_bytes((given / "b.png").read_bytes())
    assert main(command) == 2
    changed_one = f"{names[0]}.png was drawn with --image a.png (now with other contents): pass --overwrite"
    assert changed_one in capsys.readouterr().err
    assert files(out).keys() == before.keys() | {f"{names[1]}.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--mask", "MASK"],
            "a.png: --mask mask.png has 8×8 pixels, and the image 64×40: give one of the image's size",
        ),
        (["--place", "0,0", "--width", "56", "--height", "64"], "a.png: --place 0,0 needs a larger canvas"),
        (["--strength", "0"], "a.png: --strength 0 would draw nothing on the image"),
    ],
)
def test_an_error_names_the_given_picture(arguments: list[str], words: str, command_line: CommandLine) -> None:
    given, mask = command_line.out.parent / "given", command_line.out.parent / "mask.png"
    given.mkdir()
    Image.new("RGB", (64, 40), "red").save(given / "a.png")
    Image.new("L", (8, 8), "white").save(mask)
    options = [str(mask) if word == "MASK" else word for word in arguments]
    command_line.refuses(["--images", given, "--method", "direct", *options], 2, f"{given}/{words}")


def test_a_folder_of_given_pictures_may_be_that_of_the_drawn_ones(
    quick_folder: Path, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that were drawn of others there are not drawn on; one that was drawn otherwise is, as from any folder."""
    for name in ("a.png", "b.png"):
        to_pil(picture[0]).save(tmp_path / name)
    (tmp_path / "b.json").write_text(json.dumps({"image": ["b.png"], "prompt": "a tent"}))
    command = ["--model", str(quick_folder), "--images", str(tmp_path), "--width", "64", "--steps", "1"]
    command += ["--method", "upscale", "--device", "cpu", "--out"]
    for again in (False, True):
        assert main([*command, str(tmp_path / ".." / tmp_path.name)]) == 0
        said = capsys.readouterr().err
        drawn = "2 pictures of --images were drawn of others there, as their records say, and are left out"
        assert (drawn in said) is again
        assert ("2 of 2 pictures are finished already" in said) is again
        assert {*files(tmp_path)} >= {f"{name}.png-upscale-64x64-seed0.png" for name in "ab"}
        assert len([*tmp_path.glob("*.png")]) == 4
    assert main([*command, str(tmp_path / "out")]) == 0
    assert len([*(tmp_path / "out").glob("*.png")]) == 4, "elsewhere all pictures of the folder are taken"


def test_any_name_of_a_given_picture_makes_one_of_a_drawn_one(
    quick_folder: Path, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long ones are cut and those of several lines become one; each still has a name of its own, which stays."""
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    for name in ("a" * 240, "a" * 241, "ä" * 120, "of two\nlines", "of two\tlines", "plain", "plain.jpg"):
        to_pil(picture[0]).save(given / f"{name}.png")
    command = ["--model", str(quick_folder), "--images", str(given), "--width", "64", "--steps", "1"]
    command += ["--method", "upscale", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    names = sorted(Path(line).name for line in capsys.readouterr().out.splitlines())
    assert names == sorted(path.name for path in out.glob("*.png"))
    assert [name[:17] for name in names if name[0] == "o"] == ["of two_lines.png-"] * 2
    assert {"plain.png-upscale-64x64-seed0.png", "plain.jpg.png-upscale-64x64-seed0.png"} < {*names}
    assert len(names) == 7
    to_pil(picture[0].flip(2)).save(given / "plain.jpg")  # a neighbour is no reason to draw another one again
    assert main(command) == 0
    assert "7 of 8 pictures are finished already" in capsys.readouterr().err
    assert len([*out.glob("*.png")]) == 8
    assert (out / "plain.jpg-upscale-64x64-seed0.png").exists()


def test_a_line_of_prompts_names_a_picture_beside_it(
    quick_folder: Path, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    to_pil(picture[0]).save(tmp_path / "deep" / "a b.png")
    lines = [
        '{"prompt": "a tent", "image": "a b.png", "strength": 0.9, "method": "direct"}',
        '--prompt "a tent" --image "a b.png" --strength 0.4 --method direct',
        "a tent --method direct",
        '{"prompt": "a tent", "image": "none.png"}',
    ]
    (tmp_path / "deep" / "prompts").write_text("\n".join(lines))
    command = ["--model", str(quick_folder), "--prompts", str(tmp_path / "deep" / "prompts"), "--width", "64"]
    assert main([*command, "--height", "64", "--steps", "5", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "none.png does not exist: check the path; the other lines are drawn" in capsys.readouterr().err
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [record.get("strength") for record in records] == [0.9, 0.4, None]
    assert [record.get("image", {}).get("name") for record in records] == ["a b.png", "a b.png", None]
    assert [record["network_evaluations"] for record in records] == [10, 4, 10]


def test_what_was_drawn_without_a_picture_is_another(quick_folder: Path, picture: Tensor, tmp_path: Path) -> None:
    """Neither does a picture's name say which it is, nor does a record with one pass for the record of none."""
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    to_pil(picture[0]).save(first)
    second.write_bytes(first.read_bytes())
    command = ["a tent", "--model", str(quick_folder), "--width", "64", "--height", "64", "--steps", "2"]
    command += ["--method", "magnify", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for image, count in ((first, 1), (second, 1), (None, 2), (first, 2), (None, 2)):
        assert main([*command, *([] if image is None else ["--image", str(image)])]) == 0
        assert len([*(tmp_path / "out").glob("*.png")]) == count
