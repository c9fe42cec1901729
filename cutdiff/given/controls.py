"""The ControlNets of a run and their hints: several of each, those of the same number together.

This module imports no torch.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from cutdiff.files import BadFile
from cutdiff.given.pictures import Picture, as_picture
from cutdiff.options import Between, Share, checked, short

CONTROLS = ("control", "control_image", "control_scale", "control_interval")
"""The options of a run that go together."""
CONTROL_FILES = CONTROLS[:2]
"""Those that are files."""
KINDS: dict[str, tuple[Any, Any]] = {
    "control_scale": (Annotated[float, Between(0, 10)], 1.0),
    "control_interval": (tuple[Share, Share], (0.0, 1.0)),
}
"""The types of the numbers that go with each ControlNet, and their values where nobody says."""


def read_controls(own: dict[str, Any]) -> dict[str, Any]:
    """The options of `CONTROLS` among a run's `own`, each as a tuple with an entry for every ControlNet, or all None.

    ValueError, which names the option, where there are other numbers of them or one cannot be used.
    """
    files, hints, scales, intervals = (_several(name, own[name]) for name in CONTROLS)
    if not files:
        if extra := next((name for name in CONTROLS if own[name] is not None), None):
            value = ", ".join(map(short, _several(extra, own[extra])))
            raise ValueError(f"{extra}={value} goes with control, and none is given: give one, or leave it out")
        return dict.fromkeys(CONTROLS)
    for file in files:
        if not isinstance(file, str | os.PathLike) or not os.fspath(file):
            raise ValueError(f"control={short(file)} must be a file or a folder of a ControlNet")
    scales, intervals = (
        _one_each(name, values, len(files)) for name, values in zip(KINDS, (scales, intervals), strict=True)
    )
    if 0 in scales:
        raise ValueError(
            f"control_scale={short(scales)} would evaluate a ControlNet for nothing: leave it out, or give more than 0"
        )
    for first, last in intervals:
        if first >= last:
            raise ValueError(f"control_interval={first:g},{last:g} must be two shares of the steps, 0 ≤ from < to ≤ 1")
    values = tuple(map(os.fspath, files)), tuple(map(_hint, hints)) or None, scales, intervals
    return dict(zip(CONTROLS, values, strict=True))


def check_hints(control: Any, hints: Any, maker: str) -> None:
    """ValueError where there are other numbers of ControlNets and hints, or there are hints and `maker`, a method that
    makes them, if it has a name."""
    control, hints = control or (), hints or ()
    if maker and hints:
        raise ValueError(f"control_image={hints[0].name} is not for {maker}, which makes hints itself: leave it out")
    if maker or len(control) == len(hints):
        return
    if not hints:
        raise ValueError(f"control={control[0]} has no hint: give control_image, a picture with each")
    names = ", ".join(hint.name for hint in hints)
    raise ValueError(f"control_image={names} has {len(hints)} for {len(control)} of control: give one with each")


def _one_each(name: str, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The values of an option of ControlNets, or as many of the usual one where there are none. ValueError where there
    are not as many as ControlNets, or one cannot be used."""
    kind, usual = KINDS[name]
    if values and len(values) != count:
        raise ValueError(f"{name}={short(values)} has {len(values)} for {count} of control: give one with each")
    return tuple(checked(name, value, kind) for value in values or (usual,) * count)


def _several(name: str, value: Any) -> tuple[Any, ...]:
    """The values of an option that may be given one or several; an interval is a pair of numbers."""
    if value is None:
        return ()
    if not isinstance(value, tuple | list):
        return (value,)
    is_pair = name == "control_interval" and not any(isinstance(each, tuple | list) for each in value)
    return (value,) if is_pair else tuple(value)


def _hint(value: Any) -> Picture:
    """The picture of a hint. BadFile where there is nothing to see on it."""
    if isinstance(value, Picture):
        return value
    picture = as_picture("control_image", value)
    if picture is None:
        raise ValueError("control_image=None is no picture: give one with each control")
    pixels = picture.pixels()
    if pixels.min() == pixels.max():
        raise BadFile(
            f"control_image={picture.name} has one value throughout, so that it says nothing: give the edges, depth or "
            "whatever the ControlNet was made for"
        )
    return picture
