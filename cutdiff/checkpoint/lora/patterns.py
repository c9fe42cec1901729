"""Regular expressions of files that nobody has checked, matched in bounded time.

PEFT gives numbers to modules by expressions. Python's own matcher could take years for a few characters, so here the
parsed expression is followed from all positions at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from re import _constants as code  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from cutdiff.checkpoint.files import quoted

MAX_LENGTH = 1000
MAX_NESTED = 3
"""The most repetitions inside one another, whose times multiply."""
NAME = re.compile(r"\^?[\w.]+")
"""An expression that is the name of a module, which has no repetitions and whose every dot may be any character."""
CATEGORIES = {
    code.CATEGORY_DIGIT: str.isdecimal,
    code.CATEGORY_WORD: lambda character: character.isalnum() or character == "_",
    code.CATEGORY_SPACE: str.isspace,
}
OPPOSITES = {
    code.CATEGORY_NOT_DIGIT: code.CATEGORY_DIGIT,
    code.CATEGORY_NOT_WORD: code.CATEGORY_WORD,
    code.CATEGORY_NOT_SPACE: code.CATEGORY_SPACE,
}
STARTS = (code.AT_BEGINNING, code.AT_BEGINNING_STRING)
ENDS = (code.AT_END, code.AT_END_STRING)

Items = Sequence[tuple[Any, Any]]
"""A parsed expression: operations, with their arguments, one after another."""


@dataclass(frozen=True)
class Pattern:
    """An expression that a module's whole name matches, or the part of it behind any of its dots."""

    text: str
    items: Items | None
    """The parsed expression; None for the name of a module, which is matched at once."""

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Read an expression. Raises ValueError where it is none, or has more than repetitions and alternatives."""
        if NAME.fullmatch(text):
            return cls(text, None)
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{quoted(text)}, which is longer than {MAX_LENGTH} characters")
        try:
            items = list(_parser.parse(text))
            _check(items, MAX_NESTED)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{quoted(text)}, which is no regular expression ({error})") from None
        except NotImplementedError as error:
            raise ValueError(f"{quoted(text)}, an expression with {error}: write it without") from None
        return cls(text, items)

    def matches(self, module: str) -> bool:
        starts = {0, *(i + 1 for i, character in enumerate(module) if character == ".")}
        if self.items is not None:
            return len(module) in _reached(self.items, module, starts)
        name = self.text.removeprefix("^")
        start = len(module) - len(name)
        if start not in starts or (start and name is not self.text):
            return False
        return all(ours in (".", theirs) for ours, theirs in zip(name, module[start:], strict=True))


def _check(items: Items, nested: int) -> None:
    """Raise NotImplementedError, with its description, for an operation that is not followed here."""
    for operation, argument in items:
        if operation in (code.MAX_REPEAT, code.MIN_REPEAT):
            if nested == 0:
                raise NotImplementedError(f"more than {MAX_NESTED} repetitions inside one another")
            _check(argument[2], nested - 1)
        elif operation is code.SUBPATTERN:
            if argument[1] or argument[2]:
                raise NotImplementedError("flags")
            _check(argument[3], nested)
        elif operation is code.BRANCH:
            for branch in argument[1]:
                _check(branch, nested)
        elif operation is code.AT and argument not in (*STARTS, *ENDS):
            raise NotImplementedError("the edges of words")
        elif operation not in (code.LITERAL, code.NOT_LITERAL, code.ANY, code.IN, code.AT):
            raise NotImplementedError(str(operation).lower())


def _reached(items: Items, text: str, positions: set[int]) -> set[int]:
    """The positions in the text at which a match of the items can end that begins at one of `positions`."""
    for operation, argument in items:
        positions = _follow(operation, argument, text, positions)
    return positions


def _follow(operation: Any, argument: Any, text: str, positions: set[int]) -> set[int]:
    if operation is code.SUBPATTERN:
        return _reached(argument[3], text, positions)
    if operation is code.BRANCH:
        return set[int]().union(*(_reached(branch, text, positions) for branch in argument[1]))
    if operation is code.AT:
        return positions & {0 if argument in STARTS else len(text)}
    if operation not in (code.MAX_REPEAT, code.MIN_REPEAT):
        return {i + 1 for i in positions if i < len(text) and _is_of(operation, argument, text[i])}
    least, most, repeated = argument
    for _ in range(min(least, len(text) + 1)):  # after so many, more have no effect
        positions = _reached(repeated, text, positions)
    reached, new = set(positions), positions
    for _ in range(min(most - least, len(text) + 1)):
        new = _reached(repeated, text, new) - reached
        if not new:
            break
        reached |= new
    return reached


def _is_of(operation: Any, argument: Any, character: str) -> bool:
    """True for a character that a literal, a class or a dot matches."""
    if operation is code.ANY:
        return character != "\n"
    if operation in (code.LITERAL, code.NOT_LITERAL):
        return (ord(character) == argument) == (operation is code.LITERAL)
    is_negated = argument[0][0] is code.NEGATE
    for kind, value in argument[is_negated:]:
        if kind is code.LITERAL:
            has = ord(character) == value
        elif kind is code.RANGE:
            has = value[0] <= ord(character) <= value[1]
        else:
            has = CATEGORIES[OPPOSITES.get(value, value)](character) == (value in CATEGORIES)
        if has:
            return not is_negated
    return is_negated
