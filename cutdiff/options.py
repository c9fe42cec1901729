"""Options as fields of a frozen dataclass: their types and bounds are checked, read from text, and told of.

A class that derives from `Options` checks its fields when it is made. A type with bounds is written as
`Annotated[float, Between(0, 1)]`. This module imports no torch.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from pathlib import PurePath
from textwrap import dedent
from threading import Lock
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_TOKEN = r"""(?:^|(?<=[=(\[{,:\s]))(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|."""
"""A text in quotes where a value may begin, or a single character."""
_PARSING = Lock()
"""One thread parses at a time: in Python 3.11 one that is interrupted as it makes a tree may end with a SystemError."""
LONGEST = 200
"""The most characters of a value that an error shows."""
MAX_FLOAT32 = 2.0**128 * (1 - 2**-24)
"""The largest number that tensors can be multiplied by."""


class Between(NamedTuple):
    """The bounds of a number, both included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high == math.inf else f"in {self.low:g} … {self.high:g}"


class Raised(NamedTuple):
    """The least value of a number that is raised to it where it is smaller."""

    least: float


Share = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(1)]
Scale = Annotated[float, Between(-MAX_FLOAT32, MAX_FLOAT32), Raised(1.0)]
"""A guidance scale. Any of at most 1 means that guidance is off, which is written as 1."""


class Options:
    """The base of dataclasses whose fields are options."""

    def __post_init__(self) -> None:
        check_options(self)


class Option(NamedTuple):
    """One field of a dataclass of options."""

    name: str
    type: Any
    default: Any
    doc: str
    """The first sentence of the text below the field."""
    required: bool = False
    """True where there is no default."""


def options_of(thing: object) -> dict[str, Option]:
    """The options of a dataclass or of an instance of one, by name; none where it is anything else."""
    cls = thing if isinstance(thing, type) else type(thing)
    if not is_dataclass(cls):
        return {}
    types, docs = _types(cls), _docs(cls)
    return {
        field.name: Option(
            field.name,
            types.get(field.name, Any),
            None if field.default is MISSING else field.default,
            docs.get(field.name, ""),
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(cls)
        if field.init
    }


def check_options(thing: Any) -> None:
    """Give each field of the dataclass `thing` its type: 1 becomes 1.0, a list a tuple. ValueError where that fails."""
    for name, option in options_of(thing).items():
        object.__setattr__(thing, name, checked(name, getattr(thing, name), option.type))


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value as one of the type `kind`. ValueError, which names the option and what it takes, where it is none."""
    fitted = _fitted(value, kind)
    if fitted is MISSING:
        raise ValueError(f"{name}={_not_a(value, kind)}")
    return fitted


def read(name: str, text: str, kind: Any) -> Any:
    """The value that a command line or a spec writes as `text`. ValueError, naming the option, where it is none."""
    return checked(name, _parsed(text, kind), kind)


def written(value: Any) -> str:
    """A value as a spec and a record have it; `read` gives it back."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple | list):
        return f"({','.join(map(written, value))}{',' * (len(value) == 1)})"
    return repr(value)


def words(kind: Any) -> str:
    """The words of errors and --help for a type: "a finite number in 0 … 1"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = ", ".join(str(b) for b in args[1:] if isinstance(b, Between) and abs(b.low) < MAX_FLOAT32)
        return " ".join([words(args[0]), bounds]).strip()
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        several = any(_item_kinds(arg) is not None for arg in args)
        return ("; or " if several else " or ").join(dict.fromkeys(words(arg) for arg in args))
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"a list, each {words(args[0])}"
    if origin is tuple:
        kinds = dict.fromkeys(map(words, args))
        return f"{len(args)} values, each {' or '.join(kinds)}"
    names = {float: "a finite number", int: "a whole number", str: "a text", bool: "True or False", NoneType: "None"}
    return names.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def short(value: object) -> str:
    """A value as an error shows it: a path as its text, a tuple without brackets, a long one without its middle, and a
    huge number by its length."""
    if isinstance(value, PurePath):
        value = str(value)
    try:
        text = ", ".join(map(short, value)) if isinstance(value, tuple | list) and value else repr(value)
        text = f"[{text}]" if isinstance(value, list) and value else text
    except ValueError:  # Python writes integers of some thousand digits only
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def not_one_of(value: object, known: Iterable[object]) -> str:
    """An error's words for a name that is not known."""
    names = [*map(str, known)]
    return f"{short(value)} is not one of {', '.join(names)}{nearest(value, names)}"


def nearest(value: object, known: Iterable[str]) -> str:
    """An error's last words where a known name looks much like the one that was given."""
    near = get_close_matches(str(value), [*known], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def split(text: str) -> list[str]:
    """The parts of a text between its commas, but for those inside of brackets, and of quotes that open a value."""
    parts, depth = [""], 0
    for token in re.findall(_TOKEN, text, re.DOTALL):
        depth += (token in [*"([{"]) - (token in [*")]}"])
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def unquoted(text: str) -> str:
    """The text between quotes, where all of `text` is one in quotes."""
    try:
        value = _literal(text) if text[:1] in ("'", '"') else text
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, str) else text


def _parsed(text: str, kind: Any) -> Any:
    """The value of the type that a text says, or the text itself."""
    items = _item_kinds(kind)
    if items is not None and text.strip() != "None":
        inner = text.strip()
        inner = inner[1:-1] if inner[:1] + inner[-1:] in ("()", "[]") else inner
        parts = [part.strip() for part in split(inner)]
        texts = [unquoted(part) for part in (parts[:-1] if parts[-1] == "" else parts)]  # a comma may be last
        kinds = items if isinstance(items, tuple) and items else [items] * len(texts)
        kinds = [*kinds, *kinds[-1:] * len(texts)][: len(texts)]
        return tuple(_parsed(part, inner) for part, inner in zip(texts, kinds, strict=True))
    is_none = text == "None" and _fitted(None, kind) is None
    if _takes_text(kind) and _fitted(text, kind) is not MISSING and not is_none:
        return str(text)
    try:
        return _literal({"true": "True", "false": "False", "null": "None"}.get(text, text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return str(text)


def _literal(text: str) -> Any:
    with _PARSING:
        return ast.literal_eval(text)


def _item_kinds(kind: Any) -> Any:
    """The types of a tuple's items, the one type of a list's or of those of a tuple of any length; None otherwise."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return next((items for arg in args if (items := _item_kinds(arg)) is not None), None)
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return args[0]
    return args if origin is tuple else None


def _not_a(value: Any, kind: Any) -> str:
    literals = get_args(kind) if get_origin(kind) is Literal else ()
    if literals and isinstance(value, str):
        return not_one_of(value, literals)
    return f"{short(value)} must be {words(kind)}"


def _fitted(value: Any, kind: Any) -> Any:
    """The value as one of the type, MISSING where it is none."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        fitted, bounds = _fitted(value, args[0]), [bound for bound in args[1:] if isinstance(bound, Between)]
        if fitted is MISSING or not all(low <= fitted <= high for low, high in bounds):
            return MISSING
        return max([fitted, *(bound.least for bound in args[1:] if isinstance(bound, Raised))])
    if origin in (Union, UnionType):
        return next((fitted for arg in args if (fitted := _fitted(value, arg)) is not MISSING), MISSING)
    if origin is Literal:
        alike = (arg for arg in args if arg == value and isinstance(arg, bool) == isinstance(value, bool))
        return next(alike, MISSING)
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return MISSING
        kinds = args[:1] * len(value) if origin is list or args[-1:] == (Ellipsis,) else args
        if len(value) != len(kinds):
            return MISSING
        fitted = origin(map(_fitted, value, kinds))
        return MISSING if any(part is MISSING for part in fitted) else fitted
    if kind in (float, int):
        return _number(value, kind)
    return value if _is(value, origin or kind) else MISSING


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return MISSING
    try:
        number = int(value) if kind is int else float(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:  # an integer that no float can hold
        return MISSING
    return number if kind is int or abs(number) <= MAX_FLOAT32 else MISSING


def _is(value: Any, kind: Any) -> bool:
    if kind is Callable:
        return callable(value)
    return isinstance(value, kind) if isinstance(kind, type) and kind is not Any else True


def _takes_text(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(map(_takes_text, get_args(kind)))
    return kind is str or get_origin(kind) is Literal


@cache
def _types(cls: type) -> dict[str, Any]:
    """The types of the fields; none where they cannot be had, as where a name is known to type checkers only."""
    try:
        return get_type_hints(cls, include_extras=True)
    except Exception:  # an annotation may hold any expression
        return {}


@cache
def _docs(cls: type) -> dict[str, str]:
    """The first sentence of the string below each field, those of base classes too, as far as their source is there."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            with _PARSING:  # getsource parses, too
                body = ast.parse(dedent(inspect.getsource(base))).body[0]
        except (OSError, SyntaxError, TypeError):
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for field, below in pairwise(lines):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docs[field.target.id] = re.split(r"\. (?=[A-Z])", " ".join(text.value.split()))[0].rstrip(".")
    return docs
