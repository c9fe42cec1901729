"""Traces: what a page and a folder of data hold, step by step, and that recording changes nothing."""

from __future__ import annotations

import base64
import inspect
import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own import OwnModules
from torch import Tensor

import cutdiff
from cutdiff import sample
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import BadArgument, parse
from cutdiff.methods.shared import Run
from cutdiff.models.inside import replaced
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.operators import SeededPermutation, carry_back, to_network
from cutdiff.sampling.stages import Stage, Step
from cutdiff.settings import Settings
from cutdiff.specs import METHODS
from cutdiff.trace import Moment, Recorder, Unwritable, load, page, run
from cutdiff.trace.__main__ import main as compare
from cutdiff.trace.preview import fitted, model_map
from cutdiff.trace.words import Words

PROMPT = "a red house at night"
RUN: dict[str, Any] = {"num_steps": 4, "height": 96, "width": 128, "guidance_scale": 4.0, "seed": 3}


def blocks_of(path: Path) -> tuple[page.Block, list[page.Block], Any]:
    """The run, the steps and the end that a page tells of."""
    parts = page.blocks(path.read_bytes())
    ends = [part for part in parts if part["kind"] == "end"]
    return parts[0], [part for part in parts if part["kind"] == "step"], ends[0] if ends else None


def recorded(model: Model, **options: Any) -> tuple[list[Any], list[Step]]:
    """The moments and the steps of a run."""
    moments: list[Moment] = []
    options = {**RUN, **options}
    words = Words(model, PROMPT, Settings(**options))
    recorder = Recorder(model, lambda moment: moments.append(moment) or 0, words=words)
    with recorder.listening():
        steps = list(cutdiff.denoise(model, PROMPT, observer=recorder, **options))
    return moments, steps


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_changes_no_bit_and_tells_of_every_step(tiny_model: Model, method: str, tmp_path: Path) -> None:
    result = cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", data=True, method=method, **RUN)
    steps = list(cutdiff.denoise(tiny_model, PROMPT, method=method, **RUN))
    assert torch.equal(steps[-1].latents, result.latents)
    info, told, end = blocks_of(tmp_path / "run.html")
    assert (info["prompt"], info["num_steps"], info["size"]) == (PROMPT, len(steps), [12, 16])
    assert [(one["index"], one["stage"], one["sigma"]) for one in told] == [(s.index, s.stage, s.sigma) for s in steps]
    assert end is not None
    assert end["state"] == "finished"
    if method != "scalecrafter":  # whose own network may take more evaluations than it is given rows
        assert sum(one["evaluations"] for one in told) == result.record["network_evaluations"]
    trace: Any = load(tmp_path / "run.trace")
    for moment, step in zip(trace.steps, steps, strict=True):
        assert torch.equal(moment.latents, step.latents[0])
        assert torch.equal(moment.denoised, step.denoised[0])
        assert moment.state.shape == moment.latents.shape
    assert {path.name for path in tmp_path.iterdir()} == {"run.html", "run.trace"}


