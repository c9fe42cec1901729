"""Positions of a transformer past its native size: published formulas, limits, and the run that is given some."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods.shared import Run
from cutdiff.models.config import Size
from cutdiff.models.extrapolation import NTK, DyPE, Interpolation, UltraImage, YaRN, ramp
from cutdiff.models.flux import Flux, FluxConfig
from cutdiff.models.positions import AsTrained, frequencies, with_positions
from cutdiff.sampling.flow import FlowConfig
from cutdiff.sampling.stages import Stage
from cutdiff.specs import POSITIONS, resolve

ONE = torch.ones((), dtype=torch.float64)
NATIVE, DIM = 64, 56
"""The tokens of a side, and the features of an axis, of FLUX.1 at 1024 px."""
TINY = FluxConfig(
    latent_channels=4,
    num_layers=1,
    num_single_layers=1,
    num_heads=2,
    axes=(4, 8, 8),
    context_dim=12,
    pooled_dim=8,
    reads_guidance=False,
    native_size=8,
)


def turns(positions: Any, length: int, native: int = NATIVE, dim: int = DIM, time: Tensor | float = 1.0) -> Tensor:
    """The frequencies that the positions give an axis, (dim / 2,)."""
    angles = positions.angles(length, native, dim, torch.as_tensor(time, dtype=torch.float64))
    assert angles.shape == (length, dim // 2)
    assert angles.dtype == torch.float64
    torch.testing.assert_close(angles, torch.arange(length)[:, None] * angles[1])
    return angles[1]


lengths = st.integers(2, 600)
times = st.floats(0, 1)
everything = st.sampled_from(
    [*POSITIONS, "ntk,factor=10", "dype,of=ntk", "dype,of=interpolation", "yarn,fast=4,slow=0.5", "ultraimage,count=3"]
)
dims = st.sampled_from([2, 4, 8, 56])


# ---- What all have in common


@given(everything, lengths, lengths, dims, times, st.booleans())
def test_an_axis_no_longer_than_native_is_as_trained(
    spec: str, length: int, more: int, dim: int, time: float, proportional: bool
) -> None:
    positions = resolve("positions", f"{spec},proportional={proportional}")
    assert torch.equal(turns(positions, length, length + more, dim, time), turns(AsTrained(), length, length, dim))
    assert torch.equal(turns(positions, length, length, dim, time), frequencies(dim, ONE.device))
    assert positions.sharpness((length, more), max(length, more), 7) == 1


@given(everything, lengths, lengths, dims, times)
def test_a_longer_axis_is_never_turned_faster_nor_the_wrong_way(
    spec: str, native: int, more: int, dim: int, time: float
) -> None:
    trained, changed = (
        turns(resolve("positions", each), native + more, native, dim, time) for each in ("as_trained", spec)
    )
    assert (changed <= trained * (1 + 1e-12)).all()
    assert (changed > 0).all()
    if not spec.startswith(("dype", "ultraimage")):  # which may go beyond
        assert (changed >= trained * native / (native + more) * (1 - 1e-12)).all()
    sharpness = resolve("positions", spec).sharpness((native + more, native), native, 5)
    assert 1 <= sharpness <= resolve("positions", spec).sharpness((native + more, native + more), native, 5)


# ---- Published formulas


@pytest.mark.parametrize(("native", "length"), [(64, 128), (64, 256), (100, 150), (2048, 16384)])
@pytest.mark.parametrize("dim", [56, 128])
@pytest.mark.parametrize(("fast", "slow"), [(32, 1), (4, 0.5)])
def test_yarn_is_that_of_transformers(native: int, length: int, dim: int, fast: float, slow: float) -> None:
    factor = length / native
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, max_position_embeddings=length)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": factor,
        "original_max_position_embeddings": native,
        "beta_fast": fast,
        "beta_slow": slow,
    }
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    yarn = YaRN(fast=fast, slow=slow)
    torch.testing.assert_close(turns(yarn, length, native, dim).float(), expected, rtol=1e-5, atol=0)
    assert yarn.sharpness((length, length), native, 0) == pytest.approx(scale**2)
    assert yarn.sharpness((length, native), native, 0) == pytest.approx(scale)
    assert replace(yarn, temperature=False).sharpness((length, length), native, 0) == 1


@pytest.mark.parametrize(("native", "length"), [(64, 128), (64, 256), (100, 150)])
@pytest.mark.parametrize("dim", [4, 56, 128])
def test_ntk_is_the_change_of_the_base_of_transformers(native: int, length: int, dim: int) -> None:
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, max_position_embeddings=native)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0}
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    torch.testing.assert_close(turns(NTK(), length, native, dim).float(), expected, rtol=1e-5, atol=0)


def test_interpolation_keeps_all_within_the_trained_length() -> None:
    assert torch.equal(turns(Interpolation(), 160), frequencies(DIM, ONE.device) * 0.4)


def test_a_factor_of_the_base_is_that_of_i_max_with_its_bound() -> None:
    share = torch.arange(28, dtype=torch.float64) * 2 / 56
    changed, interpolated = 1e5**-share, 1e4**-share / 4
    assert (changed < interpolated).any()
    torch.testing.assert_close(turns(NTK(factor=10), 256), torch.maximum(changed, interpolated))
    i_max = NTK(factor=10, proportional=True)
    assert i_max.sharpness((256, 256), 64, 512) == pytest.approx(math.sqrt(math.log(65536 + 512, 4096 + 512)))


@pytest.mark.parametrize("time", [1.0, 0.7, 0.2, 0.05])
@pytest.mark.parametrize("length", [100, 256])
def test_dype_is_that_of_its_code(length: int, time: float) -> None:
    s, kappa = length / 64, time**2

    def share(pair: int, fast: float, slow: float) -> float:
        first, last = (28 * math.log(64 / (2 * math.pi * r * kappa)) / math.log(10_000) for r in (fast, slow))
        first, last = max(0, math.floor(first)), min(28, math.ceil(last))
        return min(1.0, max(0.0, (pair - first) / (last - first or 0.001)))

    expected = []
    for i in range(28):
        own = 10_000 ** (-i / 28)
        changed = (1 - share(i, 1.25, 0.75)) * (10_000 * s ** (56 / 54)) ** (-i / 28) + share(i, 1.25, 0.75) * own / s
        expected.append((1 - share(i, 16, 2)) * own + share(i, 16, 2) * changed)
    torch.testing.assert_close(turns(DyPE(), length, time=time), torch.tensor(expected, dtype=torch.float64))
    of_ntk = [(10_000 * (s ** (56 / 54)) ** (2 * kappa)) ** (-i / 28) for i in range(28)]
    torch.testing.assert_close(turns(DyPE(of="ntk"), length, time=time), torch.tensor(of_ntk, dtype=torch.float64))
    by = turns(DyPE(of="interpolation", strength=1.5, power=1), length, time=time) / frequencies(DIM, ONE.device)
    torch.testing.assert_close(by, torch.full((28,), s ** (-1.5 * time), dtype=torch.float64))


@given(st.sampled_from(["yarn", "ntk", "interpolation"]), st.integers(65, 600), times, times)
def test_dype_goes_back_to_what_was_trained(of: Any, length: int, early: float, late: float) -> None:
    late, early = sorted((early, late))
    at = [turns(DyPE(of=of), length, time=time) for time in (early, late, 0)]
    assert (at[0] <= at[1] * (1 + 1e-12)).all()
    assert torch.equal(at[2], frequencies(DIM, ONE.device))


def test_dype_sharpens_as_yarn_does() -> None:
    assert DyPE().sharpness((256, 128), 64, 0) == YaRN().sharpness((256, 128), 64, 0) > 1
    assert DyPE(of="ntk").sharpness((256, 128), 64, 0) == 1


def test_ultraimage_slows_the_pair_that_it_slows_in_its_code() -> None:
    published = UltraImage(reach=2)  # FLUX.1 saw pictures up to 2048 px; the paper draws at 3600 px
    own, changed = frequencies(DIM, ONE.device), turns(published, 225)
    assert [*(own != changed).nonzero().flatten()] == [9]
    assert changed[9] == pytest.approx(0.85 * 2 * math.pi / 225)
    assert torch.equal(turns(published, 128), own)
    assert published.sharpness((225, 64), 64, 0) == 1.1
    assert published.sharpness((128, 64), 64, 0) == 1


@given(st.integers(65, 600), st.integers(1, 40))
def test_ultraimage_slows_so_many_pairs_until_the_axis_lies_within_a_period(length: int, count: int) -> None:
    own, changed = frequencies(DIM, ONE.device), turns(UltraImage(count=count, period=1), length)
    off = (2 * math.pi / own - NATIVE).abs()
    slowed = off <= off.sort().values[min(count, 28) - 1]
    assert torch.equal(changed[~slowed], own[~slowed])
    assert (changed[slowed] * length <= 2 * math.pi * (1 + 1e-12)).all()


@given(lengths, times, st.floats(0.1, 40), st.floats(0.1, 1))
def test_a_ramp_is_0_for_fast_pairs_and_1_for_slow_ones(native: int, time: float, fast: float, share: float) -> None:
    own = frequencies(DIM, ONE.device)
    weights = ramp(own, native, fast * ONE, fast * share * ONE)
    rotations = native * own / (2 * math.pi)
    assert (weights.diff() >= 0).all()
    assert (weights[rotations > fast * (1 + 1e-9)] <= (weights.diff().max() if len(weights) > 1 else 0)).all()
    assert (weights[1:][rotations[:-1] < fast * share * (1 - 1e-9)] == 1).all()


# ---- In a network and in a run


def flux(positions: Any = None) -> Flux:
    torch.manual_seed(0)
    network = Flux(TINY).eval().requires_grad_(False)
    return network if positions is None else with_positions(network, positions)


def predict(network: Flux, size: tuple[int, int], time: float = 500.0) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    given_ = (torch.randn(2, *shape, generator=draws) for shape in ((4, *size), (5, 12), (8,)))
    latents, context, pooled = given_
    return network(latents, torch.full((2,), time), context, pooled)


@pytest.mark.parametrize("spec", [*POSITIONS, "as_trained,proportional=True"])
def test_a_network_with_other_positions_differs_only_past_its_native_size(spec: str) -> None:
    trained, changed = flux(), flux(resolve("positions", spec))
    for size in ((8, 8), (5, 8)):
        assert torch.equal(predict(trained, size), predict(changed, size))
    assert torch.equal(predict(trained, (16, 8)), predict(changed, (16, 8))) == (spec == "as_trained")
    assert changed.x_embedder.weight is with_positions(changed, AsTrained()).x_embedder.weight


def test_time_reaches_positions_and_the_network_itself_is_as_before() -> None:
    trained = flux()
    changed = with_positions(trained, DyPE(of="ntk"))
    assert trained.positions == AsTrained()
    clean = predict(changed, (16, 16), 1e-3), predict(trained, (16, 16), 1e-3)
    torch.testing.assert_close(*clean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(changed, (16, 16), 900), predict(trained, (16, 16), 900), rtol=1e-3, atol=1e-4)


class Looking(AsTrained):
    """Positions of one's own."""


