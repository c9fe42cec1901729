"""The fields of a configuration file of diffusers, read one by one.

A field that is not what the networks and schedules here can be built from is a ValueError that names it, its value and
what is supported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from cutdiff.checkpoint.files import quoted

DIFFUSERS_VERSION = "0.42.0"
"""The release whose fields and defaults are listed in `configs` and `schedulers`."""

MAX_SIZE, MAX_DEPTH, MAX_LEVELS = 100_000, 1000, 16
"""The most channels, layers and levels, past all networks that exist: a small file must not ask for more memory than
there is."""
MAX_FACTOR = 1e6
"""The largest factor between latents and what the VAE's layers give, as is its inverse; models have 0.13 to 1."""


def require(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that is there and is not as in `supported`."""
    for name, only in supported.items():
        value = uniform(config.get(name, only))
        if (value or None) != (only or None):  # null, false and 0 are one to diffusers
            unsupported(name, value, repr(only))


def refuse_unknown(config: Mapping[str, Any], known: set[str]) -> None:
    """Raise ValueError for a field that is not known, unless it is null, false or private."""
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ValueError(
            f"its weights are quantized ({quoted(method)}), which is not read: take the fp16 or bf16 model"
        )
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            unsupported(name, value, f"what diffusers {DIFFUSERS_VERSION} knows")


def unsupported(name: str, value: object, supported: str) -> NoReturn:
    """Raise ValueError that names the field, its value and what is supported."""
    raise ValueError(f"{name}={value!r} is not supported, only {supported}")


def boolean(fields: Mapping[str, Any], name: str) -> bool:
    """The field as True or False; null is False. Any other value, such as a text, is a ValueError."""
    if fields[name] not in (None, False, True):
        unsupported(name, fields[name], "true or false")
    return bool(fields[name])


def integer(fields: Mapping[str, Any], name: str) -> int:
    """The field as a whole number from 1; a list of equal numbers is one number."""
    value = uniform(fields[name])
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        unsupported(name, fields[name], f"one whole number from 1 to {MAX_SIZE}")
    return value


def factor(fields: Mapping[str, Any], name: str) -> float:
    """The field as a positive number, neither so large nor so small that it must be a mistake."""
    value = fields[name]
    if type(value) not in (int, float) or not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
        unsupported(name, value, f"a number from {1 / MAX_FACTOR:g} to {MAX_FACTOR:g}")
    return value


def offset(fields: Mapping[str, Any], name: str) -> float:
    """The field as a number, not so large that it must be a mistake; null is 0."""
    value = fields[name] or 0.0
    if type(value) not in (int, float) or not abs(value) <= MAX_FACTOR:
        unsupported(name, value, f"a number from {-MAX_FACTOR:g} to {MAX_FACTOR:g}")
    return value


def sequence(fields: Mapping[str, Any], name: str) -> list[Any]:
    """The field as a list that has an entry for each level, whatever the entries are."""
    if not isinstance(fields[name], list | tuple) or not 1 <= len(fields[name]) <= MAX_LEVELS:
        unsupported(name, fields[name], f"a list of 1 to {MAX_LEVELS} entries")
    return list(fields[name])


def widths(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of channels of each level, from `block_out_channels`."""
    channels = sequence(fields, "block_out_channels")
    if not all(type(width) is int and 1 <= width <= MAX_SIZE for width in channels):
        unsupported("block_out_channels", channels, f"whole numbers from 1 to {MAX_SIZE}")
    return tuple(channels)


def per_level(fields: Mapping[str, Any], name: str, levels: int) -> tuple[int, ...]:
    """The field as a whole number for each level; one number stands for all levels."""
    value = fields[name]
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(numbers) != levels or not all(type(number) is int and 1 <= number <= MAX_DEPTH for number in numbers):
        unsupported(name, value, f"a whole number from 1 to {MAX_DEPTH}, or one for each of the {levels} levels")
    return numbers


def per_channel(fields: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """The field as finite numbers, one for each channel; None where the file gives none."""
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(n) in (int, float) and math.isfinite(n) for n in value):
        unsupported(name, value, "a list of finite numbers")
    return tuple(value)


def uniform(value: Any) -> Any:
    """The entry that a list repeats; any other value as it is."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return entries[0] if entries and all(entry == entries[0] for entry in entries) else value
