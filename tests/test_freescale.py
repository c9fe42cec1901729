"""FreeScale: the published code's latents, the sizes and steps on the way, and attention that fuses scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from published_freescale import FACTOR, GUIDANCE, RUNS, SHALLOW_VAE, UNET_CONFIG, Given, sampled
from replayed import model_of, published_latents
from tiny import relative_error
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.freescale import FreeScale
from cutdiff.models.config import SDXL_UNET, Size
from cutdiff.models.fused_scales import (
    Fusion,
    Windows,
    attend_in_parts,
    attend_in_windows,
    blurred,
    fused_scales,
)
from cutdiff.models.layers import Attention
from cutdiff.models.unet import UNet
from cutdiff.pipeline import prepare
from cutdiff.sampling.denoiser import Call, Observer
from cutdiff.sampling.draws import Draws
from cutdiff.sampling.operators import view_grid
from cutdiff.sampling.split import gaussian_taps
from cutdiff.sampling.stages import Phase
from cutdiff.settings import Settings


def drawn(name: str, **options: Any) -> list[cutdiff.Step]:
    """Our steps of a published run."""
    run = RUNS[name]
    model = model_of(replace(UNET_CONFIG, native_size=run.native), SHALLOW_VAE)
    height, width = (FACTOR * side for side in run.canvases[-1])
    settings = {
        "method": "freescale",
        "height": height,
        "width": width,
        "solver": run.solver,
        "num_steps": run.num_steps,
        "guidance_scale": GUIDANCE,
        **dict(run.options),
        **options,
    }
    return [*cutdiff.denoise(model, "yes", draws=Given((0,)), **settings)]


@pytest.mark.parametrize("name", RUNS)
def test_the_published_code_draws_the_same(name: str) -> None:
    ours, published = drawn(name)[-1].latents, published_latents("freescale", name)
    assert tuple(ours.shape[2:]) == RUNS[name].canvases[-1]
    assert relative_error(sampled(ours), published) < 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("2x2", {"blurs_channels": False}),
        ("2x2", {"fast_mode": True}),
        ("2x2", {"cosine_scale": 3.0}),
        ("2x2", {"dilated_fraction": 0.5}),
        ("2x2", {"strength": 0.6}),
        ("2x1", {"dilated_by": "longer"}),
        ("2x2", {"factors": (1.5,)}),
    ],
)
def test_every_option_changes_the_picture(name: str, options: dict[str, Any]) -> None:
    assert relative_error(sampled(drawn(name, **options)[-1].latents), published_latents("freescale", name)) > 1e-2


# ---- Sizes and steps


@pytest.mark.parametrize(
    ("height", "width", "factors", "expected"),
    [
        (64, 64, None, [(8, 8)]),
        (56, 24, None, [(7, 3)]),
        (128, 128, None, [(8, 8), (16, 16)]),
        (72, 136, None, [(4, 8), (8, 16), (9, 17)]),
        (192, 192, None, [(8, 8), (16, 16), (24, 24)]),
        (256, 128, None, [(8, 4), (16, 8), (32, 16)]),
        (576, 576, None, [(8, 8), (16, 16), (32, 32), (64, 64), (72, 72)]),
        (256, 128, (), [(8, 4), (32, 16)]),
        (256, 128, (1.5, 3, 4, 5), [(8, 4), (12, 6), (24, 12), (32, 16)]),
        (8, 80, None, [(1, 8), (1, 10)]),
    ],
)
def test_sizes_double_or_are_those_that_are_given(
    tiny_model: Model, height: int, width: int, factors: Any, expected: list[Size]
) -> None:
    """The native size of the tiny model is 8 latents."""
    settings = Settings(method="freescale", num_steps=10, height=height, width=width, factors=factors)
    stages = prepare(tiny_model, "a red house", settings).stages
    assert [stage.size for stage in stages] == expected
    assert [len(stage.steps) for stage in stages] == [10, *[7] * (len(expected) - 1)]


@pytest.mark.parametrize("factors", [(1,), (2, 2), (3, 2)])
def test_factors_that_do_not_rise_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^factors=\(.*must rise, all above 1"):
        Settings(method=FreeScale(factors=factors))


@pytest.mark.parametrize(
    ("num_steps", "strength", "indices"),
    [
        (10, 0.7, range(13, 20)),
        (7, 0.7, range(9, 14)),
        (1, 0.7, range(1, 2)),
        (4, 0.0, range(7, 8)),
        (4, 1, range(4, 8)),
    ],
)
def test_a_larger_size_takes_the_last_steps(tiny_model: Model, num_steps: int, strength: float, indices: range) -> None:
    steps = [*cutdiff.denoise(tiny_model, "a", method="freescale", num_steps=num_steps, strength=strength)]
    assert [step.index for step in steps] == [*range(num_steps), *indices]
    assert [step.sigma for step in steps[num_steps:]] == [steps[i % num_steps].sigma for i in indices]


def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model) -> None:
    ours, direct = (
        [*cutdiff.denoise(tiny_model, "a", method=method, height=56, width=64, num_steps=3)][-1].latents
        for method in ("freescale", "direct")
    )
    assert torch.equal(ours, direct)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Ear(Observer):
    """The size conditioning of every row."""

    def __init__(self) -> None:
        self.sizes: list[list[float]] = []

    def call(self, call: Call, prediction: Tensor) -> None:
        self.sizes += call.inputs[4].tolist()


def test_the_network_is_conditioned_on_the_native_size_throughout(tiny_model: Model) -> None:
    ear = Ear()
    list(cutdiff.denoise(tiny_model, "a", method="freescale", height=192, width=96, num_steps=2, observer=ear))
    assert len(ear.sizes) == 2 * (2 + 2 + 2)
    assert {*map(tuple, ear.sizes)} == {(64, 32, 0, 0, 64, 32)}


# ---- Restrained dilated convolution


def spread(model: Model, num_steps: int = 10, **options: Any) -> list[dict[str, float]]:
    """The factor of every spread convolution, by its name, at each step of the last phase."""
    unet, seen = model.unet, []

    def note(*_: Any) -> None:
        convolutions = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Conv2d)}
        seen.append({n: vars(m)["forward"].args[1] for n, m in convolutions.items() if "forward" in vars(m)})

    hook = unet.conv_out.register_forward_pre_hook(note)
    steps = [*cutdiff.denoise(model, "a", method="freescale", num_steps=num_steps, **options)]
    hook.remove()
    assert len(seen) == len(steps), "both rows of a pair go through at once"
    last = steps[-1].stage
    return [factors for factors, step in zip(seen, steps, strict=True) if step.stage == last]


def deepest(unet: UNet) -> set[str]:
    """The convolutions that the published list names in SDXL's three levels, for any number of levels."""
    last, layers = len(unet.config.channels) - 1, unet.config.layers_per_block
    resnets = [f"down_blocks.{last}.resnets.{i}" for i in range(layers)] + [
        "mid_block.resnets.0",
        "mid_block.resnets.1",
    ]
    return {f"down_blocks.{last - 1}.downsamplers.0.conv", *(f"{r}.conv{j}" for r in resnets for j in (1, 2))}