def test_views_are_what_the_run_averaged(tiny_model: Model) -> None:
    moments, steps = recorded(tiny_model, method="cutdiffusion,structure_fraction=0")
    draws, before = cutdiff.Draws((3,)), None
    for moment, step in zip(moments, steps, strict=True):
        (views,) = moment.items
        origins = draws.view_origins(step.index, (12, 16), (8, 8), (4, 4), (1, 1))[0]
        assert views.kind == "views"
        assert torch.equal(views.origins, origins)
        total, count = torch.zeros(4, 14, 18), torch.zeros(14, 18)
        for (top, left), estimate in zip(origins.tolist(), views.estimates, strict=True):
            total[:, top + 1 : top + 9, left + 1 : left + 9] += estimate
            count[top + 1 : top + 9, left + 1 : left + 9] += 1
        average = (total / count)[:, 1:-1, 1:-1]
        torch.testing.assert_close(average, step.denoised[0], rtol=1e-4, atol=1e-4)
        if before is not None:
            assert torch.equal(moment.state, before)
        before = step.latents[0]
        for (top, left), estimate, distance in zip(origins.tolist(), views.estimates, views.distances, strict=True):
            rows, columns = slice(max(top, 0), top + 8), slice(max(left, 0), left + 8)
            place = average[:, rows, columns]
            inside = estimate[:, rows.start - top :, columns.start - left :][:, : place.shape[1], : place.shape[2]]
            expected = (inside - place).square().mean().sqrt() / average.std()
            torch.testing.assert_close(distance, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("interaction", ["channel", "pixel", "none"])
def test_patches_are_what_the_network_drew(tiny_model: Model, interaction: str) -> None:
    moments, steps = recorded(tiny_model, method=f"cutdiffusion,interaction={interaction}")
    assert [moment.items[0].kind for moment in moments] == ["patches"] * 2 + ["views"] * 2
    for moment, step in zip(moments[:2], steps, strict=False):
        (patches,) = moment.items
        assert patches.grid == (2, 2)
        n = torch.arange(4).view(4, 1, 1, 1)
        index = n.expand(4, 1, 6, 8) if patches.permutation is None else patches.permutation
        assert index.shape[1] == {"channel": 4, "pixel": 1, "none": 1}[interaction]
        assert (patches.permutation is None) == (interaction == "none")
        cut = torch.stack([step.denoised[0][:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
        drew = cut.gather(0, index.expand(cut.shape))
        torch.testing.assert_close(patches.estimates, drew, rtol=1e-4, atol=1e-4)
        apart = (drew - drew.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt() / step.denoised.std()
        torch.testing.assert_close(patches.distances, apart, rtol=1e-3, atol=1e-4)
        assert moment.curves["disagreement"] == pytest.approx(float(apart.mean()), rel=1e-3)


def test_guidance_is_what_it_adds_to_the_prompt_alone(tiny_model: Model) -> None:
    alone = next(cutdiff.denoise(tiny_model, PROMPT, **{**RUN, "method": "direct", "guidance_scale": 1.0}))
    (moment, *_), (step, *_) = recorded(tiny_model, method="direct")
    expected = (step.denoised - alone.denoised).square().mean().sqrt() / step.denoised.std()
    assert moment.curves["guidance"] == pytest.approx(float(expected), rel=1e-3)
    off, _ = recorded(tiny_model, method="direct", guidance_scale=1.0)
    assert [one.curves["guidance"] for one in off] == [0.0] * 4
    other, _ = recorded(tiny_model, method="direct", guidance="apg")
    assert [one.curves["guidance"] for one in other] == [None] * 4, "it joins canvases, and no items"


def test_curves(tiny_model: Model) -> None:
    (moment, *_), (step, *_) = recorded(tiny_model, method="direct")
    power = torch.fft.fft2(step.denoised[0]).abs().square().sum(dim=0) / (4 * (12 * 16) ** 2)
    rows, columns = torch.fft.fftfreq(12)[:, None], torch.fft.fftfreq(16)
    radius = (rows**2 + columns**2).sqrt()
    ends = [0, 1 / 16, 1 / 8, 1 / 4, 1]
    expected = [float(power[(radius > a) & (radius <= b)].sum()) for a, b in pairwise(ends)]
    assert moment.curves["bands"] == pytest.approx(expected, rel=1e-3)
    assert sum(expected) == pytest.approx(float(step.denoised[0].flatten(1).var(dim=1, correction=0).mean()), rel=1e-3)
    assert moment.curves["denoised_std"] == pytest.approx(float(step.denoised.std()))
    assert moment.curves["state_std"] == pytest.approx(float(step.sigma), rel=0.2)
    assert moment.curves["not_finite"] == 0


def test_attention_of_words_is_that_of_the_network(tiny_model: Model) -> None:
    """A word's map is the share of the attention that its tokens get, all words' and other tokens' 1 together."""
    words = Words(tiny_model, PROMPT, Settings(**RUN))
    assert words.names == PROMPT.split()
    moments, _ = recorded(tiny_model, method="cutdiffusion")
    assert [tuple(moment.attention.shape) for moment in moments] == [(5, 3, 4), (5, 3, 4), (5, 6, 8), (5, 6, 8)]
    for moment in moments:
        assert bool((moment.attention > 0).all())
        assert bool((moment.attention.sum(dim=0) < 1).all())
    whole, _ = recorded(tiny_model, method="direct", height=64, width=64)
    windows, _ = recorded(tiny_model, method="multidiffusion", height=64, width=64)  # of one window: the same
    torch.testing.assert_close(whole[0].attention, windows[0].attention)


def test_a_network_that_takes_the_rows_apart_gives_no_maps(tiny_model: Model) -> None:
    """The rows of a guidance pair, one after the other: which of them read the prompt is not known."""

    def method(run: Run) -> list[Stage]:
        def network(call: Call) -> Tensor:
            halves = [run.denoiser.evaluate(tuple(part[half::2] for part in call.inputs)) for half in (0, 1)]
            return torch.stack(halves, dim=1).flatten(0, 1)

        return cutdiff.Settings(method="multidiffusion").method.stages(
            replace(run, denoiser=replace(run.denoiser, network=network))
        )

    moments, _ = recorded(tiny_model, method=method)
    assert [moment.attention for moment in moments] == [None] * 4
    assert all(len(moment.items[0].estimates) == 6 for moment in moments)


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("a [red:blue:0.5] house", {}, "the prompt changes by step, or is a sum of prompts"),
        ("a red house AND a moon", {}, "the prompt changes by step, or is a sum of prompts"),
        ("", {}, None),
    ],
)
def test_prompts_without_maps(
    tiny_model: Model, prompt: str, options: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    cutdiff.trace(tiny_model, prompt, page=tmp_path / "run.html", **{**RUN, "num_steps": 1, **options})
    info, (step,), _ = blocks_of(tmp_path / "run.html")
    assert (info["words"], info["words_unread"], step["attention"]) == ([], reason, None)


def test_words_are_shown_without_the_signs_of_a_weight(tiny_model: Model) -> None:
    words = Words(tiny_model, r"a (red:1.25) [house] \[x\]", Settings(**RUN))
    assert words.names == ["a", "red ×1.25", "house ×0.909", "[", "x", "]"]


def test_every_nth_step_is_shown_in_full(tiny_model: Model, tmp_path: Path) -> None:
    options = {**RUN, "num_steps": 11, "method": "cutdiffusion"}  # the structure takes 6
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", every=4, data=True, **options)
    _, told, _ = blocks_of(tmp_path / "run.html")
    assert [one["index"] for one in told if "denoised" in one] == [0, 4, 6, 8, 10]
    assert len(told) == 11
    assert all(one["evaluations"] for one in told)
    trace: Any = load(tmp_path / "run.trace")
    assert [moment.index for moment in trace.steps if moment.denoised is not None] == [0, 4, 6, 8, 10]
    whole, _ = recorded(tiny_model, **options)
    for moment, other in zip(trace.steps, whole, strict=True):
        kept = other.digest if moment.denoised is not None else {**other.digest, "state": None}
        assert {**dict.fromkeys(other.digest), **moment.digest} == kept
    assert len({moment.digest["latents"] for moment in whole}) == 11


def test_fewer_steps_are_shown_where_all_would_be_too_many(tiny_model: Model) -> None:
    sizes: list[int] = []

    def sink(moment: Moment) -> int:
        sizes.append(1 if moment.denoised is None else 1000)
        return sizes[-1]

    recorder = Recorder(tiny_model, sink, limit=8000)
    list(cutdiff.denoise(tiny_model, PROMPT, observer=recorder, **{**RUN, "num_steps": 40, "method": "direct"}))
    assert len(sizes) == 40
    assert 4000 < sum(sizes) <= 9000
    assert sizes[0] == sizes[-1] == 1000


def test_a_failed_step_is_told_with_what_failed(tiny_model: Model, tmp_path: Path) -> None:
    calls = 0
    unet = tiny_model.unet

    def forward(*inputs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        out = type(unet).forward(unet, *inputs)
        if calls % 10 > 4:  # the calls of the third step, and of all that repeat it
            out = out.clone()
            out[5, 2, 3, 4] = torch.nan
        return out

    options = {**RUN, "method": "multidiffusion", "view_batch_size": 3}
    with replaced(unet, forward=forward), pytest.raises(FloatingPointError, match="step 2"):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", data=True, **options)
    info, told, end = blocks_of(tmp_path / "run.unfinished.html")
    assert [one["index"] for one in told] == [0, 1, 2]
    assert end == {"kind": "end", "state": "failed", "message": end["message"]}
    assert re.match(r"step 2 \(views, sigma .*\) gave NaN or infinity, first in patch or view 3 of 6", end["message"])
    assert [sum(one["items"][0]["not_finite"]) for one in told[:2]] == [0, 0]
    assert [n for n, bad in enumerate(told[2]["items"][0]["not_finite"]) if bad] == [2, 5]
    assert told[2]["stage"] == "views"
    assert told[2]["curves"]["not_finite"] > 0
    assert told[2]["evaluations"] == told[1]["evaluations"]
    trace: Any = load(tmp_path / "run.unfinished.trace")
    assert int((~trace.steps[2].denoised.isfinite()).sum()) == told[2]["curves"]["not_finite"]
    assert info["num_steps"] == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a </script> of <b>one's own")])
def test_a_run_that_ended_early_says_so(tiny_model: Model, error: BaseException, tmp_path: Path) -> None:
    """The page that it leaves makes way for that of the next run."""

    def method(run: Run) -> list[Stage]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            if step == 2:
                raise error
            return run.denoiser(x, sigma, step)

        return [Stage("", range(run.num_steps), denoise)]

    with pytest.raises(type(error)):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", method=method, **RUN)
    _, told, end = blocks_of(tmp_path / "run.unfinished.html")
    assert (len(told), end["state"], end["message"]) == (2, "failed", str(error) or "KeyboardInterrupt")
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", **RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_a_page_that_was_cut_off_anywhere_tells_of_what_it_holds(tiny_model: Model, tmp_path: Path) -> None:
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", **RUN)
    whole = (tmp_path / "run.html").read_bytes()
    ends = [match.end() for match in page.BLOCK.finditer(whole)]
    assert len(ends) == 1 + 4 + 2
    for end, length in zip(ends, range(1, 8), strict=True):
        assert len(page.blocks(whole[:end])) == length
        assert len(page.blocks(whole[: end + 100])) == length
    with pytest.raises(ValueError, match="is no page of a trace"):
        page.blocks(whole[: ends[0] - 1])


NASTY = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    """a "red" 'house' `${1}` \\" &quot; &lt;b&gt;""",
    "🏠 一只猫 \u202eesuoh\u202c \u2066 \u2028 \u2029 \x07",
    "]]> --> </style></title><img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("prompt", NASTY)
def test_no_prompt_breaks_out(tiny_model: Model, prompt: str, tmp_path: Path) -> None:
    options = {**RUN, "num_steps": 1, "negative_prompt": prompt}
    cutdiff.trace(tiny_model, prompt, page=tmp_path / "run.html", data=True, **options)
    info, (_,), _ = blocks_of(tmp_path / "run.html")
    assert (info["prompt"], info["settings"]["negative_prompt"]) == (prompt, prompt)
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 1 + 4, "the module, and four blocks"
    assert "<img" not in text
    assert load(tmp_path / "run.trace").run["prompt"] == prompt


def test_methods_of_ones_own(tiny_model: Model, tmp_path: Path) -> None:
    """A stage without a name, an operator that says nothing of itself, and items that were cut by hand."""

    class Shift:
        def gather(self, canvas: Tensor, backend: str = "auto", **how: Any) -> Tensor:
            return to_network(canvas.roll((3, 5), (2, 3)), **how)

        def scatter(self, values: Tensor, backend: str = "auto", **how: Any) -> Tensor:
            return carry_back(values, lambda items: items.roll((-3, -5), (2, 3)), **how)

    def method(run: Run) -> list[Stage]:
        def shifted(x: Tensor, sigma: float, step: int) -> Tensor:
            return run.denoiser.through(Shift(), x, sigma, step)

        def halves(x: Tensor, sigma: float, step: int) -> Tensor:
            return torch.cat(list(run.denoiser(torch.cat(x.split(8, 3)), sigma, step).split(1)), dim=3)

        return [Stage("", range(2), shifted), Stage("</b>halves", range(2, 4), halves)]

    moments, steps = recorded(tiny_model, method=method)
    assert [(moment.stage, moment.items[0].kind) for moment in moments] == [("", "items")] * 2 + [
        ("</b>halves", "items")
    ] * 2
    torch.testing.assert_close(moments[0].items[0].estimates[0].roll((-3, -5), (1, 2)), steps[0].denoised[0])
    assert torch.equal(moments[1].state, steps[0].latents[0])
    assert [len(moment.items[0].estimates) for moment in moments] == [1, 1, 2, 2]
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", method=method, **RUN)
    info, told, _ = blocks_of(tmp_path / "run.html")
    assert info["chosen"]["method"] == "method"
    assert [one["stage"] for one in told] == ["", "", "</b>halves", "</b>halves"]


def test_a_second_estimate_of_a_step_counts_but_is_not_shown(tiny_model: Model) -> None:
    moments, _ = recorded(tiny_model, method="cutdiffusion", solver="heun")
    assert [len(moment.items) for moment in moments] == [1] * 4
    assert [moment.evaluations for moment in moments] == [16, 16, 24, 12]


def test_the_folder_holds_what_was_recorded(tiny_model: Model, tmp_path: Path) -> None:
    options = {**RUN, "method": "demofusion"}
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", data=True, **options)
    moments, _ = recorded(tiny_model, **options)
    modes = {path.suffix: path.stat().st_mode for path in (tmp_path / "run.trace").iterdir()}
    assert modes[".safetensors"] == modes[".json"]
    trace: Any = load(tmp_path / "run.trace")
    assert trace.end is not None
    assert trace.end["state"] == "finished"

    def same(a: Any, b: Any) -> None:
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, tuple) and a and hasattr(a[0], "kind"):
            for one, other in zip(a, b, strict=True):
                for each in fields(one):
                    same(getattr(one, each.name), getattr(other, each.name))
        else:
            assert a == b

    for ours, theirs in zip(trace.steps, moments, strict=True):
        for each in fields(Moment):
            if each.name != "seconds":
                same(getattr(ours, each.name), getattr(theirs, each.name))


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3, 5)])
def test_tensors_keep_what_is_not_finite(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    values.view(-1)[1] = torch.nan
    part = page.bytes_of(values)
    levels = torch.from_numpy(np.frombuffer(base64.b64decode(part["data"]), "u1").copy()).view(shape)
    assert torch.equal(levels == 255, values.isnan())
    back = part["low"] + levels * (part["high"] - part["low"]) / 254
    step = (part["high"] - part["low"]) / 254
    assert float((back - values)[~values.isnan()].abs().max()) <= 0.51 * step
    large = page.half(torch.tensor([1e9, -1e9, torch.inf, torch.nan]))
    assert str(np.frombuffer(base64.b64decode(large["data"]), "<f2").tolist()) == "[65504.0, -65504.0, inf, nan]"


def test_the_map_of_a_model_shows_its_pictures(model: Model) -> None:
    result = cutdiff.generate(model, PROMPT, height=128, width=128, method="direct", num_steps=8, guidance_scale=4.0)
    colours = torch.nn.functional.avg_pool2d(result.images, model.factor)[0].flatten(1)

    def explained(rgb: list[list[float]]) -> float:
        values = torch.cat([result.latents[0].flatten(1), torch.ones(1, 16 * 16)])
        left = (torch.tensor(rgb) @ values).clamp(0, 1) - colours
        return 1 - float(left.square().sum() / (colours - colours.mean(dim=1, keepdim=True)).square().sum())

    assert explained(model_map(model)) > 0.6
    assert explained(fitted(result.latents, result.images)) > 0.9
    assert model_map(model) == model_map(model)


def test_an_observer_hears_how_many_steps_there_will_be_and_the_scale_of_guidance(tiny_model: Model) -> None:
    class Ear(Observer):
        steps = 0
        scales: list[float | None]

        def begin(self, num_steps: int) -> None:
            self.steps, self.scales = num_steps, []

        def call(self, call: Call, prediction: Tensor) -> None:
            self.scales.append(call.guidance_scale)

    def scales(**options: Any) -> list[float | None]:
        ear = Ear()
        taken = list(cutdiff.denoise(tiny_model, PROMPT, observer=ear, **{**RUN, **options}))
        assert ear.steps == len(taken)
        return ear.scales

    assert scales(method="direct", guidance_interval=(0.5, 1.0)) == [1.0, 1.0, 4.0, 4.0]
    assert scales(method="cutdiffusion", detail_guidance_scale=2.0) == [4.0, 4.0, 2.0, 2.0]
    assert scales(method="direct", guidance="apg") == [None] * 4
    assert len(scales(method="demofusion")) > 8


def test_pictures_decoded_by_the_vae(tiny_model: Model, tmp_path: Path) -> None:
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", decode=True, every=2, **{**RUN, "method": "direct"})
    _, told, end = blocks_of(tmp_path / "run.html")
    assert [("decoded" in one) for one in told] == [True, False, True, True]
    assert all(one["decoded"].startswith("data:image/webp;base64,") for one in told if "decoded" in one)
    assert end["picture"].startswith("data:image/webp;base64,")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"page": "folder"}, "page='folder' is a folder: give a file that ends in .html"),
        ({"page": "folder.html"}, "page='folder.html' is a folder: give a file that ends in .html"),
        ({"page": ""}, "page='' is not the name of a page: give a file that ends in .html"),
        ({"page": "x.png"}, "page='x.png' is not the name of a page: give a file that ends in .html"),
        ({"every": 2.5}, "every=2.5 must be a whole number of steps, 1 or more"),
        ({"every": 0}, "every=0 must be a whole number of steps, 1 or more"),
        ({"every": "2"}, "every='2' must be a whole number of steps, 1 or more"),
        ({"every": True}, "every=True must be a whole number of steps, 1 or more"),
    ],
)
def test_what_a_trace_cannot_be(
    tiny_model: Model, options: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "generate", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        cutdiff.trace(tiny_model, PROMPT, **options, **RUN)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder.html"}


@pytest.mark.parametrize("prompt", [[PROMPT], (PROMPT, PROMPT), None])
def test_one_picture_at_a_time(tiny_model: Model, prompt: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one text: trace one picture after the other"):
        cutdiff.trace(tiny_model, prompt, page=tmp_path / "run.html", **RUN)
    assert [*tmp_path.iterdir()] == []


def test_bad_options_leave_no_page(tiny_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="height=100 must be a multiple of 8"):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", **{**RUN, "height": 100})
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match=r"the trace .*file/run.html cannot be written|file"):
        cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "file" / "run.html", **RUN)


