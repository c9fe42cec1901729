"""The evaluation: its pictures, its scores, and how it continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cutdiff.evaluate import main
from cutdiff.evaluation import score
from cutdiff.evaluation.features import load_features
from cutdiff.evaluation.report import contact_sheet

ARGUMENTS = ["--methods", "direct", "cutdiffusion", "--sizes", "256", "--steps", "2", "--batch", "2"]


def run(out: Path, *arguments: str, num: int = 3) -> int:
    return main([*ARGUMENTS, "--num", str(num), "--out", str(out), *arguments])


def test_an_evaluation_draws_scores_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, num=2) == 0
    first = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png") if file.stem.isdigit()}
    assert len(first) == 3 * 2, "native, direct and cutdiffusion"
    assert run(tmp_path) == 0
    assert all(file.stat().st_mtime_ns == time for file, time in first.items()), "no finished picture is drawn again"
    assert len([file for file in tmp_path.rglob("*.png") if file.stem.isdigit()]) == 3 * 3

    results = json.loads((tmp_path / "results.json").read_text())
    cells = {(cell["name"], cell["size"]): cell for cell in results["cells"]}
    assert list(cells) == [
        ("other truth", 128), ("native", 128), ("other truth", 256), ("direct", 256), ("cutdiffusion", 256)
    ]  # fmt: skip
    assert {cell["num"] for cell in results["cells"]} == {3}
    assert results["model"]["sha256"]
    assert results["versions"]["torch"] == torch.__version__
    cut = cells["cutdiffusion", 256]
    assert cut["settings"]["num_steps"] == 2
    assert cut["cost"]["evaluations"] == 2 * (4 + 9), "a structure step on 4 patches, a detail step on 9 views, guided"
    assert cut["cost"]["TFLOP"] > 0
    assert {"one of each", "Fréchet whole", "kernel crops", "seams", "detail", "agreement"} <= set(cut["scores"])
    for cell in cells.values():
        for name, found in cell["scores"].items():
            assert found["low"] <= found["high"], (cell["name"], name)
    assert cells["native", 128]["cost"]["evaluations"] == 4

    shown = capsys.readouterr().out
    assert "| 256 px | cutdiffusion |" in shown
    assert (tmp_path / "table.md").read_text() in shown
    with Image.open(tmp_path / "contact-256.png") as sheet:
        assert sheet.size == (3 * 164 + 4, 2 * 164 + 4)
    page = (tmp_path / "report.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert [row["name"] for row in data["rows"]] == [cell["name"] for cell in results["cells"]]
    assert [[picture is not None for picture in seed] for seed in data["seeds"]] == [
        [False, True, False, True, True]
    ] * 3
    assert data["seeds"][2][4]["record"]["scores"]["seams"] == cut["scores"]["seams"]["values"][2]
    assert {*cut["scores"], *cut["cost"]} <= {*data["meanings"]}


def test_pictures_that_were_drawn_otherwise_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, num=2) == 0
    assert run(tmp_path, "--guidance-scale", "2", num=2) == 2
    assert "drawn otherwise" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path, "--caption-seed", "7", num=2) == 2
    assert "drawn otherwise" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "250"], "--sizes 250 must"),
        (["--set", "interaction=some"], "interaction='some'"),
        (["--set", "steps=3"], "steps='3' is no option of method direct (none), solver euler (none)"),
        (["--set", "steps"], "'steps' is not NAME=VALUE"),
        (["--methods", "magnify", "--set", "stride=x"], "stride='x' must be a whole number at least 1"),
        (["--methods", "magnify", "--set", "stride=1.5"], "stride=1.5 must be a whole number at least 1"),
        (["--num", "5000"], "to 4096, the captions"),
        (["--num", "1"], "argument --num: 1 must be a whole number in 2 … 100000"),
        (["--batch", "0"], "argument --batch: 0 must be a whole number in 1 … 100000"),
        (["--set", "height=256"], "'height=256': height has an argument of its own here (see --help)"),
        (["--caption-seed", "2000"], "--caption-seed 2000"),
        (["--device", "nowhere"], "--device nowhere is not available"),
        (["--model", "nowhere"], "nowhere"),
        (["--methods", "cutdifusion"], "did you mean 'cutdiffusion'? (see --help)"),
        (["--dtype", "float23"], "did you mean 'float32'?"),
        (["--metods", "direct"], "--metods is no option: did you mean '--methods'?"),
        (["--set", "strid=4"], "did you mean 'stride'?"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(tmp_path / "out", *arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("cutdiff: ")
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_truth_scores_as_the_truth() -> None:
    drawn, others = score.scenes(24), score.scenes(24, score.FLOOR_SEED)
    network = load_features()
    truth, found = (score.gather_facts(score.true_renders(s, 256), network, 128) for s in (drawn, others))
    images = score.true_renders(others, 256)
    scores = score.score(images, others.choices, found, truth, images, native=128, borders=[64, 128, 192])
    assert scores["one of each"].value == scores["right caption"].value == 1
    assert scores["bodies not one"].value == scores["subjects not one"].value == 0
    assert 0.6 < scores["detail"].value < 1.6
    kernel = scores["kernel whole"]
    assert kernel.low is not None
    assert kernel.high is not None
    assert kernel.low < 0 < kernel.high
    assert (
        score.score(images, others.choices, truth, truth, None, native=128, borders=[64, 128, 192])[
            "Fréchet whole"
        ].value
        < 1e-6
    )


def test_longer_lists_of_captions_begin_with_shorter_ones() -> None:
    assert torch.equal(score.scenes(40).choices[:7], score.scenes(7).choices)


def test_a_contact_sheet_shows_pictures_of_any_size_alike() -> None:
    rows = [torch.full((3, 3, side, side), value, dtype=torch.uint8) for side, value in ((128, 10), (384, 200))]
    sheet = contact_sheet(rows, columns=2, side=16, gap=2)
    assert sheet.shape == (3, 2 * 18 + 2, 2 * 18 + 2)
    assert (sheet[:, 2:18, 2:18] == 10).all()
    assert (sheet[:, 20:36, 20:36] == 200).all()
    assert (sheet[:, :2] == 255).all()
