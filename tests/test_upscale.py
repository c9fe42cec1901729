"""Upscale: the native picture, enlarged by what ships or by anything of one's own, whose faults have a line each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own import OwnModules
from tiny import relative_error
from torch import Tensor, nn

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import parse
from cutdiff.methods.upscale import OVERSHOOT, Upscale
from cutdiff.planning.forecast import SDXL, sized, walk
from cutdiff.settings import Settings
from cutdiff.specs import SOLVERS, spec_of

PROMPTS = ["a red house at night", "a blue tree"]
RUN: dict[str, Any] = {"method": "upscale", "num_steps": 3, "height": 128, "width": 104, "seed": 3}


def steps(model: Model, prompt: str | list[str] = PROMPTS, **options: Any) -> list[cutdiff.Step]:
    return list(cutdiff.denoise(model, prompt, **{**RUN, **options}))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 24)])
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, height: int, width: int) -> None:
    ours, direct = (
        steps(tiny_model, method=method, height=height, width=width)[-1] for method in ("upscale", "direct")
    )
    assert torch.equal(ours.latents, direct.latents)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest-exact"])
def test_it_is_the_native_picture_decoded_enlarged_and_encoded(tiny_model: Model, solver: str, mode: str) -> None:
    *drawn, end = steps(tiny_model, solver=solver, upscaler=mode.removesuffix("-exact"))
    assert [step.stage for step in drawn] == ["native"] * 3
    assert (end.stage, end.index) == ("upscale", 5)
    native = drawn[-1].latents
    assert torch.equal(native, steps(tiny_model, method="direct", solver=solver, height=64, width=48)[-1].latents)
    images = cutdiff.decode(tiny_model, native)
    if mode == "nearest-exact":
        larger = images[:, :, torch.arange(128) * 64 // 128][..., torch.arange(104) * 48 // 104]
    else:
        larger = F.interpolate(images, (128, 104), mode=mode).clamp(0, 1)
    torch.testing.assert_close(end.latents, cutdiff.encode(tiny_model, larger))
    assert torch.equal(end.denoised, end.latents)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (136, 200), (8, 72)])
def test_an_image_does_not_depend_on_its_neighbours_and_costs_what_is_planned(
    tiny_model: Model, height: int, width: int
) -> None:
    size = {"height": height, "width": width}
    both = steps(tiny_model, **size)[-1].latents
    for i, prompt in enumerate(PROMPTS):
        assert relative_error(both[i], steps(tiny_model, prompt, **{**size, "seed": 3 + i})[-1].latents[0]) < 1e-4
    settings = Settings(**{**RUN, **size, "upscaler": fails})
    planned = walk(
        sized(SDXL._replace(network=tiny_model.unet.config, vae=tiny_model.vae.config), tiny_model.dtype), settings
    )
    assert sum(stage.total.evaluations for stage in planned.stages) == 3 * 2


# ---- Upscalers of one's own


def fails(images: Tensor, size: tuple[int, int]) -> Tensor:
    raise RuntimeError("this one\nalways fails")


class Network(nn.Module):
    """A super-resolution network that knows one factor, and the size where its picture ends."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 1)
        nn.init.constant_(self.conv.weight, strength)
        nn.init.constant_(self.conv.bias, 0.2)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(F.pixel_shuffle(self.conv(images), 2), size)


@dataclass(frozen=True)
class Shaded:
    share: float = 0.5

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self.share * F.interpolate(images, size)


def test_it_gets_images_and_the_size_in_pixels_and_no_gradient(tiny_model: Model) -> None:
    received: list[tuple[Tensor, Any]] = []

    def keep(images: Tensor, size: tuple[int, int]) -> Tensor:
        received.append((images, size))
        return F.interpolate(images, size)

    drawn = steps(tiny_model, upscaler=keep)
    assert [size for _, size in received] == [(128, 104)] * 2
    native = cutdiff.decode(tiny_model, drawn[2].latents)
    for image, (images, _) in zip(native.split(1), received, strict=True):
        torch.testing.assert_close(images, image)
    assert not steps(tiny_model, upscaler=Network())[-1].latents.requires_grad


