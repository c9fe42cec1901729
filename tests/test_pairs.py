"""Two processes that draw into one folder at once lose no picture, and say nothing that is not so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paired import CAPTIONS
from PIL import Image
from processes import ENVIRONMENT, contents

ROUNDS = 3


@pytest.fixture(scope="module")
def pairs(quick_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    script = Path(__file__).with_name("paired.py")
    command = [sys.executable, str(script), str(quick_folder), str(folder), str(ROUNDS)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def ended(folder: Path) -> tuple[list[int], list[list[str]], list[str]]:
    """The statuses of two processes, the lines that each printed, and its errors."""
    printed = folder.with_name(f"{folder.name} printed")
    streams = [[(printed / str(number) / f"0.{kind}").read_text() for number in range(2)] for kind in ("out", "err")]
    return json.loads((printed / "ended.json").read_text()), [out.splitlines() for out in streams[0]], streams[1]


def prompts(folder: Path) -> dict[str, str]:
    """The prompts of the pictures of a folder by name; no file but a picture and its record is there."""
    names = {path.stem for path in folder.glob("*.png")}
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "json")}
    return {f"{name}.png": json.loads((folder / f"{name}.json").read_text())["prompt"] for name in names}


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_one_prompt(turn: int, pairs: Path) -> None:
    folder = pairs / f"one prompt {turn}"
    statuses, printed, _ = ended(folder)
    assert (statuses, printed) == ([0, 0], [[str(folder / "direct-64x64-seed0.png")]] * 2)
    assert prompts(folder) == {"direct-64x64-seed0.png": "a"}


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_two_prompts(turn: int, pairs: Path) -> None:
    folder = pairs / f"two prompts {turn}"
    statuses, printed, _ = ended(folder)
    drawn = prompts(folder)
    assert statuses == [0, 0]
    assert [[drawn[Path(line).name] for line in lines] for lines in printed] == [["a"], ["b"]]
    assert {*drawn} == {"direct-64x64-seed0.png", "direct-64x64-seed0-1.png"}


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_one_set(turn: int, pairs: Path) -> None:
    folder = pairs / f"one set {turn}"
    statuses, printed, _ = ended(folder)
    names = [f"000{line}-direct-64x64-seed0.png" for line in (1, 2)]
    assert (statuses, printed) == ([0, 0], [[str(folder / name) for name in names]] * 2)
    assert prompts(folder) == dict(zip(names, "ab", strict=True))


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_two_sets(turn: int, pairs: Path) -> None:
    """Their pictures have the same names: whoever comes second says so, and leaves what the other has said."""
    folder = pairs / f"two sets {turn}"
    statuses, printed, errors = ended(folder)
    drawn = prompts(folder)
    assert max(statuses) in (1, 2)
    for lines, own in zip(printed, ("ab", "cd"), strict=True):
        assert {drawn[Path(line).name] for line in lines} <= {*own}
    for status, error in zip(statuses, errors, strict=True):
        assert (status == 0) == (error == "")
        if error:
            assert "-direct-64x64-seed0.png " in error
            assert "choose another --out" in error
    assert {str(folder / name) for name in drawn} == {line for lines in printed for line in lines}


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_one_cell(turn: int, pairs: Path) -> None:
    assert ended(pairs / f"one cell {turn}")[0] == [0, 0]
    files = contents(pairs / f"one cell {turn}")
    log = [json.loads(line) for line in files["batches.jsonl"].decode().splitlines()]
    assert sorted((line["first"], line["captions"]) for line in log) == [(0, ["a", "b"]), (2, ["c", "d"])]
    assert {*files} == {"batches.jsonl", "cell.json", *(f"000{number}.png" for number in range(4))}


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("kind", ["other captions", "other options"])
def test_two_cells(kind: str, turn: int, pairs: Path) -> None:
    """One draws all of its pictures, and the other says that they are no pictures of its own."""
    folder = pairs / f"{kind} {turn}"
    statuses, printed, _ = ended(folder)
    assert sorted(statuses) == [0, 1]
    first, second = statuses.index(0), statuses.index(1)
    assert printed[first] == []
    assert "holds pictures that were drawn otherwise: take another --out" in printed[second][0]
    log = [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]
    captions = CAPTIONS[::-1] if kind == "other captions" and first == 1 else CAPTIONS
    drawn = {line["first"]: line["captions"] for line in log}
    assert drawn == {0: [*captions[:2]], 2: [*captions[2:]]}
    assert len({Image.open(path).tobytes() for path in folder.glob("*.png")}) == len(CAPTIONS)
