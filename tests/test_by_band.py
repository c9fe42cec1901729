"""Guidance by band: its formula, its special cases, and by name on every method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_split import SPLITS, canvases
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff import specs
from cutdiff.checkpoint.model import Model
from cutdiff.cli.arguments import parse
from cutdiff.options import Options
from cutdiff.sampling.guidance import CFG, ByBand
from cutdiff.sampling.split import Butterworth, DownUp, Gaussian, Wavelet
from cutdiff.settings import Settings

RUN: dict[str, Any] = {"num_steps": 3, "height": 96, "width": 128, "seed": 3}
PROMPTS = ["a red house at night", "a blue tree"]


def latents(model: Model, prompt: str | list[str] = PROMPTS, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, **{**RUN, **options}))[-1].latents


@pytest.mark.parametrize("name", SPLITS)
@given(u=canvases(), low_scale=st.floats(-3, 8), high_scale=st.floats(-3, 40))
def test_each_band_is_guided_by_its_own_scale(name: str, u: Tensor, low_scale: float, high_scale: float) -> None:
    split, c = SPLITS[name], u.flip(2) + 0.5
    low, high = (CFG(scale)(c, u, 1.0, 0) for scale in (low_scale, high_scale))
    expected = split.low(low) + (high - split.low(high))
    guided = ByBand(low_scale, high_scale, split)(c, u, 1.0, 0)
    assert (guided.shape, guided.dtype) == (u.shape, u.dtype)
    torch.testing.assert_close(guided, expected, rtol=0, atol={torch.float32: 5e-4, torch.float64: 1e-11}[u.dtype])


@given(u=canvases(), scale=st.floats(-3, 40))
def test_equal_scales_are_plain_guidance_to_the_bit(u: Tensor, scale: float) -> None:
    c = u.flip(2) + 0.5
    assert torch.equal(ByBand(scale, scale)(c, u, 1.0, 0), CFG(scale)(c, u, 1.0, 0))


@pytest.mark.parametrize("wavelet", [Wavelet("db4"), Wavelet("sym4")])
def test_hiwave_takes_ll_from_the_estimate_with_the_prompt(wavelet: Wavelet) -> None:
    """The bands themselves are compared: LL is of the conditional estimate, and the others are guided."""
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 4, 13, 18, generator=generator, dtype=torch.float64) for _ in range(2))
    ll, *details = (v + 7.5 * (w - v) for w, v in zip(wavelet.bands(c), wavelet.bands(u), strict=True))
    expected = wavelet.join(wavelet.bands(c)._replace(**dict(zip(("lh", "hl", "hh"), details, strict=True))), (13, 18))
    assert not torch.allclose(ll, wavelet.bands(c).ll)
    torch.testing.assert_close(ByBand(split=wavelet)(c, u, 1.0, 0), expected)


@pytest.mark.parametrize("method", specs.METHODS)
def test_by_name_on_every_method(tiny_model: Model, method: str) -> None:
    """With equal scales a run is that with plain guidance; with others it is another one, also by its split."""
    for option in ("detail_guidance_scale", "max_guidance_scale"):
        if getattr(specs.resolve("method", method), option, None) not in (None, 1):
            method += f",{option}=None"  # the scale of one stage is that of the high band alone
    plain = latents(tiny_model, method=method, guidance="cfg", guidance_scale=4.0)
    same = latents(tiny_model, method=method, guidance="by_band,low_scale=4", guidance_scale=4.0)
    assert relative_error(same, plain) < 1e-4
    hiwave, smooth = (
        latents(tiny_model, method=method, guidance="by_band", guidance_scale=4.0, split=split)
        for split in ("wavelet", "gaussian,sigma=3")
    )
    assert relative_error(hiwave, plain) > 1e-4
    assert relative_error(hiwave, smooth) > 1e-5


@pytest.mark.parametrize("method", ["direct", "multidiffusion", "cutdiffusion", "magnify"])
def test_an_image_does_not_depend_on_its_neighbours(tiny_model: Model, method: str) -> None:
    both = latents(tiny_model, method=method, guidance="by_band")
    for i, prompt in enumerate(PROMPTS):
        alone = latents(tiny_model, prompt, method=method, guidance="by_band", seed=RUN["seed"] + i)
        assert relative_error(both[i], alone[0]) < 1e-4


def test_a_detail_scale_is_that_of_the_high_band(tiny_model: Model) -> None:
    ours = latents(tiny_model, method="magnify,detail_guidance_scale=2", guidance="by_band,low_scale=2")
    equal = latents(tiny_model, method="magnify,detail_guidance_scale=1", guidance="by_band,low_scale=2")
    assert relative_error(ours, equal) > 1e-4


# ---- The split as an option


@pytest.mark.parametrize(
    ("split", "full"),
    [
        ("wavelet", "wavelet,name=sym4"),
        ("wavelet,name=db4", "wavelet,name=db4"),
        (Wavelet("db4"), "wavelet,name=db4"),
        (Gaussian(sigma=2), "gaussian,sigma=2.0,radius=None"),
        ("gaussian, sigma = 2", "gaussian,sigma=2.0,radius=None"),
        (Butterworth(), "butterworth,order=4,cutoff=0.2"),
        (DownUp(size=(3, 4)), "down_up,factor=2.0,size=(3,4),down=area"),
    ],
)
def test_a_split_is_a_spec_or_an_object_and_is_recorded_in_full(split: Any, full: str) -> None:
    guidance = ByBand(split=split)
    assert guidance.split == full
    spec = specs.spec_of("guidance", guidance)
    assert spec == f"by_band,low_scale=1.0,guidance_scale=7.5,split='{full}'"
    assert specs.resolve("guidance", spec) == guidance
    assert Settings(guidance="by_band", split=split).guidance == guidance


def test_on_the_command_line() -> None:
    flags = ["--guidance", "by_band", "--low-scale", "2", "--split", "gaussian,sigma=3", "--guidance-scale", "35"]
    assert Settings(**parse(flags).options).guidance == ByBand(2.0, 35.0, Gaussian(sigma=3))
    flags = ["--guidance", "by_band,split='wavelet,name=db4'"]
    assert Settings(**parse(flags).options).guidance == ByBand(split=Wavelet("db4"))


@dataclass(frozen=True)
class Mean(Options):
    """A split of one's own: the low band is the mean of each channel."""

    share: float = 1.0

    def low(self, x: Tensor) -> Tensor:
        return self.share * x.mean((2, 3), keepdim=True).expand_as(x)


