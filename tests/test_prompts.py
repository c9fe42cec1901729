"""Prompts as people type them: their syntax, their chunks, their text states, and the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_models import LENGTH, make_encoder, make_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import cutdiff
from cutdiff.checkpoint.model import Model
from cutdiff.cli.promptfile import parse_line
from cutdiff.methods.direct import direct
from cutdiff.models.prompts import MAX_WEIGHT, parse_weights, written
from cutdiff.models.text import TextEncoders, TextStates, weighted
from cutdiff.models.tokens import Chunk, split
from cutdiff.sample import main

QUICK = ["--steps", "1", "--width", "128", "--height", "128", "--method", "direct"]
TYPED = st.text(alphabet="ab (()[]:.\\019,+-BREAK\n")

# ---- Syntax

A, B, C = 1.1, 1 / 1.1, 1.21


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red house", [("a red house", 1)]),
        ("a (red) house", [("a ", 1), ("red", A), (" house", 1)]),
        ("a [red] house", [("a ", 1), ("red", B), (" house", 1)]),
        ("((red))", [("red", C)]),
        ("[[red]]", [("red", B * B)]),
        ("([red])", [("red", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red : 1.3 )", [("red ", 1.3)]),
        ("(red:.5)(tree:2.)", [("red", 0.5), ("tree", 2)]),
        ("(red:+2)", [("red", 2)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        ("((red:2))", [("red", 2.2)]),
        ("(a (red:2) b:3)", [("a ", 3), ("red", 6), (" b", 3)]),
        ("(a)(b)", [("ab", A)]),
        ("(a) (b)", [("a", A), (" ", 1), ("b", A)]),
        ("(a[b)c]", [("a", A), ("b", 1), ("c", B)]),
        # a number belongs to round brackets alone
        ("[red:1.3]", [("red:1.3", B)]),
        ("red:1.3)", [("red:1.3)", 1)]),
        ("a: b", [("a: b", 1)]),
        # unbalanced
        ("(red", [("red", A)]),
        ("a (b (c", [("a ", 1), ("b ", A), ("c", C)]),
        ("a [b", [("a ", 1), ("b", B)]),
        ("red)", [("red)", 1)]),
        ("red]", [("red]", 1)]),
        ("(red]", [("red]", A)]),
        ("a)(b", [("a)", 1), ("b", A)]),
        ("((((", []),
        ("()[]", []),
        # escapes
        (r"\(red\)", [("(red)", 1)]),
        (r"\[red\]", [("[red]", 1)]),
        (r"(\(red\):2)", [("(red)", 2)]),
        (r"a\\b", [(r"a\b", 1)]),
        (r"a\b", [("ab", 1)]),
        (r"(red\)", [("red)", A)]),
        (r"\\(red)", [("\\", 1), ("red", A)]),
        ("red\\", [("red", 1)]),
        # no numbers
        ("(red:nan)", [("red:nan", A)]),
        ("(red:inf)", [("red:inf", A)]),
        ("(red:1e400)", [("red:1e400", A)]),
        ("(red:1.2.3)", [("red:1.2.3", A)]),
        ("(red:.)", [("red:.", A)]),
        ("(red:)", [("red:", A)]),
        ("(red:1,5)", [("red:1,5", A)]),
        # numbers without end
        (f"(red:{'9' * 400})", [("red", MAX_WEIGHT)]),
        (f"(red:-{'9' * 400})", [("red", -MAX_WEIGHT)]),
        ("(" * 9999 + "red", [("red", MAX_WEIGHT)]),
        ("(" * 9999 + "(red:0)", [("red", 0)]),
        ("[" * 9999 + "red", [("red", 0)]),
        # steps, alternatives and AND are read nowhere
        ("[a:b:0.5] [a|b] AND c", [("a:b:0.5", B), (" ", 1), ("a|b", B), (" AND c", 1)]),
    ],
)
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    (parsed,) = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("a\nBREAK\n b", [[("a", 1)], [("b", 1)]]),
        ("a,BREAK,b", [[("a,", 1)], [(",b", 1)]]),
        ("BREAK", [[], []]),
        ("a BREAK BREAK b", [[("a", 1)], [], [("b", 1)]]),
        ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),
        ("a (BREAK) b", [[("a ", 1)], [(" b", 1)]]),
        ("a BREAKFAST break", [[("a BREAKFAST break", 1)]]),
    ],
)
def test_breaks(prompt: str, parts: list[list[tuple[str, float]]]) -> None:
    assert parse_weights(prompt) == parts


@given(TYPED)
def test_every_string_is_a_prompt_of_which_only_syntax_is_lost(prompt: str) -> None:
    parts = parse_weights(prompt)
    assert all(math.isfinite(weight) and text for pieces in parts for text, weight in pieces)
    left = iter(prompt)
    assert all(character in left for pieces in parts for text, _ in pieces for character in text), "not in their order"
    kept = "".join(text for pieces in parts for text, _ in pieces)
    for character in "ab,":
        assert kept.count(character) == prompt.count(character)


@given(st.text().filter(lambda text: text and not set(text) & set("()[]\\") and "BREAK" not in text))
def test_text_without_syntax_comes_back_as_it_is(text: str) -> None:
    assert parse_weights(text) == [[(text, 1.0)]]


@given(st.text(min_size=1).filter(lambda text: "BREAK" not in text), st.floats(-9, 9).map(lambda x: round(x, 3)))
def test_what_is_written_is_read(text: str, weight: float) -> None:
    ((piece,),) = parse_weights(written(text, weight))
    assert piece == (text, pytest.approx(weight))


# ---- Chunks


def tokens(ids: str) -> Chunk:
    return [(int(i), 1.0) for i in ids]


@pytest.mark.parametrize(
    ("parts", "window", "chunks"),
    [
        (["1234"], 2, ["1234"]),
        (["12345"], 2, ["1234", "5"]),
        (["12034"], 2, ["120", "34"]),  # 0 is the comma
        (["1203456789"], 2, ["120", "3456", "789"]),
        (["1203456"], 0, ["1203", "456"]),
        (["10345"], 2, ["1034", "5"]),  # too far from the end
        (["10345"], 9, ["10", "345"]),
        (["12004"], 2, ["1200", "4"]),
        (["12030"], 2, ["1203", "0"]),  # a comma is not parted from what is before it for another
        (["1230", "5"], 2, ["1230", "5"]),
        (["1", "2"], 2, ["1", "2"]),
        (["", "1"], 2, ["", "1"]),
        (["1", "", "2"], 2, ["1", "", "2"]),
        (["1", ""], 2, ["1"]),
        (["1", "", ""], 2, ["1", ""]),
        (["", ""], 2, [""]),
        ([""], 2, [""]),
    ],
)
def test_chunks(parts: list[str], window: int, chunks: list[str]) -> None:
    assert split([tokens(part) for part in parts], 4, 0, window) == [tokens(chunk) for chunk in chunks]


@given(st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1), st.integers(1, 9), st.integers(0, 12))
def test_chunks_hold_all_tokens_in_their_order(parts: list[list[int]], size: int, window: int) -> None:
    given = [[(token, 1.0) for token in part] for part in parts]
    chunks = split(given, size, 0, window)
    assert [token for chunk in chunks for token in chunk] == [token for part in given for token in part]
    assert all(len(chunk) <= size for chunk in chunks)
    assert len(split([[*chain(*given)]], size, 0, 0)) <= len(chunks), "commas and breaks take no fewer chunks"


# ---- States


@pytest.fixture(scope="module", params=["SDXL", "SD 1.5", "SD 2.1"])
def text(request: pytest.FixtureRequest) -> TextEncoders:
    """Random encoders of a family, the last as a diffusers folder has it: 23 layers of 24."""
    first, last = make_tokenizer("<|endoftext|>"), make_tokenizer("!</w>")
    if request.param == "SDXL":
        clip = make_encoder(CLIPTextModel, 16, 3, "quick_gelu")
        return TextEncoders(first, last, clip, make_encoder(CLIPTextModelWithProjection, 24, 4, "gelu"), layer=2)
    if request.param == "SD 1.5":
        return TextEncoders(first, None, make_encoder(CLIPTextModel, 16, 3, "quick_gelu"), None, layer=1)
    return TextEncoders(last, None, make_encoder(CLIPTextModel, 8, 23, "gelu"), None, layer=1)


def published(text: TextEncoders, prompts: list[str], **options: Any) -> TextStates:
    """The text states that diffusers' `encode_prompt` gives."""
    # Its pipelines look for the final norm where older releases of transformers keep it.
    object.__setattr__(text.text_encoder, "text_model", text.text_encoder)
    config = SimpleNamespace(force_zeros_for_empty_prompt=True)
    pipeline = SimpleNamespace(**vars(text), _execution_device=text.device, config=config)
    arguments = {"device": text.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False, **options}
    try:
        if text.text_encoder_2 is None:
            context, _ = StableDiffusionPipeline.encode_prompt(pipeline, prompts, **arguments)
            return TextStates(context, context[:, 0, :0])
        context, _, pooled, _ = StableDiffusionXLPipeline.encode_prompt(pipeline, prompts, **arguments)
        return TextStates(context, pooled)
    finally:
        object.__delattr__(text.text_encoder, "text_model")


