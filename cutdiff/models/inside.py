"""Changing the inside of a U-Net for the time of a step: `replaced` leaves no trace of a change.

`blocks`, `self_attentions` and `size_at` tell a method what it changes and how large the feature maps are there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from cutdiff.models.config import Size
from cutdiff.models.layers import Attention
from cutdiff.models.unet import DownLevel, MidBlock, TransformerBlock, UNet, UpLevel

_LOCK = threading.Lock()
_OWNED: dict[int, tuple[int, int]] = {}
"""The thread that has changed an object, and how many of its blocks are open, by the object's id."""


@contextmanager
def replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes, methods, parameters, buffers or submodules inside the block.

    Everything comes back at the end of the block, also after an error, and keeps its place in the state_dict. Blocks
    nest. A parameter, buffer or submodule may make way for a value of any kind, such as a plain tensor or a function.

    Raises RuntimeError where another thread is inside a block that changes the same object, and TypeError for an
    attribute that a property or a slot of the class holds. A thread that only *runs* a network while another thread
    has changed something inside it is not noticed, and its result is wrong: threads that draw at the same time by such
    a method need a model each.
    """
    for name in attributes:
        if hasattr(getattr(type(owner), name, None), "__set__"):
            raise TypeError(f"{type(owner).__name__}.{name} is a property or a slot: replace what it reads instead")
    with _owned_by_this_thread(owner, attributes):
        stores = _stores(owner)
        before = [dict(store) for store in stores]
        transient: set[str] = getattr(owner, "_non_persistent_buffers_set", set())
        transient_before = transient & attributes.keys()
        try:
            for name, value in attributes.items():
                _assign(owner, name, value)
            yield
        finally:
            for store, values in zip(stores, before, strict=True):
                _restore(store, values, attributes)
            for store, values in zip(stores[:-1], before, strict=False):  # the order of plain attributes means nothing
                _reorder(store, values)
            transient.difference_update(attributes)
            transient.update(transient_before)


@contextmanager
def _owned_by_this_thread(owner: object, names: Iterable[str]) -> Iterator[None]:
    key, thread = id(owner), threading.get_ident()
    with _LOCK:
        other, depth = _OWNED.get(key, (thread, 0))
        if other != thread:
            changed = ", ".join(f"{type(owner).__name__}.{name}" for name in names)
            raise RuntimeError(
                f"{changed} cannot be replaced while another thread has changed the same {type(owner).__name__}: "
                "load the model once for each thread, or draw one picture after the other"
            )
        _OWNED[key] = (thread, depth + 1)
    try:
        yield
    finally:
        with _LOCK:
            if depth:
                _OWNED[key] = (thread, depth)
            else:
                del _OWNED[key]


def _stores(owner: object) -> list[dict[str, Any]]:
    """The dictionaries that hold an object's attributes, the plain ones last."""
    own = vars(owner)
    return [own["_parameters"], own["_buffers"], own["_modules"], own] if isinstance(owner, nn.Module) else [own]


def _assign(owner: object, name: str, value: object) -> None:
    try:
        setattr(owner, name, value)
    except (TypeError, KeyError):
        if not isinstance(owner, nn.Module) or not any(name in store for store in _stores(owner)):
            raise
        # A module refuses a value of another kind, such as a plain tensor for a parameter, until the name is free.
        delattr(owner, name)
        setattr(owner, name, value)


def _restore(store: dict[str, Any], before: dict[str, Any], names: Iterable[str]) -> None:
    """Give each of `names` the value that it had before, or none."""
    for name in names:
        if name in before:
            store[name] = before[name]
        else:
            store.pop(name, None)


def _reorder(store: dict[str, Any], before: dict[str, Any]) -> None:
    """Put the keys that were there before in their former order, and new ones after them."""
    order = [key for key in before if key in store]
    if order != [key for key in store if key in before]:
        for key in order + [key for key in store if key not in before]:
            store[key] = store.pop(key)


def blocks(unet: UNet) -> Iterator[tuple[int, DownLevel | MidBlock | UpLevel]]:
    """Every block in the order of execution with its level, 0 for the finest."""
    last = len(unet.down_blocks) - 1
    for level, block in enumerate(unet.down_blocks):
        yield level, cast(DownLevel, block)
    yield last, unet.mid_block
    for depth, block in enumerate(unet.up_blocks):
        yield last - depth, cast(UpLevel, block)


def self_attentions(unet: UNet) -> Iterator[tuple[int, Attention]]:
    """Every layer of self-attention in the order of execution, with its level."""
    for level, block in blocks(unet):
        yield from ((level, module.attn1) for module in block.modules() if isinstance(module, TransformerBlock))


def size_at(size: Size, level: int) -> Size:
    """The size of a level's feature maps on a canvas of `size` latents: each level above it halves, rounding up."""
    return math.ceil(size[0] / 2**level), math.ceil(size[1] / 2**level)
