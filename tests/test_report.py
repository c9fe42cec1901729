"""The page of an evaluation: what is in it, and in a browser what a reader sees and does."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from browser import Browser
from PIL import Image

from cutdiff.evaluation import page
from cutdiff.evaluation.report import COSTS, few_pictures
from cutdiff.evaluation.score import SHARES

HOSTILE = [
    "a </script><script>window.broken = 1</script> house",
    "<img src=x onerror='window.broken = 1'> \"quoted\" & 'single' `tick` ${window.broken = 1}",
    "\u202eright to left\u202c \u2066 שלום מרحبا 🏠👩‍👩‍👧 \u2028 line",
    "]]> <!-- <script> \\u003c/script> {{ }}",
]
"""Captions that would break out of a page that put them together as text."""
NAMES = ["native", "direct", "cutdiffusion,structure_fraction=0.3", "mine:Own,s='</script><b>',u=#?%41&\"/🏠"]
SCORES = ("one of each", "kernel whole", "agreement")


@dataclass
class Evaluation:
    """An evaluation of four methods at 256 px, whose pictures are plain colours, written as it lies in its folder."""

    folder: Path
    num: int = 4
    side: int = 32
    result: dict[str, Any] = field(init=False)
    folders: dict[tuple[str, int], Path] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows = [self._row("other truth", 256, None), *(self._row(name, 256, i) for i, name in enumerate(NAMES))]
        rows[1]["size"] = 128
        self.result = {"cells": rows, "command": ["python", *HOSTILE], "source": "weights/</script>", "prompts": ["x"]}
        for i, row in enumerate(rows[1:]):
            path = self.folder / f"{row['name'].replace('/', '_')}-{row['size']}"
            self.folders[row["name"], row["size"]] = path
            path.mkdir(parents=True)
            (path / "cell.json").write_text(json.dumps({"name": row["name"], "settings": row["settings"], "batch": 2}))
            with (path / "batches.jsonl").open("w") as log:
                for first in range(0, self.num, 2):
                    captions = [HOSTILE[j % 4] for j in range(first, min(first + 2, self.num))]
                    hashes = [f"hash {i} {first + j}" for j in range(len(captions))]
                    line = {"first": first, "captions": captions, "pixels_sha256": hashes}
                    log.write(json.dumps({**line, "seconds": 1, "evaluations": 1, "flops": 1, "peak_memory_bytes": 1}))
                    log.write("\n")
            for j in range(self.num):
                Image.new("RGB", (self.side, self.side), self.colour(i, j)).save(path / f"{j:04}.png")

    def _row(self, name: str, size: int, i: int | None) -> dict[str, Any]:
        """A row; the direct one has no agreement, and its kernel distance is not a number."""
        rank = 4 if i is None else i
        kernel = [0.5, float("nan"), 2000.0, -0.25, 0.0][rank]
        pictures = range(self.num)
        scores = {
            "one of each": _score(rank / 4, 0.125, [float(j % 2 == rank % 2) for j in pictures]),
            "kernel whole": _score(kernel, 0.25 if rank != 2 else float("inf"), None),
            "agreement": _score(20.0 + rank, 1.0, [rank + j / 8 for j in pictures]),
        }
        if name == "direct":
            del scores["agreement"]
        if i is None:
            return {"name": name, "size": size, "num": self.num, "scores": scores, "cost": {}, "settings": {}}
        method = ["direct", "direct", "cutdiffusion,structure_fraction=0.3,interaction=none", "Own,s='a,b=c',u=1"][i]
        settings = {"method": method, "solver": "ddim,eta=0.0", "seed": 5, "negative_prompt": HOSTILE[i]}
        cost = {"evaluations": 20.0 + i, "TFLOP": 0.1, "seconds": None, "peak MB": 1234.5}
        return {"name": name, "size": size, "num": self.num, "scores": scores, "cost": cost, "settings": settings}

    @staticmethod
    def colour(row: int, seed: int) -> tuple[int, int, int]:
        """The colour of a picture, 40 levels from that of any other."""
        return (40 + 60 * row, 40 + 50 * seed, 120)

    def save(self) -> Path:
        path = self.folder / "report.html"
        page.save_report(path, "Evaluation <b>", self.result, self.folders)
        return path


def _score(value: float, spread: float, values: list[float] | None) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "values": values}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Evaluation(tmp_path_factory.mktemp("evaluation")).save()


def data_of(report: Path) -> dict[str, Any]:
    """The data in a page."""
    text = report.read_text(encoding="utf-8").partition('<script id="data" type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])


def names(browser: Browser) -> list[str]:
    """The methods of the table's rows, from top to bottom."""
    return browser.texts("#scores tbody th")


