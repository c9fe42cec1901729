"""The embedded models' tokenizers and text encoders, untrained: CLIP's and T5's formats and architectures with few
words."""

from __future__ import annotations

import itertools
import json
import string

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from cutdiff.models.joint_text import START_OF_WORD, T5, FluxText
from cutdiff.models.text import TextEncoders
from cutdiff.models.tokens import END_OF_WORD
from cutdiff.scenes import world

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS, T5_TOKENS = 77, 32
PART = "part of"
"""The words before the caption of a scene's part, where the small FLUX is trained on such."""
WIDTH = 64


def make_text_encoders() -> TextEncoders:
    """Make two tokenizers over the words of the world and two small CLIP encoders with random weights."""
    vocabulary, merges = _byte_pairs(world.captions(_all_choices()))
    config = _clip_config(vocabulary)
    first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for encoder in (first, second):
        _spread_embeddings(encoder)
    # SDXL's second tokenizer pads with "!"
    return TextEncoders(
        _clip_tokenizer(vocabulary, merges, END), _clip_tokenizer(vocabulary, merges, "!"), first, second
    )


def make_flow_text() -> FluxText:
    """Make the text side of a small FLUX: a CLIP encoder, whose pooled state is read, and a T5 encoder, each with its
    tokenizer over the words of the world and with random weights."""
    captions = world.captions(_all_choices())
    vocabulary, merges = _byte_pairs(captions)
    clip = CLIPTextModel(_clip_config(vocabulary))
    _spread_embeddings(clip)
    words = sorted({word for caption in [PART, *captions] for word in caption.split()})
    tokenizer = _t5_tokenizer(words)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
    t5 = T5(tokenizer, T5EncoderModel(config), T5_TOKENS)
    return FluxText(_clip_tokenizer(vocabulary, merges, END), None, clip, None, t5=t5)


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], pad_token: str) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType]  (annotated as a file's lines; pairs are what it reads)
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


def _clip_config(vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
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


def _spread_embeddings(encoder: torch.nn.Module) -> None:
    """Draw the embeddings of tokens anew and wider: CLIP starts with a deviation of 0.02 and trains for long, while
    these train for minutes, and must differ from the start."""
    embeddings = next(p for name, p in encoder.named_parameters() if name.endswith("token_embedding.weight"))
    torch.nn.init.normal_(embeddings, std=0.5)


def _t5_tokenizer(words: list[str]) -> T5Tokenizer:
    """A tokenizer for which each of the words is one token; others are spelled, by small letters, digits and
    punctuation. Every unknown character is one of T5's unknown tokens."""
    whole = [(START_OF_WORD + word, -1.0) for word in words]
    spelled = [(letter, -10.0) for letter in (START_OF_WORD, *string.ascii_lowercase, *string.digits, *",.'-:;!?()")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *whole, *spelled], extra_ids=0, model_max_length=T5_TOKENS)


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
