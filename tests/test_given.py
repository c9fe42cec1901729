"""Pictures that a run is given: every kind that is read, and those that are refused."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import CommandLine

import cutdiff
from cutdiff import Settings
from cutdiff.checkpoint.model import Model
from cutdiff.given.pictures import MAX_PIXELS, as_picture

RED, BLUE = (204, 0, 51), (0, 51, 204)


def two_colors(mode: str = "RGB") -> Image.Image:
    """A picture of 24 × 16: its left half is red, its right half blue."""
    image = Image.new("RGB", (24, 16), RED)
    image.paste(BLUE, (12, 0, 24, 16))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by a quarter: the red half is then above
    return saved(two_colors(), "JPEG", exif=exif, quality=95, subsampling=0)


def half_transparent() -> Image.Image:
    image = two_colors("RGBA")
    image.putalpha(Image.new("L", image.size, 51))
    return image


def transparent_palette() -> bytes:
    image = two_colors().quantize(4)
    return saved(image, "PNG", transparency=image.getpixel((0, 0)))


LIGHT = tuple(round(255 - 0.2 * (255 - c)) for c in RED), tuple(round(255 - 0.2 * (255 - c)) for c in BLUE)
GRAY = ((67, 67, 67), (53, 53, 53))
TRANSPARENT = "has transparent parts, which are laid on white"
KINDS: dict[str, tuple[bytes, tuple[Any, Any], float, str]] = {
    "PNG": (saved(two_colors(), "PNG"), (RED, BLUE), 0.5, ""),
    "JPEG": (saved(two_colors(), "JPEG", quality=95, subsampling=0), (RED, BLUE), 4, ""),
    "CMYK": (saved(two_colors("CMYK"), "JPEG", quality=95, subsampling=0), (RED, BLUE), 4, ""),
    "palette": (saved(two_colors().quantize(4), "PNG"), (RED, BLUE), 0.5, ""),
    "palette, transparent": (transparent_palette(), ((255, 255, 255), BLUE), 0.5, TRANSPARENT),
    "alpha": (saved(half_transparent(), "PNG"), LIGHT, 1, TRANSPARENT),
    "alpha, all opaque": (saved(two_colors("RGBA"), "PNG"), (RED, BLUE), 0.5, ""),
    "gray with alpha": (saved(two_colors("LA"), "PNG"), GRAY, 1, ""),
    "16 bits": (saved(Image.fromarray(np.full((16, 24), 0x4040, np.uint16)), "PNG"), ((64,) * 3, (64,) * 3), 0.3, ""),
    "16 bits, TIFF": (
        saved(Image.fromarray(np.full((16, 24), 0x4040, np.uint16)), "TIFF"), ((64,) * 3, (64,) * 3), 0.3, ""
    ),
    "one bit": (saved(Image.new("1", (24, 16), 1), "PNG"), ((255,) * 3, (255,) * 3), 0.5, ""),
    "several": (
        saved(two_colors(), "GIF", save_all=True, append_images=[two_colors("L"), two_colors().rotate(180)]),
        (RED, BLUE), 0.5, "holds 3 pictures: the first is taken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    data, (left, right), tolerance, notice = KINDS[kind]
    path = tmp_path / "a picture"
    path.write_bytes(data)
    picture = as_picture("image", path)
    assert picture is not None
    assert (picture.width, picture.height, picture.count, picture.name) == (24, 16, 1, "a picture")
    pixels = 255 * picture.pixels()
    assert (pixels.shape, pixels.dtype) == ((1, 16, 24, 3), np.float32)
    for columns, color in ((slice(0, 10), left), (slice(14, 24), right)):
        assert np.abs(pixels[0, :, columns] - color).max() <= tolerance
    assert [str(text).removeprefix(f"image={path} ") for text in picture.notices] == [notice] * bool(notice)


@pytest.mark.parametrize("option", ["image", "mask", "control_image"])
def test_what_is_made_of_a_picture_is_said_of_every_option(option: str, tmp_path: Path) -> None:
    halves = Image.new("L", (24, 16))
    halves.paste(255, (12, 0, 24, 16))
    several = saved(halves, "GIF", save_all=True, append_images=[halves.rotate(180)])
    halves.putalpha(Image.new("L", halves.size, 200))
    said = {several: "holds 2 pictures: the first is taken", saved(halves, "PNG"): TRANSPARENT}
    for data, words in said.items():
        path = tmp_path / "given"
        path.write_bytes(data)
        beside = {"image": {}, "mask": {"image": two_colors()}, "control_image": {"control": "a"}}[option]
        (notice,) = Settings(method="direct", **{option: path}, **beside).notices()
        assert notice == f"{option}={path} {words}"


def test_a_picture_is_turned_as_its_tag_says(tmp_path: Path) -> None:
    (tmp_path / "turned.jpg").write_bytes(turned())
    picture = as_picture("image", str(tmp_path / "turned.jpg"))
    assert picture is not None
    assert (picture.width, picture.height) == (16, 24)
    pixels = 255 * picture.pixels()[0]
    assert np.abs(pixels[:10] - RED).max() < 6
    assert np.abs(pixels[14:] - BLUE).max() < 6


def test_objects_are_pictures_too() -> None:
    array = np.asarray(two_colors())
    tensor = torch.from_numpy(array.copy()).movedim(2, 0)
    for value in (two_colors(), array, array[None], tensor, tensor[None], tensor / 255, array / 255):
        picture = as_picture("image", value)
        assert picture is not None
        assert np.allclose(picture.pixels(), array[None] / 255, atol=1e-6)
        assert picture.described() == {"name": "pixels", "sha256": picture.sha256}
        assert len(picture.sha256) == 64
    several = as_picture("image", torch.stack([tensor, 255 - tensor]))
    assert several is not None
    assert (several.count, several.width, several.height) == (2, 24, 16)
    changing = (tensor / 255).contiguous()
    kept = as_picture("image", changing)
    changing.zero_()
    assert kept is not None
    assert np.allclose(kept.pixels(), array[None] / 255), "it is the picture that was given"


BAD_OBJECTS: dict[str, tuple[Any, str]] = {
    "a number": (3, r"image=3 must be a file, a PIL image, an array \(H, W, 3\) or a tensor \(3, H, W\)"),
    "several PIL images": (
        [two_colors(), two_colors()],
        r"image=\[<PIL\..*\] must be .* \(3, H, W\); several, as one array \(B, H, W, 3\) or tensor \(B, 3, H, W\)$",
    ),
    "channels": (
        torch.zeros(4, 8, 8),
        r"\(4, 8, 8\) must be \(3, H, W\) or \(B, 3, H, W\): it has 4 channels",
    ),
    "channels last": (torch.zeros(8, 8, 3), r"image=Tensor of \(8, 8, 3\) must be .*: move channels first$"),
    "channels first": (
        np.zeros((3, 8, 8)),
        r"image=ndarray of \(3, 8, 8\) must be \(H, W, 3\) or \(B, H, W, 3\): move chan",
    ),
    "nothing": (torch.zeros(3, 0, 8), r"image=Tensor of \(3, 0, 8\) must be .*: it has no pixels$"),
    "nothing in an array": (np.zeros((0, 0, 3)), r"image=ndarray of \(0, 0, 3\) must be .*: it has no pixels$"),
    "an alpha channel": (np.zeros((8, 8, 4)), r"\(8, 8, 4\) must be .*: it has 4 channels, and 1 or 3 are read$"),
    "a line": (np.zeros(8), r"image=ndarray of \(8,\) must be .*: give a picture$"),
    "below 0": (torch.full((3, 8, 8), -1.0), r"holds torch.float32 from -1 to -1: give 8 bits, or floats in \[0, 1\]"),
    "NaN": (torch.full((3, 8, 8), torch.nan), r"holds torch.float32 from nan to nan"),
    "whole numbers": (torch.ones(3, 8, 8, dtype=torch.int64), r"holds torch.int64 from 1 to 1"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_objects_that_are_no_pictures(name: str) -> None:
    value, words = BAD_OBJECTS[name]
    with pytest.raises(ValueError, match=words):
        Settings(image=value)


def test_there_are_as_many_pictures_as_prompts(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^image holds 2 pictures for 3 prompts: give one, or as many$"):
        cutdiff.denoise(tiny_model, ["a", "b", "c"], image=torch.zeros(2, 3, 64, 64))


def test_a_file_that_changes_before_it_is_drawn(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    two_colors().save(path)
    settings = Settings(image=path, method="direct", num_steps=2)
    two_colors("L").save(path)
    with pytest.raises(ValueError, match=r"^image=.*picture\.png has changed since the run began: start again$"):
        cutdiff.denoise(tiny_model, "", settings)


def png(width: int, height: int, *, crc: int = 0) -> bytes:
    """A PNG that says it has this size, and whose pixels' checksum is off by `crc`."""

    def chunk(name: bytes, data: bytes, off: int = 0) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ off)

    header, rows = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), (b"\0" + bytes(min(width, 64))) * 8
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows), crc) + chunk(b"IEND", b"")
    )


