"""Prompts as the text states of every step: those that stay the same, that change by step, and sums of prompts.

A step of a run reads the text of its step within the schedule: step i of a schedule of n steps that of i % n, so that a
method that goes through the schedule more than once, such as a cascade of sizes, begins with the first text each time.
`AND` makes a sum of the prompt only; in a negative or second prompt it is a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from cutdiff.models import editing
from cutdiff.models.shared_text import SharedText
from cutdiff.models.text import TextEncoders, TextStates, TextSum
from cutdiff.sampling.rows import Text

Batch = tuple[str, ...]
"""A text for each picture."""


class Prompts(NamedTuple):
    """The texts of a run: the prompts of B pictures, and what they share."""

    positive: list[str]
    positive_2: str | None = None
    """The text that the second encoder reads; None: the same."""
    negative: str = ""
    negative_2: str | None = None


def encode_prompts(
    text: TextEncoders | SharedText, prompts: Prompts, num_steps: int, *, zeros_for_empty_negative: bool
) -> tuple[Text, Text]:
    """The positive and the negative text of a run of `num_steps`, of B rows and all equally long, as an item's rows are
    one batch."""
    terms, weights = _terms(prompts.positive, num_steps)
    negatives = [(part,) * len(prompts.positive) for part in editing.texts(prompts.negative, num_steps)]
    seconds, negative_seconds = _seconds(prompts, num_steps)
    length = max(text.length(part) for pair in pairs_read(prompts, num_steps) for part in pair if part is not None)

    @cache
    def encoded(batch: Batch, second: str | None) -> TextStates:
        return text.encode(list(batch), second, min_length=length)

    def positive(batches: tuple[Batch, ...], second: str | None) -> TextStates | TextSum:
        states = tuple(encoded(batch, second) for batch in batches)
        return states[0] if len(batches) == 1 else TextSum(states, weights)

    def negative(batch: Batch, second: str | None) -> TextStates:
        if zeros_for_empty_negative and not (batch[0] or second):
            return TextStates.zeros_like(encoded(terms[0][0], seconds[0]))
        return encoded(batch, second)

    return (
        _by_step([*zip(zip(*terms, strict=True), seconds, strict=True)], positive),
        _by_step([*zip(negatives, negative_seconds, strict=True)], negative),
    )


def pairs_read(prompts: Prompts, num_steps: int) -> list[tuple[str, str | None]]:
    """The texts of all steps, each once: that which the encoders read, and the second's own where it has one."""
    terms, _ = _terms(prompts.positive, num_steps)
    seconds, negative_seconds = _seconds(prompts, num_steps)
    pairs = [(part, second) for term in terms for batch, second in zip(term, seconds, strict=True) for part in batch]
    negatives = editing.texts(prompts.negative, num_steps)
    return [*dict.fromkeys([*pairs, *zip(negatives, negative_seconds, strict=True)])]


def _seconds(prompts: Prompts, num_steps: int) -> list[list[str | None]]:
    """The texts of each step that the second encoder has of its own, of the prompt and of the negative one."""
    return [
        [None] * num_steps if other is None else [*editing.texts(other, num_steps)]
        for other in (prompts.positive_2, prompts.negative_2)
    ]


def _terms(prompts: list[str], num_steps: int) -> tuple[list[list[Batch]], tuple[tuple[float, ...], ...]]:
    """The texts of each term at each step, and the weights of each picture's terms. A picture with fewer terms than
    others has its first one again, with weight 0."""
    parts = [editing.terms(prompt) for prompt in prompts]
    count = max(map(len, parts))
    full = [[*part, *[(part[0][0], 0.0)] * (count - len(part))] for part in parts]
    weights = tuple(tuple(weight for _, weight in part) for part in full)
    columns = [[editing.texts(part[i][0], num_steps) for part in full] for i in range(count)]
    return [[*zip(*column, strict=True)] for column in columns], weights


def _by_step(read: Sequence[tuple[Any, str | None]], states: Callable[..., TextStates | TextSum]) -> Text:
    """The states of what each step reads, or a function of the step where that changes."""
    made = {each: states(*each) for each in dict.fromkeys(read)}
    return made[read[0]] if len(made) == 1 else lambda step: made[read[step % len(read)]]
