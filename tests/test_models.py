"""The networks against diffusers and transformers with the same random weights, and their configurations."""

from __future__ import annotations

import math
import string

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import QUICK_UNET, QUICK_VAE, relative_error
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cutdiff.bench.baselines import published_unet, published_vae
from cutdiff.checkpoint.random_model import randomise
from cutdiff.models.config import SD15_UNET, SD21_UNET, SDXL_UNET, SDXL_VAE, UNetConfig, VAEConfig
from cutdiff.models.text import TextEncoders, TextStates
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE, DiagonalGaussian

TOLERANCE = 1e-5
SEEDS = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


# ---- U-Net


@st.composite
def unet_configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(2, 4))
    norm_groups = draw(st.sampled_from([2, 4]))  # torch normalises no group of one value, as 8 could be at 1×1
    heads = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=levels, max_size=levels))
    widths = draw(st.lists(st.sampled_from([8, 16, 24]), min_size=levels, max_size=levels))
    layers = draw(st.lists(st.integers(0, 2), min_size=levels, max_size=levels))
    pooled_dim, size_embedding_dim = draw(st.sampled_from([(7, 2), (12, 2), (12, 8), (0, 0)]))
    return UNetConfig(
        in_channels=draw(st.integers(3, 5)),
        out_channels=draw(st.integers(3, 5)),
        channels=tuple(widths),
        layers_per_block=draw(st.integers(1, 3)),
        transformer_layers=tuple(layers),
        mid_transformer_layers=layers[-1] or draw(st.integers(1, 2)),
        num_heads=tuple(heads),
        context_dim=draw(st.sampled_from([5, 16])),
        pooled_dim=pooled_dim,
        size_embedding_dim=size_embedding_dim,
        linear_projections=draw(st.booleans()),
        norm_groups=norm_groups,
    )