def assert_same(ours: TextStates, theirs: TextStates) -> None:
    assert torch.equal(ours.context, theirs.context)
    assert torch.equal(ours.pooled, theirs.pooled)


@torch.no_grad()
def test_states_are_the_published_ones_to_the_bit(text: TextEncoders) -> None:
    prompts = ["a red tent", "", "the moon"]
    assert_same(text.encode(prompts), published(text, prompts))
    if text.text_encoder_2 is not None:
        assert_same(text.encode(prompts, "sun"), published(text, prompts, prompt_2=["sun"] * 3))


@torch.no_grad()
def test_clip_skip_counts_from_the_last_layer(text: TextEncoders) -> None:
    trained = 1 if text.text_encoder.config.num_hidden_layers == 3 and text.text_encoder_2 is None else 2
    assert_same(text.skipping(trained).encode(["a tent"]), text.encode(["a tent"]))
    assert text.skipping(None) is text
    for further in (0, 1):
        ours = text.skipping(trained + further).encode(["a tent", ""])
        assert_same(ours, published(text, ["a tent", ""], clip_skip=further))
    lowest, highest = (2, 24) if text.text_encoder.config.num_hidden_layers == 23 else (1, 3)
    for clip_skip in (-1, 0, lowest - 1, highest + 1):
        with pytest.raises(ValueError, match=rf"^clip_skip={clip_skip} must lie in {lowest} … {highest}"):
            text.skipping(clip_skip)
    assert text.skipping(highest).encode([""]).context.isfinite().all()


