"""A guidance scale of at most 1 is off, wherever a scale is given: the picture and the record are those of 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.sample import main

OFF = (1.0, 0.5, 0.0, -3.0)


def drawn(model: Model, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    result = cutdiff.generate(model, "a red tent", num_steps=3, negative_prompt="a moon", **options)
    return result.latents, result.record


@pytest.mark.parametrize("scale", OFF)
@pytest.mark.parametrize(
    "options",
    [
        {"guidance": "cfg,guidance_scale={}"},
        {"guidance": "rescale,guidance_scale={}"},
        {"guidance": "by_band,low_scale={},guidance_scale={}"},
        {"guidance": "apg,guidance_scale={}"},
        {"guidance": "pag,guidance_scale={},pag_scale=0"},
        {"method": "rectifiedhr", "guidance": "cfg,guidance_scale={}"},
        {"method": "diffusehigh", "guidance": "cfg,guidance_scale={}"},
        {"method": "frecas", "guidance": "cfg,guidance_scale={}"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_off_is_the_picture_of_the_prompt_alone(tiny_model: Model, scale: float, options: dict[str, str]) -> None:
    given = {name: text.format(scale, scale) for name, text in options.items()}
    latents, record = drawn(tiny_model, **given)
    expected, at_one = drawn(tiny_model, method=options.get("method", "cutdiffusion"), guidance_scale=1.0)
    assert torch.equal(latents, expected)
    assert record["network_evaluations"] == at_one["network_evaluations"]
    assert f"guidance_scale={scale}" not in record["guidance"] or scale == 1
    assert record["negative_prompt_unread"]


@pytest.mark.parametrize("scale", OFF)
@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("cutdiffusion", "detail_guidance_scale"),
        ("magnify", "detail_guidance_scale"),
        ("diffusehigh", "detail_guidance_scale"),
        ("imax", "detail_guidance_scale"),
        ("hiflow", "detail_guidance_scale"),
        ("frecas", "high_guidance_scale"),
        ("rectifiedhr", "max_guidance_scale"),
    ],
)
def test_off_in_a_part_of_the_steps(tiny_model: Model, scale: float, method: str, option: str) -> None:
    latents, record = drawn(tiny_model, method=method, **{option: scale})
    expected, at_one = drawn(tiny_model, method=method, **{option: 1.0})
    assert torch.equal(latents, expected)
    assert record["fingerprint"] == at_one["fingerprint"]
    assert "negative_prompt_unread" not in record


@dataclass(frozen=True)
class Falling:
    """A linear guidance of one's own, whose scale falls past 1."""

    def scale_at(self, sigma: float, step: int) -> float:
        return 2.0 - step

    def __call__(self, conditional: Tensor, unconditional: Tensor, sigma: float, step: int) -> Tensor:
        return unconditional + self.scale_at(sigma, step) * (conditional - unconditional)


def test_off_from_a_step_on(tiny_model: Model) -> None:
    assert drawn(tiny_model, method="direct", guidance=Falling())[1]["network_evaluations"] == 2 + 1 + 1


def test_a_negative_prompt_that_is_not_read_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--steps", "1", "--width", "128", "--height", "128", "--method", "direct", "--num-images", "2"]
    notice = "cutdiff: guidance is off, so the negative prompt was not read"
    for number, (options, times) in enumerate(
        {
            ("--guidance-scale", "0", "--negative-prompt", "a moon"): 1,
            ("--guidance-scale", "0", "--negative-prompt-2", "a moon"): 1,
            ("--guidance-interval", "0", "0", "--negative-prompt", "a moon"): 1,
            ("--guidance-scale", "0"): 0,
            ("--guidance-scale", "2", "--negative-prompt", "a moon"): 0,
        }.items()
    ):
        assert main([*quick, *options, "--out", str(tmp_path / str(number))]) == 0
        assert capsys.readouterr().err.count(notice) == times, options
