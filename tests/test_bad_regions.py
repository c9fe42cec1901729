"""Bad input: regions. Files and objects that cannot be used get one line, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusal import CommandLine

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.given.regions import MAX_REGIONS, Region, as_regions
from cutdiff.pipeline import canvas_and_schedule
from cutdiff.settings import Settings

ALL, LEFT = [0, 0, 1, 1], [0, 0, 0.5, 1]


def region(**options: Any) -> dict[str, Any]:
    return {"prompt": "a red house", "box": ALL, **options}


def masked(mask: str) -> dict[str, Any]:
    return {"prompt": "a tent", "mask": mask}


OF_BOX = "must be [left, top, right, bottom] in shares of the picture, in 0 … 1 and rising: divide pixels by its width"
ONE_VALUE = "has one value throughout: paint the region white on black, or give box=[0, 0, 1, 1] for the whole picture"
ENTRIES: dict[str, tuple[Any, str]] = {
    "an empty list": ([], "[] has no region: give one, such as"),
    "an object": ({"prompt": "a"}, "{'prompt': 'a'} must be a list of regions, such as"),
    "a number": (3, "3 must be a list of regions"),
    "a list of texts": (["a red house"], "region 1: 'a red house' is no object"),
    "1000 regions": ([region()] * 1000, f"1000 regions are too many: give at most {MAX_REGIONS}, for each of which"),
    "an unknown key": ([region(wieght=2)], "1: 'wieght' is not one of prompt, box, mask, weight, negative_prompt: "),
    "no prompt": ([{"box": ALL}], "region 1: it has no prompt: say what the region shows"),
    "an empty prompt": ([region(), region(prompt=" ")], "region 2: prompt=' ' is empty: say what the region shows"),
    "a prompt that is none": ([region(prompt=7)], "region 1: prompt=7 must be a text"),
    "a prompt with NUL": ([region(prompt="a\0")], r"region 1: prompt='a\x00' holds a NUL or is not valid UTF-8"),
    "a negative prompt of half a letter": ([region(negative_prompt="\ud800")], r"negative_prompt='\ud800' holds a NUL"),
    "neither box nor mask": ([region(box=None)], "region 1: box=None and mask=None: a region has one of the two"),
    "box and mask": ([region(mask="half.png")], "and mask=half.png: a region has one of the two"),
    "a box of pixels": ([region(box=[0, 0, 128, 128])], f"region 1: box=[0, 0, 128, 128] {OF_BOX}"),
    "a box outside": ([region(box=[1.5, 0, 2, 1])], f"region 1: box=[1.5, 0, 2, 1] {OF_BOX}"),
    "a box of nothing": ([region(box=[0.5, 0, 0.5, 1])], f"region 1: box=[0.5, 0, 0.5, 1] {OF_BOX}"),
    "a box that falls": ([region(box=[0, 0.9, 1, 0.1])], f"region 1: box=[0, 0.9, 1, 0.1] {OF_BOX}"),
    "a box of three": ([region(box=[0, 0, 1])], f"region 1: box=[0, 0, 1] {OF_BOX}"),
    "a box of texts": ([region(box=["0", "0", "1", "1"])], OF_BOX),
    "a box with NaN": ([region(box=[float("nan"), 0, 1, 1])], f"region 1: box=[nan, 0, 1, 1] {OF_BOX}"),
    "weight 0": ([region(weight=0)], "region 1: weight=0 must be a finite number in 0.001 … 1000"),
    "weight infinite": ([region(weight=float("inf"))], "region 1: weight=inf must be a finite number"),
    "a mask that is white": ([masked("white.png")], f"region 1: mask=white.png {ONE_VALUE}"),
    "a mask that covers nothing": ([masked("black.png")], f"region 1: mask=black.png {ONE_VALUE}"),
    "a mask that is not there": ([masked("nowhere.png")], "nowhere.png does not exist: check the path"),
    "a mask of 0 bytes": ([masked("empty.png")], "empty.png has 0 bytes"),
    "a mask that is a number": ([masked(3)], "region 1: mask=3 must be a file"),  # pyright: ignore[reportArgumentType]
    "a region below others": (
        [region(weight=20), region(box=LEFT)],
        "region 2 ('a red house') has 5% of what it covers, and other regions the rest, so that it would hardly show",
    ),
    "a LoRA": ([region(prompt="a tent <lora:x:1>")], "--regions region 1 names a LoRA, which only the prompt may"),
    "a negative LoRA": ([region(negative_prompt="<lora:x:1>")], "--regions region 1 names a LoRA"),
}  # fmt: skip
TEXTS = {
    "no JSON": ('[{"prompt": "a"', "r.json is no JSON (Expecting"),
    "JSON nested deeply": ("[" * 100_000, "r.json is no JSON (maximum recursion depth"),
    "a key twice": ('[{"prompt": "a", "box": [0,0,1,1], "prompt": "b"}]', "('prompt' is given twice in one object)"),
    "no text": (b"\xff\xfe\x00[", "r.json is no JSON ("),
    "nothing": ("", "r.json is no JSON (Expecting value"),
}


@pytest.fixture
def folder(tmp_path: Path, command_line: CommandLine) -> Path:
    """A folder of masks, in which a file of regions names them."""
    folder = command_line.out.parent / "regions"
    folder.mkdir(parents=True)
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255
    for name, pixels in {"half": half, "white": half * 0 + 255, "black": half * 0}.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "empty.png").touch()
    return folder


@pytest.mark.parametrize("name", [*ENTRIES, *TEXTS])
def test_refused(name: str, folder: Path, command_line: CommandLine) -> None:
    """Without a model: the model's path is none, which would be told of later."""
    content, expected = TEXTS[name] if name in TEXTS else ENTRIES[name]
    text = content if isinstance(content, str | bytes) and name in TEXTS else json.dumps(content)
    path = folder / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = 2 if "LoRA" in name else 1
    line = command_line.refuses(["--regions", path, "--model", "nowhere"], status, expected)
    assert line.startswith("--regions ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--regions", "nowhere.json"], "--regions nowhere.json does not exist: check the path"),
        (["--regions", "."], "--regions . is a folder where a file belongs"),
        (["--bootstrapping", "0.5"], "--bootstrapping 0.5 goes with --regions: give that, or leave it out"),
        (["--bootstrapping", "0.2"], "--bootstrapping 0.2 goes with --regions: give that, or leave it out"),
        (["--regions", ""], "--regions '' names no file: give one of regions, such as"),
        (["--bootstrapping", "2"], "argument --bootstrapping: 2 must be a finite number in 0 … 1"),
    ],
)
def test_refused_arguments(arguments: list[str], expected: str, command_line: CommandLine) -> None:
    command_line.refuses([*arguments, "--model", "nowhere"], 2, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--method magnify",
            "2 is of the first steps, and magnify takes the image in the place of these: leave it out",
        ),
        (
            "--method direct",
            "2 is of the first steps, and the image leaves out 5 of 10: leave it out, or give more str",
        ),
        ("--method direct --strength 0.8", "2 is of the first steps, and the image leaves out 2 of 10"),
        ("--method magnify --mask MASK --strength 0.5", "2 is of the first steps, and the image leaves out 5 of 10"),
    ],
)
def test_steps_that_an_image_leaves_out_are_not_bootstrapped(
    arguments: str, expected: str, folder: Path, command_line: CommandLine
) -> None:
    (folder / "r.json").write_text(json.dumps([region(box=LEFT)]))
    options = arguments.replace("MASK", str(folder / "half.png")).split()
    given = ["--image", folder / "half.png", "--regions", folder / "r.json", "--steps", "10", *options]
    command_line.refuses([*given, "--bootstrapping", "0.2"], 2, f"--bootstrapping 0.{expected}")