def test_sd21_is_read_at_the_same_layer_from_a_single_file() -> None:
    """The single file has all 24 layers."""
    whole = TextEncoders(make_tokenizer("!</w>"), None, make_encoder(CLIPTextModel, 8, 24, "gelu"), None, layer=2)
    assert whole.skipping(2).layer == 2
    assert whole.skipping(24).layer == 24
    cut = replace(whole, text_encoder=make_encoder(CLIPTextModel, 8, 23, "gelu"), layer=1)
    assert (cut.skipping(2).layer, cut.skipping(24).layer) == (1, 23)


def test_chunks_are_encoded_one_by_one_and_the_first_is_pooled(text: TextEncoders) -> None:
    size = LENGTH - 2
    long = text.encode(["a " * size + "e " * size + "n"])
    parts = [text.encode([word * count]) for word, count in (("a ", size), ("e ", size), ("n", 1))]
    assert_same(long, TextStates(torch.cat([part.context for part in parts], dim=1), parts[0].pooled))
    assert_same(text.encode(["a " * size + "BREAK " + "e " * size + "BREAK n"]), long)
    assert text.length("a " * size) == LENGTH
    assert text.length("a " * size + "n") == 2 * LENGTH


def test_a_shorter_prompt_ends_in_empty_chunks(text: TextEncoders) -> None:
    alone = text.encode(["red"], min_length=LENGTH + 1)
    red, empty = text.encode(["red"]), text.encode([""])
    assert_same(alone, TextStates(torch.cat([red.context, empty.context], dim=1), red.pooled))
    torch.testing.assert_close(text.encode(["a BREAK n", "red"]).context[1], alone.context[0])


