"""The methods as canvas denoisers: properties that hold for every network, tested on a small random one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import WITHOUT_VIEWS, relative_error
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods import METHODS
from cutdiff.methods.direct import direct
from cutdiff.methods.shared import Run
from cutdiff.methods.tiled import Grain
from cutdiff.models.inside import replaced
from cutdiff.models.unet import UNet
from cutdiff.options import short
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import GRAINS
from cutdiff.sampling.stages import Stage
from cutdiff.specs import NAMED, SOLVERS, name_of, options_of, resolve

PROMPT = "a red house at night"


def latents(model: Model, prompt: str | list[str] = PROMPT, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, **options))[-1].latents


def test_every_name_is_that_of_what_it_names() -> None:
    for kind, table in NAMED.items():
        for name in table:
            if name != "list":  # which holds no numbers of its own
                assert name_of(kind, resolve(kind, name)) == name
    assert get_args(Grain) == GRAINS


@pytest.mark.parametrize("method", METHODS)
def test_a_stride_belongs_to_methods_with_views(tiny_model: Model, method: str) -> None:
    options = {"method": method, "num_steps": 2, **({"detail": "views"} if method == "upsample_guidance" else {})}
    if "stride" in options_of(resolve("method", method)):
        narrow, wide = (latents(tiny_model, stride=stride, **options) for stride in (2, 6))
        assert not torch.equal(narrow, wide)
    else:
        assert method in WITHOUT_VIEWS
        with pytest.raises(ValueError, match=r"^stride=2 is no option of method"):
            latents(tiny_model, stride=2, **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size_conditioning", ["native", "target"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_cutdiffusion_on_one_patch_is_direct_to_the_bit(
    tiny_model: Model, solver: str, size_conditioning: str, height: int, width: int
) -> None:
    options = {"height": height, "width": width, "num_steps": 5, "solver": solver}
    direct = latents(tiny_model, method="direct", **options)
    cut = latents(tiny_model, method="cutdiffusion", size_conditioning=size_conditioning, **options)
    assert torch.equal(cut, direct)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width"), [(128, 128), (192, 64), (136, 200), (8, 72)])
def test_every_size_that_is_a_multiple_of_8_can_be_drawn(
    tiny_model: Model, method: str, height: int, width: int
) -> None:
    x = latents(tiny_model, method=method, height=height, width=width, num_steps=2)
    assert x.shape == (1, 4, height // 8, width // 8)
    assert x.isfinite().all()


@hypothesis_settings(max_examples=25)
@given(num_steps=st.integers(1, 9), fraction=st.floats(0, 1), odd=st.booleans())
def test_the_stages_meet_for_every_number_of_steps(
    tiny_model: Model, num_steps: int, fraction: float, odd: bool
) -> None:
    """Structure comes first and detail after it, no step is missed, and the state is on the canvas at every step."""
    size = 72 if odd else 128
    steps = list(
        cutdiff.denoise(tiny_model, PROMPT, height=size, width=size, num_steps=num_steps, structure_fraction=fraction)
    )
    assert [step.index for step in steps] == list(range(num_steps))
    names = [step.stage for step in steps]
    switch = names.count("structure")
    assert names == ["structure"] * switch + ["detail"] * (num_steps - switch)
    assert fraction * num_steps - 1e-9 <= switch < fraction * num_steps + 1 + 1e-9
    assert all(step.latents.shape == (1, 4, size // 8, size // 8) for step in steps)


@pytest.mark.parametrize("method", METHODS)
def test_the_view_batch_size_changes_nothing_but_rounding(tiny_model: Model, method: str) -> None:
    options = {"method": method, "num_steps": 4}
    whole = latents(tiny_model, view_batch_size=100, **options)
    for view_batch_size in (1, 3):
        assert relative_error(latents(tiny_model, view_batch_size=view_batch_size, **options), whole) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_two_prompts_gives_what_two_runs_give(tiny_model: Model, method: str) -> None:
    options = {"method": method, "num_steps": 4, "height": 128, "width": 96}
    prompts = ["a red house at night", "a pink balloon over a lake"]
    both = latents(tiny_model, prompts, seed=5, **options)
    for i, prompt in enumerate(prompts):
        assert relative_error(both[i], latents(tiny_model, prompt, seed=5 + i, **options)[0]) < 1e-4


@pytest.mark.parametrize(("fraction", "num_steps", "switch"), [(0.5, 5, 3), (0.28, 50, 14), (0.55, 100, 55), (1, 3, 3)])
def test_the_structure_stage_is_rounded_up_as_written(
    tiny_model: Model, fraction: float, num_steps: int, switch: int
) -> None:
    steps = cutdiff.denoise(
        tiny_model, PROMPT, height=64, width=64, num_steps=num_steps, structure_fraction=fraction, guidance_scale=1.0
    )
    assert [step.stage for step in steps].count("structure") == switch


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_picture(tiny_model: Model) -> None:
    first = latents(tiny_model, num_steps=3, seed=1)
    assert torch.equal(first, latents(tiny_model, num_steps=3, seed=1))
    assert relative_error(latents(tiny_model, num_steps=3, seed=2), first) > 0.1


def test_without_structure_cutdiffusion_is_multidiffusion_with_jitter(tiny_model: Model) -> None:
    class Still(Draws):
        def view_origins(self, step, size, window, stride, jitter):
            return super().view_origins(step, size, window, stride, (0, 0))[0]

    options = {"num_steps": 3, "draws": Still((0,))}
    cut = latents(tiny_model, method="cutdiffusion", structure_fraction=0.0, **options)
    assert torch.equal(cut, latents(tiny_model, method="multidiffusion", **options))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does(tiny_model: Model, method: str) -> None:
    """Memory runs out at the end of a pass, after everything that a method may record in it."""
    last, seen = tiny_model.unet.conv_out, []

    def forward(x: Tensor) -> Tensor:
        seen.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return nn.Conv2d.forward(last, x)

    options = {"num_steps": 2, "height": 128, "width": 128, "method": method}
    whole = cutdiff.generate(tiny_model, [PROMPT, "a blue tent"], **options)
    with replaced(last, forward=forward):
        held = cutdiff.generate(tiny_model, [PROMPT, "a blue tent"], **options)
    assert max(seen) > 2
    assert (held.record["view_batch_size"], held.record["view_batch_halved"]) == (1, True)
    assert (whole.record["view_batch_size"], whole.record["view_batch_halved"]) == (16, False)
    assert held.record["network_evaluations"] == whole.record["network_evaluations"]
    assert relative_error(held.latents, whole.latents) < 3e-4  # through the VAE rounding grows tenfold


def test_halving_goes_on_where_it_is_and_ends_at_one(tiny_model: Model) -> None:
    seen: list[int] = []

    def forward(x: Tensor, *args: Any) -> Tensor:
        seen.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError
        return UNet.forward(tiny_model.unet, x, *args)

    options = {"num_steps": 2, "structure_fraction": 0.0}
    with replaced(tiny_model.unet, forward=forward):
        most = 6
        latents(tiny_model, **options)
        assert seen == [18, 8, *[4] * 4, 2, *[4] * 4, 2], "9 views with guidance, halved to 4 and to 2"
        most = 1
        with pytest.raises(torch.OutOfMemoryError):
            latents(tiny_model, **options)


def test_the_text_is_read_once_and_anew_where_it_changes(tiny_model: Model) -> None:
    read: list[int] = []

    def counted(states: Tensor) -> Any:
        read.append(len(states))
        return UNet.read(tiny_model.unet, states)

    with replaced(tiny_model.unet, read=counted):
        latents(tiny_model, method="demofusion", num_steps=3, height=192, width=192)
        assert read == [2], "views and patches read the same, at every step and size"
        latents(tiny_model, num_steps=4, guidance_interval=(0.25, 0.75))
        assert read[1:] == [1, 2], "without guidance and with it"

    def changed(run: Run, when: Callable[[int], bool], **changes: Any) -> list[Stage]:
        (stage,) = direct(run)

        other = replace(run.denoiser, **changes)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            return (other if when(step) else stage.denoise)(x, sigma, step)

        return [replace(stage, denoise=denoise)]

    def negative_later(run: Run) -> list[Stage]:
        return changed(run, lambda step: step == 1, negative=run.denoiser.positive)

    plain = latents(tiny_model, method="direct", num_steps=2)
    assert relative_error(latents(tiny_model, method=negative_later, num_steps=2), plain) > 1e-3

    def never_kept(run: Run) -> list[Stage]:
        return changed(run, lambda step: True, keeps_text=False)

    assert relative_error(latents(tiny_model, method=never_kept, num_steps=2), plain) < 1e-5


def test_guidance_1_evaluates_the_prompt_alone(tiny_model: Model) -> None:
    evaluations = [
        cutdiff.generate(tiny_model, PROMPT, num_steps=4, guidance_scale=g).record["network_evaluations"]
        for g in (1.0, 2.0)
    ]
    assert evaluations == [2 * 4 + 2 * 9, 2 * (2 * 4 + 2 * 9)], "4 patches and 9 views at twice the native size"


@pytest.mark.parametrize("method", METHODS)
def test_an_interval_without_steps_is_no_guidance(tiny_model: Model, method: str) -> None:
    options = {"method": method, "num_steps": 4, "height": 128, "width": 128}
    never = cutdiff.generate(tiny_model, PROMPT, guidance_interval=(0.25, 0.25), **options)
    alone = cutdiff.generate(tiny_model, PROMPT, guidance_scale=1.0, **options)
    assert torch.equal(never.latents, alone.latents)
    assert never.record["network_evaluations"] == alone.record["network_evaluations"]


def test_guidance_ends_where_its_interval_does(tiny_model: Model) -> None:
    always, between = (
        cutdiff.generate(tiny_model, PROMPT, num_steps=4, guidance_interval=interval)
        for interval in ((0.0, 1.0), (0.25, 0.6))
    )
    assert always.record["network_evaluations"] == 2 * (2 * 4 + 2 * 9)
    assert between.record["network_evaluations"] == 4 + 2 * 4 + 2 * 9 + 9, "steps 1 and 2 of 0 to 3 are guided"
    assert between.record["guidance_interval"] == (0.25, 0.6)
    assert relative_error(between.latents, always.latents) > 1e-4


def test_a_negative_prompt_and_the_interaction_matter(tiny_model: Model) -> None:
    base = latents(tiny_model, num_steps=3)
    assert relative_error(latents(tiny_model, num_steps=3, negative_prompt="a tent"), base) > 1e-4
    assert relative_error(latents(tiny_model, num_steps=3, interaction="pixel"), base) > 1e-4
    assert relative_error(latents(tiny_model, num_steps=3, size_conditioning="target"), base) > 1e-4


def test_ddim_with_eta_draws_its_noise_from_draws(tiny_model: Model) -> None:
    steps: list[int | None] = []

    class Recorded(Draws):
        def noise(self, shape: tuple[int, ...], step: int | None = None) -> Tensor:
            steps.append(step)
            return super().noise(shape, step)

    latents(tiny_model, num_steps=3, solver="ddim", eta=1.0, draws=Recorded((0,)))
    assert steps == [None, 0, 1, 2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("height", 100),
        ("width", 0),
        ("num_steps", 0),
        ("num_steps", 1001),
        ("stride", 0),
        ("stride", 9),
        ("structure_fraction", 1.1),
        ("structure_fraction", float("nan")),
        ("guidance_scale", float("inf")),
        ("seed", -1),
        ("method", "magic"),
        ("solver", "leapfrog"),
        ("interaction", "row"),
        ("size_conditioning", "both"),
        ("cosine_scales", (3.0, 1.0)),
        ("cosine_scales", (3.0, 1.0, -1.0)),
        ("cosine_scales", (3.0, 1.0, float("nan"))),
        ("guidance_interval", (0.2,)),
        ("guidance_interval", 0.5),
        ("guidance_interval", (0.6, 0.4)),
        ("guidance_interval", (0.0, float("nan"))),
        ("word_threshold", 1.1),
        ("view_batch_size", 0),
        ("eta", 0.5),
    ],
)
def test_options_that_cannot_be_used_are_named_before_any_work(tiny_model: Model, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}=(?:{re.escape(repr(value))}|{re.escape(short(value))})"):
        cutdiff.denoise(tiny_model, PROMPT, **{option: value})


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([range(2)], "[0, 1]"),
        ([range(3), range(2, 4)], "[0, 1, 2, 2, 3]"),
        ([range(1, 3)], "[1, 2]"),
        ([], "[]"),
    ],
)
def test_stages_that_do_not_lead_to_the_last_step(tiny_model: Model, steps: list[range], told: str) -> None:
    def mine(run: Run) -> Any:
        return [Stage("mine", some, lambda x, sigma, step: x) for some in steps]

    with pytest.raises(
        ValueError, match=f"^method=mine takes the steps {re.escape(told)}: its stages must take them in"
    ):
        latents(tiny_model, method=mine, num_steps=4)
