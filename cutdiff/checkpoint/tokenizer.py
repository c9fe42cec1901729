"""CLIP's tokenizers: building one from the files of a folder, and finding one in the local Hugging Face cache.

transformers is given words, merges and tokens that `vocabulary` has read and checked, but no folder: it would open
whatever the files there name, wherever that lies, and more files beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.text import by_transformers
from cutdiff.checkpoint.vocabulary import CONFIG, WORDS, check_words, read_optional, read_special, read_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CACHED_TOKENIZERS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ("stabilityai/sdxl-turbo", "tokenizer"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
)
"""The repositories that have CLIP's tokenizer, which all families share, and the folder in each."""
PAD_TOKENS = {True: "!", False: "<|endoftext|>"}
"""The token that pads prompts, by whether the encoder is OpenCLIP's."""


def read_tokenizer(folder: Path, max_length: int, pad_token: str | None = None) -> CLIPTokenizer:
    """A tokenizer in CLIP's file format. A chunk of a prompt has its own length, or `max_length` where that is less.

    Without a `pad_token` it pads as its files say. Raises ValueError where the folder has no tokenizer or a bad one.
    """
    from transformers import CLIPTokenizer

    if not _holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer (vocab.json and merges.txt), so the model is incomplete: download it"
        )
    words, config = read_words(folder), read_optional(folder / CONFIG)
    tokens = read_special(folder, config, words)
    check_words(words, tokens)
    special: dict[str, Any] = {**tokens.purposes, **({} if pad_token is None else {"pad_token": pad_token})}
    # Where the files give no length, transformers writes 10^30, and the encoder would fail on a long prompt.
    length = min(_length(folder / CONFIG, config, max_length), max_length)
    if length < 3:  # one token begins a prompt, one ends it
        raise ValueError(f"{folder} and its encoder leave {length} tokens, too few for a prompt")
    try:
        with by_transformers():
            tokenizer = CLIPTokenizer(
                vocab=words.vocabulary,
                merges=words.merges,  # pyright: ignore[reportArgumentType]  (annotated as lines; it reads pairs)
                added_tokens_decoder=tokens.numbered,
                extra_special_tokens=tokens.others,
                model_max_length=length,
                **special,
            )
            ids = tokenizer.get_vocab()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for number, token in tokens.numbered.items():
        if ids.get(token.content) != number:
            raise ValueError(
                f"{folder} gives {quoted(token.content)} the id {number}, where {ids.get(token.content)} follows on "
                "its vocabulary: download it again"
            )
    if (different := len({*ids.values()})) < len(ids):
        raise ValueError(f"{words.path} gives {len(ids)} tokens {different} different ids: download it again")
    return tokenizer


def cached_tokenizer() -> Path:
    """The folder of CLIP's tokenizer in the local Hugging Face cache. Raises ValueError where the cache has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for repository, folder in CACHED_TOKENIZERS:
        try:
            path = Path(snapshot_download(repository, local_files_only=True)) / folder
        except LocalEntryNotFoundError:
            continue
        if _holds_tokenizer(path):
            return path
    raise ValueError(
        "a single file holds no tokenizer, and the local Hugging Face cache has none either: pass --config FOLDER, a "
        "diffusers folder of the same model family (its weights are not read), or fetch one with "
        f"`hf download {CACHED_TOKENIZERS[0][0]}`"
    )


def _holds_tokenizer(folder: Path) -> bool:
    """True for a folder that has the files of a tokenizer, in either of two layouts."""
    layouts = (("vocab.json", "merges.txt"), (WORDS,))
    return any(all((folder / name).exists() for name in layout) for layout in layouts)


def _length(path: Path, config: Mapping[str, Any], default: int) -> int:
    length = default if config.get("model_max_length") is None else config["model_max_length"]
    if type(length) not in (int, float) or length != length // 1:
        raise ValueError(f"{path}: model_max_length={quoted(length)} is no number of tokens")
    return int(length)