def test_two_runs_of_one_name_at_once(tiny_model: Model, tmp_path: Path) -> None:
    """The second does not write into the page of the first."""
    first, file = run._unfinished(tmp_path / "run.html")
    second, other = run._unfinished(tmp_path / "run.html")
    assert [first.name, second.name] == ["run.unfinished.html", "run.unfinished-1.html"]
    file.close()
    other.close()
    third, file = run._unfinished(tmp_path / "run.html")
    assert third == first
    file.close()


def test_draws_of_ones_own(tiny_model: Model, tmp_path: Path) -> None:
    class Still(cutdiff.Draws):
        def permutation(self, step: int, grid: Any, shape: Any, grain: Any) -> SeededPermutation:
            return SeededPermutation((7,), 0, "channel")

    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", data=True, draws=Still((3,)), **RUN)
    steps: list[Any] = load(tmp_path / "run.trace").steps
    first, second, *_ = steps
    assert torch.equal(first.items[0].permutation, second.items[0].permutation)


def test_numbers_of_a_page_are_json(tiny_model: Model, tmp_path: Path) -> None:
    cutdiff.trace(tiny_model, PROMPT, page=tmp_path / "run.html", **RUN)
    for match in page.BLOCK.finditer((tmp_path / "run.html").read_bytes()):
        json.loads(match[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Moment(0, "", 1.0, 1, 1.0).digest == {}


QUICK = ["--steps", "2", "--width", "128", "--height", "128", "--method", "direct", "--guidance-scale", "4"]


def test_the_command_line_writes_a_page_once(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture whose page is missing or cut off is drawn again, and comes out the same."""
    command = [*QUICK, "--out", str(tmp_path), "--trace", "--trace-data", "--", PROMPT]
    page_, data = tmp_path / "direct-128x128-seed0.html", tmp_path / "direct-128x128-seed0.trace"
    assert sample.main([*QUICK, "--out", str(tmp_path), "--", PROMPT]) == 0
    picture = (tmp_path / "direct-128x128-seed0.png").read_bytes()
    for before in ("none", "cut off"):
        assert sample.main(command) == 0
        info, told, end = blocks_of(page_)
        assert (info["prompt"], len(told), end["state"]) == (PROMPT, 2, "finished"), before
        assert len(load(data).steps) == 2
        assert (tmp_path / "direct-128x128-seed0.png").read_bytes() == picture
        assert len([*tmp_path.iterdir()]) == 4
        page_.write_bytes(page_.read_bytes()[:-500])
    assert sample.main(command) == 0
    assert "finished already" not in capsys.readouterr().err
    assert sample.main(command) == 0
    assert "1 of 1 pictures are finished already" in capsys.readouterr().err


def test_a_page_that_lacks_what_is_asked_for_is_drawn_again(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, page_ = [*QUICK, "--out", str(tmp_path)], tmp_path / "direct-128x128-seed0.html"
    data = page_.with_suffix(".trace")

    def draws(*options: str) -> bool:
        assert sample.main([*plain, *options, "--", PROMPT]) == 0
        return "finished already" not in capsys.readouterr().err

    def shown() -> list[tuple[bool, bool]]:
        return [("denoised" in step, "decoded" in step) for step in blocks_of(page_)[1]]

    assert draws("--trace")
    assert shown() == [(True, False)] * 2
    assert draws("--trace", "--trace-data")
    assert not draws("--trace", "--trace-data")
    (data / "end.json").unlink()
    assert draws("--trace", "--trace-data")
    assert (data / "end.json").exists()
    assert not draws("--trace")
    assert draws("--trace", "--trace-decode")
    assert shown() == [(True, True)] * 2
    assert not draws("--trace", "--trace-decode")
    assert not draws("--trace"), "which has all that is asked for"
    assert draws("--trace", "--trace-every", "2")
    assert not draws("--trace", "--trace-every", "2")
    assert draws("--trace")
    assert not draws()
    other = ("--steps", "3", "--overwrite", "--trace")
    assert draws(*other)
    assert len(load(data).steps) == 2
    assert draws(*other, "--trace-data"), "the data were another picture's"
    assert len(load(data).steps) == 3


def test_a_run_that_was_killed_leaves_its_page(model: Model, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutdiff.sample", "--steps", "500", "--out", str(tmp_path), "--trace"]
    path = tmp_path / "cutdiffusion-256x256-seed0.unfinished.html"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        for _ in range(1200):
            if path.exists() and len(page.BLOCK.findall(path.read_bytes())) > 2:
                break
            time.sleep(0.1)
        child.kill()
    info, told, end = blocks_of(path)
    assert (info["num_steps"], end) == (500, None)
    assert len(told) >= 2


def test_a_run_that_fails_tells_where_its_page_is(
    model: Model, own: OwnModules, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        from cutdiff.sampling.stages import Stage

        def mine(run):
            def denoise(x, sigma, step):
                return run.denoiser(x, sigma, step) / (1 if step == 0 else 0)

            return [Stage("all", range(run.num_steps), denoise)]
    """
    own.write("failing", code)
    command = [*QUICK, "--out", str(tmp_path / "out"), "--trace"]
    command[command.index("direct")] = "failing:mine"
    assert sample.main(command) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("cutdiff: the trace of mine-128x128-seed0.png up to there is ")
    assert first.endswith("mine-128x128-seed0.unfinished.html")
    assert "step 1 (all, sigma 0.04131) gave NaN or infinity, although the network's output is finite" in second
    _, told, end = blocks_of(tmp_path / "out" / "mine-128x128-seed0.unfinished.html")
    assert ([one["stage"] for one in told], end["state"]) == (["all", "all"], "failed")


@pytest.mark.parametrize(("ranks", "groups", "refused"), [("2", "1", True), ("4", "2", True), ("2", "2", False)])
def test_processes_that_share_a_picture(
    ranks: str, groups: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutdiff.sample.num_processes", lambda: int(ranks))
    args = parse(["--trace", "--data-parallel", groups])
    if refused:
        with pytest.raises(BadArgument, match=f"and 2 share the work of a picture: give --data-parallel {ranks}, or"):
            sample._check_processes(args)
    else:
        sample._check_processes(args)


def test_pages_that_cannot_be_compared(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cutdiff.trace(tiny_model, PROMPT, page="a.html", **RUN)
    (tmp_path / "text.html").write_text("<p>text")
    (tmp_path / "damaged.html").write_bytes(
        (tmp_path / "a.html").read_bytes().replace(b'"kind": "step",', b'"kind"', 1)
    )
    (tmp_path / "old.html").write_bytes((tmp_path / "a.html").read_bytes().replace(b'"format": 2', b'"format": 0'))
    assert compare(["a.html", "a.png", "--out", "new/both.html"]) == 0
    (tmp_path / "both.html").write_bytes((tmp_path / "new" / "both.html").read_bytes())
    capsys.readouterr()
    for arguments, line in {
        ("a.html", "text.html"): "RUN_B text.html is no page of a trace: name one that --trace wrote",
        ("both.html", "a.html"): "RUN_A both.html compares two runs: name the page of one",
        ("a.html", "old.html"): f"RUN_B old.html is a page of another version, {cutdiff.__version__}: draw it again",
        ("damaged.html", "a.html"): "RUN_A damaged.html is damaged: draw it again with --trace",
        ("a.html", "new"): "RUN_B new.html does not exist: check the path; --trace writes a page beside the picture",
        ("a.html", "a.html", "--out", "new"): "--out new is a folder: name a file in it",
        ("a.html", "a.html", "--out", ".."): "--out .. is a folder: name a file in it",
    }.items():
        assert compare([*arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"cutdiff: {line}"), err
    assert not (tmp_path / "compare.html").exists()


def test_a_page_of_two_runs_takes_no_files_place(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        cutdiff.trace(tiny_model, PROMPT, page=f"{name}.html", **{**RUN, "num_steps": 1, "seed": seed})
    (tmp_path / "text.html").write_text("<p>text")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, path in {
        ("a.html", "b.html"): "compare.html",
        ("b.html", "a.html"): "compare-1.html",
        ("a.html", "b.png"): "compare.html",
        ("a.html", "b.html", "--out", "a.html"): "a-1.html",
        ("a.html", "b.html", "--out", "text.html"): "text-1.html",
        ("b.html", "a.html", "--out", "text.html"): "text-2.html",
    }.items():
        assert compare([*arguments]) == 0
        assert capsys.readouterr().out == f"{path}\n"
    assert len([*tmp_path.iterdir()]) == 3 + 5
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    one, other = ((tmp_path / f"compare{end}.html").read_bytes() for end in ("", "-1"))
    assert one != other


def test_its_signature_is_that_of_the_function() -> None:
    assert inspect.signature(cutdiff.trace) == inspect.signature(run.trace)
