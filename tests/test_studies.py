"""The studies: their variants of methods, and the committed results, each of a cell as it is defined."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import control
import enlarged
import figures
import order
import pytest
import studies
import torch
import two_subjects
import variants
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model, sha256
from cutdiff.evaluation import score
from cutdiff.evaluation.testbed import Testbed
from cutdiff.methods import METHODS
from cutdiff.methods.direct import direct
from cutdiff.methods.shared import Run
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.stages import Stage
from cutdiff.scenes.render import render

CELLS = {studies.result_path(cell).name: cell for cells in studies.STUDIES.values() for cell in cells}


def latents(model: Model, method: str | Callable[..., Any], **options: Any) -> Tensor:
    options = {"num_steps": 4, "height": 128, "width": 128, **options}
    return list(cutdiff.denoise(model, "a red house at night", method=method, **options))[-1].latents


@pytest.mark.parametrize(
    "method",
    [variants.interaction_every(1), variants.conditioned("native", "native"), variants.deep_reused(1, "structure")],
)
def test_a_variant_that_changes_nothing_is_cutdiffusion_to_the_bit(tiny_model: Model, method: Any) -> None:
    assert torch.equal(latents(tiny_model, method), latents(tiny_model, "cutdiffusion"))


@pytest.mark.parametrize(
    "method",
    [
        variants.contiguous_patches,
        variants.interaction_every(2),
        variants.conditioned("target", "native"),
        variants.conditioned("native", "target"),
        variants.without_jitter,
        variants.cosine_weights,
        variants.deep_reused(2, "structure"),
        variants.deep_reused(2, "detail"),
    ],
    ids=lambda method: method.__name__,
)
def test_every_other_variant_draws_something_else(tiny_model: Model, method: Any) -> None:
    found, plain = latents(tiny_model, method), latents(tiny_model, "cutdiffusion")
    assert found.isfinite().all()
    assert (found - plain).norm() > 1e-3 * plain.norm()


def test_a_network_that_is_told_the_native_size_hears_of_nothing_else(tiny_model: Model) -> None:
    """At native size that changes nothing; on a larger canvas it changes the picture, and calls are counted."""
    told = variants.told_native(direct)
    native = {"height": 64, "width": 64}
    assert torch.equal(latents(tiny_model, told, **native), latents(tiny_model, "direct", **native))
    assert not torch.equal(latents(tiny_model, told), latents(tiny_model, "direct"))
    record = cutdiff.generate(tiny_model, "a red house", method=told, num_steps=2).record
    assert record["method"] == "direct_told_native"
    assert record["network_evaluations"] == 4


def test_deep_features_that_are_reused_save_whole_evaluations(tiny_model: Model) -> None:
    """The finest level, given the output of the levels below at the same step, computes what the network computes."""
    options = {"num_steps": 4, "height": 64, "width": 64}
    plain, reused = (
        cutdiff.generate(tiny_model, "a red house", method=method, **options)
        for method in ("direct", variants.deep_reused_direct(2))
    )
    assert (plain.record["network_evaluations"], reused.record["network_evaluations"]) == (8, 4)
    assert 1e-3 < (reused.latents - plain.latents).norm() / plain.latents.norm() < 1
    config = tiny_model.unet.config
    text = torch.randn(2, 5, config.context_dim), torch.randn(2, config.pooled_dim)
    rows = (torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0]), *text, torch.full((2, 6), 64.0))
    below: list[Tensor] = []
    hook = tiny_model.unet.up_blocks[-2].register_forward_hook(lambda _module, _args, output: below.append(output))
    with torch.no_grad():
        whole = tiny_model.unet(*rows)
        hook.remove()
        assert torch.equal(variants._finest(tiny_model.unet, below[0], *rows), whole)


def test_magnify_without_its_hold_draws_something_else(tiny_model: Model) -> None:
    found, plain = latents(tiny_model, variants.not_held), latents(tiny_model, "magnify")
    assert (found - plain).norm() > 1e-3 * plain.norm()


def test_contiguous_patches_are_whole_pictures_side_by_side(tiny_model: Model) -> None:
    """Without interaction and views, each tile is the native picture of its own noise."""

    class Tiled(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            return super().noise((*shape[:2], 16, 16), step)[:, :, : shape[2], : shape[3]]

        def permutation(self, step: int, grid: Any, shape: tuple[int, ...], grain: str) -> None:
            return None

    def structure_alone(run: Run) -> list[Stage]:
        structure, _ = variants.contiguous_patches(run)
        return [replace(structure, steps=range(run.num_steps))]

    canvas = latents(tiny_model, structure_alone, draws=Tiled((3,)))
    native = latents(tiny_model, "direct", height=64, width=64, draws=Tiled((3,)))
    torch.testing.assert_close(canvas[:, :, :8, :8], native, rtol=1e-3, atol=1e-4)


def test_cells_have_names_of_their_own() -> None:
    for cells in studies.STUDIES.values():
        paths = [studies.result_path(cell) for cell in cells]
        assert len(set(paths)) == len(paths)
    settings: dict[Path, dict[str, Any]] = {}
    for cell in (cell for cells in studies.STUDIES.values() for cell in cells):
        described = cell.settings.described()
        assert settings.setdefault(studies.result_path(cell), described) == described


def test_every_result_is_of_a_cell_and_of_the_embedded_model(model: Model) -> None:
    flow = cutdiff.load(studies.FLOW)
    others = (order.ORDERS, two_subjects.FOLDER, control.FOLDER, enlarged.FOLDER)
    found = sorted(path for path in studies.RESULTS.rglob("*.json") if path.parent not in others)
    assert found
    for path in found:
        result = json.loads(path.read_text())
        if path.name.startswith("truth-"):
            assert result["scores"]["one of each"]["value"] > 0.99
            continue
        settings = CELLS[path.name].settings
        described = json.loads(json.dumps(settings.described()))
        assert studies.completed(result["settings"], settings) == described, path.name
        assert result["num"] >= 20
        assert result["caption_seed"] == (studies.CHOICE_SEED if "seed=" in path.name else score.CAPTION_SEED)
        assert (result["model"] == {"sha256": model.hashes}) == (path.parent == studies.RESULTS), path.name
        if path.parent.name == "flow":
            assert result["model"] == {"sha256": flow.hashes}, path.name
        if path.parent.name == "few-steps":
            assert [lora["sha256"] for lora in result["model"]["loras"]] == [sha256(studies.LORA)], path.name


def test_the_readme_tells_of_enlarged_pictures_what_was_measured(model: Model) -> None:
    """Every result is of a case and of the embedded model, and stands in the table with its numbers."""
    cases = {case.path: case for case in enlarged.CASES}
    found = sorted(enlarged.FOLDER.glob("*.json"))
    readme = (Path(__file__).parents[1] / "cutdiff" / "cli" / "README.md").read_text(encoding="utf-8")
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert result["settings"] == asdict(cases[path])
        assert (result["num"], result["model"]) == (enlarged.NUM, {"sha256": model.hashes})
        assert enlarged.row(result) in readme


def test_every_result_of_two_subjects_is_of_a_case(model: Model) -> None:
    cases = {case.path.name: case for cases in two_subjects.CASES.values() for case in cases}
    found = sorted(two_subjects.FOLDER.glob("*.json"))
    assert found
    for path in found:
        result, case = json.loads(path.read_text()), cases[path.name]
        described = case.settings(two_subjects.pairs(2, case.seed)[0], 0).described()
        described = {name: value for name, value in described.items() if name not in ("regions", "seed")}
        assert result["settings"] == json.loads(json.dumps(described)), path.name
        assert result["caption_seed"] == case.seed
        assert result["model"] == {"sha256": model.hashes}
        assert result["num"] == len(result["halves"]) >= 8
        both = [all(halves) for halves in result["halves"]]
        assert result["scores"]["both"]["value"] == pytest.approx(sum(both) / len(both))


def test_pairs_of_subjects_have_two_colours_and_one_scenery() -> None:
    choices = two_subjects.pairs(50, score.CAPTION_SEED)
    assert (choices[:, 0, 0] != choices[:, 1, 0]).all()
    assert (choices[:, 0, 2:] == choices[:, 1, 2:]).all()
    assert torch.equal(choices[:10], two_subjects.pairs(10, score.CAPTION_SEED))
    assert not torch.equal(choices, two_subjects.pairs(50, studies.CHOICE_SEED))


def test_a_half_is_right_with_its_subject_alone() -> None:
    choices = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    drawn = replace(score.scenes(2), color=choices[:, 0], subject=choices[:, 1])
    image = torch.cat([*(render(drawn, 128) / 2 + 0.5)], dim=2)[None]
    assert two_subjects.right_halves(image, choices) == [True, True]
    assert two_subjects.right_halves(image, choices.flip(0)) == [False, False]
    both = torch.cat([image[..., :128], image[..., :128]], dim=3)
    assert two_subjects.right_halves(both, choices) == [True, False]


def test_the_readme_says_what_was_measured() -> None:
    """`| method | 70% [64%, 76%] | kernel | detail | calls | 30% [24%, 37%] | calls | 24% [14%, 36%] |`, the
    last one of the transformer; a share may end in " of 24", and what was not drawn is "–"."""
    text = (studies.RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    said = {values[0]: values[1:] for values in lines if values[0] in METHODS and len(values) == 8}
    assert set(said) == set(METHODS)
    for method, (two, kernel, detail, evaluations, four, evaluations_four, flow) in said.items():
        (row,) = figures.rows([studies.cell(method)])
        assert two.partition(" of ")[0] == _share(row)
        assert float(kernel) == pytest.approx(row["scores"]["kernel crops"]["value"], abs=0.005)
        assert float(detail) == pytest.approx(row["scores"]["detail"]["value"], abs=0.005)
        assert float(evaluations) == row["cost"]["evaluations"]
        if four != "–":
            (row,) = figures.rows([studies.cell(method, 512)])
            assert four.partition(" of ")[0] == _share(row)
            assert float(evaluations_four) == row["cost"]["evaluations"]
        measured = figures.rows(studies.on_flow(256), studies.RESULTS / "flow")
        shares = [_share(row) for row in measured if row["name"] in (method, f"{method},map_weight=0.0")]
        assert shares == ([] if flow == "–" else [flow.partition(" of ")[0]])


def _share(row: figures.Row) -> str:
    value, low, high = (f"{row['scores']['one of each'][key]:.0%}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_a_mistyped_study_is_told_of_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.main(["table-2x2", "ablatoin"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("studies: argument STUDY: 'ablatoin' is not one of table-2x2, ")
    assert line.endswith(": did you mean 'ablation'? (see --help)\n")


def test_a_study_measures_what_is_missing(tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    cells, results = [studies.cell("direct", 128, num_steps=1)], tmp_path / "results"
    testbed = Testbed(model, replace(studies.BASE, num_steps=1), 2, tmp_path / "pictures")
    studies.measure(cells, testbed, results)
    (path,) = results.iterdir()
    assert path.name == "direct,num_steps=1-128.json"
    assert figures.rows(cells, results)[0]["num"] == 2
    assert "wrote" in capsys.readouterr().out
    studies.measure(cells, testbed, results)
    assert capsys.readouterr().out == f"{path.name} is there, of 2 pictures or more\n"
    studies.measure(cells, replace(testbed, num=3), results)
    assert figures.rows(cells, results)[0]["num"] == 3, "more pictures are a new result"
    assert len(replace(testbed, num=3).truth(128).whole) == 3, "and have a truth of their own"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": {}}))
    with pytest.raises(ValueError, match="of another settings"):
        studies.measure(cells, testbed, results)
