"""Modules of a researcher's own, written into a temporary folder where Python looks for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent


@dataclass(frozen=True)
class OwnModules:
    """A folder on sys.path. A module is imported anew after it was written."""

    folder: Path
    names: set[str] = field(default_factory=set)

    def write(self, name: str, source: str) -> Path:
        path = self.folder / f"{name}.py"
        path.write_text(dedent(source))
        self.names.add(name)
        self.forget()
        return path

    def forget(self) -> None:
        """Let no module stay imported."""
        for name in self.names:
            sys.modules.pop(name, None)


METHODS = '''
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cutdiff.options import Between, Options
from cutdiff.sampling.stages import Stage


@dataclass(frozen=True)
class Mine(Options):
    """Direct inference, with options that change nothing."""

    strength: Annotated[float, Between(0, 10)] = 1.0
    """How strong it is. A second sentence is not for --help."""
    number: int = 1
    words: str = "plain"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    kind: Literal["soft", "hard"] = "soft"
    level: Literal[1, 2] = 1
    on: bool = False
    maybe: float | None = None

    def stages(self, run):
        return [Stage("mine", range(run.num_steps), run.denoiser)]


@dataclass
class Needy:
    strength: float

    def stages(self, run):
        return []


@dataclass(frozen=True)
class Strict:
    """A plain dataclass, which checks a field itself."""

    strength: float = 1.0

    def __post_init__(self):
        if self.strength == 5:
            raise ValueError("five is too much")

    def stages(self, run):
        return Mine().stages(run)


@dataclass(frozen=True)
class Clashing(Mine):
    guidance_scale: float = 1.0


def plain(run):
    return [Stage("plain", range(run.num_steps), run.denoiser)]


made = Mine(strength=3)
nothing = 3
'''
"""A dataclass, a class with a required field, a function, and an instance."""
