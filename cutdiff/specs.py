"""Methods, solvers, schedules and guidance by name: the tables of what ships, and how any other object is given.

A spec is a name of a table, or `module:object`, and options of the object: `cutdiffusion`,
`cutdiffusion,structure_fraction=0.3`, `mymodule:MyMethod,strength=2`. Wherever a spec is taken, so is the object
itself. This module imports no torch; what a table names is imported when it is first asked for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from cutdiff.options import Option, check_options, nearest, options_of, read, split, unquoted
from cutdiff.sources import described

METHODS = {
    "direct": "cutdiff.methods.direct:direct",
    "attention_scaling": "cutdiff.methods.attention_scaling:AttentionScaling",
    "scalecrafter": "cutdiff.methods.scalecrafter:ScaleCrafter",
    "hidiffusion": "cutdiff.methods.hidiffusion:HiDiffusion",
    "freescale": "cutdiff.methods.freescale:FreeScale",
    "multidiffusion": "cutdiff.methods.multidiffusion:MultiDiffusion",
    "spotdiffusion": "cutdiff.methods.spotdiffusion:SpotDiffusion",
    "upsample_guidance": "cutdiff.methods.upsample_guidance:UpsampleGuidance",
    "cutdiffusion": "cutdiff.methods.cutdiffusion:CutDiffusion",
    "demofusion": "cutdiff.methods.demofusion:DemoFusion",
    "accdiffusion": "cutdiff.methods.accdiffusion:AccDiffusion",
    "diffusehigh": "cutdiff.methods.diffusehigh:DiffuseHigh",
    "frecas": "cutdiff.methods.frecas:FreCaS",
    "imax": "cutdiff.methods.imax:IMax",
    "hiflow": "cutdiff.methods.hiflow:HiFlow",
    "rectifiedhr": "cutdiff.methods.rectifiedhr:RectifiedHR",
    "upscale": "cutdiff.methods.upscale:Upscale",
    "magnify": "cutdiff.methods.magnify:Magnify",
    "climb": "cutdiff.methods.magnify:Climb",
}
SOLVERS = {
    "euler": "cutdiff.sampling.solvers:Euler",
    "ddim": "cutdiff.sampling.solvers:DDIM",
    "euler_ancestral": "cutdiff.sampling.solvers:EulerAncestral",
    "heun": "cutdiff.sampling.solvers:Heun",
    "dpmpp_2m": "cutdiff.sampling.solvers:DPMpp2M",
    "dpmpp_2m_sde": "cutdiff.sampling.solvers:DPMpp2MSDE",
    "dpmpp_sde": "cutdiff.sampling.solvers:DPMppSDE",
    "unipc": "cutdiff.sampling.solvers:UniPC",
    "lcm": "cutdiff.sampling.solvers:LCM",
}
SCHEDULES = {
    "model": "cutdiff.sampling.schedules:ModelSchedule",
    "karras": "cutdiff.sampling.schedules:Karras",
    "exponential": "cutdiff.sampling.schedules:Exponential",
    "beta": "cutdiff.sampling.schedules:Beta",
    "sgm_uniform": "cutdiff.sampling.schedules:SGMUniform",
    "trailing": "cutdiff.sampling.schedules:Trailing",
    "align_your_steps": "cutdiff.sampling.schedules:AlignYourSteps",
    "list": "cutdiff.sampling.schedules:Listed",
}
GUIDANCE = {
    "cfg": "cutdiff.sampling.guidance:CFG",
    "rescale": "cutdiff.sampling.guidance:Rescale",
    "by_band": "cutdiff.sampling.guidance:ByBand",
    "apg": "cutdiff.sampling.projected:APG",
    "cfg_plus_plus": "cutdiff.sampling.guidance:CFGPlusPlus",
    "pag": "cutdiff.sampling.perturbed:PAG",
}
SPLITS = {
    "down_up": "cutdiff.sampling.split:DownUp",
    "gaussian": "cutdiff.sampling.split:Gaussian",
    "butterworth": "cutdiff.sampling.split:Butterworth",
    "wavelet": "cutdiff.sampling.split:Wavelet",
}
POSITIONS = {
    "as_trained": "cutdiff.models.positions:AsTrained",
    "interpolation": "cutdiff.models.extrapolation:Interpolation",
    "ntk": "cutdiff.models.extrapolation:NTK",
    "yarn": "cutdiff.models.extrapolation:YaRN",
    "dype": "cutdiff.models.extrapolation:DyPE",
    "ultraimage": "cutdiff.models.extrapolation:UltraImage",
}
UPSCALERS = {
    "bicubic": "cutdiff.methods.upscale:bicubic",
    "bilinear": "cutdiff.methods.upscale:bilinear",
    "nearest": "cutdiff.methods.upscale:nearest",
}
TABLES = {"method": METHODS, "solver": SOLVERS, "schedule": SCHEDULES, "guidance": GUIDANCE}
"""The objects that a run is given, by kind."""
NAMED = {**TABLES, "split": SPLITS, "upscaler": UPSCALERS, "positions": POSITIONS}
"""All that has names, the parts too that only options of others are given."""
SHAPES = {
    "method": "a dataclass with `stages(run)`, or a function of a `Run`",
    "solver": "an object with `start(schedule, noise)`",
    "schedule": "an object with `sigmas(model_noise, num_steps)`, or a list of numbers",
    "guidance": "a function of (conditional, unconditional, sigma, step)",
    "split": "an object with `low(x)`",
    "upscaler": "a function of (images, size)",
    "positions": "an object with `angles(…)` and `sharpness(…)`",
}
"""The shape of an object of each kind."""
METHODS_OF = {
    "method": ("stages",),
    "solver": ("start",),
    "schedule": ("sigmas",),
    "guidance": ("begin",),
    "split": ("low",),
    "positions": ("angles", "sharpness"),
}
"""The methods that an object of a kind has, if it is no function."""


_ADDRESS = r"\w[\w.]*:\w+"
"""The form of `module:object`."""


class Text(str):
    """The value of an option as a command line writes it, which is read for the type of the option."""


def check_name(kind: str, text: str) -> None:
    """ValueError where a spec names nothing that could be had; nothing is imported."""
    name, _ = parse(kind, text)
    if name not in NAMED[kind] and not re.fullmatch(_ADDRESS, name):
        raise ValueError(_unknown(kind, name))


def named(kind: str, value: Any) -> Any:
    """The class or object that `value` names or is, before it is made. ValueError where there is none."""
    if kind == "schedule" and _numbers(value) is not None:
        value = "list"
    return _load(kind, parse(kind, value)[0]) if isinstance(value, str) else value


def resolve(kind: str, value: Any, given: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The object that `value` names or is; a class is made with its defaults, and with those options that it needs and
    has none for taken from `given`.

    ValueError, which names the kind, the value and what is known, where there is none, or an option does not fit.
    """
    thing, options = named(kind, value), {}
    if kind == "schedule" and (numbers := _numbers(value)) is not None:
        options = {"values": numbers}
    elif isinstance(value, str):
        options = {name: Text(text) for name, text in parse(kind, value)[1].items()}
    if isinstance(thing, type):
        thing = _made(kind, thing, options, given)
    elif options and not options_of(thing):
        raise ValueError(f"{kind}={name_of(kind, thing)} has no options, so {', '.join(options)} cannot be given")
    elif options:
        thing = changed({kind: thing}, options)[kind]
    if not _fits(kind, thing):
        raise ValueError(f"{kind}={thing!r} must be {SHAPES[kind]}, or a name of {', '.join(NAMED[kind])}")
    if options_of(thing):
        check_options(thing)
    return thing


