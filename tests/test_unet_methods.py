"""The methods that change the inside of the U-Net: their operators, the network after runs, and the published codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published_unet_methods import GUIDANCE, RUNS, STEPS
from replayed import CONFIG, noise, published_latents, states, weights
from tiny import relative_error
from torch import Tensor, nn

from cutdiff.methods.attention_scaling import entropy_factor, scaled_attention
from cutdiff.methods.hidiffusion import Plan, changed, pooling, resampling, top_level, windowed
from cutdiff.methods.hidiffusion import plan_for as hidiffusion_plan
from cutdiff.methods.scalecrafter import Dilations, plan_for, redilated
from cutdiff.methods.shared import Run
from cutdiff.models.config import SD15_UNET, SD21_UNET, SDXL_UNET, UNetConfig
from cutdiff.models.dilated import dilated_conv
from cutdiff.models.inside import blocks, replaced, size_at
from cutdiff.models.layers import Attention
from cutdiff.models.text import TextStates
from cutdiff.models.unet import TransformerBlock, UNet
from cutdiff.models.windows import attend_in_windows
from cutdiff.sampling.denoiser import Denoiser, Work
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.guidance import CFG
from cutdiff.sampling.noise import NoiseConfig
from cutdiff.sampling.schedules import ModelSchedule, Schedule, make_schedule
from cutdiff.sampling.stages import Phase, Stage, solve
from cutdiff.scenes.vocabulary import make_text_encoders
from cutdiff.specs import SOLVERS, resolve

METHOD_NAMES = ("attention_scaling", "scalecrafter", "hidiffusion")
EMBEDDED = replace(CONFIG, layers_per_block=1, transformer_layers=(0, 1, 1), mid_transformer_layers=1)
"""A configuration with the embedded model's layout."""
SD = replace(
    CONFIG,
    channels=(8, 16, 16, 16),
    transformer_layers=(1, 1, 1, 0),
    mid_transformer_layers=1,
    num_heads=(1, 2, 2, 2),
    pooled_dim=0,
    size_embedding_dim=0,
    linear_projections=False,
)
"""A configuration with the layout of SD 1.5, which reads neither pooled text nor sizes; SD 2.1 differs in widths."""


def make_unet(config: UNetConfig = CONFIG) -> UNet:
    unet = UNet(config).eval().requires_grad_(False)
    unet.load_state_dict(weights(unet.state_dict()), strict=True)
    return unet


def schedule_for(solver: str, num_steps: int) -> Schedule:
    return make_schedule(ModelSchedule(), resolve("solver", solver), NoiseConfig(), num_steps)


def stages_of(method: str, run: Run) -> list[Stage | Phase]:
    """The stages of a method by its name: of an object with `stages`, or of a plain function."""
    chosen = resolve("method", method)
    return getattr(chosen, "stages", chosen)(run)


def no_picture(tensor: Tensor) -> Tensor:
    raise AssertionError("these methods need no VAE")


