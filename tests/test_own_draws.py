"""Draws of a researcher's own: one of another shape is an error that names the draw, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.given.regions import Region
from cutdiff.methods.shared import Run
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import SeededPermutation
from cutdiff.sampling.stages import Stage

SIZE = {"height": 128, "width": 128, "num_steps": 2}


def on_noise_of_the_encoder(run: Run) -> list[Stage]:
    noise = run.draws.encoder_noise((2, 4, *run.size), 2)
    return [Stage("", range(run.num_steps), lambda x, sigma, step: run.denoiser(x + noise, sigma, step))]


def on_torus_shifts(run: Run) -> list[Stage]:
    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        shifts = run.draws.torus_shifts(step, run.size, run.window)
        return run.denoiser(x, sigma, step, crop_origins=shifts)

    return [Stage("", range(run.num_steps), denoise)]


METHODS = {
    "noise": "direct",
    "second_noise": "direct",
    "phase_noise": "magnify",
    "permutation": "cutdiffusion",
    "view_origins": "multidiffusion",
    "attention_origins": "freescale",
    "window_shifts": "hidiffusion",
    "encoder_noise": on_noise_of_the_encoder,
    "torus_shifts": on_torus_shifts,
    "blurs": "diffusehigh",
    "background_colors": "direct",
}
"""A method that asks for each draw."""


def options_for(draw: str) -> dict[str, Any]:
    """The options of a run that asks for a draw."""
    own = {"regions": [Region("a tent", (0, 0, 0.5, 1))]} if draw == "background_colors" else {}
    return {"method": METHODS[draw], "solver": "dpmpp_sde" if draw == "second_noise" else "euler", **own, **SIZE}


def of(name: str, draw: Callable[..., Any]) -> Any:
    """Draws of two images, of which one is replaced."""
    return type("Own", (Draws,), {name: lambda self, *args: draw(getattr(Draws, name)(self, *args), *args)})((0, 1))


def larger(value: Tensor, *_: Any) -> Tensor:
    return torch.cat([value, value[-1:]])


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "second noise of three images": ("second_noise", larger, r"draws\.second_noise gave \(3, 4, 16, 16\) .*where \(2,"),
    "noise of three images": ("noise", larger, r"draws\.noise gave \(3, 4, 16, 16\) .*where \(2, 4, 16, 16\) is ne"),
    "noise without images": ("noise", lambda x, *_: x[0], r"draws\.noise gave \(4, 16, 16\) .*where \(2, 4, 16, 16\)"),
    "noise that is none": ("noise", lambda *_: None, r"draws\.noise gave NoneType where \(2, 4, 16, 16\) is needed"),
    "noise that is a list": ("noise", lambda x, *_: x.tolist(), r"draws\.noise gave list where"),
    "phase noise of the first size": (
        "phase_noise",
        lambda x, *_: x[:, :, :8, :8],
        r"draws\.phase_noise gave \(2, 4, 8, 8\) .*where \(2, 4, 16, 16\) is needed",
    ),
    "phase noise that is none": ("phase_noise", lambda *_: 0.0, r"draws\.phase_noise gave float where"),
    "a permutation of the canvas": (
        "permutation",
        lambda _x, _step, _grid, shape, _grain: torch.zeros(shape, dtype=torch.int64),
        r"draws\.permutation gave \(2, 4, 8, 8\) .*where \(4, 4, 8, 8\) or \(4, 1, 8, 8\) or \(2, 4, 4, 8, 8\) or",
    ),
    "a permutation of three images": (
        "permutation",
        lambda _x, _step, _grid, shape, _grain: torch.zeros(3, 4, *shape[1:], dtype=torch.int64),
        r"draws\.permutation gave \(3, 4, 4, 8, 8\)",
    ),
    "a permutation of floats": (
        "permutation",
        lambda _x, _step, _grid, shape, _grain: torch.zeros(4, *shape[1:]),
        r"draws\.permutation gave \(4, 4, 8, 8\) of torch\.float32 where .* of torch\.int64 is needed",
    ),
    "a permutation that is a list": ("permutation", lambda *_: [0, 1], r"draws\.permutation gave list where"),
    "a permutation by counter of one image": (
        "permutation",
        lambda _x, step, _grid, _shape, grain: SeededPermutation((0,), step, grain),
        r"draws\.permutation gave seeds for 1 images where 2 are drawn",
    ),
    "origins of three images": (
        "view_origins",
        larger,
        r"draws\.view_origins gave \(3, 9, 2\) of torch\.int64 where \(2, 9, 2\) or \(9, 2\) of torch\.int64 is needed",
    ),
    "origins of three numbers": (
        "view_origins",
        lambda x, *_: torch.cat([x, x], dim=2),
        r"draws\.view_origins gave \(2, 9, 4\) .* where \(2, 9, 2\)",
    ),
    "origins of floats": (
        "view_origins",
        lambda x, *_: x.float(),
        r"draws\.view_origins gave \(2, 9, 2\) of torch\.float32 where .* of torch\.int64 is needed",
    ),
    "origins that are none": ("view_origins", lambda *_: None, r"draws\.view_origins gave NoneType where"),
    "one origin": ("view_origins", lambda x, *_: x[0, 0], r"draws\.view_origins gave \(2,\) .*where"),
    "origins of a layer of three images": (
        "attention_origins",
        larger,
        r"draws\.attention_origins gave \(3, 9, 2\) of torch\.int64 where \(2, 9, 2\) or \(9, 2\) of torch\.int64",
    ),
    "origins of a layer of floats": (
        "attention_origins",
        lambda x, *_: x.float(),
        r"draws\.attention_origins gave \(2, 9, 2\) of torch\.float32 where .* of torch\.int64 is needed",
    ),
    "origins of a layer that leave a gap": (
        "attention_origins",
        lambda x, *_: x[:, 1:],
        r"^views of \(4, 4\) .* leave pixels of the \(8, 8\) canvas uncovered",
    ),
    "shifts of three images": ("window_shifts", larger, r"draws\.window_shifts gave \(3,\) .*where \(2,\) is needed"),
    "encoder noise of three images": (
        "encoder_noise",
        larger,
        r"draws\.encoder_noise gave \(3, 4, 16, 16\) .*where \(2, 4, 16, 16\) is needed",
    ),
    "torus shifts of three images": (
        "torus_shifts",
        larger,
        r"draws\.torus_shifts gave \(3, 2\) of torch\.int64 where \(2, 2\) of torch\.int64 is needed",
    ),
    "torus shifts of floats": (
        "torus_shifts",
        lambda x, *_: x.float(),
        r"draws\.torus_shifts gave \(2, 2\) of torch\.float32 where \(2, 2\) of torch\.int64 is needed",
    ),
    "blurs of three images": ("blurs", larger, r"draws\.blurs gave \(3,\) .*where \(2,\) is needed"),
    "colours of three images": (
        "background_colors",
        larger,
        r"draws\.background_colors gave \(3, 3\) .*where \(2, 3\) is needed",
    ),
    "one shift": ("window_shifts", lambda *_: 2, r"draws\.window_shifts gave int where \(2,\) is needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_draw_of_another_shape_is_named(name: str, tiny_model: Model) -> None:
    draw, make, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        cutdiff.generate(tiny_model, ["a", "b"], draws=of(draw, make), **options_for(draw))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("draw", METHODS)
def test_the_same_draws_of_another_class_draw_the_same(draw: str, tiny_model: Model) -> None:
    asked = []

    def same(value: Any, *_: Any) -> Any:
        asked.append(draw)
        return value

    options = options_for(draw)
    ours = cutdiff.generate(tiny_model, ["a", "b"], draws=of(draw, same), **options)
    assert torch.equal(ours.latents, cutdiff.generate(tiny_model, ["a", "b"], **options).latents)
    assert asked
    assert ours.record["draws"] == {"class": "Own", "seeds": [0, 1]}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_permutation_may_be_of_pixels_or_channels_of_one_image_or_each(
    images: int, channels: int, tiny_model: Model
) -> None:
    def permutation(_: Any, step: int, grid: tuple[int, int], shape: tuple[int, ...], grain: str) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.rand(images, 4, channels, *shape[2:], generator=generator).argsort(dim=1)
        return index if images > 1 else index[0]

    draws = of("permutation", permutation)
    result = cutdiff.generate(tiny_model, ["a", "b"], method="cutdiffusion", draws=draws, **SIZE)
    assert result.latents.isfinite().all()


def test_a_draw_that_is_missing_is_named(tiny_model: Model) -> None:
    class Little:
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            return torch.zeros(shape)

    draws: Any = Little()
    assert cutdiff.generate(tiny_model, "a", method="direct", draws=draws, **SIZE).record["seed"] is None
    with pytest.raises(AttributeError, match="'Little' object has no attribute 'view_origins'"):
        cutdiff.generate(tiny_model, "a", method="multidiffusion", draws=draws, **SIZE)