def part(kind: str, option: str, value: Any) -> Any:
    """The value of an option that takes an object of `kind`: the full spec of one that ships, else the object itself,
    so that a record names the former and hashes the latter. ValueError, which names the option, as of `resolve`."""
    try:
        thing = resolve(kind, value)
    except ValueError as error:
        fault = str(error)
        known = fault.startswith(f"{kind}=")
        raise ValueError(f"{option}{fault[len(kind) :] if known else f'={value!r}: {fault}'}") from None
    ships = not isinstance(thing, partial) and _address(thing) in NAMED[kind].values()
    return spec_of(kind, thing) if ships else thing


def changed(things: dict[str, Any], options: dict[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
    """The objects by their kinds, with options of theirs changed. ValueError where an option is of none, or of two.

    `also` are names that an unknown one may have been meant for.
    """
    owned: dict[str, dict[str, Any]] = {kind: {} for kind in things}
    for name, value in options.items():
        kinds = [kind for kind, thing in things.items() if name in options_of(thing)]
        if not kinds:
            raise ValueError(f"{name}={value!r} {no_option(name, things, also)}")
        if len(kinds) > 1:
            names = " and ".join(f"{kind} {name_of(kind, things[kind])}" for kind in kinds)
            raise ValueError(f"{name}={value!r} is an option of {names}: give it in a spec, as NAME,{name}={value}")
        owned[kinds[0]][name] = value
    return {
        kind: replace(thing, **_valued(owned[kind], options_of(thing))) if owned[kind] else thing
        for kind, thing in things.items()
    }


def no_option(name: str, things: dict[str, Any], also: Iterable[str] = ()) -> str:
    """An error's words for an option that none of the objects, by their kinds, has; `also` as in `changed`."""
    having = [f"{kind} {name_of(kind, x)} ({', '.join(options_of(x)) or 'none'})" for kind, x in things.items()]
    shipped = _shipped_options() if things.keys() <= TABLES.keys() else {}
    near = nearest(name, [*also, *(option for thing in things.values() for option in options_of(thing)), *shipped])
    hint = f", but of {', '.join(shipped[name])}" if name in shipped else near
    if name in NAMED and len(things) == 1 and shipped:
        hint = f", but of the run: give {name} (--{name}) by itself"
    others = f"{', '.join(having[:-1])} or " if having[1:] else ""
    return f"is no option of {others}{having[-1]}{hint}"


def owners(name: str) -> list[str]:
    """The names of all that ships with an option of this name."""
    return _shipped_options().get(name, [])


def _shipped_options() -> dict[str, list[str]]:
    """The options of all that ships, and the names of what has them."""
    having: dict[str, list[str]] = {}
    for kind, table in TABLES.items():
        for name in table:
            for option in options_of(_load(kind, name)):
                having.setdefault(option, []).append(name)
    return having


def parse(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """A spec as its name and the texts of its options. ValueError where it is none."""
    name, *parts = split(text)
    options: dict[str, str] = {}
    for part in parts:
        option, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not option.isidentifier() or option in options:
            raise ValueError(f"{kind}={text!r} is no spec, for {part!r}: give NAME,option=value,option=value")
        options[option] = unquoted(value)
    return name.strip(), options


def spec_of(kind: str, thing: Any) -> str:
    """The full spec of an object: its name and all its options."""
    return ",".join([name_of(kind, thing), *(f"{name}={text}" for name, text in described_options(thing).items())])


def described_options(thing: Any) -> dict[str, str]:
    """All options of an object as texts, those that a command line could write as it would."""
    return {name: described(getattr(thing, name)) for name in options_of(thing)}


def name_of(kind: str, thing: Any) -> str:
    """The name of an object in its table; that of its function or class where it is in none."""
    thing = thing.func if isinstance(thing, partial) else thing
    named = thing if hasattr(thing, "__name__") else type(thing)
    return next((name for name, known in NAMED[kind].items() if known == _address(thing)), named.__name__)


def _address(thing: Any) -> str:
    """`module:object` of a function or class, or of the class of an instance."""
    named = thing if hasattr(thing, "__name__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def _load(kind: str, name: str) -> Any:
    """The object that a table or `module:object` names."""
    address = NAMED[kind].get(name, name)
    if not re.fullmatch(_ADDRESS, address):
        raise ValueError(_unknown(kind, name))
    module, _, attribute = address.partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{kind}={name!r}: there is no module {error.name!r} where Python looks for it") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind}={name!r}: importing {module} failed, {type(error).__name__}: {error}") from error
    if not hasattr(loaded, attribute):
        public = [name for name in vars(loaded) if not name.startswith("_")]
        raise ValueError(f"{kind}={name!r}: the module {module} has no {attribute!r}{nearest(attribute, public)}")
    return getattr(loaded, attribute)


def _unknown(kind: str, name: str) -> str:
    known = f"{', '.join(NAMED[kind])}, or module:object of your own{nearest(name, NAMED[kind])}"
    return f"{kind}={name!r} is not one of {known}"


def _made(kind: str, cls: type, options: dict[str, Any], given: Mapping[str, Any]) -> Any:
    """An instance of the class; an option is a value, or reads its text for the type of the field."""
    known = options_of(cls)
    for name in options:
        if name not in known:
            raise ValueError(f"{kind}={name_of(kind, cls)}: {name} {no_option(name, {kind: cls})}")
    needed = {name: given[name] for name, option in known.items() if option.required and name in given}
    options = {**needed, **options}
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise ValueError(f"{kind}={name_of(kind, cls)} needs {', '.join(missing)}: give NAME,{missing[0]}=value")
    try:
        return cls(**_valued(options, known))
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind}={cls.__name__} cannot be made, {type(error).__name__}: {error}") from error


def _valued(options: dict[str, Any], known: dict[str, Option]) -> dict[str, Any]:
    return {name: read(name, v, known[name].type) if isinstance(v, Text) else v for name, v in options.items()}


def _fits(kind: str, thing: Any) -> bool:
    if kind in METHODS_OF and all(callable(getattr(thing, name, None)) for name in METHODS_OF[kind]):
        return True
    return kind in ("method", "guidance", "upscaler") and callable(thing) and not inspect.isbuiltin(thing)


def _numbers(value: Any) -> tuple[float, ...] | None:
    """A list of numbers, or a text of them between commas; None where it is something else."""
    if isinstance(value, str) and re.match(r"[\d.]", value):
        try:
            return tuple(map(float, value.split(",")))
        except ValueError:
            raise ValueError(f"schedule={value!r} must be numbers with commas between them") from None
    if hasattr(value, "tolist"):
        value = value.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(value) if isinstance(value, list | tuple) else None