def unet_inputs(
    config: UNetConfig, seed: int, batch: int, height: int, width: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = generator(seed)
    return (
        torch.randn(batch, config.in_channels, height, width, generator=rng),
        torch.rand(batch, generator=rng) * 999,
        torch.randn(batch, tokens, config.context_dim, generator=rng),
        torch.randn(batch, config.pooled_dim, generator=rng),
        torch.randint(0, 2048, (batch, 6), generator=rng),
    )


@torch.no_grad()
def run_published_unet(
    unet: UNet2DConditionModel, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, size_ids: Tensor
) -> Tensor:
    conditions = {"text_embeds": pooled, "time_ids": size_ids}
    return unet(x, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]


@settings(max_examples=25)
@given(
    config=unet_configs(),
    seed=SEEDS,
    batch=st.integers(1, 3),
    height=st.integers(5, 19),
    width=st.integers(5, 19),
    tokens=st.integers(1, 9),
)
@torch.no_grad()
def test_unet_is_the_published_one(
    config: UNetConfig, seed: int, batch: int, height: int, width: int, tokens: int
) -> None:
    theirs, ours = published_unet(config), UNet(config).eval()
    randomise(theirs, seed)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = unet_inputs(config, seed, batch, height, width, tokens)
    assert relative_error(ours(*inputs), run_published_unet(theirs, *inputs)) <= TOLERANCE


def test_every_key_of_sdxl_base_is_the_published_one() -> None:
    """The configuration of stable-diffusion-xl-base-1.0 is written out here, not made from ours."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[5, 10, 20],  # type: ignore[arg-type]  # annotated as a tuple, a list in every file
            transformer_layers_per_block=[1, 2, 10],  # type: ignore[arg-type]
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
            sample_size=128,
        )
        ours = UNet(SDXL_UNET)
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 2_567_463_684
    assert [block.attentions[0].transformer_blocks[0].attn1.heads for block in theirs.down_blocks[1:]] == [10, 20]


def test_every_key_of_the_sdxl_vae_is_the_published_one() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            sample_size=1024,
        )
        ours = VAE(SDXL_VAE)
    assert shapes(ours) == shapes(theirs)
    assert SDXL_VAE.scaling_factor == 0.13025
    assert SDXL_VAE.factor == 8


@pytest.mark.large
@pytest.mark.parametrize("config", [SDXL_UNET, SD15_UNET, SD21_UNET], ids=["SDXL", "SD 1.5", "SD 2.1"])
@torch.no_grad()
def test_full_size_unet_is_the_published_one(config: UNetConfig) -> None:
    """Up to 2.6 billion float32 weights are in memory once: 10 GiB, and the activations of one image."""
    with torch.device("meta"):
        theirs, ours = published_unet(config), UNet(config)
    theirs.to_empty(device="cpu")
    randomise(theirs, seed=0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert ours.conv_in.weight.data_ptr() == theirs.conv_in.weight.data_ptr()
    inputs = unet_inputs(config, seed=1, batch=1, height=64, width=64, tokens=77)
    assert relative_error(ours.eval()(*inputs), run_published_unet(theirs, *inputs)) <= 1e-4


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours() -> None:
    unet = UNet(QUICK_UNET)
    randomise(unet, seed=0)
    inputs = unet_inputs(QUICK_UNET, seed=1, batch=3, height=9, width=12, tokens=5)
    alone = torch.cat([unet(*(tensor[i : i + 1] for tensor in inputs)) for i in range(3)])
    assert relative_error(unet(*inputs), alone) <= TOLERANCE


@torch.no_grad()
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_text_that_was_read_once_gives_what_reading_it_for_every_item_gives(texts: int, items: int, seed: int) -> None:
    unet = UNet(QUICK_UNET)
    randomise(unet, seed)
    x, timesteps, _, pooled, size_ids = unet_inputs(QUICK_UNET, seed, batch=items, height=8, width=6, tokens=5)
    states = torch.randn(texts, 5, QUICK_UNET.context_dim, generator=generator(seed))
    rows = torch.randint(texts, (items,), generator=generator(seed))
    whole = unet(x, timesteps, states[rows], pooled, size_ids)
    read = unet.read(states)[rows]
    assert relative_error(unet(x, timesteps, read, pooled, size_ids), whole) <= TOLERANCE
    part = unet(x[::2], timesteps[::2], read[::2], pooled[::2], size_ids[::2])
    assert len(read) == items
    assert relative_error(part, whole[::2]) <= TOLERANCE


# A test for the graph as dynamo captures it; what a backend makes of it is not ours.
BACKEND = "aot_eager"


@torch.no_grad()
def test_unet_compiles_without_a_graph_break_at_fixed_and_changing_sizes() -> None:
    torch.compiler.reset()
    unet = UNet(QUICK_UNET)
    randomise(unet, seed=0)
    compiled = torch.compile(unet, fullgraph=True, backend=BACKEND)
    for batch, height, width in ((2, 16, 16), (3, 9, 13)):  # recompiled with symbols for what changed
        inputs = unet_inputs(QUICK_UNET, seed=1, batch=batch, height=height, width=width, tokens=5)
        assert relative_error(compiled(*inputs), unet(*inputs)) <= TOLERANCE
    x, timesteps, context, *rest = inputs
    read = unet.read(context)
    assert relative_error(compiled(x, timesteps, read, *rest), unet(*inputs)) <= TOLERANCE


@torch.no_grad()
def test_vae_compiles_without_a_graph_break_at_fixed_and_changing_sizes() -> None:
    torch.compiler.reset()
    vae = VAE(QUICK_VAE)
    randomise(vae, seed=0)
    decode = torch.compile(vae.decode, fullgraph=True, backend=BACKEND)
    for batch, height, width in ((2, 4, 4), (3, 3, 5)):
        latents = torch.randn(batch, 4, height, width, generator=generator(batch))
        assert relative_error(decode(latents), vae.decode(latents)) <= TOLERANCE


# ---- VAE


@st.composite
def vae_configs(draw: st.DrawFn) -> VAEConfig:
    levels = draw(st.integers(2, 4))
    return VAEConfig(
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        channels=tuple(draw(st.lists(st.sampled_from([8, 16, 24]), min_size=levels, max_size=levels))),
        layers_per_block=draw(st.integers(1, 3)),
        latent_channels=draw(st.integers(1, 8)),
        norm_groups=draw(st.sampled_from([2, 4])),
        scaling_factor=draw(st.floats(0.1, 2)),
        shift_factor=draw(st.sampled_from([0.0, 0.0609, -1.5])),
        quant_conv=draw(st.booleans()),
    )


def same_vaes(config: VAEConfig, seed: int) -> tuple[VAE, AutoencoderKL]:
    theirs, ours = published_vae(config), VAE(config).eval()
    randomise(theirs, seed)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@settings(max_examples=20)
@given(config=vae_configs(), seed=SEEDS, batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9))
@torch.no_grad()
def test_vae_decodes_as_the_published_one(config: VAEConfig, seed: int, batch: int, height: int, width: int) -> None:
    ours, theirs = same_vaes(config, seed)
    latents = torch.randn(batch, config.latent_channels, height, width, generator=generator(seed))
    images = ours.decode(latents)
    assert images.shape == (batch, config.out_channels, height * config.factor, width * config.factor)
    expected = theirs.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    assert relative_error(images, expected) <= TOLERANCE


@settings(max_examples=20)
@given(config=vae_configs(), seed=SEEDS, batch=st.integers(1, 3), height=st.integers(16, 50), width=st.integers(16, 50))
@torch.no_grad()
def test_vae_encodes_as_the_published_one(config: VAEConfig, seed: int, batch: int, height: int, width: int) -> None:
    """Both drop the same pixels where the factor does not divide the size."""
    ours, theirs = same_vaes(config, seed)
    images = torch.rand(batch, config.in_channels, height, width, generator=generator(seed)) * 2 - 1
    distribution, expected = ours.encode(images), theirs.encode(images, return_dict=False)[0]
    assert relative_error(distribution.mean, (expected.mean - config.shift_factor) * config.scaling_factor) <= TOLERANCE
    assert relative_error(distribution.std, expected.std * config.scaling_factor) <= TOLERANCE
    unscaled = distribution.logvar - 2 * math.log(config.scaling_factor)
    torch.testing.assert_close(unscaled, expected.logvar, rtol=1e-5, atol=1e-4)


def test_a_sample_depends_on_its_generator_alone() -> None:
    mean, logvar = torch.randn(2, 2, 4, 3, 5, generator=generator(0))
    distribution = DiagonalGaussian(mean, logvar)
    torch.manual_seed(1)
    first, state = distribution.sample(generator(7)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(distribution.sample(generator(7)), first)
    assert not torch.equal(distribution.sample(generator(8)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "sampling moved the global generator"


def test_samples_have_the_mean_and_deviation_of_their_distribution() -> None:
    distribution = DiagonalGaussian(torch.full((100_000,), 3.0), torch.full((100_000,), 2 * math.log(0.5)))
    samples = distribution.sample(generator(0))
    assert samples.mean().item() == pytest.approx(3.0, abs=0.01)
    assert samples.std().item() == pytest.approx(0.5, abs=0.01)


def test_divergence_is_zero_from_the_standard_normal_and_the_published_one_elsewhere() -> None:
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(DiagonalGaussian(zeros, zeros).kl(), torch.zeros(2))
    mean, logvar = torch.randn(2, 3, 4, 3, 5, generator=generator(0))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


# ---- Text

LENGTH = 12
PROMPTS = ["a red tent", "", "the moon", "a 😀"]


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    letters = string.ascii_lowercase
    words = ["<|startoftext|>", "<|endoftext|>", "!</w>", *letters, *(f"{a}</w>" for a in letters), "re", "red</w>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("r", "e"), ("re", "d</w>")],  # type: ignore[arg-type]  # annotated as strings, which fail
        pad_token=pad_token,
        model_max_length=LENGTH,
    )


def make_encoder(kind: type, width: int, layers: int, activation: str) -> nn.Module:
    """A CLIP text encoder with random weights, which ends its prompts at token 1."""
    config = CLIPTextConfig(
        vocab_size=57,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=20,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = kind(config)
    randomise(encoder, seed=width)
    return encoder


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    """SDXL's pair of encoders: widths, depths and activations differ, and the second pads with "!"."""
    return TextEncoders(
        tokenizer=make_tokenizer("<|endoftext|>"),
        tokenizer_2=make_tokenizer("!</w>"),
        text_encoder=make_encoder(CLIPTextModel, 16, 3, "quick_gelu"),  # type: ignore[arg-type]
        text_encoder_2=make_encoder(CLIPTextModelWithProjection, 24, 4, "gelu"),  # type: ignore[arg-type]
    )


def token_ids(text: TextEncoders, prompts: list[str]) -> list[Tensor]:
    """The token ids (B, L) for each encoder, of prompts that fit one chunk."""
    (chunk,) = text.tokenize(prompts)
    return [tokens.ids for tokens in chunk]


def test_token_ids_are_framed_and_padded_for_each_encoder(text: TextEncoders) -> None:
    first, second = token_ids(text, PROMPTS)
    assert first.shape == second.shape == (len(PROMPTS), LENGTH)
    a, red, t, e, n, final_t = 29, 56, 22, 7, 16, 48
    framed = [0, a, red, t, e, n, final_t, 1]
    assert first[0].tolist() == [*framed, 1, 1, 1, 1]
    assert second[0].tolist() == [*framed, 2, 2, 2, 2]


@torch.no_grad()
def test_text_states_are_the_penultimate_ones_side_by_side_and_the_second_pooled(text: TextEncoders) -> None:
    states = text.encode(PROMPTS)
    first, second = token_ids(text, PROMPTS)
    captured = []
    encoder, encoder_2 = text.text_encoder, text.text_encoder_2
    assert encoder_2 is not None
    layers_1 = encoder.get_submodule("encoder.layers")
    layers_2 = encoder_2.get_submodule("text_model.encoder.layers")
    assert isinstance(layers_1, nn.ModuleList)
    assert isinstance(layers_2, nn.ModuleList)
    hooks = [
        layers[-2].register_forward_hook(lambda _module, _args, output: captured.append(output))
        for layers in (layers_1, layers_2)
    ]
    encoder(first)
    output = encoder_2(second)
    for hook in hooks:
        hook.remove()
    penultimate = [output[0] if isinstance(output, tuple) else output for output in captured]
    assert torch.equal(states.context, torch.cat(penultimate, dim=-1))
    assert states.context.shape == (len(PROMPTS), LENGTH, 16 + 24)

    assert torch.equal(states.pooled, output.text_embeds)
    ends = (second == 1).int().argmax(dim=1)
    pooled = encoder_2.text_projection(output.last_hidden_state[torch.arange(len(PROMPTS)), ends])
    torch.testing.assert_close(states.pooled, pooled)


@torch.no_grad()
def test_a_prompt_does_not_depend_on_its_neighbours(text: TextEncoders) -> None:
    together = text.encode(PROMPTS)
    alone = [text.encode([prompt]) for prompt in PROMPTS]
    assert relative_error(together.context, torch.cat([states.context for states in alone])) <= TOLERANCE
    assert relative_error(together.pooled, torch.cat([states.pooled for states in alone])) <= TOLERANCE


def test_encoding_a_prompt_records_no_gradients_and_encoding_tokens_does(text: TextEncoders) -> None:
    assert not text.encode(PROMPTS).context.requires_grad
    assert text.encode_tokens(*token_ids(text, PROMPTS)).pooled.requires_grad


def test_zero_states_have_the_shape_of_others(text: TextEncoders) -> None:
    states = text.encode(PROMPTS)
    zeros = TextStates.zeros_like(states)
    assert torch.equal(zeros.context, torch.zeros_like(states.context))
    assert torch.equal(zeros.pooled, torch.zeros_like(states.pooled))


# ---- Configurations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer_layers": (0, 2)}, r"transformer_layers=\(0, 2\) must have one entry for each of the 3 levels"),
        ({"num_heads": (5,)}, r"num_heads=\(5,\) must have one entry for each of the 3 levels"),
        ({"channels": (320, 640, 1290)}, r"1290 channels must divide into 32 norm groups and 20 heads"),
        ({"num_heads": (5, 10, 19)}, r"1280 channels must divide into 32 norm groups and 19 heads"),
    ],
)
def test_a_unet_that_cannot_be_is_an_error(options: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**options)  # type: ignore[arg-type]


def test_a_vae_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"100 channels do not divide into 32 norm groups"):
        VAEConfig(channels=(128, 100))
