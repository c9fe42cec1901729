"""The page of a trace in a real browser: Debian's chromium without a window, where there is one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, opened_browser
from PIL import Image
from test_trace import NASTY, PROMPT, RUN
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run
from cutdiff.models.inside import replaced
from cutdiff.sampling.stages import Stage
from cutdiff.trace import load, page
from cutdiff.trace.__main__ import main as compare

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.xdist_group("browser")


class Player(Browser):
    """A browser at a page, of which nothing but the page's own file may be loaded."""

    def show(self, path: Path, width: int = 1280, scheme: str = "light", place: str = "") -> None:
        self.driver.get("about:blank")  # so that a page of the same address is loaded again
        self.open(path, width, 900, dark=scheme == "dark", place=place)

    def value(self, code: str, *arguments: Any) -> Any:
        """The value of an expression."""
        return self.js(f"return {code}", *arguments)

    def text(self, selector: str) -> str:
        return self.value("document.querySelector(arguments[0]).textContent", selector)

    def all(self, selector: str, each: str) -> list[Any]:
        """The value of an expression in `e` of every element."""
        return self.value(f"[...document.querySelectorAll(arguments[0])].map((e) => {each})", selector)

    def point(self, selector: str, column: float, row: float) -> None:
        """Move the pointer over a canvas, to a place in its own pixels."""
        canvas = self.driver.find_element("css selector", selector)
        self.value("arguments[0].scrollIntoView({block: 'center'})", canvas)
        box, size = (
            self.value(f"[arguments[0].{a}, arguments[0].{b}]", canvas)
            for a, b in (("clientWidth", "clientHeight"), ("width", "height"))
        )
        x, y = ((place / side - 0.5) * length for place, side, length in zip((column, row), size, box, strict=True))
        webdriver.ActionChains(self.driver, duration=0).move_to_element_with_offset(
            canvas, round(x), round(y)
        ).perform()

    def pixels(self, selector: str) -> np.ndarray:
        """The colours of a canvas, (H, W, 3)."""
        code = (
            "((c) => { const d = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
            "d.drawImage(c, 0, 0); return [c.height, c.width, [...d.getImageData(0, 0, c.width, c.height).data]] })"
            "(document.querySelector(arguments[0]))"
        )
        height, width, data = self.value(code, selector)
        return np.array(data, dtype=float).reshape(height, width, 4)[:, :, :3]

    def complaints(self) -> list[str]:
        """The lines that the console said, and all that was loaded beside the page."""
        loaded = self.value(
            "performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !/^data:/.test(n))"
        )
        return [entry["message"] for entry in self.driver.get_log("browser")] + loaded


@pytest.fixture(scope="module")
def browser() -> Iterator[Player]:
    with opened_browser() as own:
        yield Player(own.driver)


@pytest.fixture(autouse=True)
def no_complaints(browser: Player) -> Iterator[None]:
    browser.complaints()
    yield
    assert browser.complaints() == []


Drawn = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def drawn(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """The page and the data of a run with these options, drawn once."""
    folder, known = tmp_path_factory.mktemp("traces"), {}

    def draw(prompt: str = PROMPT, **options: Any) -> tuple[Path, Any]:
        key = (prompt, str(options))
        if key not in known:
            path = folder / f"run {len(known)}.html"
            cutdiff.trace(tiny_model, prompt, page=path, data=True, **{**RUN, "method": "cutdiffusion", **options})
            known[key] = path, load(path.with_suffix(".trace"))
        return known[key]

    return draw


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("method", ["cutdiffusion", "upsample_guidance"])
def test_it_fits_and_shows_something(browser: Player, drawn: Drawn, width: int, scheme: str, method: str) -> None:
    browser.show(drawn(method=method)[0], width, scheme)
    assert browser.value("document.documentElement.scrollWidth") == width
    with Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())) as image:
        assert image.size == (width, 900)
        colours: Any = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 300
    background = max(colours)[1]
    assert (sum(background) < 3 * 60) == (scheme == "dark")
    wide = "[...document.querySelectorAll('main canvas')].filter((c) => c.clientWidth > 0)"
    assert browser.value(f"{wide}.length") >= 3
    assert browser.value(f"{wide}.every((c) => c.width > 1 && c.height > 1)")


