"""The embedded model's tokenizers and text encoders, untrained: CLIP's formats and architecture with few words."""

from __future__ import annotations

import itertools
import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cutdiff.models.text import TextEncoders
from cutdiff.models.tokens import END_OF_WORD
from cutdiff.scenes import world

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77
WIDTH = 64


def make_text_encoders() -> TextEncoders:
    """Make two tokenizers over the words of the world and two small CLIP encoders with random weights."""
    vocabulary, merges = _byte_pairs(world.captions(_all_choices()))

    def tokenizer(pad_token: str) -> CLIPTokenizer:
        return CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,  # pyright: ignore[reportArgumentType]  (annotated as a file's lines; pairs are what it reads)
            pad_token=pad_token,
            model_max_length=MAX_TOKENS,
        )

    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for encoder in (first, second):
        # CLIP starts with embeddings of deviation 0.02 and trains for long; these train for minutes, and must differ
        # from the start.
        embeddings = next(p for name, p in encoder.named_parameters() if name.endswith("token_embedding.weight"))
        torch.nn.init.normal_(embeddings, std=0.5)
    return TextEncoders(tokenizer(END), tokenizer("!"), first, second)  # SDXL's second tokenizer pads with "!"


def _all_choices() -> torch.Tensor:
    sizes = [len(v) for v in (world.COLORS, world.SUBJECTS, world.RIDGES, world.GROUNDS, world.TIMES)]
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def _byte_pairs(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary over all bytes, as CLIP's is, and its merges, under which every word of the texts is one token."""
    trained = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    trained.pre_tokenizer = Whitespace()
    trained.train_from_iterator(
        texts, BpeTrainer(vocab_size=10_000, end_of_word_suffix=END_OF_WORD, show_progress=False)
    )
    merged = {token: index for token, index in trained.get_vocab().items() if len(token.removesuffix(END_OF_WORD)) > 1}
    merges = [(first, second) for first, second in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(byte + END_OF_WORD for byte in alphabet),
        *sorted(merged, key=merged.__getitem__),
        START,
        END,
    ]
    return {token: index for index, token in enumerate(tokens)}, merges
