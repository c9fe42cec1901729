"""The world of scenes: its vocabulary, the parameters of a scene, and its caption.

Each scene has exactly one sky body and one subject, so that repetition can be counted. Lengths are fractions of the
side of the (square) scene; y points down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TIMES = ("day", "sunset", "night")
GROUNDS = ("meadow", "desert", "snowfield", "lake")
SUBJECTS = ("house", "tree", "tent", "balloon")
COLORS = ("red", "blue", "yellow", "purple", "pink")
RIDGES = ("hills", "mountains")


@dataclass(frozen=True)
class Scenes:
    """The parameters of N scenes: tensors with an entry for each, int64 for choices, float32 for lengths and phases."""

    time: Tensor
    ground: Tensor
    subject: Tensor
    color: Tensor
    ridge: Tensor
    horizon: Tensor
    """The y of the ground's upper edge."""
    subject_x: Tensor
    subject_size: Tensor
    balloon_y: Tensor
    """The y of the middle of a balloon's envelope; the other subjects stand on the ground."""
    body_x: Tensor
    body_y: Tensor
    body_radius: Tensor
    ridge_height: Tensor
    ridge_phases: Tensor
    """The phases (N, 6) of the waves that make the ridge."""

    def __len__(self) -> int:
        return len(self.time)

    @property
    def choices(self) -> Tensor:
        """All that a caption names: (N, 5) indices of colour, subject, ridge, ground and time."""
        return torch.stack([self.color, self.subject, self.ridge, self.ground, self.time], dim=1)

    @staticmethod
    def joined(parts: Sequence[Scenes]) -> Scenes:
        """All scenes of several such objects."""
        return Scenes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scenes)))

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))


def sample(n: int, generator: torch.Generator) -> Scenes:
    """Draw N scenes on the generator's device."""

    def choice(options: tuple[str, ...]) -> Tensor:
        return torch.randint(len(options), (n,), generator=generator, device=generator.device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=generator.device)

    # The body stands on the side of the sky that the subject leaves free, so that neither hides the other.
    subject_x = uniform(0.25, 0.75)
    side = torch.where(subject_x < 0.5, 1.0, -1.0)
    return Scenes(
        time=choice(TIMES),
        ground=choice(GROUNDS),
        subject=choice(SUBJECTS),
        color=choice(COLORS),
        ridge=choice(RIDGES),
        horizon=uniform(0.58, 0.70),
        subject_x=subject_x,
        subject_size=uniform(0.16, 0.24),
        balloon_y=uniform(0.24, 0.34),
        body_x=(subject_x + side * uniform(0.33, 0.50)).clamp(0.1, 0.9),
        body_y=uniform(0.12, 0.24),
        body_radius=uniform(0.055, 0.08),
        ridge_height=uniform(0.05, 0.10),
        ridge_phases=uniform(0.0, 2 * torch.pi, 6),
    )


def captions(choices: Tensor, keep: Tensor | None = None) -> list[str]:
    """Captions that name what can be named, such as "a red house with mountains over a meadow at sunset".

    `choices` (N, 5) is as in `Scenes.choices`. `keep` (N, 3), bool, leaves the ridge, the ground or the time out of a
    caption where it is False.
    """
    keep = torch.ones(len(choices), 3, dtype=torch.bool) if keep is None else keep
    texts = []
    for (color, subject, ridge, ground, time), kept in zip(choices.tolist(), keep.tolist(), strict=True):
        clauses = (f" with {RIDGES[ridge]}", f" over a {GROUNDS[ground]}", f" at {TIMES[time]}")
        chosen = (clause for clause, wanted in zip(clauses, kept, strict=True) if wanted)
        texts.append(f"a {COLORS[color]} {SUBJECTS[subject]}" + "".join(chosen))
    return texts
