"""The transformers against diffusers' with the same random weights, their configurations, and positions in a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SEEDS, TOLERANCE, generator, shapes
from tiny import relative_error
from torch import Tensor, nn

from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import Size
from cutdiff.models.flux import Flux, FluxConfig
from cutdiff.models.inside import replaced
from cutdiff.models.positions import AsTrained, frequencies
from cutdiff.models.sd3 import SD3, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config

Network = Flux | SD3
FLUX = FluxConfig(
    latent_channels=4,
    num_layers=2,
    num_single_layers=2,
    num_heads=3,
    axes=(4, 6, 8),
    context_dim=20,
    pooled_dim=12,
    native_size=16,
)
SD3_TINY = SD3Config(
    latent_channels=4,
    num_layers=3,
    num_heads=3,
    head_dim=12,
    context_dim=20,
    pooled_dim=12,
    native_size=16,
    table_size=12,
    dual_layers=(0,),
    qk_norm=True,
)
CONFIGS = pytest.mark.parametrize("config", [FLUX, SD3_TINY], ids=["FLUX", "SD3"])


def build(config: FluxConfig | SD3Config, seed: int = 0) -> Network:
    """A random network, SD3's with a table that no formula gives."""
    network = Flux(config) if isinstance(config, FluxConfig) else SD3(config)
    randomise(network, seed)
    if isinstance(network, SD3):
        network.pos_embed.pos_embed.normal_(generator=generator(seed))
    return network


