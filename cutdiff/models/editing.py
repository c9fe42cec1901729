r"""The syntax of a prompt that changes from step to step, and of a sum of prompts.

The rules are those of AUTOMATIC1111's stable-diffusion-webui (`prompt_parser`), with which a step is counted from 1:

- `[from:to:when]` is `from` up to the step `when`, and `to` after it; `[to:when]` has nothing before it, and
  `[from::when]` nothing after it. A `when` with a point is a share of the steps, rounded down: of 10 steps `[a:b:0.25]`
  has `a` in 2.
- `[a|b|c]` is `a` at the first step, `b` at the second, `c` at the third, `a` at the fourth. Any may be empty.
- `a AND b:1.2` is two prompts, whose guidance is added up with the weights 1 and 1.2. `AND` parts the whole prompt, in
  brackets too, and comes before all other syntax.

Both kinds of brackets may hold each other and those of weights, which `models.prompts` reads in the text of a step. An
escaped character, such as `\[` or `\:`, is text there and here. Brackets that match none of these are text, and so are
all that are open around them.

There are three departures. That program counts the calls of its denoiser from 0, so that its first text lasts one step
longer than its rules say; here the rules hold. A number after a colon is a weight only in a prompt that has `AND`; by
that program `a screen, 16:9` has the weight 9. And a `|` outside of alternatives is text, for which that program gives
up on all steps in the prompt.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from cutdiff.models.prompts import limited

TOKEN = re.compile(r"\\.?|[()\[\]:|]|[^\\()\[\]:|]+", re.DOTALL)
WHEN = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?\d++)?+")
WEIGHT = re.compile(r"[+-]?(?:\d++\.?|\d*+\.\d++)")
AND = re.compile(r"\bAND\b")
CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Edit:
    """`[before:after:when]`."""

    before: Nodes
    after: Nodes
    when: str

    def last_step(self, num_steps: int) -> int:
        """The last step, counted from 1, that has the text `before`; 0 or less for none."""
        value = float(self.when) * (num_steps if "." in self.when else 1)
        return int(max(-1, min(num_steps, value)))

    def nodes_at(self, step: int, num_steps: int) -> Nodes:
        return self.before if step <= self.last_step(num_steps) else self.after


@dataclass(frozen=True)
class Alternatives:
    """`[a|b|c]`."""

    options: list[Nodes]

    def nodes_at(self, step: int, num_steps: int) -> Nodes:
        return self.options[(step - 1) % len(self.options)]


Nodes = Sequence["str | Edit | Alternatives | Nodes"]
"""Text, what changes, and brackets of weights with what they hold, one after another."""


@dataclass
class Bracket:
    """A bracket that is not closed yet, and what came after it."""

    kind: str
    nodes: list[str | Edit | Alternatives | Nodes] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    """The indices of the colons and bars among the nodes."""

    def closed(self) -> Edit | Alternatives | Nodes | None:
        """The meaning of the bracket once it is closed; None where it is text."""
        colons = [i for i in self.marks if self.nodes[i] == ":"]
        if self.kind == "(":
            return ["(", *self.nodes, ")"] if len(colons) <= 1 else None
        if not self.marks:
            return ["[", *self.nodes, "]"]
        if not colons:
            ends = pairwise([-1, *self.marks, len(self.nodes)])
            return Alternatives([self.nodes[a + 1 : b] for a, b in ends])
        when = self.nodes[colons[-1] + 1 :]
        text = "".join(node for node in when if isinstance(node, str)).strip()
        if len(colons) > 2 or not all(isinstance(node, str) for node in when) or not WHEN.fullmatch(text):
            return None
        *first, last = colons
        if not first:
            return Edit([], self.nodes[:last], text)
        return Edit(self.nodes[: first[0]], self.nodes[first[0] + 1 : last], text)


def schedule(prompt: str, num_steps: int) -> list[tuple[int, str]]:
    """The texts that a prompt without AND has one after another, each with the last step that it is read at, counted
    from 1. No string is an error; one without steps and alternatives is its own text."""
    nodes, changing = _parsed(prompt)
    if not changing:
        return [(num_steps, prompt)]
    period = math.lcm(*(len(node.options) for node in changing if isinstance(node, Alternatives)))
    edits = [0, *_ends([node for node in changing if isinstance(node, Edit)], num_steps)]

    @cache
    def text(step: int) -> str:
        return _text(nodes, step, num_steps)

    def alike(step: int) -> int:
        """The first step that has the same text because of the same edits and alternatives."""
        start = edits[bisect_left(edits, step) - 1] + 1
        return start + (step - start) % period

    return [(end, text(alike(end))) for end in _ends(changing, num_steps)]


def texts(prompt: str, num_steps: int) -> list[str]:
    """The text of a prompt without AND at each step."""
    parts = schedule(prompt, num_steps)
    starts = [0, *(end for end, _ in parts)]
    return [text for start, (end, text) in zip(starts, parts, strict=False) for _ in range(end - start)]


def terms(prompt: str) -> list[tuple[str, float]]:
    """The prompts between ANDs and their weights; without AND the prompt itself, of weight 1."""
    parts = AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    weighted = []
    for part in parts:
        text, colon, weight = part.rpartition(":")
        has_weight = colon and WEIGHT.fullmatch(weight.strip())
        weighted.append((text.strip(), limited(float(weight))) if has_weight else (part.strip(), 1.0))
    return weighted


def described(prompt: str, num_steps: int, *, sums: bool = True) -> list[dict[str, object]] | None:
    """The terms of a prompt as a record has them, each with its weight and the steps after which its text changes; None
    for a prompt that is read as it is. Without `sums` AND is a word."""
    parts = terms(prompt) if sums else [(prompt, 1.0)]
    changing = [_parsed(text)[1] for text, _ in parts]
    if len(parts) == 1 and not changing[0]:
        return None
    ends = [_ends(nodes, num_steps) for nodes in changing]
    return [{"weight": weight, "changes_after": own[:-1]} for (_, weight), own in zip(parts, ends, strict=True)]


def _ends(changing: Sequence[Edit | Alternatives], num_steps: int) -> list[int]:
    """The last steps of the texts that a prompt with these nodes has one after another."""
    if any(isinstance(node, Alternatives) for node in changing):
        return [*range(1, num_steps + 1)]
    ends = {num_steps, *(node.last_step(num_steps) for node in changing if isinstance(node, Edit))}
    return [end for end in sorted(ends) if end >= 1]


def _parsed(prompt: str) -> tuple[Nodes, list[Edit | Alternatives]]:
    """The nodes of a prompt, and those of all depths that change."""
    if "[" not in prompt:
        return [prompt], []
    root: list[str | Edit | Alternatives | Nodes] = []
    open_brackets: list[Bracket] = []
    changing: list[Edit | Alternatives] = []

    def give_up() -> None:
        """Make text of the open brackets, and keep what they hold."""
        for bracket in open_brackets:
            root.append(bracket.kind)
            root.extend(bracket.nodes)
        open_brackets.clear()

    for token in TOKEN.findall(prompt):
        if token in CLOSING:
            open_brackets.append(Bracket(token))
            continue
        node = token
        if token in (")", "]"):
            matches = open_brackets and CLOSING[open_brackets[-1].kind] == token
            closed = open_brackets[-1].closed() if matches else None
            if closed is None:
                give_up()
            else:
                open_brackets.pop()
                node = closed
                changing += [closed] if isinstance(closed, Edit | Alternatives) else []
        elif token in (":", "|") and open_brackets:
            open_brackets[-1].marks.append(len(open_brackets[-1].nodes))
        (open_brackets[-1].nodes if open_brackets else root).append(node)
    give_up()
    return root, changing


def _text(nodes: Nodes, step: int, num_steps: int) -> str:
    """The text of the nodes at a step, counted from 1."""
    pieces: list[str] = []
    inner = [iter(nodes)]
    while inner:
        node = next(inner[-1], None)
        if node is None:
            inner.pop()
        elif isinstance(node, str):
            pieces.append(node)
        else:
            inner.append(iter(node.nodes_at(step, num_steps) if isinstance(node, Edit | Alternatives) else node))
    return "".join(pieces)