def test_slider_keys_and_playing(browser: Player, drawn: Drawn) -> None:
    path, trace = drawn()
    browser.show(path)

    def step() -> int:
        value = int(browser.value("document.getElementById('slider').value"))
        assert browser.text("#readout .count") == f"{value + 1} / 4"
        spoken = browser.value("document.getElementById('slider').getAttribute('aria-valuetext')")
        assert spoken.startswith(f"step {value + 1}, {trace.steps[value].stage}, σ ")
        assert browser.value("!document.getElementById('patches-0').hidden") == (value < 2)
        assert browser.value("!document.getElementById('views-0').hidden") == (value >= 2)
        return value

    assert step() == 0
    keys = webdriver.Keys
    for key, expected in [
        (keys.ARROW_RIGHT, 1),
        (keys.END, 3),
        (keys.ARROW_RIGHT, 3),
        (keys.ARROW_LEFT, 2),
        (keys.HOME, 0),
    ]:
        browser.press(key)
        assert step() == expected
    browser.value("document.getElementById('slider').focus()")
    browser.press(keys.ARROW_RIGHT)
    assert step() == 1
    slider = browser.driver.find_element("id", "slider")
    width = slider.size["width"]
    chain = webdriver.ActionChains(browser.driver, duration=0)
    chain.move_to_element_with_offset(slider, round(width * (2.5 / 4 - 0.5)), 0).click().perform()
    assert step() == 2
    browser.click("#play")
    assert browser.value("document.getElementById('play').ariaPressed") == "true"
    browser.wait("document.getElementById('play').ariaPressed === 'false'")
    assert step() == 3
    browser.press(" ")  # the button has the focus
    assert browser.value("document.getElementById('play').ariaPressed") == "true"
    browser.press(keys.ARROW_LEFT)
    assert browser.value("document.getElementById('play').ariaPressed") == "false"
    browser.show(path, place="#step-3")
    assert step() == 2


