r"""The syntax of a prompt: words with weights, and breaks between chunks.

The rules are those of AUTOMATIC1111's stable-diffusion-webui (`prompt_parser.parse_prompt_attention`). `(word)` weighs
1.1 times as much, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times; brackets within brackets multiply. A closing bracket
that no bracket opened is text, and one that is missing is assumed at the end. `\(`, `\)`, `\[`, `\]` and `\\` are text;
any other backslash is dropped. `BREAK`, a word of its own, begins a new chunk.

A number is digits with at most one point, as there: `(x:nan)` and `(x:1e9)` are text in brackets, of weight 1.1. There
are three departures. `(x:1.2.3)`, an error there, is text in brackets too; a weight stays within ±`MAX_WEIGHT`, so that
none overflows; and `BREAK` begins a new chunk within brackets too. Steps such as `[a:b:0.5]`, alternatives such as
`[a|b]` and `AND` are read before, by `models.editing`; here they are text.
"""

from __future__ import annotations

import math
import re
from itertools import groupby, pairwise
from operator import itemgetter

from cutdiff.options import MAX_FLOAT32

LORA = re.compile(r"<(lora|lyco|hypernet):([^<>]*+)>")
Pieces = list[tuple[str, float]]
"""Pieces of text, each with its weight."""

FACTORS = {"(": 1.1, "[": 1 / 1.1}
"""The factor of a bracket without a number."""
MAX_WEIGHT = 1000.0

SYNTAX = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\]?)
    | :\s*+(?P<weight>[+-]?+(?:\d++\.?+\d*+|\.\d++))\s*+\)
    | [()\[\]:]
    | [^\\()\[\]:]+
    """,
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")


def parse_weights(prompt: str) -> list[Pieces]:
    """The pieces of a prompt in their order, in one list for each part between BREAKs. No string is an error.

    Neighbours of one weight are one piece, and no piece is empty.
    """
    # All brackets in their order, after one around everything: the factor of each, and the number of the one of its
    # kind around it. Round and square brackets are counted apart because they may overlap.
    factors, outer = [1.0], [0]
    opened = {"(": [0], "[": [0]}
    placed: list[tuple[str, int, int]] = []  # text, and the innermost brackets around it
    breaks: list[int] = []  # the indices of the texts that begin a new part
    for match in SYNTAX.finditer(prompt):
        token = match[0]
        if token in opened:
            factors.append(FACTORS[token])
            outer.append(opened[token][-1])
            opened[token].append(len(factors) - 1)
        elif token.endswith(")") and match["escaped"] is None and opened["("][-1]:
            closed = opened["("].pop()
            if match["weight"]:
                factors[closed] = float(match["weight"])
        elif token == "]" and opened["["][-1]:
            opened["["].pop()
        else:
            texts = _parts(token) if "BREAK" in token else [token if match["escaped"] is None else match["escaped"]]
            breaks += range(len(placed) + 1, len(placed) + len(texts))
            placed += [(text, opened["("][-1], opened["["][-1]) for text in texts]
    weights = [1.0]
    for number in range(1, len(factors)):
        weights.append(limited(weights[outer[number]] * limited(factors[number])))
    pieces = [(text, limited(weights[i] * weights[j])) for text, i, j in placed]
    return [_merged(pieces[start:stop]) for start, stop in pairwise([0, *breaks, len(pieces)])]


def named_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without the LoRAs that it names as A1111 does, and their names and scales: `<lora:name:0.3>`, or
    `<lora:name>` for 1. ValueError for one that cannot be read."""
    named: list[tuple[str, float]] = []
    for match in LORA.finditer(prompt):
        name, *scales = match[2].split(":")
        if match[1] == "hypernet":
            raise ValueError(f"{match[0]} is a hypernetwork, which cannot be read: leave it out")
        try:
            (scale,) = map(float, scales or ["1"])
        except ValueError:
            scale = math.nan
        if not name or not abs(scale) <= MAX_FLOAT32:
            raise ValueError(f"{match[0]} must be <lora:NAME:SCALE>, with one scale that is a finite number")
        named.append((name, scale))
    return (LORA.sub("", prompt).strip() if named else prompt), named


def written(text: str, weight: float = 1.0) -> str:
    """The text as one types it to give it this weight."""
    text = re.sub(r"([()\[\]\\])", r"\\\1", text)
    return text if weight == 1 else f"({text}:{weight:.4f})"


def _parts(text: str) -> list[str]:
    """The parts of a text between BREAKs, without the blanks beside these."""
    first, *others = BREAK.split(text)
    parts = [first, *(part.lstrip() for part in others)]
    return [*(part.rstrip() for part in parts[:-1]), parts[-1]]


def limited(weight: float) -> float:
    """The weight within ±`MAX_WEIGHT`."""
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def _merged(pieces: Pieces) -> Pieces:
    runs = groupby((piece for piece in pieces if piece[0]), key=itemgetter(1))
    return [("".join(text for text, _ in run), weight) for weight, run in runs]