def test_steps_that_an_image_leaves_are_bootstrapped(tiny_model: Model) -> None:
    options = {"image": np.eye(8), "regions": [Region("a tent", (0, 0, 0.5, 1))], "num_steps": 10, "method": "direct"}
    for more in ({"strength": 0.9, "bootstrapping": 0.2}, {}, {"bootstrapping": 0.0}):
        canvas_and_schedule(tiny_model, Settings(**options, **more))
    assert Settings(**options).described()["bootstrapping"] == 0.2


def test_refused_objects() -> None:
    for value, message in (
        (5, r"^regions=5 must be a list of regions"),
        ([], r"^regions=\[\] has no region"),
        ([3], r"^regions=region 1: 3 is no object"),
        ([{"prompt": "a", "box": [0, 0, 9, 9]}], r"^regions=region 1: box=\[0, 0, 9, 9\] must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(regions=value)
    with pytest.raises(ValueError, match=r"^mask=ndarray .* holds 2 pictures|^mask=pixels holds 2 pictures"):
        Region("a", mask=np.stack([np.eye(8), np.eye(8)])[..., None])


@pytest.mark.parametrize("width", [64, 512])
def test_a_region_smaller_than_a_latent(tiny_model: Model, width: int) -> None:
    """It is refused where the canvas is known, and on a larger one it is drawn."""
    drawn = {"regions": [Region("a tent", (0, 0, 1 / 40, 1 / 2))], "height": 64, "width": width, "num_steps": 1}
    if width > 64:
        assert cutdiff.generate(tiny_model, "a red house", method="direct", **drawn).images.isfinite().all()
        return
    message = r"^regions=region 1 \('a tent'\) covers 0\.8 of one latent of the canvas of 8×8: make the region larger"
    with pytest.raises(ValueError, match=message):
        cutdiff.generate(tiny_model, "a red house", method="direct", **drawn)


def test_a_lora_in_a_region_is_a_matter_of_the_model(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^regions=region 1 names <lora:x:1>: load the model with loras="):
        cutdiff.generate(tiny_model, "a", regions=[Region("<lora:x:1> a tent", (0, 0, 1, 1))])


def test_regions_that_overlap_are_said() -> None:
    """From a region on that has less than 70% of what it covers; below 10% it is refused."""

    def said(right: float, weight: float = 1.0) -> list[str]:
        regions = as_regions([region(box=[0, 0, right, 1], weight=weight), region(prompt="a tent", box=[0.5, 0, 1, 1])])
        return Settings(regions=regions).notices()

    assert said(0.5) == said(0.75) == []
    (notice,) = said(1.0, weight=3.0)
    assert notice.startswith("regions=region 2 ('a tent') has 25% of what it covers, and others the rest: where they")
    assert [notice[:16] for notice in said(1.0)] == ["regions=region 2"]
    (first, second) = Settings(regions=[region(), region()]).notices()
    assert " has 50% of what it covers" in first
    assert " has 50% of what it covers" in second