@pytest.mark.parametrize("interaction", ["channel", "pixel", "none"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_pixel_is_linked_as_the_permutation_says(browser: Player, drawn: Drawn, interaction: str, width: int) -> None:
    path, trace = drawn(interaction=interaction)
    browser.show(path, width, place="#step-2")
    (items,) = trace.steps[1].items
    plain = torch.arange(4).view(4, 1, 1, 1).expand(4, 4, 6, 8)
    index = plain if items.permutation is None else items.permutation.expand(4, 4, 6, 8)
    gap = 1  # of the painted grid
    for number, (n, y, x) in enumerate([(0, 0, 0), (1, 2, 5), (3, 5, 7), (2, 3, 1)]):
        column, row = n % 2 * (8 + gap) + x + 0.5, n // 2 * (6 + gap) + y + 0.5
        for side in ("before", "after"):
            canvas = f"#patches-0 .triple > :nth-child({2 if side == 'before' else 3}) canvas"
            browser.point(canvas, column, row)
            others = (index[n, :, y, x] if side == "after" else (index[:, :, y, x] == n).int().argmax(0)).tolist()
            told = browser.value("({...document.querySelector('#patches-0 .link').dataset})")
            expected = {"side": side, "patch": n, "row": y, "column": x, "others": ",".join(map(str, others))}
            assert told == {key: str(value) for key, value in expected.items()}, number
            other = f"#patches-0 .triple > :nth-child({3 if side == 'before' else 2}) .channel"
            marks = browser.all(other, "[e.x.baseVal.value, e.y.baseVal.value]")
            centres = [(m % 2 * (8 + gap) + x, m // 2 * (6 + gap) + y) for m in others]
            assert len(marks) == 4
            for (left, top), (at_x, at_y) in zip(marks, centres, strict=True):
                assert at_x <= left < at_x + 1
                assert at_y <= top < at_y + 1
    browser.value("scrollTo(0, 0)")
    title = browser.driver.find_element("css selector", "h1")
    webdriver.ActionChains(browser.driver, duration=0).move_to_element(title).perform()
    assert browser.text("#patches-0 .link").startswith("Point at a pixel of a patch")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_grid_is_wider_than_the_window(browser: Player, drawn: Drawn, tmp_path: Path, width: int) -> None:
    """The pages have 16 patches, or 49 views, with a bar each; also side by side with another run."""
    large, _ = drawn(height=256, width=256)
    small, _ = drawn()
    assert compare([str(small), str(large), "--out", str(tmp_path / "both.html")]) == 0
    for path in (large, tmp_path / "both.html"):
        for step, number in (("1", 16), ("4", 49)):
            browser.show(path, width, place=f"#step-{step}")
            if path != large:
                browser.click(".which-run button:nth-child(2)")
            bars = browser.all(".inside:not([hidden]) .card:not([hidden]) .bar-list button", "e.clientWidth")
            assert len(bars) == number
            assert min(bars) >= 10
            assert browser.value("document.documentElement.scrollWidth") == width


def test_a_bar_frames_its_patch(browser: Player, drawn: Drawn) -> None:
    """And a pixel of what the network drew marks the bar of its patch."""
    browser.show(drawn()[0])
    assert browser.all("#patches-0 .bar-list b", "e.textContent") == ["1", "2", "3", "4"]
    pressed, here = (("#patches-0 .bar-list button", each) for each in ("e.ariaPressed", "e.matches('.here')"))
    frames = "#patches-0 .triple > :nth-child({}) .patch-frame"
    for n, place in ((2, [0, 7]), (3, [9, 7])):  # of 6 × 8 latents and a gap
        browser.click(f"#patches-0 .bar-list li:nth-child({n + 1}) button")
        assert browser.all(*pressed) == [str(k == n).lower() for k in range(4)]
        assert browser.all(frames.format(3), "[e.x.baseVal.value, e.y.baseVal.value]") == [place]
        assert browser.all(frames.format(2), "1") == [], "what stands in place is not what was compared"
    browser.point("#patches-0 .triple > :nth-child(3) canvas", 9.5, 0.5)
    assert browser.all(*here) == [False, True, False, False]
    assert len(browser.all(frames.format(3), "1")) == 1
    browser.press(webdriver.Keys.ARROW_RIGHT)
    assert browser.all(*pressed) == ["false", "false", "false", "true"]
    assert len(browser.all(frames.format(3), "1")) == 1
    browser.click("#patches-0 .bar-list li:nth-child(4) button")
    assert browser.all(frames.format(3), "1") == []
    browser.press(webdriver.Keys.END)
    browser.press(webdriver.Keys.HOME)
    assert browser.all(*pressed) == ["false"] * 4


def test_runs_of_different_sizes(browser: Player, drawn: Drawn, tmp_path: Path) -> None:
    """They have no difference, and the page says why; a cascade has some with a run of one size on the way."""
    small, large = (drawn(method="direct", width=width)[0] for width in (96, 128))
    assert compare([str(small), str(large), "--out", str(tmp_path / "both.html")]) == 0
    browser.show(tmp_path / "both.html")
    assert browser.text("#parting").startswith("Run A has a canvas of 96 × 96 px, and run B one of 128 × 96 px: no ")
    assert browser.value("document.querySelectorAll('#pictures .run-panels').length") == 2
    native, cascade = (
        drawn(method=method, height=side, width=side)[0] for method, side in (("direct", 64), ("demofusion", 128))
    )
    assert compare([str(native), str(cascade), "--out", str(tmp_path / "cascade.html")]) == 0
    browser.show(tmp_path / "cascade.html", place="#step-1")
    assert browser.text("#parting").startswith("The runs are the same, to the bit")
    notes = "#pictures .run-panels:nth-child(3) .frame:nth-child(1) .note"
    assert browser.text(notes) == "none"
    browser.press(webdriver.Keys.END)
    assert browser.text(notes) == "of 8 × 8 and 16 × 16 latents"


def test_what_numbers_mean_is_said(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    titles, notes = (browser.all(f".chart {each}", "e.textContent") for each in ("h3", ".note"))
    said = [title for title, note in zip(titles, notes, strict=True) if note.endswith(", on a logarithmic axis")]
    assert said == ["Energy", "Spectrum of the estimate"]
    assert browser.all(".facts li:last-child", "e.textContent")[0].endswith(" s with its trace")


def test_pixels_are_walked_by_keys(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    browser.value("document.querySelector('#patches-0 canvas.grid').focus()")
    keys = webdriver.Keys
    browser.press(*[keys.ARROW_RIGHT] * 9, keys.ARROW_DOWN)  # over the end of the first patch into the second
    told = browser.value("({...document.querySelector('#patches-0 .link').dataset})")
    assert (told["side"], told["patch"], told["row"], told["column"]) == ("before", "1", "1", "1")
    assert browser.value("document.getElementById('slider').value") == "0"


def test_patches_have_the_colours_of_the_tensors(browser: Player, drawn: Drawn) -> None:
    path, trace = drawn()
    browser.show(path, place="#step-2")
    (end,) = (part for part in page.blocks(path.read_bytes()) if part["kind"] == "end")
    rgb, moment = torch.tensor(end["map"]), trace.steps[1]
    (items,) = moment.items
    cut = torch.stack([moment.denoised[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    scale = 1 / (1 + moment.sigma**2) ** 0.5
    read = torch.stack([moment.state[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]) * scale
    read_after = read.gather(0, items.permutation.expand(read.shape))

    def check(expected: Tensor, child: int, tolerance: float) -> None:
        shown = browser.pixels(f"#patches-0 .triple > :nth-child({child}) canvas")
        for n, patch in enumerate(expected):
            colours = (rgb[:, :4] @ patch.flatten(1) + rgb[:, 4:]).clamp(0, 1).unflatten(1, (6, 8)).permute(1, 2, 0)
            top, left = n // 2 * 7, n % 2 * 9
            assert np.abs(shown[top : top + 6, left : left + 8] - 255 * colours.numpy()).max() < tolerance

    check(cut, 2, 2)
    check(items.estimates, 3, 6)  # which the page holds in bytes
    browser.click("#patches-0 .choice button:nth-child(2)")
    check(read, 2, 2)
    check(read_after, 3, 2)


def test_a_view_is_chosen_by_its_bar_and_by_a_click(browser: Player, drawn: Drawn) -> None:
    path, trace = drawn()
    browser.show(path, place="#step-4")
    moment, note = trace.steps[3], "#views-0 .three > :nth-child({}) .note"
    (items,) = moment.items
    browser.click("#views-0 li:nth-child(6) button")
    assert browser.text(note.format(1)) == "view 6"
    top, left = items.origins[5].tolist()
    assert browser.text(note.format(2)) == f"row {top}, column {left}"
    rows, columns = slice(max(top, 0), top + 8), slice(max(left, 0), left + 8)
    place = moment.denoised[:, rows, columns]
    alone = items.estimates[5][:, rows.start - top :, columns.start - left :][:, : place.shape[1], : place.shape[2]]
    expected = float((alone - place).square().mean().sqrt())
    assert float(browser.text(note.format(3)).removeprefix("rms ")) == pytest.approx(expected, rel=0.03)
    frames = browser.all("#views-0 .view:not(.then):not(.chosen)", "[e.y.baseVal.value, e.x.baseVal.value]")
    assert frames == items.origins.tolist()
    before = browser.all("#views-0 .view.then", "[e.y.baseVal.value, e.x.baseVal.value]")
    assert before == trace.steps[2].items[0].origins.tolist()
    browser.point("#views-0 .views canvas", 3, 3)
    webdriver.ActionChains(browser.driver, duration=0).click().perform()
    assert browser.text(note.format(1)) == "view 1"
    assert browser.all("#views-0 .bar-list button", "e.ariaPressed") == ["true"] + ["false"] * 5


def test_a_word_is_laid_over_the_estimate(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    words = browser.all(".word bdi", "e.textContent")
    assert words == PROMPT.split()
    estimate = "#pictures .panels > :nth-child(2) canvas"
    plain = browser.pixels(estimate)
    browser.click(".word:nth-child(3)")
    laid = browser.pixels(estimate)
    assert browser.text("#pictures .panels > :nth-child(2) .note") == "attention over “house”"
    assert (laid <= 1.1 * plain + 1).all()
    assert laid.mean() < 0.9 * plain.mean()
    browser.click(".word:nth-child(3)")
    assert np.array_equal(browser.pixels(estimate), plain)


def test_two_runs_side_by_side(
    browser: Player, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (drawn(**options)[0] for options in ({}, {"guidance_interval": (0.0, 0.5)}))
    assert compare([str(one), str(other.with_suffix(".png")), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    for width in (1280, 390):
        browser.show(tmp_path / "both.html", width)
        assert browser.value("document.documentElement.scrollWidth") == width
    parting = "document.getElementById('parting')"
    assert (browser.value(f"{parting}.dataset.denoised"), browser.value(f"{parting}.dataset.state")) == ("2", "3")
    assert browser.text("#parting").startswith(
        "The runs part with the estimate of step 3: its canvas is still the same"
    )
    differences = "#pictures .run-panels:nth-child(3) .frame:nth-child({}) .note"
    for step, (state, estimate) in enumerate([(True, True), (True, True), (True, False), (False, False)], start=1):
        browser.show(tmp_path / "both.html", place=f"#step-{step}")
        assert (browser.text(differences.format(1)) == "none") == state
        assert (browser.text(differences.format(2)) == "none") == estimate
    browser.click(".which-run button:nth-child(2)")
    assert browser.value("document.getElementById('views-0').clientWidth") == 0
    assert browser.value("document.getElementById('views-1').clientWidth") > 300
    assert compare([str(one), str(one), "--out", str(tmp_path / "same.html")]) == 0
    browser.show(tmp_path / "same.html")
    assert browser.text("#parting").startswith("The runs are the same, to the bit")


def test_a_run_that_was_killed(browser: Player, drawn: Drawn, tmp_path: Path) -> None:
    whole = drawn()[0].read_bytes()
    ends = [match.end() for match in page.BLOCK.finditer(whole)]
    for cut, steps in ((ends[2] + 5000, 2), (ends[0], 0)):
        (tmp_path / "cut.html").write_bytes(whole[:cut])
        browser.show(tmp_path / "cut.html")
        after = f"after step {steps} of 4" if steps else "before its first step was recorded"
        assert (
            browser.text(".notice")
            == f"The page ends {after}: the run was killed, or still goes on (then load the page again)."
        )
        assert browser.value("document.querySelectorAll('.lane .cell').length") == steps
    (tmp_path / "cut.html").write_bytes(whole[: ends[0] - 9])
    browser.show(tmp_path / "cut.html")
    assert browser.text(".notice") == "The page ends before the run began."


def test_where_nan_began(browser: Player, tiny_model: Model, tmp_path: Path) -> None:
    def method(run: Run) -> list[Stage]:
        (stage,) = cutdiff.Settings(method="multidiffusion").method.stages(run)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            if step < 2:
                return stage.denoise(x, sigma, step)
            last = run.denoiser.unet.conv_out

            def forward(values: Tensor) -> Tensor:
                out = torch.nn.Conv2d.forward(last, values)
                out[5, :, 2:4] = torch.nan
                return out

            with replaced(last, forward=forward):
                return stage.denoise(x, sigma, step)

        return [Stage("mine", range(run.num_steps), denoise)]

    with pytest.raises(FloatingPointError):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", method=method, **RUN)
    browser.show(tmp_path / "run.unfinished.html")
    first, second = browser.all(".notice", "e.textContent")
    assert first.startswith(
        "The run ended in step 3 of 4, in the words of its error, which counts the schedule's steps from 0: step 2 ("
    )
    assert second == "NaN or infinity begins in step 3 (mine), first in view 3 of 6. Show it"
    assert browser.value("document.querySelectorAll('.lane .bad').length") == 1
    browser.click(".notice button")
    assert browser.value("document.getElementById('slider').value") == "2"
    assert browser.text("#pictures .panels > :nth-child(2) .note").endswith("values not finite")
    shown = browser.pixels("#pictures .panels > :nth-child(2) canvas")
    assert is_bad(shown).sum() == 2 * 8
    assert browser.all("#views-0 .bar-list button", "e.matches('.bad-item')") == [False, False, True] + [False] * 3


@pytest.mark.parametrize("prompt", NASTY)
def test_prompts_are_shown_as_typed(browser: Player, drawn: Drawn, prompt: str) -> None:
    browser.show(drawn(prompt, negative_prompt=prompt, num_steps=1)[0])
    assert browser.value("document.querySelector('h1').textContent") == prompt
    assert browser.value("document.querySelector('.negative bdi').textContent") == prompt
    assert browser.value("document.querySelectorAll('img:not(.picture img), h1 *:not(bdi)').length") == 0
    assert browser.value("document.title").replace(" ", "") in prompt.replace(" ", "")
    assert len(browser.value("[...document.querySelectorAll('.facts li')].map((li) => li.textContent)")) >= 8


def test_a_method_of_ones_own(browser: Player, tiny_model: Model, tmp_path: Path) -> None:
    """Stages without names, whose items are halves that were cut by hand; and one without any network."""

    def method(run: Run) -> list[Stage]:
        def halves(x: Tensor, sigma: float, step: int) -> Tensor:
            return torch.cat(list(run.denoiser(torch.cat(x.split(8, 3)), sigma, step).split(1)), dim=3)

        return [Stage("", range(2), halves), Stage("", range(2, 4), lambda x, sigma, step: x / (1 + sigma))]

    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", method=method, **RUN)
    browser.show(tmp_path / "run.html")
    assert browser.value("document.getElementById('items-0').clientWidth") > 0
    assert browser.value("document.querySelectorAll('#items-0 .bar-list li').length") == 2
    assert browser.text(".lane .stage") == "no name"
    browser.press(webdriver.Keys.END)
    assert browser.value("document.getElementById('items-0').clientWidth") == 0
    assert " 0 evaluations" in browser.text("#readout")


def test_dark_and_light_at_will(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.value(ground)
    browser.click("#theme")
    dark = browser.value(ground)
    assert dark != light
    browser.show(drawn()[0], scheme="dark")
    assert browser.value(ground) == dark
    browser.click("#theme")
    assert browser.value(ground) == light


def test_names_for_those_who_do_not_see(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    named = "(e) => (e.ariaLabel || e.getAttribute('aria-label') || e.textContent || e.title || '').trim().length > 0"
    shown = "[...document.querySelectorAll('button, input, canvas[role]')].filter((e) => e.clientWidth > 0)"
    assert browser.value(f"{shown}.length") > 10
    assert browser.value(f"{shown}.filter((e) => !({named})(e)).map((e) => e.outerHTML)") == []
    assert browser.value("document.querySelectorAll('details tbody tr').length") == 4
    levels = browser.all("h1, h2, h3", "Number(e.tagName[1])")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_thinned_runs_part_at_a_step_without_pictures(browser: Player, drawn: Drawn, tmp_path: Path) -> None:
    """To the bit, and each picture says of which step it is, the same of both runs."""
    options: dict[str, Any] = {"method": "direct", "num_steps": 7, "guidance_scale": 60.0}
    one, other = drawn(every=6, **options)[0], drawn(every=3, guidance_interval=(0.0, 0.3), **options)[0]
    assert compare([str(one), str(other), "--out", str(tmp_path / "both.html")]) == 0
    browser.show(tmp_path / "both.html")
    parting = browser.value("({...document.getElementById('parting').dataset})")
    whole, ended = drawn(**options)[1].steps, drawn(guidance_interval=(0.0, 0.3), **options)[1].steps
    first = next(i for i in range(7) if not torch.equal(whole[i].denoised, ended[i].denoised))
    assert parting == {"denoised": str(first), "state": str(first + 1)}
    assert 0 < first < 5, "not one that both show"
    assert browser.text("#parting").endswith(" At the latest from step 7 on their estimates are more than 1% apart.")
    note = "#pictures .run-panels:nth-child(3) .frame:nth-child(2) .note"
    for step, said in ((1, "none"), (2, "of step 1: none"), (6, "of step 1: none")):
        browser.show(tmp_path / "both.html", place=f"#step-{step}")
        assert browser.text(note) == said
    browser.show(tmp_path / "both.html", place="#step-7")
    assert browser.text(note).startswith("rms ")


def test_runs_of_different_lengths(browser: Player, drawn: Drawn, tmp_path: Path) -> None:
    long, short = (drawn(method="direct", num_steps=number)[0] for number in (6, 4))
    assert compare([str(long), str(short), "--out", str(tmp_path / "both.html")]) == 0
    browser.show(tmp_path / "both.html", place="#step-6")
    said = browser.text("#parting")
    assert " They are compared step by step, although their noise differs: at step 1 run A is at σ " in said
    assert said.endswith(" Run A has 6 steps, run B 4 steps.")
    notes = "#pictures .run-panels:nth-child(3) .frame:nth-child({}) .note"
    assert [browser.text(notes.format(n)) for n in (1, 2)] == ["run B has ended"] * 2
    chart = ".chart:first-child .key b"
    assert browser.text(".chart:first-child h3") == "Distance between the runs"
    assert browser.all(chart, "e.textContent") == ["–", "–"]


def test_a_killed_run_is_compared_in_the_same_units(browser: Player, drawn: Drawn, tmp_path: Path) -> None:
    whole = drawn()[0]
    ends = [match.end() for match in page.BLOCK.finditer(whole.read_bytes())]
    (tmp_path / "cut.html").write_bytes(whole.read_bytes()[: ends[3]])
    assert compare([str(whole), str(tmp_path / "cut.html"), "--out", str(tmp_path / "both.html")]) == 0
    browser.show(tmp_path / "both.html")
    charts = browser.all(
        ".chart", "[e.querySelector('h3').textContent, ...[...e.querySelectorAll('b')].map((b) => b.textContent)]"
    )
    (spectrum,) = (values for title, *values in charts if title == "Spectrum of the estimate")
    assert spectrum[:4] == spectrum[4:]
    assert "–" not in spectrum


def test_a_flow_is_shown_in_its_own_time(browser: Player, tmp_path: Path) -> None:
    flow = cutdiff.load(Path(__file__).parents[1] / "weights" / "scenes-flow")
    options = {**RUN, "method": "cutdiffusion", "height": 256, "width": 256}
    cutdiff.trace(flow, PROMPT, page=tmp_path / "run.html", **options)
    browser.show(tmp_path / "run.html")
    assert browser.text("#readout .line").startswith("step 1 · structure · t 1 · ")
    assert browser.text(".sigma-name") == "t"
    assert browser.text("#pictures .frame .note") == "t 1"
    assert browser.pixels("#pictures canvas").std(axis=(0, 1)).min() > 20, "it is noise, and no flat colour"
    browser.click("#patches-0 .choice button:nth-child(2)")
    assert browser.pixels("#patches-0 .triple > :nth-child(3) canvas").std(axis=(0, 1)).min() > 20
    ticks = browser.all(".chart:first-child .tick", "Number(e.textContent)")
    assert browser.text(".chart:first-child h3") == "Energy"
    assert max(ticks) < 10
    times = browser.all("details tbody tr td:nth-child(4)", "Number(e.textContent)")
    assert times[0] == 1
    assert all(1 > b > 0 and a > b for a, b in pairwise(times))


def is_bad(shown: np.ndarray) -> np.ndarray:
    """The pixels that have the colours of values that are not finite."""
    return (shown == [255, 0, 144]).all(axis=2) | (shown == [20, 0, 12]).all(axis=2)


def test_what_pads_a_patch_is_not_bad(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn(height=104, width=120)[0])
    for show in ("2", "1"):
        browser.click(f"#patches-0 .choice button:nth-child({show})")
        for side in ("2", "3"):
            shown = browser.pixels(f"#patches-0 .triple > :nth-child({side}) canvas")
            assert shown.shape[:2] == (2 * 7 + 1, 2 * 8 + 1)
            assert not is_bad(shown).any()


@pytest.mark.parametrize("asks_none", [False, True])
def test_where_nan_of_a_methods_own_began(browser: Player, tiny_model: Model, tmp_path: Path, asks_none: bool) -> None:
    """Its estimate is shown, although all that the network gave is finite; also where no network is asked."""

    def method(run: Run) -> list[Stage]:
        (stage,) = cutdiff.Settings(method="multidiffusion").method.stages(run)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            denoised = x / (1 + sigma) if asks_none else stage.denoise(x, sigma, step).clone()
            if step == 2:
                denoised[..., 3:5, 7] = torch.nan
            return denoised

        return [Stage("mine", range(run.num_steps), denoise)]

    with pytest.raises(FloatingPointError):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", data=True, method=method, **RUN)
    browser.show(tmp_path / "run.unfinished.html", place="#step-3")
    assert browser.all(".notice", "e.textContent")[1] == (
        "NaN or infinity begins in step 3 (mine), in the estimate of x0, which the method made of what the network "
        "gave, all of it finite. Show it"
    )
    assert browser.all(".lane .bad", "e.x.baseVal.value") == [pytest.approx(2.04)]
    assert browser.text("#pictures .frame:nth-child(1) .note").startswith("σ ")
    assert browser.text("#pictures .frame:nth-child(2) .note") == "8 values not finite"
    bad = np.argwhere(is_bad(browser.pixels("#pictures .frame:nth-child(2) canvas")))
    assert bad.tolist() == [[3, 7], [4, 7]]
    moment: Any = load(tmp_path / "run.unfinished.trace").steps[-1]
    assert (moment.index, moment.failed, moment.latents) == (2, True, None)


@pytest.mark.parametrize("options", [{"interaction": "none"}, {"method": "demofusion", "height": 128}])
def test_no_exchange_is_told_of_where_there_is_none(browser: Player, drawn: Drawn, options: dict[str, Any]) -> None:
    path, trace = drawn(**options)
    (first, *_) = (i for i, step in enumerate(trace.steps) for items in step.items if items.kind == "patches")
    browser.show(path, place=f"#step-{first + 1}")
    assert browser.value("document.getElementById('patches-0').clientWidth") > 0
    browser.point("#patches-0 .triple > :nth-child(3) canvas", 1.5, 1.5)
    said = browser.value("document.getElementById('patches-0').textContent")
    assert "which exchange nothing" in said
    for word in ("xchanged", "averaged away", "after the exchange"):
        assert word not in said
    browser.show(drawn()[0])
    said = browser.value("document.getElementById('patches-0').textContent")
    assert all(word in said for word in ("Exchanged", "exchanged back", "averaged away"))


def test_steps_are_numbered_as_they_were_taken(browser: Player, drawn: Drawn) -> None:
    """A method that leaves steps of the schedule out, and takes others again."""
    path, trace = drawn(method="climb", height=256, width=256, num_steps=8)
    indices = [step.index for step in trace.steps]
    assert indices != [*range(len(indices))], "it is such a method"
    browser.show(path)
    for number in range(1, len(indices) + 1):
        assert browser.text("#readout .count") == f"{number} / {len(indices)}"
        assert browser.text("#readout .line").startswith(f"step {number} · ")
        browser.press(webdriver.Keys.ARROW_RIGHT)
    assert browser.all("details tbody th", "Number(e.textContent)") == [*range(1, len(indices) + 1)]


def test_bars_are_one_stop_of_the_tab_key(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn(height=256, width=256)[0], place="#step-4")
    stops = "#views-0 .bar-list button[tabindex='0']"
    assert browser.all(stops, "e.ariaLabel.split(',')[0]") == ["view 1"]
    browser.value("document.querySelector(arguments[0]).focus()", stops)
    keys = webdriver.Keys
    browser.press(keys.ARROW_UP, *[keys.ARROW_DOWN] * 3)
    assert browser.value("document.activeElement.ariaLabel").startswith("view 4, ")
    browser.press(keys.ENTER)
    assert browser.text("#views-0 .three .note") == "view 4"
    assert browser.all(stops, "e.ariaLabel.split(',')[0]") == ["view 4"]
    bar = browser.boxes("#bar")[0]["height"]
    padding = "parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop)"
    assert bar <= browser.value(padding) < bar + 80


def test_a_linked_pixel_is_read_as_a_list(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn()[0])
    browser.value("document.querySelector('#patches-0 canvas.grid').focus()")
    said = browser.text("#patches-0 .link").partition(": ")[2].split(", ")
    assert [part.startswith(f"channel {n} to patch ") for n, part in enumerate(said, start=1)] == [True] * 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_differ_for_the_colour_blind(browser: Player, drawn: Drawn, scheme: str) -> None:
    """As Machado, Oliveira and Fernandes (2009) simulate three kinds; lines have dashes of their own as well."""
    browser.show(drawn()[0], scheme=scheme)
    code = "getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"

    def colours(kind: str, number: int) -> np.ndarray:
        return np.array([linear(browser.value(code, f"--{kind}{n}")) for n in range(number)])

    for kind, number, least in (("c", 4, 17), ("s", 6, 15)):
        for name, matrix in {"normal": np.eye(3), **BLINDNESS}.items():
            places = lab(np.clip(colours(kind, number) @ np.array(matrix).T, 0, 1))
            apart = np.linalg.norm(places[:, None] - places, axis=2)[~np.eye(number, dtype=bool)]
            assert apart.min() >= least, (kind, name)
    dark = luminance(linear(browser.value(code, "--dark")))
    assert browser.value("getComputedStyle(document.querySelector('.lane .stage')).color") == "rgb(16, 19, 23)"
    for colour in colours("s", 6):
        assert (luminance(colour) + 0.05) / (dark + 0.05) >= 4.5
    dashes = browser.all(".chart:nth-child(2) .keys line", "e.getAttribute('stroke-dasharray')")
    assert len({*dashes}) == len(dashes) == 4


BLINDNESS = {
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""The matrices of full severity, on linear RGB."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: np.ndarray) -> float:
    return float(XYZ[1] @ colour)


def lab(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB (N, 3)."""
    ratios = colours @ XYZ.T / XYZ.sum(axis=1)
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_a_heat_map_has_its_scale(browser: Player, drawn: Drawn) -> None:
    path, trace = drawn()
    browser.show(path)
    assert browser.all("#pictures .scale", "e.clientHeight") == [0] * 4
    browser.press(webdriver.Keys.ARROW_RIGHT)
    (most,) = browser.all("#pictures .frame:nth-child(3) .scale span", "Number(e.textContent)")
    change = (trace.steps[1].denoised - trace.steps[0].denoised).square().mean(dim=0).sqrt()
    assert most == pytest.approx(float(change.max()), rel=0.05)


def test_one_is_no_plural(browser: Player, drawn: Drawn) -> None:
    browser.show(drawn(num_steps=1, method="direct", guidance_scale=1.0)[0])
    facts = browser.all(".facts li", "e.textContent")
    assert "1 step" in facts
    assert "1 evaluation" in facts
    assert " · 1 evaluation · " in browser.text("#readout")