def make_run(
    size: tuple[int, int],
    *,
    config: UNetConfig = CONFIG,
    solver: str = "ddim",
    num_steps: int = STEPS,
    seeds: tuple[int, ...] = (0,),
    guidance_scale: float = GUIDANCE,
    view_batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Run:
    positive, negative = (
        TextStates(s.context.repeat(len(seeds), 1, 1).to(dtype), s.pooled.repeat(len(seeds), 1).to(dtype))
        for s in states()
    )
    schedule = schedule_for(solver, num_steps)
    denoiser = Denoiser(
        unet=make_unet(config).to(dtype),
        timestep=schedule.timestep,
        coefficients=NoiseConfig().coefficients,
        positive=positive,
        negative=negative,
        guidance=CFG(guidance_scale),
        factor=8,
        work=Work(view_batch_size),
    )
    prompts, text = [""] * len(seeds), make_text_encoders()
    return Run(denoiser, Draws(seeds), size, size, schedule, prompts, text, no_picture, no_picture)


def latents(method: str, run: Run, *, solver: str = "ddim", start: Tensor | None = None) -> Tensor:
    schedule = schedule_for(solver, run.num_steps)
    x = (noise(run.size) if start is None else start) * schedule.init_scale
    steps = solve(stages_of(method, run), x, schedule, resolve("solver", solver), lambda shape, step, *_: x)
    return list(steps)[-1].latents


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Whole runs


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_ends_in_the_same_latents(name: str) -> None:
    method, size, native = RUNS[name]
    run = make_run(size, config=replace(CONFIG, native_size=native))
    assert relative_error(latents(method, run), published_latents("unet_methods", name)) < 1e-4
    assert relative_error(latents("direct", run), published_latents("unet_methods", name)) > 0.1


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_at_native_size_every_method_is_direct_to_the_bit(method: str, solver: str) -> None:
    run = make_run((8, 8), solver=solver, num_steps=4)
    assert torch.equal(latents(method, run, solver=solver), latents("direct", run, solver=solver))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("config", [CONFIG, EMBEDDED, SD], ids=["sdxl", "embedded", "sd"])
@pytest.mark.parametrize("size", [(16, 16), (9, 15), (33, 7), (1, 20)])
def test_any_size_can_be_drawn_and_differs_from_direct(method: str, config: UNetConfig, size: tuple[int, int]) -> None:
    run = make_run(size, config=config, num_steps=3, solver="euler")
    drawn = latents(method, run, solver="euler")
    assert drawn.isfinite().all()
    assert relative_error(drawn, latents("direct", run, solver="euler")) > 1e-3


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("size", [(16, 24), (9, 33)])
def test_an_image_does_not_depend_on_its_neighbours(method: str, size: tuple[int, int]) -> None:
    seeds = (0, 7, 2)
    start = torch.cat([noise(size), sample(2, CONFIG.in_channels, *size)])
    alone = [
        latents(method, make_run(size, num_steps=3, seeds=(seed,)), start=start[i : i + 1])
        for i, seed in enumerate(seeds)
    ]
    for view_batch_size in (2, 16):
        together = make_run(size, num_steps=3, seeds=seeds, view_batch_size=view_batch_size)
        assert relative_error(latents(method, together, start=start), torch.cat(alone)) < 1e-4


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_low_precision_draws_nearly_the_same(method: str) -> None:
    expected = latents(method, make_run((32, 32), num_steps=3))
    assert relative_error(latents(method, make_run((32, 32), num_steps=3, dtype=torch.bfloat16)), expected) < 0.1


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_runs_that_take_turns_do_not_touch_each_other(method: str) -> None:
    """A step changes the network only while it is taken, so that others may use it between steps."""
    changing, plain = make_run((16, 16), num_steps=3), make_run((16, 16), num_steps=3)
    plain = replace(plain, denoiser=replace(plain.denoiser, unet=changing.denoiser.unet))
    schedule = schedule_for("ddim", 3)
    x = noise((16, 16)) * schedule.init_scale
    both = (
        solve(stages_of(name, run), x, schedule, resolve("solver", "ddim"), lambda shape, step, *_: x)
        for name, run in ((method, changing), ("direct", plain))
    )
    last = list(zip(*both, strict=True))[-1]
    assert torch.equal(last[0].latents, latents(method, make_run((16, 16), num_steps=3)))
    assert torch.equal(last[1].latents, latents("direct", make_run((16, 16), num_steps=3)))


@pytest.mark.parametrize(("size", "evaluations"), [((16, 16), 2 * 10), ((32, 32), 2 * 10 + 7)])
def test_noise_damped_guidance_is_counted(size: tuple[int, int], evaluations: int) -> None:
    """Each of the first 70% of the steps takes one evaluation more, of the negative row alone."""
    run = make_run(size)
    latents("scalecrafter", run)
    assert run.denoiser.work.evaluations == evaluations


def test_without_guidance_nothing_is_damped() -> None:
    run = make_run((32, 32), guidance_scale=1.0)
    assert latents("scalecrafter", run).isfinite().all()
    assert run.denoiser.work.evaluations == 10


# ---- What a change leaves behind


def snapshot(unet: UNet) -> dict[str, dict[str, Any]]:
    """Every plain attribute of every module."""
    return {name: {k: v for k, v in vars(m).items() if not k.startswith("_")} for name, m in unet.named_modules()}


LEVEL_1 = top_level(CONFIG)
Changed = Callable[[Run], AbstractContextManager[Denoiser | None]]
"""Changes the network of a run; the block gets the denoiser to call, None where that is the run's own."""
CHANGES: dict[str, Changed] = {
    "scaled attention": lambda run: scaled_attention(run.denoiser.unet, run.size),
    "re-dilation": lambda run: redilated(run.denoiser.unet, plan_for(4).dilations),
    "resampling": lambda run: resampling(run.denoiser.unet, LEVEL_1, (2, 2)),
    "pooling": lambda run: pooling(run.denoiser.unet, LEVEL_1, (2, 2)),
    "windows": lambda run: nullcontext(windowed(run, (2, 2), 0)),
    "all of HiDiffusion": lambda run: changed(run, (2, 2), Plan(LEVEL_1, range(1), LEVEL_1, range(1)), 0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_leaves_no_trace_even_after_an_error(change: Changed) -> None:
    run = make_run((16, 16), num_steps=4)
    before, x = snapshot(run.denoiser.unet), 10 * noise(run.size)
    plain = run.denoiser(x, 10.0, 0)
    with change(run) as denoiser:
        assert relative_error((denoiser or run.denoiser)(x, 10.0, 0), plain) > 1e-4
    assert snapshot(run.denoiser.unet) == before
    with pytest.raises(KeyboardInterrupt), change(run):
        raise KeyboardInterrupt
    assert snapshot(run.denoiser.unet) == before
    assert run.denoiser.network is None
    assert torch.equal(run.denoiser(x, 10.0, 0), plain)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_network_that_fails_in_the_middle_of_a_step_is_restored(method: str) -> None:
    run = make_run((32, 32), num_steps=4)
    before = snapshot(run.denoiser.unet)

    def fail(*_: Tensor) -> Tensor:
        raise FloatingPointError

    with replaced(run.denoiser.unet.up_blocks[1].resnets[2], forward=fail), pytest.raises(FloatingPointError):
        latents(method, run)
    assert snapshot(run.denoiser.unet) == before
    assert run.denoiser.network is None


def test_replaced_restores_own_attributes_and_drops_others() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with replaced(conv, stride=(2, 2), forward=lambda x: x):
        assert conv.stride == (2, 2)
        assert conv("anything") == "anything"
    assert conv.stride == (1, 1)
    assert "forward" not in vars(conv)


# ---- Attention scaling


def explicit_attention(attention: Attention, x: Tensor, scale: float) -> Tensor:
    split = lambda values: values.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = split(attention.to_q(x)), split(attention.to_k(x)), split(attention.to_v(x))
    out = (scale * q @ k.mT).softmax(dim=-1) @ v
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


def test_scaled_attention_is_the_softmax_with_the_papers_scale() -> None:
    unet = make_unet()
    size = (15, 24)  # level 1 has 8 x 12 tokens where it had 4 x 4
    block = next(module for module in unet.down_blocks[1].modules() if isinstance(module, TransformerBlock))
    x, context = sample(2, 96, 16), sample(2, 5, CONFIG.context_dim)
    text = block.attn2(x, context)
    with scaled_attention(unet, size):
        expected = explicit_attention(block.attn1, x, math.sqrt(math.log(96) / math.log(16) / 8))
        assert relative_error(block.attn1(x), expected) < 1e-6
        assert torch.equal(block.attn2(x, context), text)


def test_the_scale_follows_the_number_of_tokens_at_each_level() -> None:
    unet = make_unet()
    with scaled_attention(unet, (16, 16)):
        for level, block in blocks(unet):
            native = (8 >> level) ** 2
            for module in block.modules():
                if isinstance(module, TransformerBlock):
                    assert module.attn1.scale == pytest.approx(math.sqrt(math.log(4 * native, native) / 8))
    assert entropy_factor(4096, 4096) == 1
    assert entropy_factor(16384, 4096) == pytest.approx(math.sqrt(7 / 6))
    assert entropy_factor(1024, 4096) == pytest.approx(math.sqrt(5 / 6))
    assert entropy_factor(1, 1) == 1
    assert entropy_factor(16, 1) == pytest.approx(2)


# ---- Re-dilation


def spread(weight: Tensor, dilation: int) -> Tensor:
    """The 3×3 kernel with zeros between its taps."""
    kernel = torch.zeros(*weight.shape[:2], 2 * dilation + 1, 2 * dilation + 1)
    kernel[:, :, ::dilation, ::dilation] = weight
    return kernel


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_redilated_convolution_has_zeros_between_its_taps(factor: int, stride: int) -> None:
    conv = nn.Conv2d(3, 5, 3, stride=stride, padding=1)
    x = sample(2, 3, 9, 12)
    expected = F.conv2d(x, spread(conv.weight, factor), conv.bias, stride=stride, padding=factor)
    assert expected.shape == conv(x).shape
    torch.testing.assert_close(dilated_conv(conv, factor, x), expected)


def test_a_fractional_dilation_is_a_whole_one_on_a_stretched_input() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    x = sample(1, 3, 10, 15)
    wide = F.interpolate(x, size=(12, 18), mode="bilinear")
    expected = F.interpolate(
        F.conv2d(wide, spread(conv.weight, 3), conv.bias, padding=3), size=(10, 15), mode="bilinear"
    )
    torch.testing.assert_close(dilated_conv(conv, 2.5, x), expected)


@pytest.mark.parametrize("size", [(9, 11), (1, 7)])
@pytest.mark.parametrize("factor", [1.3, 2.5, 3.2])
@pytest.mark.parametrize("stride", [1, 2])
def test_redilation_keeps_the_shape(size: tuple[int, int], factor: float, stride: int) -> None:
    conv = nn.Conv2d(2, 2, 3, stride=stride, padding=1)
    x = sample(1, 2, *size)
    assert dilated_conv(conv, factor, x).shape == conv(x).shape


def factors(unet: UNet, dilations: Dilations) -> dict[str, float]:
    """The convolutions that are spread, by name."""
    with redilated(unet, dilations):
        return {
            name: vars(module)["forward"].args[1]
            for name, module in unet.named_modules()
            if isinstance(module, nn.Conv2d) and "forward" in vars(module)
        }


def resnets(block: str, count: int, factor: float) -> dict[str, float]:
    return {f"{block}.resnets.{i}.conv{j}": factor for i in range(count) for j in (1, 2)}


def test_the_published_settings_of_sdxl_are_met() -> None:
    """The names of the published lists that SDXL has."""
    with torch.device("meta"):
        unet = UNet(SDXL_UNET)
    for scale in (2, 2.5):
        plan = plan_for(scale)
        assert factors(unet, plan.dilations) == {
            **resnets("mid_block", 2, scale),
            **resnets("up_blocks.0", 3, scale),
            "up_blocks.0.upsamplers.0.conv": scale,
        }
        assert (plan.share, plan.base) == (30 / 50, None)
    plan = plan_for(4)
    assert factors(unet, plan.dilations) == {
        **resnets("down_blocks.2", 2, 4),
        **resnets("mid_block", 2, 4),
        **resnets("up_blocks.0", 3, 4),
        "up_blocks.0.upsamplers.0.conv": 4,
        **resnets("up_blocks.1", 3, 3),
        "up_blocks.1.upsamplers.0.conv": 3,
        **resnets("up_blocks.2", 3, 2),
    }
    assert plan.base is not None
    assert factors(unet, plan.base) == factors(unet, plan_for(2).dilations)
    assert plan.share == 35 / 50


def test_dilations_shrink_to_2() -> None:
    dilations = plan_for(4).dilations
    steps = [dilations.shrunk((35 - i) / 35) for i in range(35)]
    assert [d.mid for d in steps] == sorted((d.mid for d in steps), reverse=True)
    assert (steps[0].mid, steps[-1].mid) == (4, 2)
    assert steps[0] == dilations
    assert {d.up[1] for d in steps} == {3, 2}
    assert {d.up[2] for d in steps} == {2}


def test_damped_guidance_takes_the_direction_from_one_network_and_the_base_from_another() -> None:
    run = make_run((32, 32))
    x, sigma, plan = 10 * noise(run.size), 10.0, plan_for(4)
    stage = stages_of("scalecrafter", run)[0]
    assert isinstance(stage, Stage)
    found = stage.denoise(x, sigma, 0)

    def predicted(dilations: Dilations, text: TextStates) -> Tensor:
        denoiser = replace(run.denoiser, guidance=CFG(1.0), positive=text)
        with redilated(run.denoiser.unet, dilations):
            return (x - denoiser(x, sigma, 0)) / sigma

    assert plan.base is not None
    wide, base = plan.dilations.shrunk(1), plan.base.shrunk(1)
    positive, negative = (predicted(wide, text) for text in (run.denoiser.positive, run.denoiser.negative))
    expected = predicted(base, run.denoiser.negative) + GUIDANCE * (positive - negative)
    torch.testing.assert_close((x - found) / sigma, expected, rtol=1e-4, atol=1e-4)


# ---- HiDiffusion


@pytest.mark.parametrize("windows", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 6)])
def test_windowed_attention_is_attention_of_each_window(size: tuple[int, int], windows: tuple[int, int]) -> None:
    attention = Attention(16, 2)
    x, quarters = sample(4, size[0] * size[1], 16), torch.arange(4)
    found = attend_in_windows(attention, size, windows, quarters, x)
    for i in range(len(x)):
        picture = x[i].unflatten(0, size)  # (h, w, C)
        sides = [math.ceil(side / count) for side, count in zip(size, windows, strict=True)]
        shift = (i * (sides[0] // 4), i * (sides[1] // 4))
        rolled = picture.roll((-shift[0], -shift[1]), dims=(0, 1))
        expected = torch.full_like(rolled, torch.nan)
        for top in range(0, size[0], sides[0]):
            for left in range(0, size[1], sides[1]):
                window = (slice(top, top + sides[0]), slice(left, left + sides[1]))
                tokens = rolled[window].flatten(0, 1)[None]
                out = explicit_attention(attention, tokens, 8**-0.5)[0]
                expected[window] = out.unflatten(0, rolled[window].shape[:2])
        expected = expected.roll(shift, dims=(0, 1)).flatten(0, 1)
        torch.testing.assert_close(found[i], expected)


def test_shifts_of_windows_depend_on_seed_and_step_alone() -> None:
    draws = Draws((3, 4))
    shifts = torch.stack([draws.window_shifts(step) for step in range(200)])
    assert shifts.shape == (200, 2)
    assert torch.equal(shifts[:, 1], torch.stack([Draws((4,)).window_shifts(step)[0] for step in range(200)]))
    assert shifts.flatten().bincount().min() > 60
    assert len(shifts.flatten().bincount()) == 4


def test_the_levels_of_known_networks() -> None:
    assert top_level(SDXL_UNET) == 1
    assert top_level(EMBEDDED) == 1
    four = {"channels": (8,) * 4, "num_heads": (1,) * 4, "norm_groups": 4}
    assert top_level(UNetConfig(**four, transformer_layers=(1, 1, 1, 0))) == 0  # type: ignore[arg-type]
    assert top_level(UNetConfig(**four, transformer_layers=(0, 0, 0, 1))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [CONFIG, EMBEDDED], ids=["sdxl", "embedded"])
@pytest.mark.parametrize("size", [(16, 16), (32, 24), (13, 19)])
def test_rau_net_shrinks_the_deep_levels_and_gives_back_the_size(config: UNetConfig, size: tuple[int, int]) -> None:
    run = make_run(size, config=config)
    unet, seen = run.denoiser.unet, []
    hook = unet.mid_block.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[2:]))
    x = 10 * noise(size)
    level = top_level(config)
    for change in (resampling(unet, level, (2, 2)), pooling(unet, level, (2, 2)), resampling(unet, level, (1, 2))):
        with change:
            assert run.denoiser(x, 10.0, 0).shape == x.shape
    with resampling(unet, level, (2, 2)), pooling(unet, level, (2, 2)):
        assert run.denoiser(x, 10.0, 0).shape == x.shape
    hook.remove()
    assert seen == [size_at(size, 3), size_at(size, 3), (size_at(size, 2)[0], size_at(size, 3)[1]), size_at(size, 4)]


def test_the_resampler_is_a_dilated_convolution_with_stride_4() -> None:
    unet = make_unet()
    conv = unet.get_submodule("down_blocks.1.downsamplers.0.conv")
    assert isinstance(conv, nn.Conv2d)
    x = sample(1, 16, 9, 12)
    expected = F.conv2d(x, spread(conv.weight, 2), conv.bias, stride=4, padding=2)
    with resampling(unet, LEVEL_1, (2, 2)):
        torch.testing.assert_close(conv(x), expected)


def test_an_axis_of_native_size_keeps_its_network() -> None:
    """On 8 × 16 the deep levels get 2 × 2, the native size, not 1 × 2."""
    run, seen = make_run((8, 16)), []
    hook = run.denoiser.unet.mid_block.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[2:]))
    latents("hidiffusion", run)
    hook.remove()
    assert seen == [(2, 2)] * 4 + [(2, 4)] * 6


