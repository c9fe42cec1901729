"""AccDiffusion: its published run, the words in each view's prompt, and the attention that selects them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cascades import PROMPT, Replayed, Words, fixture, network, noises, shuffles
from tiny import relative_error
from torch import Tensor

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.methods import accdiffusion
from cutdiff.methods.accdiffusion import responsive, view_prompts
from cutdiff.models.attention import map_level, recorded_attention
from cutdiff.models.layers import Attention
from cutdiff.models.text import TextStates
from cutdiff.sampling.draws import Draws
from cutdiff.specs import SOLVERS


def latents(model: Model, method: str = "accdiffusion", prompt: str | list[str] = PROMPT, **options: Any) -> Tensor:
    return list(cutdiff.denoise(model, prompt, method=method, **options))[-1].latents


@pytest.mark.parametrize("published", fixture("accdiffusion"))
def test_the_published_run_has_the_same_prompts_and_latents(tiny_model: Model, published: dict[str, Any]) -> None:
    encoded: list[list[str]] = []

    class Heard(Words):
        def encode(self, prompts: list[str], prompt_2: str | None = None, **options: int) -> TextStates:
            encoded.append(prompts)
            return super().encode(prompts, prompt_2, **options)

    (height, width), num_steps = published["size"], published["num_steps"]
    draws = Replayed(
        num_steps=num_steps,
        origins=tuple(published["origins"]),
        noises=noises([(1, 4, 32, 32), (1, 4, height, width)], seed=3),
        index=shuffles(num_steps, (4, 4, 32, 32), seed=5),
    )
    x = latents(
        replace(network(tiny_model, native_size=32, levels=3), text=Heard()),
        height=8 * height,
        width=8 * width,
        num_steps=num_steps,
        solver=published["solver"],
        size_conditioning="target",
        draws=draws,
    )
    assert encoded == [[PROMPT], published["prompts"]]
    sample = x[0, :, :: published["every"], :: published["every"]].flatten()
    assert relative_error(sample, torch.tensor(published["latents"])) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_at_native_size_it_is_direct_to_the_bit(tiny_model: Model, solver: str) -> None:
    options = {"height": 56, "width": 64, "num_steps": 3, "solver": solver}
    assert torch.equal(latents(tiny_model, **options), latents(tiny_model, "direct", **options))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_with_every_word_in_every_view_and_no_interaction_it_is_demofusion(
    tiny_model: Model, guidance_scale: float
) -> None:
    class Still(Draws):
        def view_origins(self, step, size, window, stride, jitter):
            return super().view_origins(0, size, window, stride, jitter)

    options = {"num_steps": 3, "draws": Still((0,)), "guidance_scale": guidance_scale}
    demofusion = latents(tiny_model, "demofusion", **options)
    same = latents(tiny_model, word_threshold=0.0, interaction="none", **options)
    assert relative_error(same, demofusion) < 1e-6
    other = latents(tiny_model, word_threshold=1.0, interaction="none", **options)
    assert relative_error(other, demofusion) > 1e-4


def test_pixels_are_exchanged_anew_at_every_step_of_a_phase(tiny_model: Model) -> None:
    asked: list[tuple[int, Any, str]] = []

    class Recorded(Draws):
        def permutation(self, step, grid, shape, grain):
            asked.append((step, grid, grain))
            return super().permutation(step, grid, shape, grain)

    channel = latents(tiny_model, num_steps=2, width=192, draws=Recorded((0,)))
    assert asked == [(step, (k, k), "channel") for step, k in ((2, 2), (3, 2), (4, 3), (5, 3))]
    assert relative_error(latents(tiny_model, num_steps=2, width=192, interaction="pixel"), channel) > 1e-4


def test_a_prompt_without_words_can_be_drawn(tiny_model: Model) -> None:
    assert latents(tiny_model, prompt=["", PROMPT], num_steps=1).isfinite().all()


def test_words_stand_where_their_tokens_stand(tiny_model: Model) -> None:
    text = tiny_model.text
    words = ["a", "red", "house", ",", "at", "night"]
    assert text.words("a red house,  at NIGHT") == [(word, [i]) for i, word in enumerate(words, start=1)]
    assert text.words("a zebra at") == [("a", [1]), ("zebra", [2, 3, 4, 5, 6]), ("at", [7])], "zebra is made of bytes"
    assert text.words("") == []


def test_words_of_a_long_prompt_stand_in_their_chunks(tiny_model: Model) -> None:
    words = tiny_model.text.words("red " * 73 + "zebra house")  # the zebra lies in both chunks
    assert words[72:] == [("red", [73]), ("zebra", [74, 75, 78, 79, 80]), ("house", [81])]
    assert tiny_model.text.words("red BREAK house") == [("red", [1]), ("house", [78])]


def test_words_keep_their_weights_and_lose_their_brackets(tiny_model: Model) -> None:
    words = tiny_model.text.words(r"a [(red house:1.5)], \(night\)")
    typed = ["a", "(red:1.3636)", "(house:1.3636)", ",", r"\(", "night", r"\)"]
    assert words == [(word, [i]) for i, word in enumerate(typed, start=1)]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("word_threshold", [0.0, 0.5, 1.0])
def test_long_prompts_on_either_side_of_the_guidance_can_be_drawn(
    tiny_model: Model, guidance_scale: float, word_threshold: float
) -> None:
    options: dict[str, Any] = {"num_steps": 1, "guidance_scale": guidance_scale, "word_threshold": word_threshold}
    long = "(red:1.2), " * 50
    assert latents(tiny_model, prompt=[long, "a house"], **options).isfinite().all()
    assert latents(tiny_model, prompt="a house", negative_prompt=long, **options).isfinite().all()


def test_a_view_with_fewer_words_takes_no_more_chunks(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "red " * 56 + ", " + "red " * 17 + ", " + "red " * 75
    fewer = whole[::-1].replace(",", "", 1)[::-1]  # without the comma that ends the first chunk
    text = tiny_model.text
    assert (text.length(whole), text.length(fewer)) == (2 * 77, 3 * 77)
    monkeypatch.setattr(accdiffusion, "view_prompts", lambda _words, _masks, at, *_: [fewer] * len(at.flatten(0, 1)))
    assert latents(tiny_model, prompt=whole, num_steps=1).isfinite().all()


def test_a_view_is_told_the_words_that_fill_enough_of_it() -> None:
    masks = torch.zeros(2, 4, 4, 8)
    masks[0, 1, :, :4] = 1  # the left half
    masks[0, 2, :, 4:] = 1  # the right half, in two tokens
    masks[0, 3, :2, :4] = 1
    masks[1, 1] = 1
    words = [[("left", [1]), ("right", [2, 3])], [("all", [1])]]
    origins = torch.tensor([[0, 0], [0, 2], [0, 4], [0, 6]]).expand(2, 4, 2)
    assert view_prompts(words, masks, origins, (4, 4), 0.5) == [
        *("left right", "left right", "right", "right"),
        *("all", "all", "all", "all"),
    ]
    # outside of the canvas there is nothing: the last view is half empty
    assert view_prompts(words, masks, origins, (4, 4), 0.6) == ["left", "right", "right", "", "all", "all", "all", ""]
    assert view_prompts([[], []], masks, origins, (4, 4), 0.0) == [""] * 8


def test_a_mask_is_what_exceeds_the_mean_without_specks() -> None:
    maps = torch.zeros(1, 2, 32, 48)
    maps[0, 0, 3:10, :9] = 1  # reaches the border, and stays
    maps[0, 0, 20:24, 20:30] = 1  # is thinner than 7 pixels
    maps[0, 1] = 5  # nothing exceeds its mean
    expected = torch.zeros_like(maps)
    expected[0, 0, 3:10, :9] = 1
    assert torch.equal(responsive(maps), expected)
    small = torch.zeros(1, 1, 8, 8)
    small[0, 0, 2, 2] = 1
    assert torch.equal(responsive(small), small), "small maps are not opened"


def test_weights_are_those_that_attention_attends_with() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2, context_dim=6)
    x, context = torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    weights = layer.weights(x, context)
    assert weights.shape == (3, 2, 5, 7)
    values = layer.to_v(context).unflatten(2, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2)), layer(x, context))


def test_recording_changes_nothing_and_leaves_nothing_behind(tiny_model: Model) -> None:
    unet = tiny_model.unet
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = unet.config
    given = (draw(3, 4, 7, 5), torch.ones(3), draw(3, 9, config.context_dim), draw(3, config.pooled_dim), draw(3, 6))
    plain = unet(*given)
    with recorded_attention(unet) as maps:
        assert torch.equal(unet(*given), plain)
        parts = [unet(*(g[part] for g in given)) for part in (slice(0, 2), slice(2, 3))]
    assert torch.cat(parts).shape == plain.shape
    assert map_level(unet) == 1
    mean = maps.mean()
    assert mean.shape == (6, 4 * 3, 9)
    torch.testing.assert_close(mean.sum(dim=2), torch.ones(6, 12))
    torch.testing.assert_close(mean[:3], mean[3:])
    assert not any(module._forward_hooks for module in unet.modules())
