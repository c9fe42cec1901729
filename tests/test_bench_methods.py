"""The comparison of methods: what is planned is what is measured, all draw in turns, and nothing needs diffusers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK_UNET, QUICK_VAE
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cutdiff.bench import __main__ as command
from cutdiff.bench import methods
from cutdiff.bench.methods import METHODS, SIDES, report
from cutdiff.checkpoint.random_model import random_model
from cutdiff.pipeline import prepare
from cutdiff.planning.forecast import weight_bytes
from cutdiff.specs import resolve, spec_of

README = Path(methods.__file__).with_name("README.md")
SMALLEST = ["--small", "--size", "192", "--steps", "2", "--repeats", "2", "--device", "cpu", "--plan"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SMALL_UNET", QUICK_UNET)
    monkeypatch.setattr(command, "SMALL_VAE", QUICK_VAE)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, bool]]:
    """The method of each run, its view batch size, and True where it was counted."""
    runs: list[tuple[str, int | None, bool]] = []

    def listed(model: Any, prompt: Any, settings: Any) -> Any:
        runs.append((settings.method_name, settings.view_batch_size, _get_current_dispatch_mode() is not None))
        return prepare(model, prompt, settings)

    monkeypatch.setattr(methods, "prepare", listed)
    return runs


def test_what_was_planned_is_what_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations and FLOPs exactly, and the memory that lives within 3%; without diffusers, too. The views of a step
    are 25, and 16 of them go through the network at once on a CPU."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "cutdiff.bench.baselines", raising=False)
    monkeypatch.setattr(command, "version", lambda name: pytest.fail(f"asked for the version of {name}"))
    path = tmp_path / "bench.json"
    assert command.main([*SMALLEST, "--methods", *METHODS, "magnify,stride=4", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    (part,) = result["drawn"]
    assert result["planned"] == []
    assert [row["method"] for row in part["methods"]] == [*METHODS, "magnify,stride=4"]
    assert part["methods"][-1]["options"] == spec_of("method", resolve("method", "magnify,stride=4"))
    for row in part["methods"]:
        for name, batch in {"one": 1, "automatic": 16}.items():
            one = row[name]
            assert one["view_batch_size"] == batch
            assert one["planned"]["evaluations"] == one["evaluations"]
            assert one["planned"]["flops"] == one["flops"] > 0
            assert one["planned"]["live_bytes"] == pytest.approx(one["live_bytes"], rel=0.03)
            assert len(one["seconds"]) == 2
            assert min(one["seconds"]) > 0
    by_name = {row["method"]: row for row in part["methods"]}
    assert by_name["direct"]["one"]["evaluations"] == 2 * 2
    assert by_name["cutdiffusion"]["one"]["evaluations"] == 2 * (9 + 25)
    assert by_name["multidiffusion"]["automatic"]["live_bytes"] > 4 * by_name["multidiffusion"]["one"]["live_bytes"]
    assert part["weight_bytes"] == weight_bytes(random_model(QUICK_UNET, QUICK_VAE, torch.device("cpu")))
    assert {"cpu", "torch", "python", "cutdiff"} <= set(result["hardware"])
    assert result["command"][:4] == ["python", "-m", "cutdiff.bench", "--small"]
    out = capsys.readouterr().out
    assert "small network, 192², 2 steps: measured in float32, 2 rounds" in out
    assert "automatic is 16 at once; the plan is off by at most evaluations 0.0%, FLOPs 0.0%, peak memory" in out
    assert "in brackets: times magnify,stride=4\n" in out


def test_all_are_counted_once_and_then_draw_in_turns(drawn: list[tuple[str, int | None, bool]]) -> None:
    """The counting does not slow the runs that are timed."""
    assert command.main([*SMALLEST, "--methods", "direct", "multidiffusion"]) == 0
    turn = [(method, batch) for method in ("direct", "multidiffusion") for batch in (1, None)]
    assert drawn == [(*run, counted) for counted in (True, False, False) for run in turn]


@pytest.mark.parametrize("side", SIDES)
def test_the_readme_has_what_is_planned_today(
    side: int, capsys: pytest.CaptureFixture[str], drawn: list[tuple[str, int | None, bool]]
) -> None:
    """Without a GPU SDXL is not drawn."""
    assert command.main(["--methods", "--device", "cpu", "--plan", str(side)]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("SDXL, ", "| SDXL, "))]
    assert len(lines) == 1 + len(METHODS)
    readme = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in readme] == []
    assert drawn == []
    assert err.splitlines()[-1] == "cutdiff: nothing is drawn: SDXL takes a GPU, and --small draws with a small network"


def row(evaluations: int, flops: float, live_bytes: float, *seconds: float) -> dict[str, Any]:
    planned = {"evaluations": evaluations, "flops": flops, "live_bytes": live_bytes * 1.25}
    known = {"view_batch_size": 16, "planned": planned, "seconds": [*seconds]} if seconds else {}
    return {"evaluations": evaluations, "flops": flops, "live_bytes": live_bytes, **known}


def test_shares_of_the_last_method_are_of_the_same_batch_and_the_same_round() -> None:
    """A round that is slow for all changes no share. Memory is compared with the weights."""
    own = {"method": "own", "one": row(8, 4e14, 3e9, 4, 3, 12), "automatic": row(9, 4e14, 7e9, 2, 2, 2)}
    last = {"method": "last", "one": row(1000, 2e14, 1e9, 2, 6, 4), "automatic": row(1000, 2e14, 1e9, 1, 4, 4)}
    about = {"weight_bytes": 1e9, "steps": 4}
    drawn = {"model": "small network", "side": 256, "dtype": "float32", "methods": [own, last], **about}
    bare = [
        {key: value if key == "method" else row(5, 2e12, 1e9) for key, value in line.items()} for line in (own, last)
    ]
    decode = {"flops": 42e12, "peak_bytes": 12e9}
    planned = {"model": "SDXL", "side": 64, "methods": bare, "decode": decode, **about}
    lines = report({"hardware": {"cpu": "some"}, "drawn": [drawn], "planned": [planned]}).splitlines()
    assert lines[0] == "cpu some"
    assert lines[1].endswith("evaluations 0.0%, FLOPs 0.0%, peak memory besides the weights 25.0%")
    assert lines[2].endswith("planned, not measured, in bfloat16; weights 1 GB, included; to decode 42 TFLOP, 12 GB")
    assert lines[3] == "in brackets: times last"
    first, second, third, _ = (line.strip("| ").split(" | ") for line in lines[7:])
    assert first[:4] == ["small network, 256²", "own", "8 / 9", "400 (2.00×)"]
    assert first[4:6] == ["4.00 [3.00 – 12.00] (2.00×)", "2.00 [2.00 – 2.00] (0.50×)"]
    assert first[6:] == ["4 (2.00×)", "8 (4.00×)"]
    assert second[2:5] == ["1,000", "200 (1.00×)", "4.00 [2.00 – 6.00] (1.00×)"]
    assert third == ["SDXL, 64²", "own", "5", "2 (1.00×)", "–", "–", "2 (1.00×)", "2 (1.00×)"]
    assert len({line.count("|") for line in lines[5:]}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "direct", "magnfy"], "--methods magnfy: method='magnfy' is not one of direct,"),
        (["--methods", "nowhere:Mine"], "--methods nowhere:Mine: method='nowhere:Mine': there is no module"),
        (["--methods", "direct,stride=8"], "--methods direct,stride=8: method=direct has no options,"),
        (["--methods", "--only", "a"], "--only does not go with --methods, which takes --plan, --small,"),
        (["--methods", "--also=fp8"], "--also does not go with --methods"),
        (["--methods", "--compile"], "--compile does not go with --methods"),
        (["--methods", "--view-batch-size", "2"], "--view-batch-size does not go with --methods"),
        (["--methods", "--size", "100"], "--size 100: height=100 must be a multiple of 8; try 96"),
        (["--methods", "--size", "40960"], "--size 40960: height=40960 must be a positive multiple of 8"),
        (["--methods", "--plan", "64", "70"], "--plan 70: height=70 must be a multiple of 8; try 64"),
        (["--methods", "--plan", "-8"], "--plan -8: height=-8 must be a positive multiple of 8"),
        (["--methods", "--steps", "1001"], "--steps 1001 must be between 1 and the 1000 timesteps"),
        (["--methods", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--methods", "--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written"),
        (["--only", "a"], "--plan goes with --methods: give both"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_planned(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("walk", "prepare", "decoding"):
        monkeypatch.setattr(methods, name, lambda *args: pytest.fail("expensive work began"))
    assert command.main([*SMALLEST, *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"cutdiff: {message}")
    assert line.count("\n") == 1