JPEG = saved(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
UNKNOWN = "has no format that is known here: give a PNG or a JPEG"
BAD_FILES: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist: check the path"),
    "a folder": (lambda path: path.mkdir(), "is a folder where a file belongs"),
    "a pipe": (lambda path: os.mkfifo(path), "is a device, a pipe or a socket: only regular files are read"),
    "0 bytes": (b"", "has 0 bytes: give a picture"),
    "a text": (b"a red house at night\n" * 9, UNKNOWN),
    "JSON": (b"{}", UNKNOWN),
    "HTML": (b"<!doctype html><html></html>", UNKNOWN),
    "cut off, JPEG": (JPEG[: len(JPEG) // 2], "cannot be read to its end (image file is truncated"),
    "cut off, PNG": (saved(two_colors(), "PNG")[:-40], "cannot be read to its end"),
    "a wrong checksum": (png(8, 8, crc=1), "cannot be read to its end (broken PNG file"),
    "100,000 pixels a side": (
        png(100_000, 100_000),
        f"has 10000000000 pixels, more than MAX_PIXELS={MAX_PIXELS}, the most that are read: make it smaller",
    ),
    "a row too many": (png(1 << 14, (1 << 13) + 1), f"has {MAX_PIXELS + (1 << 14)} pixels, more than MAX_PIXELS="),
    "floats": (saved(Image.new("F", (8, 8)), "TIFF"), "has pixels of the mode F: save it as RGB, of 8 or 16 bits"),
    "32 bits": (saved(Image.new("I", (8, 8)), "TIFF"), "has pixels of the mode I: save it as RGB"),
    "PostScript": (saved(two_colors(), "EPS"), "is PostScript, which another program would draw: save it as a PNG"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_pictures(name: str, command_line: CommandLine, tmp_path: Path) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / "picture.png"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    status = 2 if name in ("missing", "a folder", "a pipe") else 1
    command_line.refuses(["--image", path], status, f"--image {path} {words}")


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "strength 0": (["--strength", "0", "--method", "direct"], "--strength 0 would draw nothing on the image: give a"),
    "strength 1": (["--strength", "1", "--method", "direct"], "--strength 1 would leave nothing of the image: give"),
    "strength 1, magnify": (["--strength", "1", "--method", "magnify"], "--strength 1 would leave nothing of"),
    "strength 2": (["--strength", "2"], "--strength 2 must be a finite number in 0 … 1"),
    "strength of none": (
        ["--strength", "0.5", "--method", "demofusion"],
        "--strength 0.5 means nothing to demofusion, which takes all of its steps: leave it out",
    ),
    "strength twice": (
        ["--strength", "0.5", "--method", "magnify", "--structure-fraction", "0.3"],
        "--strength 0.5 is another word for structure_fraction of magnify: give one of them",
    ),
    "inverted in a cascade": (
        ["--invert", "--method", "magnify"],
        "--invert is of the noise on an image, and magnify takes the image without noise: leave it out",
    ),
    "a square first": (
        ["--method", "diffusehigh", "--native-shape", "square"], "--native-shape 'square' is of a picture that is drawn"
    ),
    "noise on the way back": (
        ["--invert", "--method", "direct", "--solver", "lcm"],
        "--invert leads back to the image by steps without noise, and lcm adds some: choose euler, or an eta of 0",
    ),
    "a width between": (["--width", "300"], "--width 300 must be a multiple of 8; try 296 or 304"),
    "one step": (["--method", "rectifiedhr", "--steps", "1"], "--steps 1 has no step after the image: give at least 2"),
    "a shape that is too long": (
        ["--width", "16384"], "--height 40960 follows from the shape of the image, 16×40, and is more than 32768: give"
    ),
    "a fit": (["--fit", "cut"], "argument --fit: 'cut' is not one of cover, contain, stretch"),
    "another image": (["--image", "b.png"], "picture.png and b.png are two files: give one"),
    "a folder too": (["--images", "."], "--images . takes the place of --image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_do_not_suit_a_picture(name: str, command_line: CommandLine, tmp_path: Path) -> None:
    arguments, words = BAD_OPTIONS[name]
    two_colors().resize((16, 40)).save(tmp_path / "picture.png")
    command_line.refuses(["--image", tmp_path / "picture.png", *arguments], 2, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strength", "0.5"], "--strength 0.5 is of an image, and none is given: give one, or leave it out"),
        (["--fit", "contain"], "--fit 'contain' goes with --image: give that, or leave it out"),
        (["--fit", "cover"], "--fit 'cover' goes with --image: give that, or leave it out"),
        (["--image", ""], "--image '' names no file: give a picture"),
        (["--images", ""], "argument --images: '' names nothing: give a path"),
        (["--invert"], "--invert is of the noise on an image, and no image is given: leave it out"),
        (["--images", "nowhere"], "--images nowhere cannot be read (No such file or directory): give a folder of pict"),
        (["--images", "pyproject.toml"], "--images pyproject.toml cannot be read (Not a directory): give a folder"),
        (["--images", "cutdiff"], "--images cutdiff holds no file with the ending of a picture, such as .png"),
        (["--images", "a", "--prompts", "b"], "--images a takes the place of --prompts b: give one of them"),
    ],
)
def test_options_of_no_picture(
    arguments: list[str], words: str, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    command_line.refuses(arguments, 2, words)
