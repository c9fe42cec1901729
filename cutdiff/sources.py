"""Objects as texts that are the same in every process: their options, their source, and the values that they hold.

A record and a fingerprint have these, so that a picture of one object is never taken for that of another. This module
imports no torch.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from cutdiff.options import options_of, written

_TEXTS: dict[tuple[Path, int], tuple[object, str]] = {}
"""The files that were read, by their path and the id of their module's spec, which is kept so that the id stays its."""


def source_hash(thing: Any) -> str | None:
    """SHA-256, in hexadecimal, of an object that is not the package's: its source, and the values that it holds, as a
    function those of its closure and its defaults, as an instance its attributes, but for options. None for what is the
    package's.

    The source is the whole file that defines it, and the files of other modules of a researcher's own that it imports,
    so that an edited helper counts; in a notebook or an interactive session, the definition itself, or its compiled
    code where even that is not kept.
    """
    return _hashed(thing, ())


def described(value: Any, outer: tuple[int, ...] = ()) -> str:
    """A value as text that is the same in every process: of what has no such form, its name and source or contents."""
    if isinstance(value, str) and (outer or re.search(r"""[][(){},'"\n]|^\s|\s$""", value)):
        return repr(str(value))
    if isinstance(value, str | int | float | complex | bytes | None):
        return written(value)
    if id(value) in outer:
        return "<itself>"
    inner = (*outer, id(value))
    if isinstance(value, tuple | list):
        return f"({','.join(described(part, inner) for part in value)}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{described(key, inner)}:{described(part, inner)}' for key, part in value.items())}}}"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(described(part, inner) for part in value))}}}"
    if hasattr(value, "detach") and hasattr(value, "dtype"):
        value = value.detach().cpu().contiguous()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    if hasattr(value, "tobytes") and hasattr(value, "shape"):
        return f"<{value.dtype} {tuple(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}>"
    if isinstance(value, types.ModuleType):
        return f"<module {value.__name__}>"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if not (hasattr(value, "state_dict") or _is_written_here(_apart(value)[0])):
        return f"<{name} {_reduced(value, inner)}>"
    inside = [f"{option}={described(getattr(value, option), inner)}" for option in options_of(value)]
    return f"<{' '.join([name, (_hashed(value, outer) or '')[:16], *inside]).strip()}>"


def _hashed(thing: Any, outer: tuple[int, ...]) -> str | None:
    """As `source_hash`; `outer` are the ids of the objects that hold this one, in which it may be again."""
    named, values = _apart(thing)
    if _is_of_package(named) and (not values or named is type(thing)):
        return None
    bases = [base for base in getattr(named, "__mro__", (named,))[1:] if _is_written_here(base)]
    sources = [_source(part) for part in (named, *bases) if part is named or not _is_of_package(part)]
    if isinstance(named, types.FunctionType):  # of two on one line, or of one name, this tells which it is
        sources.append(repr(_compiled(named.__code__)))
    contents = [described(value, (*outer, id(thing))) for value in values]
    return hashlib.sha256("\n".join([named.__qualname__, *sources, *contents]).encode()).hexdigest()


def _apart(thing: Any) -> tuple[Any, list[Any]]:
    """The function or class that an object is of, and the values that it holds."""
    if isinstance(thing, partial):
        return _apart(thing.func)[0], [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType):
        return thing.__func__, [thing.__self__]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return thing, cells if _is_of_package(thing) else cells + defaults
    if isinstance(thing, type):
        return thing, []
    if hasattr(thing, "state_dict"):  # a torch module, whose attributes hold more than what it computes with
        return type(thing), [thing.state_dict()]
    options = options_of(thing)  # which are described beside the source
    slots = [name for base in type(thing).__mro__ for name in _names(getattr(base, "__slots__", ()))]
    attributes = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    values = {name: value for name, value in attributes.items() if name not in options}
    return type(thing), [values] if values else []


def _reduced(value: Any, inner: tuple[int, ...]) -> str:
    """The parts that make a copy of a library's object, as text; where none do, a text that differs every time."""
    shown = repr(value)
    if " at 0x" not in shown and len(shown) <= 200:
        return repr(shown)
    if isinstance(value, types.BuiltinFunctionType | types.FunctionType | type):
        return str(getattr(value, "__module__", ""))
    try:
        maker, *state = value.__reduce_ex__(4)
    except Exception:
        return uuid4().hex
    return described([getattr(maker, "__qualname__", ""), *map(_listed, state)], inner)


def _listed(part: Any) -> Any:
    return part if isinstance(part, tuple | dict | None) else list(part) if isinstance(part, Iterator) else part


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else [*slots]


def _is_of_package(named: Any) -> bool:
    return _module_of(named).partition(".")[0] == "cutdiff"


def _is_written_here(named: Any) -> bool:
    """True for what is this package's or a researcher's own, False for what is Python's or an installed library's."""
    module = _module_of(named)
    if module.partition(".")[0] in (*sys.builtin_module_names, *sys.stdlib_module_names) and module != "__main__":
        return False
    return "site-packages" not in str(getattr(sys.modules.get(module), "__file__", ""))


def _module_of(named: Any) -> str:
    """The name of a module, or of the one in which a function or class stands."""
    return (
        named.__name__ if isinstance(named, types.ModuleType) else str(getattr(named, "__module__", None) or "builtins")
    )


def _source(named: Callable[..., Any] | type) -> str:
    """The files that an object's definition reads, or the definition itself where it stands in none."""
    try:
        file = inspect.getsourcefile(named)
        if file is not None and Path(file).is_file():
            modules = {Path(file): sys.modules.get(named.__module__)}
            modules |= _files_of(sys.modules.get(named.__module__), set())
            return "\n".join(
                _text(path, getattr(module, "__spec__", None)) for path, module in sorted(modules.items(), key=str)
            )
        return inspect.getsource(named)
    except (OSError, TypeError):
        functions = [named] if isinstance(named, types.FunctionType) else getattr(named, "__dict__", {}).values()
        return repr([_compiled(f.__code__) for f in functions if isinstance(f, types.FunctionType)])


def _text(path: Path, spec: object) -> str:
    """The text of a file when a module of it was first asked for: Python runs what was imported, not a later edit. The
    `spec` of the module is another one after it is imported again."""
    key = path, id(spec)
    if key not in _TEXTS:
        _TEXTS[key] = spec, path.read_text(encoding="utf-8", errors="replace")
    return _TEXTS[key][1]


def _files_of(module: types.ModuleType | None, reached: set[str]) -> dict[Path, types.ModuleType]:
    """The files of a module of a researcher's own, and of all such modules whose names it holds."""
    if module is None or module.__name__ in reached or _is_of_package(module) or not _is_written_here(module):
        return {}
    reached.add(module.__name__)
    file = getattr(module, "__file__", None)
    files = {Path(file): module} if file and Path(file).is_file() else {}
    for value in [*vars(module).values()]:
        other = (
            value if isinstance(value, types.ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        )
        files |= _files_of(other, reached)
    return files


def _compiled(code: types.CodeType) -> tuple[Any, ...]:
    constants = [_compiled(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return code.co_code, code.co_names, constants
