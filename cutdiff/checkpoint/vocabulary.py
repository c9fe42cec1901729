"""The vocabulary, merges and special tokens in the files of a CLIP tokenizer: read, checked, and nothing else of them.

The files are a vocab.json and a merges.txt or a tokenizer.json, and beside them a tokenizer_config.json, a
special_tokens_map.json and an added_tokens.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.read import read_json, read_text

if TYPE_CHECKING:
    from tokenizers import AddedToken

FRAME = ("<|startoftext|>", "<|endoftext|>")
"""The tokens that begin and end a prompt."""
WORDS, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
PURPOSES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"))
LISTS = ("extra_special_tokens", "additional_special_tokens")
"""The fields of CONFIG and SPECIAL with a token for a purpose, and with others. Apart from these, `model_max_length`
and `added_tokens_decoder` are read."""
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
"""The fields of a token that say how it is looked for in a prompt, beside its `content`."""
MAX_WORDS, MAX_ADDED, MAX_CONTENT = 100_000, 5000, 200
"""The most words of a vocabulary, of which CLIP's has 49,408, the most tokens beside it, and the most characters of
one of these: each takes time and memory."""


class Words(NamedTuple):
    """A vocabulary as a file has it."""

    path: Path
    vocabulary: dict[str, Any]
    merges: list[tuple[str, str]]
    added: list[Any]
    """The tokens beside it."""


class SpecialTokens(NamedTuple):
    """The tokens that are looked for in a prompt before it is split into words."""

    purposes: dict[str, AddedToken]
    others: list[AddedToken]
    numbered: dict[int, AddedToken]
    """Those with an id of their own."""


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def read_words(folder: Path) -> Words:
    """The words of a tokenizer.json, or where there is none those of a vocab.json and a merges.txt."""
    if (folder / WORDS).exists():
        path = source = folder / WORDS
        content = read_json(path)
        model = content.get("model")
        vocabulary, lines = (model.get(name) if isinstance(model, dict) else None for name in ("vocab", "merges"))
        added = content.get("added_tokens") or []
    else:
        path, source = folder / "vocab.json", folder / "merges.txt"
        vocabulary, lines, added = read_json(path), read_text(source).replace("\r\n", "\n").split("\n"), []
    if not isinstance(vocabulary, dict) or not isinstance(lines, list) or not isinstance(added, list):
        raise ValueError(f"{path} has no vocabulary and merges, so it is not CLIP's: download it again")
    merges = []
    for line in lines:
        if line == "" or (isinstance(line, str) and line.startswith("#version")):
            continue
        pair = line.split(" ") if isinstance(line, str) else line
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(word, str) for word in pair):
            raise ValueError(f"{source}: {quoted(line)} is no pair of words to merge: download it again")
        merges.append((pair[0], pair[1]))
    return Words(path, vocabulary, merges, added)


def read_special(folder: Path, config: Mapping[str, Any], words: Words) -> SpecialTokens:
    """The tokens with a purpose or an id. Where CONFIG numbers tokens these are all, else other files have more, as in
    transformers."""
    path = folder / CONFIG
    purposes, others = _with_purpose(path, config)
    numbers: Any = config.get("added_tokens_decoder")
    if numbers is None:
        special = _with_purpose(folder / SPECIAL, read_optional(folder / SPECIAL), special=True)
        purposes, others = {**purposes, **special[0]}, [*others, *special[1]]
        names = {token.content for token in (*purposes.values(), *others)}
        numbers = [
            (folder / ADDED, number, {"content": content, "special": content in names})
            for content, number in read_optional(folder / ADDED).items()
        ]
        numbers += [(words.path, token.get("id") if isinstance(token, dict) else None, token) for token in words.added]
    elif isinstance(numbers, dict):
        ids = {key: int(key) for key in numbers if key.isdecimal() and len(key) <= 10}
        numbers = [(path, ids.get(key, key), token) for key, token in numbers.items()]
    else:
        raise ValueError(f"{path}: added_tokens_decoder={quoted(numbers)} must have tokens by their ids")
    if len(numbers) + len(others) > MAX_ADDED:
        raise ValueError(f"{folder} has more than {MAX_ADDED} tokens beside its vocabulary: remove those without use")
    numbered = {_id(path, token, number): _token(path, token) for path, number, token in numbers}
    by_content = {token.content: token for token in numbered.values()}
    purposes = {name: by_content.get(token.content, token) for name, token in purposes.items()}
    return SpecialTokens(purposes, others, numbered)


def _with_purpose(
    path: Path, fields: Mapping[str, Any], *, special: bool = False
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The tokens of a file by their purposes, and those in lists; `special` tokens are all marked as such."""
    marked = {"special": True} if special else {}
    others: list[Any] = []
    for name in LISTS:
        listed = fields.get(name) or []
        if not isinstance(listed, list | dict):
            raise ValueError(f"{path}: {name}={quoted(listed)} must be a list of tokens")
        others += listed.values() if isinstance(listed, dict) else listed
    if len(others) > MAX_ADDED:
        raise ValueError(f"{path} lists more than {MAX_ADDED} tokens: remove those without use")
    purposes = {name: _token(path, fields[name], marked) for name in PURPOSES if fields.get(name) is not None}
    return purposes, [_token(path, token, marked) for token in others]


def _token(path: Path, token: object, marked: Mapping[str, bool] = MappingProxyType({})) -> AddedToken:
    """A token from its text, which makes it special, or from its fields."""
    from tokenizers import AddedToken

    fields = token if isinstance(token, dict) else {"content": token, "special": True}
    content = fields.get("content")
    if not isinstance(content, str) or not 1 <= len(content) <= MAX_CONTENT or not content.isprintable():
        raise ValueError(f"{path} has {quoted(token)} where a token of 1 to {MAX_CONTENT} printable characters belongs")
    flags = {**{name: fields[name] for name in FLAGS if name in fields}, **marked}
    if odd := next((name for name, value in flags.items() if type(value) is not bool), None):
        raise ValueError(f"{path}: {odd}={quoted(flags[odd])} of the token {quoted(content)} must be true or false")
    return AddedToken(content, **flags)


def _id(path: Path, token: object, number: object) -> int:
    if type(number) is not int or not 0 <= number < 2**32:
        raise ValueError(f"{path} gives {quoted(token)} the id {quoted(number)}: download it again")
    return number


def check_words(words: Words, tokens: SpecialTokens) -> None:
    """Raise ValueError for a vocabulary that is too large, gives a word no id, or lacks one of CLIP's or its merges."""
    if len(words.vocabulary) > MAX_WORDS:
        raise ValueError(f"{words.path} has {len(words.vocabulary)} words, more than {MAX_WORDS}, so it is not CLIP's")
    for word, number in words.vocabulary.items():
        _id(words.path, word, number)
    known = {*words.vocabulary, *(token.content for token in tokens.numbered.values())}
    if missing := [token for token in FRAME if token not in known]:
        raise ValueError(f"{words.path} has no {' and no '.join(missing)}, so it is not CLIP's: download it again")
    for pair in words.merges:
        if missing := [word for word in (*pair, "".join(pair)) if word not in words.vocabulary]:
            raise ValueError(f"{words.path} lacks {quoted(missing[0])}, which merges make or need: download both again")