def inputs(
    config: FluxConfig | SD3Config, seed: int = 1, *, batch: int = 2, size: Size = (8, 6), tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random latents, time, context, pooled text, and numbers that end with a guidance scale."""
    rng = generator(seed)
    return (
        torch.randn(batch, config.latent_channels, *size, generator=rng),
        (torch.rand(1, generator=rng) * 1000).expand(batch),
        torch.randn(batch, tokens, config.context_dim, generator=rng),
        torch.randn(batch, config.pooled_dim, generator=rng),
        torch.cat([torch.full((batch, 6), torch.nan), torch.rand(batch, 1, generator=rng) * 5], dim=1),
    )


def published_flux(config: FluxConfig) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=config.latent_channels * config.patch**2,
        num_layers=config.num_layers,
        num_single_layers=config.num_single_layers,
        attention_head_dim=sum(config.axes),
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.reads_guidance,
        axes_dims_rope=config.axes,  # type: ignore[arg-type]  # any three numbers
    )


def published_sd3(config: SD3Config) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=config.native_size,
        patch_size=config.patch,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.num_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.dim,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.table_size,
        dual_attention_layers=config.dual_layers,
        qk_norm="rms_norm" if config.qk_norm else None,
    )


def run_published_flux(
    theirs: FluxTransformer2DModel, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, numbers: Tensor
) -> Tensor:
    """The prediction for latents whose sides are even, packed as FluxPipeline packs them: 2×2 into the channels."""
    batch, channels, h, w = x.shape
    packed = x.view(batch, channels, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)
    places = torch.zeros(h // 2, w // 2, 3)
    places[..., 1] += torch.arange(h // 2)[:, None]
    places[..., 2] += torch.arange(w // 2)
    out = theirs(
        packed,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=timestep / 1000,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(context.shape[1], 3),
        guidance=numbers[:, -1] if theirs.config["guidance_embeds"] else None,
        return_dict=False,
    )[0]
    return out.view(batch, h // 2, w // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


AXES = st.tuples(*(st.integers(1, 4).map(lambda n: 2 * n) for _ in range(3)))
SIDES = st.integers(1, 9).map(lambda n: 2 * n)


@settings(max_examples=25)
@given(
    config=st.builds(
        FluxConfig,
        latent_channels=st.integers(1, 5),
        num_layers=st.integers(1, 2),
        num_single_layers=st.integers(1, 2),
        num_heads=st.integers(1, 5),
        axes=AXES,
        context_dim=st.sampled_from([5, 16]),
        pooled_dim=st.sampled_from([7, 12]),
        reads_guidance=st.booleans(),
    ),
    seed=SEEDS,
    batch=st.integers(1, 3),
    size=st.tuples(SIDES, SIDES),
    tokens=st.integers(1, 9),
)
@torch.no_grad()
def test_flux_is_the_published_one(config: FluxConfig, seed: int, batch: int, size: Size, tokens: int) -> None:
    theirs, ours = published_flux(config), Flux(config).eval()
    randomise(theirs, seed)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = inputs(config, seed, batch=batch, size=size, tokens=tokens)
    assert relative_error(ours(*given), run_published_flux(theirs, *given)) <= TOLERANCE


@settings(max_examples=25)
@given(
    config=st.builds(
        lambda dual, layers, heads, **fields: SD3Config(
            num_layers=layers, num_heads=heads, dual_layers=tuple(sorted(n for n in dual if n < layers)), **fields
        ),
        dual=st.sets(st.integers(0, 2)),
        layers=st.integers(1, 3),
        heads=st.integers(1, 5),
        latent_channels=st.integers(1, 5),
        head_dim=st.sampled_from([4, 12]),
        patch=st.sampled_from([1, 2, 3]),
        context_dim=st.sampled_from([5, 16]),
        pooled_dim=st.sampled_from([7, 12]),
        native_size=st.sampled_from([6, 12]),
        table_size=st.sampled_from([9, 12]),
        qk_norm=st.booleans(),
    ),
    seed=SEEDS,
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tokens=st.integers(1, 9),
)
@torch.no_grad()
def test_sd3_is_the_published_one(config: SD3Config, seed: int, batch: int, size: Size, tokens: int) -> None:
    """The table of positions is any table here; that of the formula is compared as it is made."""
    theirs, ours = published_sd3(config), SD3(config).eval()
    torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)
    randomise(theirs, seed)
    theirs.pos_embed.pos_embed.normal_(generator=generator(seed))
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    latents = (size[0] * config.patch, size[1] * config.patch)
    given = inputs(config, seed, batch=batch, size=latents, tokens=tokens)
    expected = theirs(*(given[i] for i in (0, 2, 3, 1)), return_dict=False)[0]
    assert relative_error(ours(*given), expected) <= TOLERANCE


FLUX_DEV = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SD3_FILE = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
}
MEDIUM = SD3_FILE | {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 24}
LARGE = SD3_FILE | {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38}


@pytest.mark.parametrize(
    ("ours", "theirs", "file", "count"),
    [
        (Flux, FluxTransformer2DModel, FLUX_DEV | {"guidance_embeds": True}, 11_901_408_320),
        (Flux, FluxTransformer2DModel, FLUX_DEV | {"guidance_embeds": False}, 11_891_178_560),
        (SD3, SD3Transformer2DModel, MEDIUM | {"pos_embed_max_size": 192}, 2_028_328_000),
        (
            SD3,
            SD3Transformer2DModel,
            MEDIUM | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
            2_243_171_520,
        ),
        (SD3, SD3Transformer2DModel, LARGE | {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}, 8_056_627_520),
    ],
    ids=["FLUX.1-dev", "FLUX.1-schnell", "SD3-medium", "SD3.5-medium", "SD3.5-large"],
)
def test_every_key_of_the_full_networks_is_the_published_one(
    request: pytest.FixtureRequest,
    ours: Callable[[Any], nn.Module],
    theirs: type[nn.Module],
    file: dict[str, Any],
    count: int,
) -> None:
    """The files' configurations are written out here, not made from ours."""
    config = {
        "FLUX.1-dev": FluxConfig(),
        "FLUX.1-schnell": FluxConfig(reads_guidance=False),
        "SD3-medium": SD3_MEDIUM,
        "SD3.5-medium": SD35_MEDIUM,
        "SD3.5-large": SD35_LARGE,
    }[request.node.callspec.id]
    with torch.device("meta"):
        network = ours(config)
        assert shapes(network) == shapes(theirs(**file))
    assert sum(p.numel() for p in network.parameters()) == count


@CONFIGS
@torch.no_grad()
def test_bfloat16_is_close_to_float32(config: FluxConfig | SD3Config) -> None:
    """The time and the guidance scale, whose embeddings turn by radians, keep their digits."""
    network, (latents, timestep, context, pooled, numbers) = build(config), inputs(config)
    exact = network(latents, timestep, context, pooled, numbers)
    rounded = network.bfloat16()(latents.bfloat16(), timestep, context.bfloat16(), pooled.bfloat16(), numbers)
    assert rounded.dtype is torch.bfloat16
    assert 1e-4 < relative_error(rounded.float(), exact) < 0.03


@CONFIGS
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=10)
@torch.no_grad()
def test_odd_latents_are_continued_and_cut(config: FluxConfig | SD3Config, size: Size) -> None:
    network, (x, *others) = build(config), inputs(config, size=size)
    rows, columns = (torch.arange(n + n % 2).clamp(max=n - 1) for n in size)
    expected = network(x[:, :, rows][..., columns], *others)[:, :, : size[0], : size[1]]
    assert torch.equal(network(x, *others), expected)


@CONFIGS
@torch.no_grad()
def test_inputs_of_any_layout_give_the_same(config: FluxConfig | SD3Config) -> None:
    network, given = build(config), inputs(config)
    spread = [torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0] for t in given]  # every other number
    spread[0] = spread[0].mT.contiguous().mT.to(memory_format=torch.channels_last)
    assert not any(t.is_contiguous() for t in spread)
    torch.testing.assert_close(network(*spread), network(*given))