def test_what_goes_a_little_past_0_and_1_is_clamped(tiny_model: Model) -> None:
    def past(images: Tensor, size: tuple[int, int], *, by: float = OVERSHOOT) -> Tensor:
        return F.interpolate(images.round(), size).double() * (1 + 2 * by) - by

    def within(images: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(images.round(), size)

    ours, clamped = (steps(tiny_model, upscaler=upscaler)[-1].latents for upscaler in (past, within))
    assert torch.equal(ours, clamped)
    with pytest.raises(ValueError, match=r"^upscaler=past gave values from -0\.6 to 1\.6, where images in \[0, 1\]"):
        steps(tiny_model, upscaler=partial(past, by=0.6))


def as_bytes(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size).mul(255).byte()


@pytest.mark.parametrize(
    ("upscaler", "words"),
    [
        (fails, r"upscaler=fails failed on images of \(1, 3, 64, 48\), RuntimeError: this one always fails$"),
        (
            lambda images, size: images,
            r"upscaler=<lambda> gave \(1, 3, 64, 48\) of torch.float32 for \(1, 3, 64, 48\), w",
        ),
        (
            lambda images, size: None,
            r"gave NoneType for \(1, 3, 64, 48\), where floats of \(1, 3, 128, 104\) are needed",
        ),
        (as_bytes, r"upscaler=as_bytes gave \(1, 3, 128, 104\) of torch.uint8 for"),
        (lambda images, size: 255 * F.interpolate(images, size), r"gave values from .* where images in \[0, 1\] are"),
        (lambda images, size: F.interpolate(images, size) / 10 - 1, "gave values from -.* where images in"),
        (lambda images, size: F.interpolate(images, size) * torch.nan, "gave values from nan to nan"),
        (lambda images: images, r"upscaler=<lambda> failed on images of .*, TypeError: .*takes 1 positional argument"),
    ],
)
def test_faults_of_ones_own_are_named_in_one_line(tiny_model: Model, upscaler: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        steps(tiny_model, upscaler=upscaler)
    assert "\n" not in str(raised.value)


def test_memory_that_does_not_suffice_is_not_the_upscalers_fault(tiny_model: Model) -> None:
    def greedy(images: Tensor, size: tuple[int, int]) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        steps(tiny_model, upscaler=greedy)


def test_it_is_recorded_by_what_it_is_and_holds(tiny_model: Model) -> None:
    specs = [
        spec_of("method", Upscale(upscaler=upscaler))
        for upscaler in ("bicubic", fails, as_bytes, Network(0.1), Network(0.2), Shaded(), Shaded(0.7))
    ]
    specs += [spec_of("method", Upscale(upscaler=partial(bound, by=share))) for share in (0.1, 0.2)]
    assert specs[0] == "upscale,upscaler=bicubic"
    assert len(set(specs)) == len(specs)
    assert all(re.fullmatch(r"upscale,upscaler='?<\w+ [0-9a-f]{16}.*>'?", spec) for spec in specs[1:])
    records = [cutdiff.generate(tiny_model, "a", **{**RUN, "upscaler": u}).record for u in (Shaded(), Shaded(0.7))]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]


def bound(images: Tensor, size: tuple[int, int], by: float) -> Tensor:
    return by * F.interpolate(images, size)


def test_by_its_address_on_every_way(tiny_model: Model, own: OwnModules) -> None:
    source = """
    import torch.nn.functional as F
    FACTOR = {factor}
    def grey(images, size):
        return F.interpolate(images.mean(1, keepdim=True), size).expand(-1, 3, -1, -1) * FACTOR
    """
    own.write("own_upscalers", source.format(factor=1))
    ours = Settings(method="upscale,upscaler=own_upscalers:grey").method
    assert ours == Settings(method="upscale", upscaler="own_upscalers:grey").method
    flags = ["--method", "upscale", "--upscaler", "own_upscalers:grey"]
    assert Settings(**parse(flags).options).method == ours
    image = cutdiff.generate(tiny_model, "a", **{**RUN, "upscaler": "own_upscalers:grey"}).latents
    assert relative_error(image, steps(tiny_model, "a")[-1].latents) > 1e-3
    before = spec_of("method", ours)
    own.write("own_upscalers", source.format(factor=0.5))
    assert spec_of("method", Upscale(upscaler="own_upscalers:grey")) != before


@pytest.mark.parametrize(
    ("upscaler", "message"),
    [
        ("bicubik", "upscaler='bicubik' is not one of bicubic, bilinear, nearest, or module:object .* mean 'bicubic'"),
        ("bicubic,a=1", "upscaler=bicubic has no options, so a cannot be given"),
        ("no_such_module:f", "upscaler='no_such_module:f': there is no module 'no_such_module'"),
        (
            "math:pi",
            r"upscaler=3\.14.* must be a function of \(images, size\), or a name of bicubic, bilinear, nearest",
        ),
        (3, "upscaler=3 must be a text or a Callable"),
    ],
)
def test_what_is_no_upscaler(upscaler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(method="upscale", upscaler=upscaler)