@pytest.mark.parametrize(
    ("config", "times", "expected"),
    [
        # first the level and the steps of 50 in which it is resampled, then those in which it is pooled
        (SDXL_UNET, 2, Plan(1, range(8), 1, range(8, 20))),
        (SDXL_UNET, 4, Plan(1, range(15), 1, range(35))),
        (SD15_UNET, 2, Plan(0, range(20), 1, range(0))),
        (SD15_UNET, 4, Plan(0, range(35), 1, range(15))),
        (SD21_UNET, 2, Plan(0, range(20), 1, range(0))),
        (SD21_UNET, 4, Plan(0, range(35), 1, range(15))),
        (replace(SD21_UNET, native_size=64), 4, Plan(0, range(35), 1, range(15))),
    ],
)
def test_the_published_plans(config: UNetConfig, times: int, expected: Plan) -> None:
    """The thresholds T1 and T2 that the published code has for 1024, 2048 and 4096 pixels."""
    side = times * config.native_size
    assert hidiffusion_plan(config, (side, side), 50) == expected
    assert hidiffusion_plan(config, (side, side + 40), 50) == expected
    assert hidiffusion_plan(config, (side + 8, side), 50) == expected
    near = hidiffusion_plan(config, (2 * config.native_size, 4 * config.native_size), 50)
    assert near == hidiffusion_plan(config, (2 * config.native_size,) * 2, 50), "both axes are to be four times native"