def test_convolutions_of_the_deepest_level_are_dilated_in_the_first_steps(tiny_model: Model) -> None:
    by_step = spread(tiny_model, height=128, width=192)
    assert [bool(factors) for factors in by_step] == [True] * 4 + [False] * 3, "steps 3 to 6 of 10, then 7 to 9"
    assert all(factors == dict.fromkeys(deepest(tiny_model.unet), 3.0) for factors in by_step[:4])


def test_a_plan_tells_dilated_steps_from_others(tiny_model: Model) -> None:
    settings = Settings(method="freescale", height=96, width=96, num_steps=10)
    phase = prepare(tiny_model, "a", settings).stages[1]
    assert isinstance(phase, Phase)
    _, stage = phase.begin(sample(1, 4, 8, 8))
    assert stage.cost is not None
    assert [stage.cost(step) for step in stage.steps] == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    ("options", "factor"), [({}, 1.5), ({"dilated_by": "longer"}, 2.5), ({"dilated_by": "width"}, 1.5)]
)
def test_the_width_says_how_far_unless_told(tiny_model: Model, options: dict[str, Any], factor: float) -> None:
    (factors,) = spread(tiny_model, 1, height=160, width=96, **options)
    assert {*factors.values()} == {factor}


def test_the_published_convolutions_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet(SDXL_UNET)
    assert deepest(unet) == {
        "down_blocks.1.downsamplers.0.conv",
        *(f"down_blocks.2.resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)),
        *(f"mid_block.resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)),
    }


# ---- Scale fusion


@given(data=st.data())
def test_attention_in_windows_is_the_mean_of_that_of_each_window(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, 9)) for _ in range(2))
    window = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    stride = (data.draw(st.integers(1, window[0])), data.draw(st.integers(1, window[1])))
    jitter = (data.draw(st.integers(0, (window[0] - stride[0]) // 2)), (window[1] - stride[1]) // 2)
    origins = Draws((1, 2)).attention_origins(3, 4, (height, width), window, stride, jitter)
    windows, x, most = Windows(origins, window, (height, width)), sample(2, height, width, 3), []

    def attend(tokens: Tensor) -> Tensor:
        most.append(tokens.shape[0] * tokens.shape[1])
        return 2 * tokens + tokens.mean(dim=1, keepdim=True)  # mixes the tokens of a window, zeros among them

    ours = attend_in_windows(attend, windows, windows.corners, x)
    assert max(most) <= len(x) * max(height * width, window[0] * window[1])
    for i, image in enumerate(x):
        total, count = torch.zeros_like(image), torch.zeros(height, width, 1)
        for top, left in origins[i].tolist():
            rows, columns = range(top, top + window[0]), range(left, left + window[1])
            inside = [(r, c) for r in rows for c in columns if 0 <= r < height and 0 <= c < width]
            mean = sum(image[r, c] for r, c in inside) / (window[0] * window[1])
            for r, c in inside:
                total[r, c] += 2 * image[r, c] + mean
                count[r, c] += 1
        torch.testing.assert_close(ours[i], total / count)


@pytest.mark.parametrize(("grid", "size"), [((2, 3), (7, 9)), ((2, 2), (1, 6)), ((1, 1), (4, 5))])
def test_attention_in_parts_is_attention_among_every_so_many_pixels(grid: Size, size: Size) -> None:
    x = sample(2, *size, 3)
    ours = attend_in_parts(lambda tokens: tokens.cumsum(dim=1), grid, x)
    for r in range(size[0]):
        for c in range(size[1]):
            before = [(a, b) for a in range(r % grid[0], r + 1, grid[0]) for b in range(c % grid[1], size[1], grid[1])]
            expected = sum(x[:, a, b] for a, b in before if (a, b) <= (r, c))
            torch.testing.assert_close(ours[:, r, c], expected)


@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("channels", [True, False])
def test_the_low_pass_is_one_convolution(radius: int, channels: bool) -> None:
    x, taps = sample(2, 5, 6, 8), gaussian_taps(1.0, radius, torch.empty(0))
    across = taps if channels else torch.ones(1)
    kernel = taps[:, None, None] * taps[None, :, None] * across
    expected = F.conv3d(x[:, None], kernel[None, None], padding=(radius, radius, radius * channels))[:, 0]
    torch.testing.assert_close(blurred(x, taps, across), expected)


def test_where_a_window_is_the_map_attention_is_what_it_was() -> None:
    attention, tokens = Attention(16, 2), sample(2, 30, 16)
    windows = Windows(torch.zeros(3, 1, 2, dtype=torch.int64), (5, 6), (5, 6))
    taps = gaussian_taps(1.0, 1, tokens)
    fusion = Fusion(windows, windows.corners, (1, 1), taps, taps)
    plain = attention(tokens)
    with fused_scales([(attention, fusion)], torch.tensor([2, 0])):
        torch.testing.assert_close(attention(tokens), plain)
    with fused_scales([(attention, replace(fusion, grid=(5, 6)))], torch.tensor([2, 0])):
        assert relative_error(attention(tokens), plain) > 1e-2


def test_every_row_has_the_windows_of_its_image() -> None:
    attention, size, window = Attention(16, 2), (9, 8), (4, 4)
    origins = Draws((1, 2)).attention_origins(0, 0, size, window, (2, 2), (1, 1))
    taps, images, tokens = gaussian_taps(1.0, 1, torch.empty(0)), [1, 0, 1], sample(3, 72, 16)

    def fused(origins: Tensor, images: list[int], tokens: Tensor) -> Tensor:
        windows = Windows(origins, window, size)
        with fused_scales([(attention, Fusion(windows, windows.corners, (1, 1), taps, taps))], torch.tensor(images)):
            return attention(tokens)

    together = fused(origins, images, tokens)
    for row, image in enumerate(images):
        alone = fused(origins[image : image + 1], [0], tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.equal(origins[0], origins[1])


def test_low_frequencies_are_local_and_high_ones_of_the_whole() -> None:
    """Values that are constant within windows and differ between them: the whole mixes them, windows do not."""
    attention = Attention(4, 1)
    size, window = (8, 8), (4, 4)
    origins = view_grid(size, window, window)[None]
    windows, tokens = Windows(origins, window, size), sample(1, 64, 4)
    taps = gaussian_taps(1.0, 2, tokens)
    whole = attention(tokens).view(1, 8, 8, 4)
    local = torch.empty_like(whole)
    for top in (0, 4):
        for left in (0, 4):
            part = tokens.view(1, 8, 8, 4)[:, top : top + 4, left : left + 4]
            local[:, top : top + 4, left : left + 4] = attention(part.flatten(1, 2)).view(part.shape)
    kernel = torch.outer(taps, taps).expand(4, 1, 5, 5)
    low = [F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=2, groups=4).permute(0, 2, 3, 1) for x in (local, whole)]
    with fused_scales([(attention, Fusion(windows, windows.corners, (1, 1), taps, torch.ones(1)))], torch.tensor([0])):
        torch.testing.assert_close(attention(tokens).view(1, 8, 8, 4), low[0] + whole - low[1])


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 200), (8, 80)])
def test_windows_are_native_and_move_by_half_and_an_eighth(tiny_model: Model, height: int, width: int) -> None:
    """This holds at 1.5 times the native size too, where the published code takes the whole picture for a window."""
    asked: dict[Any, set[Any]] = {}

    class Spy(Draws):
        def attention_origins(
            self, step: int, layer: int, size: Size, window: Size, stride: Size, jitter: Size
        ) -> Tensor:
            asked.setdefault(size, set()).add((window, stride, jitter))
            return super().attention_origins(step, layer, size, window, stride, jitter)

    settings = Settings(method="freescale", factors=(), num_steps=1, height=height, width=width)
    list(cutdiff.denoise(tiny_model, "a", settings, draws=Spy((0,))))
    assert (
        asked
        == {
            (128, 128): {(8, 8): {((4, 4), (2, 2), (0, 0))}},
            (96, 200): {(6, 13): {((1, 4), (1, 2), (0, 0))}},
            (8, 80): {(1, 5): {((1, 4), (1, 2), (0, 0))}},
        }[height, width]
    )


def test_each_layer_and_step_has_windows_of_its_own() -> None:
    draws, of = Draws((3, 4)), ((32, 32), (16, 16), (8, 8), (2, 2))
    origins = [draws.attention_origins(step, layer, *of) for step in range(3) for layer in range(3)]
    origins += [draws.view_origins(step, *of) for step in range(3)]
    assert len({tuple(o.flatten().tolist()) for o in origins}) == len(origins)
    assert not torch.equal(origins[0][0], origins[0][1])
    assert torch.equal(origins[0][1:], Draws((4,)).attention_origins(0, 0, *of))