def sort_by(browser: Browser, column: str) -> str:
    """Sort by a column; returns what the table then says of it to a screen reader."""
    button = f'[data-column="{column}"]'
    browser.click(button)
    assert browser.js("return document.activeElement.dataset.column") == column, "the focus stays where it was"
    return browser.js("return document.querySelector(arguments[0]).closest('th').ariaSort", button)


def open_zoom(browser: Browser, row: int, seed: int) -> None:
    browser.click(f'[data-row="{row}"] [data-seed="{seed}"]')


def colours(browser: Browser, selector: str) -> list[tuple[int, ...]]:
    """The colours in the middle of pictures, once they are decoded."""
    script = """
        const [selector, done] = arguments;
        const read = async (image) => {
            await image.decode();
            const canvas = new OffscreenCanvas(1, 1), context = canvas.getContext("2d");
            context.drawImage(image, 4, 4, 1, 1, 0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        };
        Promise.all([...document.querySelectorAll(selector)].map(read)).then(done);"""
    return [tuple(colour) for colour in browser.driver.execute_async_script(script, selector)]


def near(colour: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= 8


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_fits_and_shows_its_pictures(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, 800, dark=dark)
    assert browser.js("return document.documentElement.scrollWidth") == width, "the page itself has no sideways scroll"
    top = browser.picture()
    assert top.size == (width, 800)
    assert len(top.getcolors(1 << 20) or []) > 50
    assert (top.convert("L").resize((1, 1)).tobytes() < b"\x80") == dark
    browser.js("document.querySelector('#sheet').scrollIntoView()")
    colours(browser, "#sheet img")
    seen = {colour for _, colour in browser.picture().getcolors(1 << 20) or []}
    for row in range(4):
        assert any(near(colour, Evaluation.colour(row, 0)) for colour in seen), "the first seed by every method"
    assert browser.errors() == []


def test_columns_that_are_out_of_sight_are_told_and_reached(browser: Browser, report: Path) -> None:
    """By keys alone: the table takes the focus, and scrolls under the arrow keys."""
    script = """const w = document.querySelector("#scores").closest(".wide"), end = w.getBoundingClientRect().right;
    return [[...w.querySelectorAll("thead th")].filter((e) => e.getBoundingClientRect().right > end).length,
        w.parentElement.previousElementSibling.hidden, w.parentElement.previousElementSibling.textContent,
        w.parentElement.matches(".right")]"""
    for width, least in ((390, 6), (800, 3)):
        browser.open(report, width)
        hidden, *said = browser.js(script)
        assert hidden >= least
        assert said == [False, f"{hidden} more columns to the right: scroll, or use the arrow keys →", True]
    wide = "document.querySelector('#scores').closest('.wide')"
    browser.js(f"{wide}.focus()")
    browser.press(*["ARROW_RIGHT"] * 3)
    browser.wait(f"{wide}.scrollLeft > 20")
    browser.js(f"{wide}.scrollLeft += 9999")
    browser.settle()
    assert browser.js(script)[::3] == [0, False]
    assert browser.js(script)[1]
    browser.open(report, 2400)
    assert browser.js(script)[::3] == [0, False]
    assert browser.errors() == []


def test_how_it_was_made_says_what_all_rows_have(browser: Browser, report: Path) -> None:
    browser.open(report)
    run = json.loads(browser.texts("#run pre")[0])
    assert run["settings of all rows"] == {"solver": "ddim,eta=0.0", "seed": 5}
    assert "ddim,eta=0.0" in browser.texts("#facts bdi")


def test_few_pictures_are_told(browser: Browser, tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path)
    browser.open(evaluation.save())
    assert browser.js("return document.querySelector('#notice').hidden")
    evaluation.result["notice"] = few_pictures(4, "Fréchet", 32)
    browser.open(evaluation.save())
    assert browser.texts("#notice") == [evaluation.result["notice"]]
    assert "Fréchet whole is fitted to 4 pictures, no more than the 32 features of each" in evaluation.result["notice"]


def test_text_is_legible_in_light_and_dark(browser: Browser, report: Path) -> None:
    """The contrast of WCAG 2, (L + 0.05) / (l + 0.05), is at least 4.5 on both grounds."""

    def luminance(name: str) -> float:
        script = """
            document.body.style.color = `var(--${arguments[0]})`;
            return getComputedStyle(document.body).color.match(/[0-9.]+/g).slice(0, 3).map(Number);"""
        channels = [value / 255 for value in browser.js(script, name)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark in (False, True):
        browser.open(report, dark=dark)
        for text in ("text", "quiet", "blue", "orange"):
            for ground in ("ground", "raised", "striped"):
                light, less = sorted((luminance(text), luminance(ground)), reverse=True)
                assert (light + 0.05) / (less + 0.05) >= 4.5, (text, ground, dark)


def test_a_column_sorts_up_and_down_and_back(browser: Browser, report: Path) -> None:
    browser.open(report)
    order = ["other truth", *NAMES]
    assert names(browser) == order
    assert sort_by(browser, "kernel whole") == "ascending"
    assert names(browser) == [NAMES[3], "other truth", NAMES[0], NAMES[2], NAMES[1]], "what is no number comes last"
    browser.press("ENTER")
    assert names(browser) == [NAMES[2], NAMES[0], "other truth", NAMES[3], NAMES[1]]
    assert sort_by(browser, "kernel whole") == "none"
    assert names(browser) == order
    sort_by(browser, "agreement")
    assert sort_by(browser, "agreement") == "descending"
    assert names(browser) == ["other truth", NAMES[3], NAMES[2], NAMES[0], NAMES[1]]
    rows = browser.js("return [...document.querySelectorAll('#sheet tbody tr')].map(e => Number(e.dataset.row))")
    assert rows == [4, 3, 1, 2], "pictures stand in the order of the table, without the truth, which has none"
    for column in ("method", "size", "evaluations", "pictures"):
        assert sort_by(browser, column) == "ascending"
    assert browser.errors() == []


def test_numbers_have_bars_at_their_places(browser: Browser, report: Path) -> None:
    browser.open(report)
    cells = browser.js("""const shown = (cell) => {
        const bar = cell.querySelector(".bar")?.getBoundingClientRect();
        const text = [...cell.querySelectorAll(".value, .interval")].map((e) => e.textContent).join(" ");
        const place = (kind) => {
            const box = cell.querySelector(`.bar .${kind}`)?.getBoundingClientRect();
            return [kind, box && { from: (box.left - bar.left) / bar.width, to: (box.right - bar.left) / bar.width }];
        };
        return { text, ...Object.fromEntries(["dot", "between", "filled", "reference"].map(place)) };
    };
    return [...document.querySelectorAll("#scores tbody tr")].map((row) => [...row.cells].map(shown));""")
    heads = browser.texts("#scores thead button")
    costs = ["evaluations", "TFLOP", "seconds", "peak MB"]
    assert heads == ["method", "size", *SCORES, *costs, "pictures"]
    assert {row[heads.index("seconds")]["text"] for row in cells} == {""}, "where all were drawn in one batch"
    by_name = {name: dict(zip(heads, row, strict=True)) for name, row in zip(["truth", *NAMES], cells, strict=True)}
    share = by_name[NAMES[2]]["one of each"]
    assert share["text"] == "50.0% [37.5, 62.5]"
    assert (share["dot"]["from"] + share["dot"]["to"]) / 2 == pytest.approx(0.5, abs=0.01)
    assert [share["between"][end] for end in ("from", "to")] == pytest.approx([0.375, 0.625], abs=0.01)
    assert share["reference"]["from"] == pytest.approx(1, abs=0.02), "the truth of the same size, which has 100%"
    assert by_name["native"]["one of each"]["reference"] is None, "there is no truth of its size"
    agreement = by_name["native"]["agreement"]
    assert agreement["text"] == "20 [19, 21]"
    assert agreement["between"]["from"] == pytest.approx(0, abs=0.01), "the axis goes from 19 to 25"
    assert (agreement["dot"]["from"] + agreement["dot"]["to"]) / 2 == pytest.approx(1 / 6, abs=0.01)
    assert by_name["direct"]["kernel whole"]["text"] == "NaN [NaN, NaN]"
    assert by_name["direct"]["kernel whole"]["dot"] is None
    assert by_name[NAMES[2]]["kernel whole"]["text"] == "2000 [-Infinity, Infinity]"
    assert by_name[NAMES[2]]["kernel whole"]["between"] is None
    assert by_name["direct"]["agreement"]["text"] == ""
    cost = by_name[NAMES[2]]["evaluations"]
    assert cost["text"] == "22"
    assert [cost["filled"][end] for end in ("from", "to")] == pytest.approx([0, 22 / 23], abs=0.01)
    assert browser.errors() == []


def test_rows_are_chosen_by_words_and_size(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.find("#filter input").send_keys("CUT 0.3")
    assert names(browser) == [NAMES[2]]
    assert browser.texts("#filter output") == ["1 of 5 rows"]
    assert browser.js("return document.querySelectorAll('#sheet tbody tr').length") == 1
    browser.find("#filter input").send_keys("x")
    assert names(browser) == []
    browser.press(*["BACKSPACE"] * 8)
    assert len(names(browser)) == 5
    browser.click("#filter fieldset label:nth-of-type(1)")
    assert names(browser) == ["other truth", *NAMES[1:]]
    assert browser.errors() == []


def test_a_picture_zooms_to_its_seed_by_all_methods(browser: Browser, report: Path) -> None:
    browser.open(report)
    open_zoom(browser, 3, 1)
    shown = colours(browser, "#zoom img")
    assert len(shown) == 4
    assert all(near(colour, Evaluation.colour(row, 1)) for row, colour in enumerate(shown))
    assert browser.texts("#zoom-title, #zoom header bdi") == ["Seed 6", HOSTILE[1]]
    chosen = browser.js("return [...document.querySelectorAll('#zoom figure')].map(e => e.className)")
    assert chosen == ["", "", "chosen", ""]
    assert browser.texts("#zoom .mark") == ["no", "yes", "no", "yes"]
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert all(near(colour, Evaluation.colour(row, 3)) for row, colour in enumerate(colours(browser, "#zoom img")))
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert browser.texts("#zoom-title") == ["Seed 8"], "the last one"
    assert browser.js("return document.querySelector('[data-step=\"1\"]').ariaDisabled") == "true"
    browser.press("ARROW_LEFT")
    assert all(near(colour, Evaluation.colour(row, 2)) for row, colour in enumerate(colours(browser, "#zoom img")))
    browser.press("ESCAPE")
    assert not browser.js("return document.querySelector('#zoom').open")
    focus = "const e = document.activeElement; return [e.closest('tr')?.dataset.row, e.dataset.seed]"
    assert browser.js(focus) == ["3", "2"], "the focus is on the picture that was looked at"
    browser.press("ARROW_UP", "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")
    assert browser.js(focus) == ["2", "0"], "arrow keys walk through the sheet and stop at its border"
    browser.press("ENTER")
    assert browser.texts("#zoom-title") == ["Seed 5"]
    assert browser.errors() == []


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_few_pictures_are_as_large_as_the_window(browser: Browser, report: Path, width: int, height: int) -> None:
    browser.open(report, width, height)
    browser.find("#filter input").send_keys("256")
    browser.click("#sheet button")
    boxes = browser.boxes("#zoom img")
    assert len(boxes) == 3
    assert all(box["width"] >= 320 and box["right"] <= width for box in boxes)
    browser.resize(700, 500)
    boxes = browser.boxes("#zoom img")
    assert all(box["right"] <= 700 for box in boxes)


def test_a_record_says_what_differs_and_all_that_is_known(browser: Browser, report: Path) -> None:
    browser.open(report)
    open_zoom(browser, 3, 1)
    browser.click("figure.chosen button")
    said = browser.texts("#record tbody th, #record tbody td:nth-child(2)")
    assert said == ["method", "cutdiffusion", "negative_prompt", HOSTILE[2]]
    elsewhere = browser.texts("#record tbody tr:first-child td:nth-child(3) div")
    assert elsewhere == ["direct in direct", f"Own in {NAMES[3]}"], "of the same size"
    record = json.loads(browser.texts("#record pre")[0])
    assert record["caption"] == HOSTILE[1]
    assert record["seed"] == 6
    assert record["pixels_sha256"] == "hash 2 1"
    assert record["scores"] == {"one of each": 0.0, "agreement": 2.125}
    assert record["settings"]["method"] == "cutdiffusion,structure_fraction=0.3,interaction=none"
    of_all = {"solver": "ddim,eta=0.0", "seed": 5}
    assert record["run"] == {
        "command": ["python", *HOSTILE],
        "source": "weights/</script>",
        "settings of all rows": of_all,
    }
    browser.press("ESCAPE")
    assert browser.js("return [document.querySelector('#record').open, document.querySelector('#zoom').open]") == [
        False,
        True,
    ]
    browser.press("ARROW_RIGHT", "ESCAPE")
    browser.click("#scores tbody tr:nth-child(4) th button")
    record = json.loads(browser.texts("#record pre")[0])
    assert record["scores"]["kernel whole"] == [2000, "-Infinity", "Infinity"], "of a row, all of its scores"
    assert browser.errors() == []


def test_what_a_run_says_stays_text(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.js("""for (const picture of document.querySelectorAll("#sheet td button")) {
        picture.click();
        document.querySelector("figure.chosen button").click();
        document.querySelector("#record").close();
    }""")
    assert browser.js("return window.broken") is None
    assert browser.js("return document.scripts.length") == 2
    assert browser.texts("title, h1") == ["Evaluation <b>"] * 2
    assert browser.texts("#sheet thead bdi") == HOSTILE
    isolated = "return [...document.querySelectorAll('bdi')].map(e => getComputedStyle(e).unicodeBidi)"
    assert {*browser.js(isolated)} == {"isolate"}
    assert json.loads(browser.texts("#run pre")[0])["command"][1:] == HOSTILE
    assert browser.errors() == []


def test_nothing_but_its_own_script_runs_and_nothing_is_fetched(browser: Browser, report: Path) -> None:
    browser.open(report)
    image = "<img src=http://localhost/a.png onerror='broken = 1'>"
    browser.js("document.body.insertAdjacentHTML('beforeend', arguments[0])", image)
    browser.js("document.body.append(Object.assign(document.createElement('script'), { text: 'window.broken = 1' }))")
    refused = browser.errors()
    assert len([line for line in refused if "Content Security Policy" in line]) >= 2
    assert browser.js("return window.broken") is None


def test_the_page_alone_shows_all_and_in_its_folder_leads_to_the_files(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    browser.open(report)
    open_zoom(browser, 1, 2)
    links = browser.js("return [...document.querySelectorAll('#zoom figcaption a')].map(e => e.href)")
    for row, link in enumerate(links):
        with Image.open(unquote(urlparse(link).path)) as picture:
            assert picture.getpixel((0, 0)) == Evaluation.colour(row, 2)
    alone = Path(shutil.copy(report, tmp_path / "moved.html"))
    browser.open(alone)
    assert len(colours(browser, "#sheet img")) == 16
    assert browser.errors() == []


@pytest.mark.parametrize("seeds", [2, 0])
def test_the_pictures_have_a_bound(
    seeds: int, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Evaluation(tmp_path, num=3)
    size = len(json.dumps(data_of(evaluation.save())["seeds"][:seeds]))
    monkeypatch.setattr(page, "MOST_BYTES", size)
    report = evaluation.save()
    assert len(data_of(report)["seeds"]) == seeds
    browser.open(report)
    assert browser.texts("#pictures-title ~ .note")[0].startswith(f"The first {seeds} of 3 seeds.")
    assert len(names(browser)) == 5
    assert browser.errors() == []


def test_pictures_are_shrunk_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SIDE", 20)
    monkeypatch.setattr(page, "MOST_SEEDS", 2)
    data = data_of(Evaluation(tmp_path, num=3).save())
    assert len(data["seeds"]) == 2
    picture = data["seeds"][1][3]
    assert (picture["record"]["width"], picture["record"]["height"]) == (32, 32), "as the file is"
    with Image.open(BytesIO(b64decode(picture["webp"]))) as image:
        assert (image.format, image.size) == ("WEBP", (20, 20))


def test_a_page_is_written_whole_or_stays(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path)
    before = evaluation.save().read_bytes()
    next(iter(evaluation.folders.values())).joinpath("0003.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        evaluation.save()
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_rows_without_pictures_have_none(tmp_path: Path) -> None:
    """A study's results may be here, and its pictures on another machine."""
    evaluation = Evaluation(tmp_path)
    evaluation.folders.pop(("direct", 256))
    data = data_of(evaluation.save())
    assert [picture is None for picture in data["seeds"][0]] == [True, False, True, False, False]
    evaluation.folders.clear()
    assert data_of(evaluation.save())["seeds"] == [[None] * 5] * 4


def test_an_evaluation_of_fewer_pictures_than_its_folders_hold_shows_its_own(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path)
    for row in evaluation.result["cells"]:
        row["num"] = 2
        for score in row["scores"].values():
            score["values"] = score["values"] and score["values"][:2]
    data = data_of(evaluation.save())
    assert len(data["seeds"]) == data["drawn"] == 2


def test_every_cost_and_share_has_a_meaning() -> None:
    assert {*COSTS, *SHARES} <= {*page.MEANINGS}
