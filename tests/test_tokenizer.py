"""Tokenizers: built from files that were read here, they give the ids of transformers, which reads the same folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import OPENED
from transformers import CLIPTokenizer

from cutdiff.checkpoint.locate import EMBEDDED, embedded
from cutdiff.checkpoint.tokenizer import read_tokenizer
from cutdiff.checkpoint.vocabulary import MAX_ADDED, MAX_CONTENT, MAX_WORDS

TEXTS = ("a red House, at sunset! 12", "naïve 气球 🎈", "<|endoftext|> a <|startoftext|>tent", "a <cat>and <Dog >x", "")
END = "<|endoftext|>"
NEXT = 592
"""The id after the last one of the embedded vocabulary."""
CAT = {"content": "<cat>", "lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
DOG = {"content": "<dog>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded tokenizer, to change."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(embedded(EMBEDDED) / "tokenizer", copy)
    return copy


def write(folder: Path, name: str, **fields: Any) -> None:
    """Write JSON with these fields, beside those that the file has."""
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def one_file(folder: Path, **fields: Any) -> None:
    """A tokenizer.json in the place of the vocabulary and its merges."""
    CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer.json", **fields)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def both(folder: Path) -> None:
    """A tokenizer.json with a token of its own beside files that lack it."""
    write(folder, "added_tokens.json", **{"<cat>": NEXT})
    one_file(folder)
    (folder / "added_tokens.json").unlink()
    shutil.copy(embedded(EMBEDDED) / "tokenizer/vocab.json", folder)


def old_layout(folder: Path) -> None:
    """The fields of SD 1.5's tokenizer."""
    token = {"content": END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    write(folder, "special_tokens_map.json", bos_token={**token, "content": "<|startoftext|>"}, eos_token=token)
    write(folder, "tokenizer_config.json", unk_token={"__type": "AddedToken", **token}, errors="replace")


def new_layout(folder: Path) -> None:
    """The fields of a tokenizer with two tokens of a textual inversion, as new releases write them."""
    write(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder={
            "0": {**DOG, "content": "!", "single_word": False, "special": True},
            str(NEXT + 1): {**DOG, "special": False},
            str(NEXT): {**CAT, "special": True},
        },
        pad_token="!",
    )
    write(folder, "added_tokens.json", **{"<bird>": NEXT})  # has no effect


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "plain": lambda _: None,
    "old": old_layout,
    "new": new_layout,
    "one file": one_file,
    "one file beside others": both,
    "pairs with carriage returns": lambda folder: (folder / "merges.txt").write_bytes(
        (folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    ),
    "added": lambda folder: write(folder, "added_tokens.json", **{"<cat>": NEXT, "<dog>": NEXT + 1}),
    "added, special": lambda folder: (
        write(folder, "added_tokens.json", **{"<cat>": NEXT, "<dog>": NEXT + 1}),
        write(folder, "special_tokens_map.json", extra_special_tokens=["<dog>"]),
    ),
    "listed": lambda folder: write(folder, "tokenizer_config.json", additional_special_tokens=["<dog>", "<cat>"]),
    "listed, in the other file": lambda folder: write(
        folder, "special_tokens_map.json", extra_special_tokens=[CAT, "<dog>"]
    ),
    "padded": lambda folder: write(folder, "special_tokens_map.json", pad_token="!"),
    "padded, in the other file": lambda folder: (
        (folder / "special_tokens_map.json").unlink(),
        write(folder, "tokenizer_config.json", pad_token="!"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ids_are_those_of_transformers(layout: str, folder: Path) -> None:
    LAYOUTS[layout](folder)
    ours, theirs = read_tokenizer(folder, 77), CLIPTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder


NAMES = ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "gguf_file")


@pytest.mark.parametrize("name", [*NAMES, "init_inputs", "tokenizer_object", "chat_template_file"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_files_that_a_field_names_are_not_opened(file: str, name: str, folder: Path) -> None:
    outside = folder.parent / "outside" / "tokenizer.json"
    outside.parent.mkdir()
    shutil.copytree(folder, folder.parent / "other")
    write(folder.parent / "other", "vocab.json", red=0, **{"!": 77})
    one_file(folder.parent / "other")
    (folder.parent / "other" / "tokenizer.json").rename(outside)
    expected = read_tokenizer(folder, 77).get_vocab()
    value = [str(outside)] if name in ("fast_tokenizer_files", "init_inputs") else str(outside)
    write(folder, file, **{name: value})
    OPENED.clear()
    assert read_tokenizer(folder, 77).get_vocab() == expected
    assert {path.resolve().parent for path in OPENED if path.suffix in (".json", ".txt")} == {folder}


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tekken.json", "tokenizer.model", "spiece.model", "config.json", "x.gguf"]
)
def test_other_files_of_the_folder_are_not_opened(name: str, folder: Path) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    OPENED.clear()
    read_tokenizer(folder, 77)
    assert folder / name not in OPENED


TOKEN = "where a token of 1 to 200 printable characters belongs"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a number for a token": ("special_tokens_map.json", {"bos_token": 3}, f"special_tokens_map.json has 3 {TOKEN}"),
    "an empty token": ("tokenizer_config.json", {"mask_token": ""}, f"tokenizer_config.json has '' {TOKEN}"),
    "a long token": ("tokenizer_config.json", {"eos_token": "x" * (MAX_CONTENT + 1)}, f"has '{'x' * 99}… {TOKEN}"),
    "no UTF-8": ("tokenizer_config.json", {"pad_token": "\ud800"}, rf"has '\ud800' {TOKEN}"),
    "no content": ("special_tokens_map.json", {"pad_token": {"lstrip": True}}, f"has {{'lstrip': True}} {TOKEN}"),
    "a flag": (
        "special_tokens_map.json",
        {"pad_token": {"content": "!", "lstrip": "no"}},
        "lstrip='no' of the token '!' must be true or false",
    ),
    "text for a list": ("tokenizer_config.json", {"extra_special_tokens": "<cat>"}, "='<cat>' must be a list of tok"),
    "many tokens": (
        "special_tokens_map.json",
        {"additional_special_tokens": [f"<{i}>" for i in range(10**5)]},
        f"special_tokens_map.json lists more than {MAX_ADDED} tokens: remove those without use",
    ),
    "many tokens with ids": (
        "added_tokens.json",
        {f"<{i}>": NEXT + i for i in range(10**5)},
        f"tokenizer has more than {MAX_ADDED} tokens beside its vocabulary",
    ),
    "a gap": ("added_tokens.json", {"<cat>": NEXT + 1}, f"the id {NEXT + 1}, where {NEXT} follows on its vocabulary"),
    "an id of another": ("added_tokens.json", {"<cat>": 5}, f"gives '<cat>' the id 5, where {NEXT} follows on its"),
    "a text for an id": ("added_tokens.json", {"<cat>": "5"}, "the id '5': download it again"),
    "no numbers": ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder=[] must have tokens"),
    "a word for a number": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"x": CAT}},
        "the id 'x': download it again",
    ),
    "many digits": ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: CAT}}, "the id '99999"),
    "many words": ("vocab.json", {f"{i}x": NEXT + i for i in range(10**5)}, f"words, more than {MAX_WORDS}, so it is"),
    "a large id": ("vocab.json", {"x": 2**40}, f"vocab.json gives 'x' the id {2**40}: download it again"),
    "no UTF-8 in words": ("vocab.json", {"\ud800": NEXT}, "transformers cannot read it (TypeError"),
}
"""A file, the fields that are added to it, and the message."""


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_cannot_be_used(name: str, folder: Path) -> None:
    file, fields, expected = REFUSED[name]
    write(folder, file, **fields)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        read_tokenizer(folder, 77)
    assert len(str(caught.value)) < 600 + len(str(folder))


ONE_FILE: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "tokenizer.json has no vocabulary and merges, so it is not CLIP's"),
    "a list of words": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "has no vocabulary and merges"),
    "no merges": ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "has no vocabulary and merges"),
    "a merge of three": ({"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}, "'a b c' is no pair of words to merge"),
    "a merge of numbers": ({"model": {"vocab": {"a": 0}, "merges": [[1, 2]]}}, "[1, 2] is no pair of words to merge"),
    "added text": ({"added_tokens": "x"}, "has no vocabulary and merges"),
    "added words": ({"added_tokens": ["x"]}, "gives 'x' the id None: download it again"),
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_one_file_that_cannot_be_used(name: str, folder: Path) -> None:
    fields, expected = ONE_FILE[name]
    one_file(folder, **fields)
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_tokenizer(folder, 77)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"])
@pytest.mark.parametrize("value", [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "X"}, [[[]]], 3])
def test_parts_that_are_always_clips_are_not_read(
    part: str, value: object, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library that is given them panics for some: its error is no Exception, and its trace is long."""
    expected = read_tokenizer(folder, 77).get_vocab()
    one_file(folder, **{part: value})
    assert read_tokenizer(folder, 77).get_vocab() == expected
    assert capfd.readouterr().err == ""