class Learned(nn.Module):
    """Positions of one's own that are a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def angles(self, length: int, native: int, dim: int, time: Tensor) -> Tensor:
        return AsTrained().angles(length, native, dim, time) * self.weight

    def sharpness(self, size: Size, native: int, text: int) -> float:
        return 1.0


def test_positions_that_are_a_module_become_no_part_of_the_network() -> None:
    network = flux()
    changed = with_positions(network, Learned())
    assert isinstance(changed.positions, Learned)
    assert network.positions == AsTrained()
    assert changed.state_dict().keys() == network.state_dict().keys()


@pytest.fixture(scope="module")
def flow_model(tiny_model: Model) -> Model:
    """A random transformer, trained with flow matching, in the place of the U-Net."""
    unet = tiny_model.unet.config
    torch.manual_seed(0)
    network = Flux(replace(TINY, context_dim=unet.context_dim, pooled_dim=unet.pooled_dim))
    return replace(tiny_model, unet=network.eval().requires_grad_(False), noise=FlowConfig())


def drawn(model: Model, method: Any, positions: Any, side: int = 128) -> cutdiff.Result:
    options: dict[str, Any] = {"num_steps": 2, "guidance_scale": 3, "height": side, "width": 96}
    return cutdiff.generate(model, "a red tent", method=method, positions=positions, **options)


def test_a_run_has_the_positions_and_the_model_has_its_own(flow_model: Model) -> None:
    read = []

    def method(run: Run) -> list[Stage]:
        read.append(run.denoiser.unet.positions)
        return [Stage("one", range(run.num_steps), run.denoiser)]

    given_ = ("ntk,factor=10", YaRN(), Looking(), None)
    records = [drawn(flow_model, method, positions).record for positions in given_]
    assert read == [NTK(factor=10), YaRN(), Looking(), AsTrained()]
    assert flow_model.unet.positions == AsTrained()
    texts = [record.get("positions") for record in records]
    assert texts[0] == "ntk,proportional=False,factor=10.0"
    assert texts[1] == "yarn,proportional=False,fast=32.0,slow=1.0,temperature=True"
    assert str(texts[2]).startswith("<Looking ")
    assert texts[3] is None
    assert len({record["fingerprint"] for record in records}) == 4


@pytest.mark.parametrize("method", ["direct", "imax", "hiflow", "diffusehigh", "rectifiedhr", "upsample_guidance"])
def test_whatever_sees_more_than_the_native_size_is_told_otherwise(flow_model: Model, method: str) -> None:
    trained = drawn(flow_model, method, None)
    assert torch.equal(trained.latents, drawn(flow_model, method, "as_trained").latents)
    changed = drawn(flow_model, method, "ntk")
    assert not torch.allclose(trained.latents, changed.latents, rtol=1e-3, atol=1e-3)
    assert "positions_unread" not in changed.record
    assert changed.record["network_evaluations"] == trained.record["network_evaluations"]


@pytest.mark.parametrize(
    ("method", "side"), [("multidiffusion", 128), ("magnify", 128), ("upscale", 128), ("direct", 64)]
)
def test_what_sees_the_native_size_alone_is_the_same_to_the_bit(flow_model: Model, method: str, side: int) -> None:
    options: dict[str, Any] = {"num_steps": 2, "height": side, "width": side}
    trained, changed, own = (
        cutdiff.generate(flow_model, "a", method=method, positions=positions, **options)
        for positions in (None, "dype", Looking())
    )
    assert torch.equal(trained.latents, changed.latents)
    unread = ["positions_unread" in result.record for result in (trained, changed, own)]
    assert unread == [False, True, isinstance(Looking(), AsTrained)]


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("ntk", r"^positions=ntk is for a transformer .* and this model has a UNet: leave it out$"),
        ("nkt", r"^positions='nkt' is not one of as_trained, .*: did you mean 'ntk'\?$"),
        ("ntk,factor=0.5", r"^positions='ntk,factor=0.5': factor=0.5 must be a finite number at least 1 or None$"),
        ("dype,of=pi", r"^positions='dype,of=pi': of='pi' is not one of yarn, ntk, interpolation"),
        ("yarn,fast=1,slow=2", r"slow=2 must be at most fast=1: change one, or leave one out$"),
        (frequencies, r"^positions=<function frequencies.* must be an object with `angles\(…\)` and `sharpness\(…\)`"),
        (type("Half", (), {"angles": turns})(), r"must be an object with `angles\(…\)` and `sharpness\(…\)`"),
    ],
)
def test_what_is_no_positions_for_a_model(tiny_model: Model, positions: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cutdiff.generate(tiny_model, "a", method="direct", positions=positions, num_steps=1)