def test_weights_multiply_states_and_keep_the_mean_of_each_chunk(text: TextEncoders) -> None:
    plain, ours = (text.encode([prompt]) for prompt in ("a red BREAK n a", "a (red:3) BREAK n [a]"))
    assert torch.equal(ours.pooled, plain.pooled)
    factors = torch.ones(2, LENGTH, 1)
    factors[0, 2] = 3
    factors[1, 2] = 1 / 1.1
    widths = [encoder.config.hidden_size for encoder in text.encoders]
    chunks = plain.context.unflatten(1, (2, LENGTH))[0].split(widths, dim=2)
    expected = [z * factors * (z.mean((1, 2)) / (z * factors).mean((1, 2)))[:, None, None] for z in chunks]
    torch.testing.assert_close(ours.context, torch.cat(expected, dim=2).flatten(0, 1)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_1_change_no_bit_and_none_makes_nan(dtype: torch.dtype) -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.tensor([[1.0] * 5, [1, 0, 0, 0, 1], [1, MAX_WEIGHT, 1, 1, 1]])
    once = weighted(states, weights)
    assert torch.equal(once[0], states[0])
    assert not torch.equal(once[1], states[1])
    assert once.dtype == dtype
    assert once.isfinite().all()
    assert torch.equal(weighted(states * 0, weights), states * 0)
    antisymmetric = torch.cat([states[1:2, :2], -states[1:2, :2]], dim=1)  # whose mean is 0
    assert weighted(antisymmetric, torch.tensor([[1.0, 2, 1, 2]])).isfinite().all()


# ---- A guidance pair


def guidance_pair(model: Model, prompt: str | list[str], **options: Any) -> tuple[TextStates, TextStates]:
    seen: list[tuple[TextStates, TextStates]] = []

    def method(run: Any) -> Any:
        seen.append((run.denoiser.positive, run.denoiser.negative))
        return direct(run)

    cutdiff.denoise(model, prompt, method=method, num_steps=1, **options)
    return seen[0]


LONG = "a red house, " * 40


@pytest.mark.parametrize(
    ("prompt", "negative_prompt"), [("a tent", LONG), (LONG, "a tent"), (LONG, ""), (["a tent", LONG, ""], "a BREAK b")]
)
@pytest.mark.parametrize("zeros", [True, False])
def test_both_sides_of_the_guidance_are_equally_long(
    tiny_model: Model, prompt: str | list[str], negative_prompt: str, zeros: bool
) -> None:
    model = replace(tiny_model, zeros_for_empty_negative=zeros)
    positive, negative = guidance_pair(model, prompt, negative_prompt=negative_prompt)
    assert positive.context.shape == negative.context.shape
    expected = model.text.encode([negative_prompt] * len(positive.context), min_length=positive.context.shape[1])
    if zeros and not negative_prompt:
        expected = TextStates.zeros_like(expected)
    assert_same(negative, expected)


def test_a_second_prompt_is_for_the_second_encoder(tiny_model: Model) -> None:
    plain, _ = guidance_pair(tiny_model, "a tent")
    positive, negative = guidance_pair(tiny_model, "a tent", prompt_2="a house", negative_prompt_2="the moon")
    half = plain.context.shape[2] // 2
    house, moon, empty = (tiny_model.text.encode([prompt]) for prompt in ("a house", "the moon", ""))
    assert torch.equal(positive.context[..., :half], plain.context[..., :half])
    assert torch.equal(positive.context[..., half:], house.context[..., half:])
    assert torch.equal(positive.pooled, house.pooled)
    assert torch.equal(negative.context[..., :half], empty.context[..., :half])
    assert torch.equal(negative.context[..., half:], moon.context[..., half:])
    longer, shorter = guidance_pair(tiny_model, "a tent", prompt_2=LONG)
    assert longer.context.shape == shorter.context.shape
    assert longer.context.shape[1] > plain.context.shape[1]


def test_where_there_is_no_second_encoder_a_second_prompt_is_an_error(tiny_model: Model) -> None:
    text = replace(tiny_model.text, tokenizer_2=None, text_encoder_2=None)
    for name in ("prompt_2", "negative_prompt_2"):
        with pytest.raises(ValueError, match=rf"^{name}='a tent' is for a second text encoder"):
            cutdiff.denoise(replace(tiny_model, text=text), "", **{name: "a tent"})


def test_the_layer_is_read_for_the_run_and_the_model_stays_as_it_is(tiny_model: Model) -> None:
    skipped, _ = guidance_pair(tiny_model, "a tent", clip_skip=1)
    assert_same(skipped, tiny_model.text.skipping(1).encode(["a tent"]))
    assert tiny_model.text.layer == 2


# ---- The command line


def pictures(folder: Path) -> list[tuple[str, dict[str, Any], str]]:
    """The names, records and texts of the pictures in a folder."""
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found.append((path.name, json.loads(path.with_suffix(".json").read_text()), image.info["parameters"]))
    return found


SIZE = {"width": 136, "height": 128}


@pytest.mark.parametrize(
    ("line", "prompt", "options"),
    [
        ("a tent -- red", "a tent -- red", {}),
        ("a tent --width 136 --height 128", "a tent", SIZE),
        ("a dog's tent --width=136 --height 128", "a dog's tent", SIZE),
        ("(a:1.2) [b|c] AND d --steps 20 --seed 7", "(a:1.2) [b|c] AND d", {"num_steps": 20, "seed": 7}),
        ('--prompt "a tent" --width 136 --height 128', "a tent", SIZE),
        ("--width 136 --prompt a red tent --height 128", "a red tent", SIZE),
        (
            '--prompt "a tent, \\(red\\) --wide" --negative_prompt a moon --steps 20 --cfg_scale 4.5',
            "a tent, \\(red\\) --wide",
            {"negative_prompt": "a moon", "num_steps": 20, "guidance_scale": "4.5"},
        ),
        ("a tent --guidance-scale 0 --cfg-interval 1", "a tent", {"guidance_scale": "0", "cfg_interval": "1"}),
        ("a tent --guidance-interval 0.2 1", "a tent", {"guidance_interval": (0.2, 1.0)}),
        ('a tent --sampler_name "Euler a"', "a tent", {"solver": "euler_ancestral"}),
        ("a tent --sampler_name DPM++ 2M Karras", "a tent", {"solver": "dpmpp_2m", "schedule": "karras"}),
        (
            "a tent --sampler_name dpm++ 2m sde exponential",
            "a tent",
            {"solver": "dpmpp_2m_sde", "schedule": "exponential"},
        ),
        ("a tent --sampler_name Euler SGM Uniform", "a tent", {"solver": "euler", "schedule": "sgm_uniform"}),
        ("a tent --method magnify,structure_fraction=0.4", "a tent", {"method": "magnify,structure_fraction=0.4"}),
    ],
)
def test_a_line_with_options(line: str, prompt: str, options: dict[str, Any]) -> None:
    assert parse_line(line.encode()) == (prompt, options)


def test_a_flag_of_a_line_needs_no_value() -> None:
    assert parse_line(b"a tent --invert --image h.png") == ("a tent", {"invert": True, "image": "h.png"})


def test_lines_with_options_are_drawn_as_objects_are(tmp_path: Path) -> None:
    file, objects = tmp_path / "lines.txt", tmp_path / "objects.txt"
    file.write_text(
        '--prompt "a red tent" --negative_prompt "a moon" --width 136 --height 128 --steps 2 --cfg_scale 0\n'
        "a blue tree --method demofusion --cosine-scales 1 2.5 3 --steps 1 --seed 9\n"
    )
    rows = [
        {"prompt": "a red tent", "negative_prompt": "a moon", **SIZE, "steps": 2, "guidance_scale": 1},
        {"prompt": "a blue tree", "method": "demofusion", "cosine_scales": [1, 2.5, 3], "steps": 1, "seed": 9},
    ]
    objects.write_text("\n".join(map(json.dumps, rows)))
    for source in (file, objects):
        assert main(["--prompts", str(source), *QUICK, "--out", str(tmp_path / source.stem)]) == 0
    lines, others = (pictures(tmp_path / name) for name in ("lines", "objects"))
    assert [name for name, _, _ in lines] == [name for name, _, _ in others]
    assert [record["fingerprint"] for _, record, _ in lines] == [record["fingerprint"] for _, record, _ in others]


def test_a_file_of_prompts_is_drawn_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    lines = [
        "\ufeffa red tent\r",
        "",
        "# a comment",
        "  a (blue:1.3) tree  ",
        '{"prompt": "--help"}',
        "a red tent",
        '{"prompt": "# no comment", "width": 136, "num_steps": 2, "guidance-scale": 4, "method": "demofusion", '
        '"cosine_scales": [1, 2.5, 3]}',
        '{"prompt": "", "negative_prompt": "--seed=1", "prompt_2": "a moon", "seed": 7, "method": "cutdiffusion"}',
    ]
    file.write_bytes("\n".join(lines).encode())
    options = ["--negative-prompt", "a house", "--clip-skip", "1", "--num-images", "2"]
    assert main(["--prompts", str(file), *QUICK, *options, "--out", str(out)]) == 0
    names = [
        *("0001-direct-128x128", "0004-direct-128x128", "0005-direct-128x128"),
        *("0006-direct-128x128", "0007-demofusion-136x128", "0008-cutdiffusion-128x128"),
    ]
    seeds = [(0, 1)] * 5 + [(7, 8)]
    expected = [f"{name}-seed{seed}.png" for name, pair in zip(names, seeds, strict=True) for seed in pair]
    assert [Path(line).name for line in capsys.readouterr().out.split()] == expected
    found = pictures(out)
    assert [name for name, _, _ in found] == expected
    records = [record for _, record, _ in found][::2]
    prompts = ["a red tent", "a (blue:1.3) tree", "--help", "a red tent", "# no comment", ""]
    assert [record["prompt"] for record in records] == prompts
    assert [record["negative_prompt"] for record in records] == ["a house"] * 5 + ["--seed=1"]
    assert [record["num_steps"] for record in records] == [1, 1, 1, 1, 2, 1]
    assert [record["prompt_2"] for record in records] == [None] * 5 + ["a moon"]
    assert records[4]["guidance"] == "cfg,guidance_scale=4.0"
    assert records[4]["method"].endswith(",cosine_scales=(1.0,2.5,3.0)")
    assert records[5]["method"].startswith("cutdiffusion,size_conditioning=native,")
    assert all("Clip skip: 1" in text for _, _, text in found)
