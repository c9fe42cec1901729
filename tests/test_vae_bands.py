"""The VAE in bands of rows: the result of the whole picture, in memory that is bounded, whatever the bands."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SEEDS, generator, vae_configs
from tiny import QUICK_VAE, relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.bands import GPU_BAND_BYTES, Limits, in_bands
from cutdiff.models.config import SDXL_VAE, VAEConfig
from cutdiff.models.layers import Downsample
from cutdiff.models.vae import VAE
from cutdiff.planning.meter import Meter

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALL = replace(QUICK_VAE, channels=(8, 16, 16))


def make_vae(config: VAEConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> VAE:
    vae = VAE(config).to(dtype).requires_grad_(False)
    randomise(vae, seed)
    return vae


# ---- The result


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Draw limits from single rows to the whole, and from no picture in memory to all."""
    return Limits(int(10 ** draw(st.floats(0, 6))), int(10 ** draw(st.floats(0, 6))))


@settings(max_examples=40)
@given(
    config=vae_configs(),
    seed=SEEDS,
    dtype=st.sampled_from(list(ROUNDING)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    limits=limits(),
)
def test_decoding_gives_the_whole(
    config: VAEConfig, seed: int, dtype: torch.dtype, shape: tuple[int, int, int], limits: Limits
) -> None:
    vae, (batch, height, width) = make_vae(config, dtype, seed), shape
    latents = torch.randn(batch, config.latent_channels, height, width, generator=generator(seed), dtype=dtype)
    given = latents.clone()
    images = in_bands(vae.decoder, latents, limits)
    assert relative_error(images, vae.decoder(latents)) <= ROUNDING[dtype]
    assert torch.equal(latents, given)
    assert images.is_contiguous()


@settings(max_examples=40)
@given(
    config=vae_configs(),
    seed=SEEDS,
    dtype=st.sampled_from(list(ROUNDING)),
    shape=st.tuples(st.integers(1, 3), st.integers(16, 50), st.integers(16, 50)),
    limits=limits(),
)
def test_encoding_gives_the_whole(
    config: VAEConfig, seed: int, dtype: torch.dtype, shape: tuple[int, int, int], limits: Limits
) -> None:
    """The sizes include those that the factor does not divide."""
    vae, (batch, height, width) = make_vae(config, dtype, seed), shape
    images = torch.rand(batch, config.in_channels, height, width, generator=generator(seed), dtype=dtype) * 2 - 1
    assert relative_error(in_bands(vae.encoder, images, limits), vae.encoder(images)) <= ROUNDING[dtype]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64])
