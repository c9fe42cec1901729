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
from textwrap import dedent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

MAX_FLOAT32 = 2.0**128 * (1 - 2**-24)
"""The largest number that tensors can be multiplied by."""


class Between(NamedTuple):
    """The bounds of a number, both included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high == math.inf else f"in {self.low:g} … {self.high:g}"


Share = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(1)]
Scale = Annotated[float, Between(-MAX_FLOAT32, MAX_FLOAT32)]


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


def options_of(thing: object) -> dict[str, Option]:
    """The options of a dataclass or of an instance of one, by name; none where it is anything else."""
    cls = thing if isinstance(thing, type) else type(thing)
    if not is_dataclass(cls):
        return {}
    types, docs = _types(cls), _docs(cls)
    return {
        field.name: Option(field.name, types.get(field.name, Any), field.default, docs.get(field.name, ""))
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
    """The value that a command line writes as `text`. ValueError, which names the option, where it is none."""
    is_none = text == "None" and _fitted(None, kind) is None
    if _takes_text(kind) and _fitted(text, kind) is not MISSING and not is_none:
        return checked(name, str(text), kind)
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = str(text)
    return checked(name, value, kind)


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
        bounds = ", ".join(str(bound) for bound in args[1:] if abs(bound.low) < MAX_FLOAT32)
        return " ".join([words(args[0]), bounds]).strip()
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin is tuple:
        return f"{len(args)} values, each {words(args[0])}" if args[-1] is not Ellipsis else "a list of numbers"
    names = {float: "a finite number", int: "a whole number", str: "a text", bool: "True or False", NoneType: "None"}
    return names.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def not_one_of(value: object, known: Iterable[object]) -> str:
    """An error's words for a name that is not known."""
    names = [*map(str, known)]
    return f"{value!r} is not one of {', '.join(names)}{nearest(value, names)}"


def nearest(value: object, known: Iterable[str]) -> str:
    """An error's last words where a known name looks much like the one that was given."""
    near = get_close_matches(str(value), [*known], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _not_a(value: Any, kind: Any) -> str:
    literals = get_args(kind) if get_origin(kind) is Literal else ()
    if literals and isinstance(value, str):
        return not_one_of(value, literals)
    return f"{value!r} must be {words(kind)}"


def _fitted(value: Any, kind: Any) -> Any:
    """The value as one of the type, MISSING where it is none."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        fitted = _fitted(value, args[0])
        return fitted if fitted is not MISSING and all(low <= fitted <= high for low, high in args[1:]) else MISSING
    if origin in (Union, UnionType):
        return next((fitted for arg in args if (fitted := _fitted(value, arg)) is not MISSING), MISSING)
    if origin is Literal:
        alike = (arg for arg in args if arg == value and isinstance(arg, bool) == isinstance(value, bool))
        return next(alike, MISSING)
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple | list) else args
        if not isinstance(value, tuple | list) or len(value) != len(kinds):
            return MISSING
        fitted = tuple(map(_fitted, value, kinds))
        return MISSING if any(part is MISSING for part in fitted) else fitted
    if kind in (float, int):
        return _number(value, kind)
    return value if _is(value, origin or kind) else MISSING


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return MISSING
    number = int(value) if kind is int else float(value)  # pyright: ignore[reportArgumentType]
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
    """The types of the fields; none where a name in them is known to type checkers only."""
    try:
        return get_type_hints(cls, include_extras=True)
    except NameError:
        return {}


@cache
def _docs(cls: type) -> dict[str, str]:
    """The first sentence of the string below each field, those of base classes too, as far as their source is there."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
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