@CONFIGS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(config: FluxConfig | SD3Config) -> None:
    network, given = build(config), inputs(config, batch=3)
    alone = torch.cat([network(*(t[i : i + 1] for t in given)) for i in range(3)])
    assert relative_error(network(*given), alone) <= TOLERANCE


@CONFIGS
@torch.no_grad()
def test_they_compile_without_a_graph_break_at_fixed_and_changing_sizes(config: FluxConfig | SD3Config) -> None:
    torch.compiler.reset()
    network = build(replace(config, num_layers=1))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for batch, size in ((2, (8, 8)), (3, (9, 13))):  # recompiled with symbols for what changed
        given = inputs(config, batch=batch, size=size)
        assert relative_error(compiled(*given), network(*given)) <= TOLERANCE


def test_a_network_that_reads_the_guidance_scale_wants_it() -> None:
    with pytest.raises(ValueError, match="reads the guidance scale"):
        build(FLUX)(*inputs(FLUX)[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (16, 56)}, r"axes=\(16, 56\) must be three even numbers"),
        ({"axes": (16, 56, 55)}, r"axes=\(16, 56, 55\) must be three even numbers"),
        ({"axes": (0, 0, 0)}, r"axes=\(0, 0, 0\) must be three even numbers"),
        ({"patch": 0}, "patch=0 must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
    ],
)
def test_shapes_that_no_flux_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FLUX, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_layers": (0, 3)}, r"dual_layers=\(0, 3\) must be among the 3 blocks"),
        ({"head_dim": 2}, "num_heads=3 and head_dim=2 must have a product that 4 divides"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"table_size": 0}, "table_size=0 must be at least 1"),
        ({"pooled_dim": 0}, "pooled_dim=0 must be at least 1"),
    ],
)
def test_shapes_that_no_sd3_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SD3_TINY, **change)


# ---- The table of SD3


@dataclass(frozen=True)
class Stretched(AsTrained):
    """The native positions, stretched over an axis, and a factor of the scores."""

    factor: float = 1.0

    def angles(self, length: int, native: int, dim: int, time: Tensor) -> Tensor:
        return super().angles(length, native, dim, time) * (native / length)

    def sharpness(self, size: Size, native: int, text: int) -> float:
        return self.factor


def expected_table(config: SD3Config, coordinates: tuple[Tensor, Tensor]) -> Tensor:
    """The sines and cosines of rows and columns, in tokens of the table."""
    native = config.native_size // config.patch
    rows, columns = (
        c[:, None] * native / config.table_size * frequencies(config.dim // 2, c.device) for c in coordinates
    )
    down = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, len(columns), -1)
    right = torch.cat([columns.sin(), columns.cos()], dim=1).expand(len(rows), -1, -1)
    return torch.cat([right, down], dim=2).float()


@settings(max_examples=30)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_positions_are_those_of_the_table_and_go_on_beyond_it(size: Size, dtype: torch.dtype) -> None:
    """A table of 16 bits has angles of so many digits, and its neighbours' angle fewer the farther it leads."""
    placed = SD3(SD3_TINY).pos_embed.to(dtype)
    starts = [(SD3_TINY.table_size - n) // 2 for n in size]
    ours = placed.table(size, AsTrained(), torch.tensor(0.5))
    expected = expected_table(SD3_TINY, tuple(start + torch.arange(n) for n, start in zip(size, starts, strict=True)))
    torch.testing.assert_close(ours, expected.to(dtype), rtol=0, atol=1e-5 if dtype is torch.float32 else 0.1)
    if max(size) <= SD3_TINY.table_size:
        (top, left), (h, w) = starts, size
        table = placed.pos_embed.unflatten(1, (SD3_TINY.table_size,) * 2)[0]
        assert torch.equal(ours, table[top : top + h, left : left + w])


@settings(max_examples=30)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@torch.no_grad()
def test_other_positions_stand_around_the_middle_of_the_table(size: Size) -> None:
    ours = SD3(SD3_TINY).pos_embed.table(size, Stretched(), torch.tensor(0.5))
    native = SD3_TINY.native_size // SD3_TINY.patch

    def stretched(n: int) -> Tensor:
        middle = (SD3_TINY.table_size - n) // 2 + (n - 1) / 2
        return middle + (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * native / n

    torch.testing.assert_close(ours, expected_table(SD3_TINY, (stretched(size[0]), stretched(size[1]))))


@torch.no_grad()
def test_sharpness_is_a_factor_of_the_scores_of_sd3() -> None:
    config = replace(SD3_TINY, qk_norm=False)
    network, given = build(config), inputs(config, size=(16, 16))
    with replaced(network, positions=Stretched(factor=4.0)):
        ours = network(*given)
    for name, parameter in network.named_parameters():
        if ".to_q." in name or ".add_q_proj." in name:
            parameter *= 4
    assert relative_error(ours, network(*given)) <= TOLERANCE  # at native size nothing is stretched
    assert math.isfinite(ours.norm())