def test_a_split_of_ones_own_is_used_and_recorded(tiny_model: Model, tmp_path: Path) -> None:
    records = []
    for split in (Mean(), Mean(0.5), f"{__name__}:Mean"):
        result = cutdiff.generate(tiny_model, PROMPTS[0], method="direct", guidance=ByBand(1, 4, split), **RUN)
        records.append((result.record["guidance"], result.record["fingerprint"], result.latents))
    (first, key, drawn), (second, other_key, other), (named, same_key, same) = records
    assert first.startswith("by_band,low_scale=1.0,guidance_scale=4.0,split=")
    assert "Mean" in first
    assert first != second
    assert key != other_key
    assert not torch.equal(drawn, other)
    assert (named, same_key) == (first, key)
    assert torch.equal(drawn, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "wavelett"}, "split='wavelett' is not one of down_up, .* of your own: did you mean 'wavelet'"),
        ({"split": 3}, "split=3 must be a text or a Split"),
        ({"split": CFG()}, "split=CFG.* must be a text or a Split"),
        (
            {"split": "cutdiff.sampling.guidance:CFG"},
            r"split=CFG.* must be an object with `low\(x\)`, or a name of dow",
        ),
        ({"split": "wavelet,name=haar"}, "split='wavelet,name=haar': name='haar' is not one of db4, sym4"),
        ({"split": "wavelet,sigma=1"}, r"split=wavelet: sigma is no option of split wavelet \(name\)"),
        ({"split": "gaussian,sigma=-2"}, "split='gaussian,sigma=-2': sigma=-2"),
        ({"low_scale": float("nan")}, "low_scale=nan must be a finite number"),
    ],
)
def test_what_cannot_be_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(guidance="by_band", **options)
