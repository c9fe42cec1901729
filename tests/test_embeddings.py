"""Textual inversion: tokens that stand for several vectors, in saved pipelines and in files of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from refusal import CommandLine
from safetensors.torch import save_file
from test_models import make_encoder, make_tokenizer
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import cutdiff
from cutdiff.checkpoint import EmbeddingError
from cutdiff.checkpoint.embeddings import add_embeddings, read_inversion
from cutdiff.checkpoint.model import Model
from cutdiff.models.text import TextEncoders
from cutdiff.models.tokens import tokenize
from cutdiff.scenes.vocabulary import WIDTH
from cutdiff.settings import Settings

PROMPTS = ["a <cat> red", "<cat> <cat>, <dog>", "a (<cat>:1.3) BREAK <dog>", "red", "a<cat>n"]


def ids(tokenizer: Any, prompt: str) -> list[int]:
    return [token for chunk in tokenize(tokenizer, prompt, 0) for token, _ in chunk]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_token_stands_for_all_its_vectors_as_in_diffusers(prompt: str) -> None:
    tokenizer = make_tokenizer("!</w>")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>", "<bird>_1"])
    converted = TextualInversionLoaderMixin()._maybe_convert_prompt(prompt, tokenizer)
    plain = make_tokenizer("!</w>")
    plain.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>", "<bird>_1"])
    expected = plain(converted.replace("(", "").replace(":1.3)", "").replace("BREAK ", ""), add_special_tokens=False)
    assert ids(tokenizer, prompt) == expected.input_ids
    weights = {weight for chunk in tokenize(tokenizer, "a (<cat>:1.3)") for token, weight in chunk if token > 57}
    assert weights == {1.3}


def test_the_words_of_a_prompt_hold_all_vectors() -> None:
    encoders = TextEncoders(
        tokenizer := make_tokenizer("!</w>"), None, make_encoder(CLIPTextModel, 16, 3, "gelu"), None
    )
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    assert encoders.words("a (<cat>:1.3) red") == [("a", [1]), ("(<cat>:1.3000)", [2, 3, 4]), ("red", [5])]


def model_of(tiny_model: Model, *, second: bool) -> Model:
    """A model with encoders of 16 and 24 channels, or of the first alone."""
    clip = make_encoder(CLIPTextModel, 16, 3, "quick_gelu")
    other = make_encoder(CLIPTextModelWithProjection, 24, 4, "gelu") if second else None
    tokenizers = make_tokenizer("<|endoftext|>"), make_tokenizer("!</w>") if second else None
    return replace(tiny_model, text=TextEncoders(*tokenizers, clip, other, layer=2 if second else 1))  # type: ignore[arg-type]


FILES: dict[str, dict[str, tuple[int, ...]]] = {
    "SD 1.5, A1111": {"emb_params": (3, 16)},
    "SD 1.5, diffusers": {"<style>": (16,)},
    "SDXL": {"clip_l": (3, 16), "clip_g": (3, 24)},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_into_the_encoders(name: str, tmp_path: Path, tiny_model: Model) -> None:
    """Each vector is that of an ordinary token in a model whose table has it there."""
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape) for key, shape in FILES[name].items()}
    save_file(tensors, tmp_path / "style.safetensors")
    model = add_embeddings(
        model_of(tiny_model, second=name == "SDXL"), [read_inversion("My-Style", tmp_path / "style.safetensors")]
    )
    number = len(next(iter(tensors.values())).reshape(-1, 16 if name != "SDXL" else tensors["clip_l"].shape[1]))
    same = model_of(tiny_model, second=name == "SDXL")
    letters = [chr(ord("p") + i) for i in range(number)]
    for encoder, tokenizer, values in zip(same.text.encoders, same.text.tokenizers, tensors.values(), strict=True):
        table: nn.Embedding = encoder.get_input_embeddings()  # pyright: ignore[reportAssignmentType]
        table.weight.data[[ids(tokenizer, letter)[0] for letter in letters]] = values.reshape(number, -1)
    ours, theirs = (
        m.text.encode([prompt])
        for m, prompt in ((model, "a (my-style:1.2) red"), (same, f"a ({' '.join(letters)}:1.2) red"))
    )
    torch.testing.assert_close(ours.context, theirs.context)
    torch.testing.assert_close(ours.pooled, theirs.pooled)
    assert ids(model.text.tokenizer, "my-styles") == ids(same.text.tokenizer, "my-styles"), "part of a word"
    (embedding,) = model.embeddings
    assert (embedding.token, embedding.path) == ("My-Style", str(tmp_path / "style.safetensors"))
    with pytest.raises(EmbeddingError, match="'My-Style' is a token of the model already: give another as TOKEN="):
        add_embeddings(model, [read_inversion("My-Style", tmp_path / "style.safetensors")])


@pytest.mark.parametrize(
    "tokens", [("sty", "sty_1"), ("sty_1", "sty"), ("wide", "wide_2"), ("wide_2", "wide"), ("wide", "wide_1")]
)
def test_no_token_takes_the_vectors_of_another(tokens: tuple[str, str], tmp_path: Path) -> None:
    def file(token: str) -> tuple[str, Path]:
        num = 2 if token == "wide" else 1
        save_file({"clip_l": torch.ones(num, WIDTH), "clip_g": torch.ones(num, WIDTH)}, tmp_path / token)
        return token, (tmp_path / token).rename(tmp_path / f"{token}.safetensors")

    with pytest.raises(EmbeddingError, match=r"would be read as the vectors of one|is a token of the model already"):
        cutdiff.load(embeddings=[file(token) for token in tokens])
    apart = [file(token) for token in ("sty", "sty_2", "wide", "wide_3")]
    assert len(cutdiff.load(embeddings=apart).embeddings) == 4


@pytest.mark.parametrize("token", ["AND", "a AND b", "BREAK", "<lora:x:1>", "foo (1)", "[a]", r"a\(b"])
def test_a_token_that_no_prompt_could_name(token: str, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"clip_l": torch.zeros(1, WIDTH), "clip_g": torch.zeros(1, WIDTH)}, file)
    with pytest.raises(EmbeddingError, match="is no plain text of a prompt, which could not name it: give another as"):
        cutdiff.load(embeddings=[(token, file)])
    assert cutdiff.load(embeddings=[("a|b: c", file)]).embeddings


def test_the_record_and_the_fingerprint_name_the_files(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"clip_l": torch.zeros(2, WIDTH), "clip_g": torch.ones(2, WIDTH)}, file)
    plain, model, other = (cutdiff.load(embeddings=given) for given in ([], [("style", file)], [("other", file)]))
    records = [cutdiff.generate(m, "a style tent", Settings(num_steps=1)).record for m in (plain, model, other)]
    assert "embeddings" not in records[0]["model"]
    assert [part["token"] for part in records[1]["model"]["embeddings"]] == ["style"]
    assert len({record["fingerprint"] for record in records}) == 3


BAD: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "one key": ({"emb_params": (2, 64)}, "has the keys emb_params, where this model needs clip_l and clip_g: use one"),
    "no keys": ({}, "has the keys "),
    "unknown keys": (
        {"clip_l": (2, 64), "clip_h": (2, 64)},
        "has the keys clip_h, clip_l, where this model needs clip_l",
    ),
    "a third key": ({"clip_l": (2, 64), "clip_g": (2, 64), "x": (1,)}, "where this model needs clip_l and clip_g"),
    "wrong width": (
        {"clip_l": (2, 768), "clip_g": (2, 64)},
        "has clip_l (2, 768), where this model reads vectors of width 64: use one made "
        "for it, not for Stable Diffusion 1",
    ),
    "three axes": ({"clip_l": (1, 2, 64), "clip_g": (2, 64)}, "has clip_l (1, 2, 64), where this model reads vectors"),
    "no vector": (
        {"clip_l": (0, 64), "clip_g": (0, 64)},
        "has clip_l (0, 64), where this model reads vectors of width",
    ),
    "other numbers": (
        {"clip_l": (1, 64), "clip_g": (2, 64)},
        "has clip_l (1, 64) and clip_g (2, 64), which must",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused(name: str, tmp_path: Path, command_line: CommandLine) -> None:
    shapes, expected = BAD[name]
    file = tmp_path / "style.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    command_line.refuses(["--embedding", f"s={file}"], 1, f"--embedding {file} ", expected)


def test_values_and_names_that_cannot_be_used(tmp_path: Path, command_line: CommandLine) -> None:
    file, empty = tmp_path / "red.safetensors", tmp_path / "empty.safetensors"
    save_file({"clip_l": torch.full((1, WIDTH), torch.nan), "clip_g": torch.ones(1, WIDTH)}, file)
    empty.touch()
    command_line.refuses(["--embedding", f"s={file}"], 1, "has values in clip_l that are no finite numbers")
    command_line.refuses(["--embedding", empty], 1, f"--embedding {empty} is empty")
    command_line.refuses(["--embedding", "s=none.safetensors"], 2, "s=none.safetensors is no file: give PATH or TOKEN")
    command_line.refuses(["--embedding", f"={file}"], 2, "is no file: give PATH or TOKEN=PATH")
    save_file({"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(1, WIDTH)}, file)
    command_line.refuses(["--embedding", f"a={file}"], 1, "'a' is a token of the model already")