@pytest.mark.parametrize("config", [SDXL_UNET, SD15_UNET])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 25, 30])
def test_a_threshold_is_rounded_down_as_published(config: UNetConfig, num_steps: int) -> None:
    near, far = (hidiffusion_plan(config, (times * config.native_size,) * 2, num_steps) for times in (2, 4))
    first, last = (int(share * num_steps + 1e-9) for share in (0.3, 0.7))
    assert max(near.resampled.stop, near.pooled.stop) == int(0.4 * num_steps + 1e-9)
    assert sorted((far.resampled.stop, far.pooled.stop)) == [first, last]
    assert all(plan.changes(num_steps - 1) == (False, False) for plan in (near, far))


@pytest.mark.parametrize(
    ("config", "times", "expected"),
    [
        # for each step the sides of the maps that leave levels 0, 1 and 2 on the way down, and of the middle's
        (SD, 2, [(16, 4, 2, 1)] * 4 + [(16, 8, 4, 2)] * 6),
        (SD, 4, [(32, 4, 2, 1)] * 3 + [(32, 8, 4, 2)] * 4 + [(32, 16, 8, 4)] * 3),
        (CONFIG, 2, [(16, 8, 2, 2)] * 1 + [(16, 4, 2, 2)] * 3 + [(16, 8, 4, 4)] * 6),
        (CONFIG, 4, [(32, 8, 2, 2)] * 3 + [(32, 8, 4, 4)] * 4 + [(32, 16, 8, 8)] * 3),
    ],
    ids=["sd-2", "sd-4", "sdxl-2", "sdxl-4"],
)
def test_maps_are_shrunk_at_the_steps_of_the_plan(
    config: UNetConfig, times: int, expected: list[tuple[int, ...]]
) -> None:
    """Pooling is behind a level's first layer, so that its last one tells; the way up gives back the size."""
    run = make_run((8 * times, 8 * times), config=config)
    unet, sides = run.denoiser.unet, []
    before, x = snapshot(unet), 10 * noise(run.size)
    plain = run.denoiser(x, 10.0, 0)
    watched = [*(block.resnets[-1] for block in unet.down_blocks[:3]), unet.mid_block]
    hooks = [m.register_forward_hook(lambda _m, _i, output: sides.append(output.shape[2])) for m in watched]
    drawn = latents("hidiffusion", run)
    for hook in hooks:
        hook.remove()
    assert [*zip(*[iter(sides)] * 4, strict=True)] == expected
    assert snapshot(unet) == before, "the network is as it was"
    assert drawn.shape == (1, 2, 8 * times, 8 * times)
    assert torch.equal(run.denoiser(x, 10.0, 0), plain)
    first = stages_of("hidiffusion", run)[0]
    assert isinstance(first, Stage)
    assert relative_error(first.denoise(x, 10.0, 0), plain) > 1e-4


