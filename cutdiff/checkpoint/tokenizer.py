"""CLIP's tokenizers: reading one from a folder, and finding one in the local Hugging Face cache.

transformers reads the files, but only after they have been checked here: it makes an empty tokenizer of a folder
without files, and some of its releases open any file that a configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutdiff.checkpoint.files import quoted
from cutdiff.checkpoint.read import read_json, read_text
from cutdiff.checkpoint.text import by_transformers

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
FRAME = ("<|startoftext|>", "<|endoftext|>")
"""The tokens that begin and end a prompt."""
PAD_TOKENS = {True: "!", False: "<|endoftext|>"}
"""The token that pads prompts, by whether the encoder is OpenCLIP's."""
TOKENIZER_JSON = (
    "vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The files of a tokenizer that transformers reads, beside merges.txt."""
FILE_FIELDS = ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "init_inputs")
"""Fields of a tokenizer_config.json that some release of transformers opens as files, wherever they lie."""


def read_tokenizer(folder: Path, max_length: int, pad_token: str | None = None) -> CLIPTokenizer:
    """A tokenizer in CLIP's file format. A chunk of a prompt has its own length, or `max_length` where that is less.

    Without a `pad_token` it pads as its files say. Raises ValueError where the folder has no tokenizer or a bad one.
    """
    from transformers import CLIPTokenizer

    if not _holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer (vocab.json and merges.txt), so the model is incomplete: download it"
        )
    _check_tokenizer(folder)
    special: dict[str, Any] = {} if pad_token is None else {"pad_token": pad_token}
    try:
        with by_transformers():
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **special)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or length != length // 1:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length={quoted(length)} is no number of tokens"
        )
    # Where the files give no length, transformers says 10^30, and the encoder would fail on a long prompt.
    tokenizer.model_max_length = int(min(length, max_length))
    if tokenizer.model_max_length < 3:  # one token begins a prompt, one ends it
        raise ValueError(f"{folder} and its encoder leave {tokenizer.model_max_length} tokens, too few for a prompt")
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


def _check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a file that transformers must not read: a damaged one, or one that names other files."""
    files = {name: read_json(folder / name) for name in TOKENIZER_JSON if (folder / name).exists()}
    if (folder / "merges.txt").exists():
        read_text(folder / "merges.txt")
    if (vocabulary := files.get("vocab.json")) is not None:
        _check_vocabulary(folder / "vocab.json", vocabulary, files.get("added_tokens.json", {}))
    named = [field for field in FILE_FIELDS if files.get("tokenizer_config.json", {}).get(field)]
    if named:
        raise ValueError(f"{folder / 'tokenizer_config.json'} names files, in {', '.join(named)}: remove these fields")


def _check_vocabulary(path: Path, vocabulary: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Raise ValueError where two tokens share an id, an id is no number, or a token that frames a prompt is missing."""
    ids = [*vocabulary.values()]
    if odd := next((token for token, value in vocabulary.items() if type(value) is not int or value < 0), None):
        raise ValueError(f"{path} gives {quoted(odd)} the id {quoted(vocabulary[odd])}: download it again")
    if len({*ids}) < len(ids):
        raise ValueError(f"{path} gives {len(ids)} tokens {len({*ids})} different ids: download it again")
    if missing := [token for token in FRAME if token not in vocabulary and token not in added]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}, so it is not CLIP's: download it again")


def _holds_tokenizer(folder: Path) -> bool:
    """True for a folder that has the files of a tokenizer, in either of two layouts."""
    layouts = (("vocab.json", "merges.txt"), ("tokenizer.json",))
    return any(all((folder / name).exists() for name in layout) for layout in layouts)
