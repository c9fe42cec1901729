"""A picture gets a name of its own, whoever saves at the same time, and what was done to it later is noticed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_own_objects import record_of

from cutdiff.output.images import NameTaken, State, read_record, remove_parts, reserved, save_image, state_of

SAVERS, ROUNDS = 8, 10


def record(number: int) -> dict[str, Any]:
    return record_of(fingerprint=f"of {number}", seed=number)


def picture(number: int) -> torch.Tensor:
    """A picture (3, 64, 64) that no other number has."""
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number))


def save(folder: Path, number: int, **options: Any) -> Path | None:
    try:
        return save_image(picture(number), record(number), folder, "a", **options)
    except NameTaken:
        return None


def saved_at_once(folder: Path, savers: list[int], **options: Any) -> list[Path | None]:
    """The paths at which several threads have saved pictures at the same time; each has a lock of its own."""
    ready = threading.Barrier(len(savers))

    def run(number: int) -> Path | None:
        ready.wait()
        return save(folder, number, **options)

    with ThreadPoolExecutor(len(savers)) as pool:
        return [*pool.map(run, savers)]


def check(path: Path, number: int) -> None:
    """Assert that a picture and its record are those of `number`, and whole."""
    assert read_record(path)["seed"] == number
    assert state_of(path, lambda record: record["fingerprint"] == f"of {number}") is State.FINISHED


def test_no_name_is_given_twice(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        folder = tmp_path / str(turn)
        paths = saved_at_once(folder, [*range(SAVERS)])
        expected = {"a.png", *(f"a-{number}.png" for number in range(1, SAVERS))}
        assert {path.name for path in paths if path} == expected
        for number, path in enumerate(paths):
            assert path is not None
            check(path, number)
        assert len([*folder.iterdir()]) == 2 * SAVERS


def test_a_picture_that_several_drew_is_saved_once(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        folder = tmp_path / str(turn)
        assert saved_at_once(folder, [3] * SAVERS) == [folder / "a.png"] * SAVERS
        check(folder / "a.png", 3)
        before = (folder / "a.png").stat().st_ino
        assert save(folder, 3, overwrite=True) == folder / "a.png"
        assert (folder / "a.png").stat().st_ino == before, "it was written anew"
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.png"]


def test_of_several_sets_one_has_the_name(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        paths = saved_at_once(tmp_path / str(turn), [*range(SAVERS)], numbers=False)
        (winner,) = [number for number, path in enumerate(paths) if path]
        check(tmp_path / str(turn) / "a.png", winner)


def test_pictures_that_are_drawn_over_are_whole(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        folder = tmp_path / str(turn)
        assert saved_at_once(folder, [*range(SAVERS)], overwrite=True) == [folder / "a.png"] * SAVERS
        check(folder / "a.png", read_record(folder / "a.png")["seed"])


def test_what_a_living_process_writes_is_not_removed(tmp_path: Path) -> None:
    """A reservation locks out even another thread, as each opens the file anew."""
    left = [".b.png.part", ".b.json.a1b2_c3d.part", ".b-2.png.a1b2_c3d.part", ".another.png.part"]
    for name in left:
        (tmp_path / name).write_text("half")
    with reserved(tmp_path / "a.png") as part:
        part.write(b"a whole picture")
        part.flush()
        sweeper = threading.Thread(target=remove_parts, args=(tmp_path, {"a", "b"}))
        sweeper.start()
        sweeper.join(0.2)
        assert (tmp_path / ".a.png.part").read_bytes() == b"a whole picture"
        (tmp_path / ".a.png.part").rename(tmp_path / "a.png")
    sweeper.join()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", ".another.png.part"}
    assert (tmp_path / "a.png").read_bytes() == b"a whole picture"


def test_what_was_left_of_a_reservation_is_not_in_the_next_picture(tmp_path: Path) -> None:
    (tmp_path / ".a.png.part").write_bytes(b"x" * 100_000)
    path = save(tmp_path, 1)
    assert path is not None
    check(path, 1)


@pytest.mark.parametrize("make", [lambda part, other: part.symlink_to(other), lambda part, other: os.mkfifo(part)])
def test_a_link_or_a_pipe_in_the_place_of_a_part_is_not_followed(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    other = tmp_path / "another file"
    other.write_text("mine")
    make(tmp_path / ".a.png.part", other)
    with pytest.raises(OSError, match=r"\.a\.png\.part"):
        save(tmp_path, 1)
    assert other.read_text() == "mine"


# ---- What was done to a picture later


def as_jpeg(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, format="JPEG")


def tagged(path: Path) -> None:
    """A tool adds a tag, packs the pixels anew, and adds an opaque alpha channel."""
    info = PngInfo()
    info.add_text("Rating", "5")
    with Image.open(path) as image:
        image.convert("RGBA").save(path, pnginfo=info, optimize=True)


CHANGES: dict[str, tuple[Callable[[Path], object], State]] = {
    "nothing": (lambda path: None, State.FINISHED),
    "tagged": (tagged, State.FINISHED),
    "removed": (Path.unlink, State.FREE),
    "emptied": (lambda path: path.write_bytes(b""), State.DAMAGED),
    "a byte less": (lambda path: path.write_bytes(path.read_bytes()[:-1]), State.DAMAGED),
    "without its end": (lambda path: path.write_bytes(path.read_bytes()[:-12]), State.DAMAGED),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), State.DAMAGED),
    "five bytes": (lambda path: path.write_bytes(path.read_bytes()[:5]), State.DAMAGED),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), State.DAMAGED),
    "zeros at the end": (lambda path: path.write_bytes(path.read_bytes()[:2000].ljust(9000, b"\0")), State.DAMAGED),
    "another picture": (lambda path: Image.new("RGB", (64, 64)).save(path), State.OTHER),
    "another size": (lambda path: Image.new("RGB", (8, 8)).save(path), State.OTHER),
    "a JPEG": (as_jpeg, State.OTHER),
    "a text": (lambda path: path.write_bytes(b"mine"), State.OTHER),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), State.OTHER),
    "no record": (lambda path: path.with_suffix(".json").unlink(), State.OTHER),
    "a record that is none": (lambda path: path.with_suffix(".json").write_text('{"model": 3}'), State.OTHER),
}
"""The changes that people make to a picture, and its state after each."""
LATER = {"another picture"}
"""The changes that a record of an earlier version, which does not hold the pixels' digest, cannot show."""


@pytest.mark.parametrize("old", [False, True], ids=["", "old record"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_done_to_a_picture(name: str, old: bool, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    path = save(tmp_path, 1)
    assert path is not None
    if old:
        saved = read_record(path)
        del saved["pixels_sha256"]
        path.with_suffix(".json").write_text(json.dumps(saved))
    change(path)
    state = state_of(path, lambda record: record.get("fingerprint") == "of 1")
    assert state is (State.FINISHED if old and name in LATER else expected)


@pytest.mark.parametrize("name", [name for name, (_, state) in CHANGES.items() if state is not State.OTHER])
def test_a_picture_that_is_saved_again_is_whole(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert path is not None
    CHANGES[name][0](path)
    assert save(tmp_path, 1, numbers=False) == path
    check(path, 1)


def test_the_largest_pictures_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image.open refuses those with more than twice as many pixels as this."""
    path = save(tmp_path, 1)
    assert path is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    check(path, 1)


def test_a_copy_under_another_name_is_another_picture(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    shutil.copy(tmp_path / "a.png", tmp_path / "a-1.png")
    assert state_of(tmp_path / "a-1.png", lambda record: True) is State.OTHER