@pytest.mark.parametrize(("config", "level"), [(SD, 0), (CONFIG, 1)], ids=["sd", "sdxl"])
def test_self_attention_of_the_top_level_is_in_windows_at_every_step(config: UNetConfig, level: int) -> None:
    """A window has a quarter of its map: in SD's layout that of the canvas, which level 0 never shrinks."""
    run, tokens = make_run((16, 16), config=config, num_steps=2), []
    block = next(m for m in run.denoiser.unet.down_blocks[level].modules() if isinstance(m, TransformerBlock))
    hook = block.attn1.to_q.register_forward_hook(lambda _m, inputs, _o: tokens.append(inputs[0].shape[1]))
    latents("hidiffusion", run)
    hook.remove()
    assert tokens == [(16 >> level) ** 2 // 4] * 4 * 2


@pytest.mark.parametrize("times", [2, 4])
def test_the_steps_that_cost_the_same_have_one_key(times: int) -> None:
    stages = stages_of("hidiffusion", make_run((8 * times, 8 * times), config=SD))
    assert [(stage.name, stage.steps) for stage in stages if isinstance(stage, Stage)] == [
        ("resolution-aware", range(4 if times == 2 else 7)),
        ("windowed", range(4 if times == 2 else 7, 10)),
    ]
    (first, second) = stages
    assert isinstance(first, Stage)
    assert isinstance(second, Stage)
    assert first.cost is not None
    keys = [first.cost(step) for step in first.steps]
    assert keys == ([(True, False)] * 4 if times == 2 else [(True, True)] * 3 + [(True, False)] * 4)
    assert second.cost is None
