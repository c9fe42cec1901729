"""DemoFusion: its published run, the properties of every phase, and the pieces that it is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cascades import PROMPT, Replayed, fixture, network, noises
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import phase_sizes
from cutdiff.methods.tiled import gaussian_blur, with_moments
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.stages import Step
from cutdiff.specs import SOLVERS


def run(model: Model, **options: Any) -> list[Step]:
    return list(cutdiff.denoise(model, PROMPT, method="demofusion", **options))


def moments(x: Tensor) -> Tensor:
    return torch.stack([x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3))])


@pytest.mark.parametrize("published", fixture("demofusion"), ids=lambda case: "x".join(map(str, case["size"])))
def test_the_published_run_ends_in_the_same_latents(tiny_model: Model, published: dict[str, Any]) -> None:
    (height, width), num_steps = published["size"], published["num_steps"]
    shapes = [(1, 4, *size) for size in phase_sizes((height, width), 8)]
    steps = run(
        network(tiny_model, native_size=8, levels=2),
        height=8 * height,
        width=8 * width,
        num_steps=num_steps,
        solver=published["solver"],
        size_conditioning="target",
        draws=Replayed(num_steps=num_steps, origins=tuple(published["origins"]), noises=noises(shapes, seed=3)),
    )
    sample = steps[-1].latents[0, :, :: published["every"], :: published["every"]].flatten()
    assert relative_error(sample, torch.tensor(published["latents"])) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size_conditioning", ["native", "target"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_on_one_phase_it_is_direct_to_the_bit(
    tiny_model: Model, solver: str, size_conditioning: str, height: int, width: int
) -> None:
    options = {"height": height, "width": width, "num_steps": 3, "solver": solver}
    direct = list(cutdiff.denoise(tiny_model, PROMPT, method="direct", **options))[-1]
    (*_, last) = run(tiny_model, size_conditioning=size_conditioning, **options)
    assert torch.equal(last.latents, direct.latents)


def test_the_first_phase_draws_what_direct_draws_at_native_size(tiny_model: Model) -> None:
    native = list(cutdiff.denoise(tiny_model, PROMPT, method="direct", height=64, width=32, num_steps=3))
    steps = run(tiny_model, height=128, width=64, num_steps=3)
    assert torch.equal(steps[2].latents, native[-1].latents)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_phase_takes_all_steps_on_its_own_canvas(tiny_model: Model, solver: str) -> None:
    heard: list[tuple[Step, int]] = []
    result = cutdiff.generate(
        tiny_model,
        PROMPT,
        method="demofusion",
        height=192,
        width=120,
        num_steps=2,
        solver=solver,
        on_step=lambda step, num_steps: heard.append((step, num_steps)),
    )
    steps = [step for step, _ in heard]
    assert [number for _, number in heard] == [6] * 6
    assert [step.index for step in steps] == list(range(6))
    assert [step.stage for step in steps] == ["phase 1"] * 2 + ["phase 2"] * 2 + ["phase 3"] * 2
    assert [step.sigma for step in steps] == [step.sigma for step in steps[:2]] * 3
    assert [tuple(step.latents.shape[2:]) for step in steps] == [(8, 5)] * 2 + [(16, 10)] * 2 + [(24, 15)] * 2
    assert result.latents.shape == (1, 4, 24, 15)
    assert result.images.shape == (1, 3, 192, 120)
    assert (result.record["height"], result.record["width"]) == (192, 120)
    assert list(result.record["seconds"]) == ["phase 1", "phase 2", "phase 3", "decode"]


def test_every_phase_ends_with_the_moments_of_the_first_image_by_image(tiny_model: Model) -> None:
    steps = list(cutdiff.denoise(tiny_model, [PROMPT, "a pink tent"], method="demofusion", num_steps=2, width=192))
    for end in steps[3::2]:
        torch.testing.assert_close(moments(end.latents), moments(steps[1].latents), rtol=1e-4, atol=1e-4)


def test_no_phase_draws_what_another_has_drawn(tiny_model: Model) -> None:
    drawn: list[tuple[str, int | None, Tensor]] = []

    class Recorded(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            drawn.append(("noise", step, super().noise(shape, step)))
            return drawn[-1][2]

        def phase_noise(self, shape: tuple[int, ...], phase: int) -> Tensor:
            drawn.append(("phase", phase, super().phase_noise(shape, phase)))
            return drawn[-1][2]

    run(tiny_model, num_steps=2, width=192, solver="ddim", eta=1.0, draws=Recorded((0,)))
    calls = [(kind, number) for kind, number, _ in drawn]
    of_steps = [("noise", i) for i in range(6)]
    assert calls == [("noise", None), *of_steps[:2], ("phase", 2), *of_steps[2:4], ("phase", 3), *of_steps[4:]]
    assert len({tuple(noise.flatten()[:8].tolist()) for _, _, noise in drawn}) == len(drawn)


def test_at_full_share_the_patches_alone_decide(tiny_model: Model) -> None:
    class Still(Draws):
        def view_origins(self, step, size, window, stride, jitter):
            return super().view_origins(step, size, window, stride, (0, 0))

    options = {"num_steps": 2, "cosine_scales": (3.0, 0.0, 1.0)}
    moved, still = run(tiny_model, **options)[-1], run(tiny_model, draws=Still((0,)), **options)[-1]
    assert relative_error(still.latents, moved.latents) < 1e-6
    mixed = {"num_steps": 2, "cosine_scales": (3.0, 1.0, 1.0)}
    moved, still = run(tiny_model, **mixed)[-1], run(tiny_model, draws=Still((0,)), **mixed)[-1]
    assert relative_error(still.latents, moved.latents) > 1e-3


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_every_cosine_scale_matters(tiny_model: Model, scale: int) -> None:
    scales = [3.0, 1.0, 1.0]
    base = run(tiny_model, num_steps=3)[-1].latents
    scales[scale] += 1
    assert relative_error(run(tiny_model, num_steps=3, cosine_scales=tuple(scales))[-1].latents, base) > 1e-4


@hypothesis_settings(max_examples=200)
@given(height=st.integers(1, 60), width=st.integers(1, 60), native=st.integers(1, 20))
def test_phases_grow_by_multiples_of_native_and_keep_the_shape(height: int, width: int, native: int) -> None:
    sizes, longest = phase_sizes((height, width), native), max(height, width)
    assert sizes[-1] == (height, width)
    assert len(sizes) == math.ceil(longest / native)
    for k, size in enumerate(sizes[:-1], start=1):
        assert max(size) == k * native
        assert all(
            abs(side - k * native * full / longest) <= 1 for side, full in zip(size, (height, width), strict=True)
        )


def test_the_blur_is_a_gaussian_and_fades_to_nothing() -> None:
    canvas = torch.zeros(1, 2, 9, 9)
    canvas[0, 1, 4, 4] = 1
    blurred = gaussian_blur(canvas, 0.8, radius=2)
    assert blurred[0, 0].abs().max() == 0
    assert blurred.sum().item() == pytest.approx(1)
    assert (blurred[0, 1, 4, 5] / blurred[0, 1, 4, 4]).item() == pytest.approx(math.exp(-1 / (2 * 0.64)))
    assert (blurred[0, 1, 5, 5] / blurred[0, 1, 4, 4]).item() == pytest.approx(math.exp(-2 / (2 * 0.64)))
    assert blurred[0, 1, 4, 7] == 0
    assert torch.equal(gaussian_blur(canvas, 0.008, radius=2), canvas)


def test_moments_are_given_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x, like = (torch.randn(2, 4, 5, 3, generator=generator) for _ in range(2))
    like = like * torch.tensor([2.0, 50.0]).view(2, 1, 1, 1) + 7
    torch.testing.assert_close(moments(with_moments(x, like)), moments(like))