def test_no_row_shows_where_a_band_ended(rows: int) -> None:
    """All rows are equally near the whole: the largest difference of a row is that of rounding."""
    vae = make_vae(SMALL, torch.float64)
    latents = torch.randn(1, 4, 16, 5, generator=generator(1), dtype=torch.float64)
    whole = vae.decoder(latents)
    row_bytes = 16 * latents.shape[3] * 4 * 8  # of the widest picture, 16 channels at full size
    images = in_bands(vae.decoder, latents, Limits(rows * row_bytes, kept_bytes=0))
    assert ((images - whole).abs().amax((0, 1, 3)) <= 1e-12 * whole.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_loses_no_more_than_the_whole_does(dtype: torch.dtype) -> None:
    vae = make_vae(SMALL, dtype)
    latents = torch.randn(1, 4, 16, 12, generator=generator(1)).to(dtype)
    exact = deepcopy(vae).double().decoder(latents.double())
    banded, whole = in_bands(vae.decoder, latents, Limits(20_000, 50_000)), vae.decoder(latents)
    assert banded.dtype == dtype
    assert relative_error(banded.double(), exact) <= 1.2 * relative_error(whole.double(), exact)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_attention_in_chunks_of_queries_is_attention(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make_vae(SMALL, dtype).decoder.mid_block.attentions[0]
    x = torch.randn(2, 16, 7, 5, generator=generator(1)).to(dtype)
    whole = attention(x)
    for queries in (0, 1, 6, 34):
        monkeypatch.setattr("cutdiff.models.vae.SCORE_BYTES", queries * 2 * 35 * 4)
        assert relative_error(attention(x), whole) <= tolerance


def test_attention_on_operands_in_bfloat16_keeps_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes them, with sums in float32 as here; the trained model's scores reach 25."""
    model = cutdiff.load()
    *_, step = cutdiff.denoise(model, "a red house over a meadow at day", method="direct", num_steps=6, width=256)
    exact = model.vae.decode(step.latents, banded=False)
    monkeypatch.setattr("cutdiff.models.vae.SCORE_BYTES", 1 << 20)
    chunked = model.vae.decode(step.latents, banded=False)
    assert relative_error(chunked, exact) <= 1e-5
    monkeypatch.setattr("cutdiff.models.vae._operands", lambda q: torch.bfloat16)
    assert 1e-6 <= relative_error(model.vae.decode(step.latents, banded=False), exact) <= 1e-3


# ---- Memory


def peak_bytes(run: Callable[[], object]) -> int:
    with Meter() as meter:
        run()
    return meter.peak_bytes


@pytest.mark.parametrize("method", ["decode", "encode"])
@torch.no_grad()
def test_sdxl_at_4096_takes_less_than_8_gb_in_16_bits(method: str) -> None:
    """The tensors have only sizes, and the weights count; the whole at once takes three times as much."""
    with torch.device("meta"):
        vae = VAE(SDXL_VAE).half()
        pictures = torch.empty(1, 4, 512, 512) if method == "decode" else torch.empty(1, 3, 4096, 4096)
    run = getattr(vae, method)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert weights + peak_bytes(lambda: run(pictures.half())) <= 7.2e9
    assert peak_bytes(lambda: run(pictures.half(), banded=False)) > 20e9


@pytest.mark.parametrize("height", [128, 512])
def test_what_is_held_is_two_pictures_and_a_few_bands(height: int) -> None:
    """The decoder keeps the pictures of its last level, and of the one before at half the size, and nothing else."""
    vae, width = make_vae(SMALL), 64
    latents = torch.randn(1, 4, height // 4, width // 4, generator=generator(1))
    held = (SMALL.channels[0] + SMALL.channels[1] / 4 + SMALL.out_channels) * height * width * 4
    band_bytes = 4 * SMALL.channels[1] * width * 4
    assert peak_bytes(lambda: in_bands(vae.decoder, latents, Limits(band_bytes, 0))) <= held + 12 * band_bytes
    assert peak_bytes(lambda: vae.decoder(latents)) > 2 * held


# ---- When


@pytest.fixture
def banded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of what runs in bands from here on."""
    sizes: list[tuple[int, ...]] = []

    def watched(network: Callable[[Tensor], Tensor], x: Tensor, _: Limits) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        return in_bands(network, x, Limits(GPU_BAND_BYTES))

    monkeypatch.setattr("cutdiff.models.vae.in_bands", watched)
    return sizes


@torch.no_grad()
def test_size_decides_and_can_be_overruled(model: Model, banded_sizes: list[tuple[int, ...]]) -> None:
    with torch.device("meta"):
        large, small = VAE(SDXL_VAE), VAE(model.vae.config)
        for size in (32, 64, 128):  # 64: an activation of 256 MiB
            large.decode(torch.empty(1, 4, size, size))
        large.encode(torch.empty(1, 3, 1024, 1024))
        assert banded_sizes == [(64, 64), (128, 128), (1024, 1024)]
        small.decode(torch.empty(1, 4, 96, 96))  # 6 times the native size
        small.encode(torch.empty(1, 3, 768, 768))
        large.decode(torch.empty(1, 4, 128, 128), banded=False)
        large.encode(torch.empty(1, 3, 1024, 1024), banded=False)
        assert len(banded_sizes) == 3
        small.decode(torch.empty(1, 4, 8, 8), banded=True)
        small.encode(torch.empty(1, 3, 64, 64), banded=True)
        assert banded_sizes[3:] == [(8, 8), (64, 64)]


@pytest.mark.parametrize("banded", [None, False])
@pytest.mark.parametrize("side", [16, 47, 64])
def test_a_picture_of_any_size_keeps_its_digits(model: Model, side: int, banded: bool | None) -> None:
    """The error of a group norm in channels_last grows eightfold with each doubling of the side: a large picture is
    decoded in bands, or whole in the other layout."""
    latents = torch.randn(1, 4, side, side, generator=generator(0)).contiguous(memory_format=torch.channels_last)
    exact = deepcopy(model.vae).double().decode(latents.double(), banded=False)
    assert relative_error(model.vae.decode(latents, banded=banded).double(), exact) <= 3e-5


def test_what_is_trained_runs_whole(monkeypatch: pytest.MonkeyPatch, banded_sizes: list[tuple[int, ...]]) -> None:
    monkeypatch.setattr("cutdiff.models.vae.CPU_LARGE_BYTES", 0)
    vae = make_vae(SMALL)
    latents = torch.randn(1, 4, 3, 3, generator=generator(1))
    assert vae.decode(latents.clone().requires_grad_()).requires_grad
    vae.decoder.requires_grad_(True)
    assert vae.decode(latents).requires_grad
    assert vae.requires_grad_(True).decode(latents).requires_grad
    assert not banded_sizes
    with torch.no_grad():
        vae.decode(latents)
    assert len(banded_sizes) == 1


def test_a_run_decodes_in_bands(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, banded_sizes: list[tuple[int, ...]]
) -> None:
    """It decodes in bands in float32 too, where float16 overflows."""
    vae = deepcopy(tiny_model.vae).half()
    vae.config = replace(vae.config, force_upcast=False)
    vae.decoder.conv_in.weight.mul_(6e4)
    latents = torch.randn(2, 4, 8, 6, generator=generator(1))
    model = replace(tiny_model, vae=vae)
    whole = cutdiff.decode(model, latents)
    for limit in ("LARGE_BYTES", "CPU_LARGE_BYTES"):
        monkeypatch.setattr(f"cutdiff.models.vae.{limit}", 0)
    torch.testing.assert_close(cutdiff.decode(model, latents), whole, rtol=0, atol=1e-5)
    assert banded_sizes == [(8, 6)] * 4


# ---- What cannot run


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (torch.sigmoid, "sigmoid cannot run in bands: add it to FUNCTIONS in cutdiff.models.bands"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "mode='reflect', value=None cannot run in bands"),
        (
            lambda x: F.conv_transpose2d(x, torch.ones(4, 2, 3, 3), None, 2, 1),
            r"kernel=\(3, 3\), stride=2, padding=1 cannot run in bands: doubling by 4×4 can",
        ),
    ],
)
def test_another_function_is_an_error(network: Callable[[Tensor], Tensor], expected: str) -> None:
    with pytest.raises(NotImplementedError, match=expected):
        in_bands(network, torch.ones(1, 4, 6, 6))


def test_a_term_that_is_read_after_its_sum_is_an_error() -> None:
    norm = torch.nn.GroupNorm(2, 4).requires_grad_(False)

    def network(x: Tensor) -> Tensor:
        y = norm(F.silu(x))
        kept = norm(y)  # takes the statistics of y
        return (y + kept) + y

    with pytest.raises(RuntimeError, match="a sum took the place of its left term, which is read after it"):
        in_bands(network, torch.randn(1, 4, 6, 6, generator=generator(0)))


@pytest.mark.parametrize("band_bytes", [1, 10_000])
def test_padding_and_strides_of_other_networks(band_bytes: int) -> None:
    """The VAE does not use these: symmetric downsampling, dilation, groups, and zeros above."""
    down = Downsample(8)
    dilated = torch.nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)

    def network(x: Tensor) -> Tensor:
        return dilated(F.pad(down(x), (1, 2, 3, 0)))

    x = torch.randn(2, 8, 13, 11, generator=generator(0))
    with torch.no_grad():
        assert relative_error(in_bands(network, x, Limits(band_bytes)), network(x)) <= 1e-6
