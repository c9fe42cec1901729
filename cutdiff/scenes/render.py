"""Render scenes from signed distances: exact pictures of any crop at any resolution, in one batch.

Every shape is a signed distance (negative inside) in units of the scene's side. A pixel's coverage is the distance
over the pixel's size, clipped to [0, 1]. That is a box filter for straight edges, so that the same edge stays sharp at
every resolution and a crop equals the same part of the whole picture drawn larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cutdiff.scenes import world
from cutdiff.scenes.world import Scenes

SKY = {  # top, bottom
    "day": ((0.30, 0.58, 0.92), (0.66, 0.83, 0.95)),
    "sunset": ((0.34, 0.33, 0.50), (0.94, 0.66, 0.44)),
    "night": ((0.03, 0.04, 0.13), (0.13, 0.17, 0.33)),
}
BODY = {"day": (1.0, 0.97, 0.80), "sunset": (1.0, 0.90, 0.72), "night": (0.94, 0.95, 0.92)}
GLOW = {"day": 0.30, "sunset": 0.30, "night": 0.15}
GROUND = {
    "meadow": (0.32, 0.60, 0.22),
    "desert": (0.84, 0.69, 0.44),
    "snowfield": (0.84, 0.88, 0.94),
    "lake": (0.13, 0.40, 0.58),
}
RIDGE = {"hills": (0.24, 0.42, 0.30), "mountains": (0.42, 0.42, 0.50)}
SUBJECT = {
    "red": (0.82, 0.08, 0.10),
    "blue": (0.08, 0.12, 0.82),
    "yellow": (0.98, 0.82, 0.08),
    "purple": (0.52, 0.08, 0.66),
    "pink": (0.96, 0.34, 0.66),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.80, 0.76), "night": (0.42, 0.45, 0.55)}
"""The colours of ground and ridge are multiplied by these; the subject is drawn in its own colour at every time."""


@dataclass(frozen=True)
class Crop:
    """A square part of each scene: its corner (left, top) and side, in fractions of the scene; three (N,) tensors."""

    left: Tensor
    top: Tensor
    side: Tensor

    @staticmethod
    def whole(n: int, device: torch.device | str = "cpu") -> Crop:
        """The whole of N scenes."""
        zeros = torch.zeros(n, device=device)
        return Crop(zeros, zeros, zeros + 1)

    @staticmethod
    def sample(n: int, generator: torch.Generator, *, min_side: float, whole: float) -> Crop:
        """Draw whole scenes with probability `whole`, else crops whose log side is uniform down to `min_side`."""
        device = generator.device
        side = min_side ** torch.rand(n, generator=generator, device=device)
        side = torch.where(torch.rand(n, generator=generator, device=device) < whole, 1.0, side)
        corner = torch.rand(2, n, generator=generator, device=device) * (1 - side)
        return Crop(corner[0], corner[1], side)

    @staticmethod
    def joined(parts: Sequence[Crop]) -> Crop:
        """The crops of several such objects."""
        return Crop(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Crop)))

    def __getitem__(self, index: slice | Tensor) -> Crop:
        return Crop(self.left[index], self.top[index], self.side[index])


def render(scenes: Scenes, size: int, crop: Crop | None = None) -> Tensor:
    """Draw N scenes, or a crop of each, as images (N, 3, size, size) in [-1, 1]."""
    crop = Crop.whole(len(scenes), scenes.time.device) if crop is None else crop
    return _Painter(scenes, size, crop).paint() * 2 - 1


def outlines(scenes: Scenes, size: int, crop: Crop | None = None, *, width: float | Tensor = 2.0) -> Tensor:
    """The edges of all shapes of N scenes, or of a crop of each, as white lines on black: (N, 3, size, size) in [0, 1].

    A shape hides the lines of those behind it. `width` is that of a line in pixels, for all or for each scene (N,).
    """
    crop = Crop.whole(len(scenes), scenes.time.device) if crop is None else crop
    return _Painter(scenes, size, crop).outline(width)


class _Painter:
    def __init__(self, scenes: Scenes, size: int, crop: Crop) -> None:
        self.scenes = scenes
        self.device = scenes.time.device
        steps = (torch.arange(size, device=self.device) + 0.5) / size
        self.x = (crop.left[:, None] + crop.side[:, None] * steps)[:, None, :]  # (N, 1, size)
        self.y = (crop.top[:, None] + crop.side[:, None] * steps)[:, :, None]  # (N, size, 1)
        self.pixel = (crop.side / size)[:, None, None]
        self.horizon = scenes.horizon[:, None, None]

    def paint(self) -> Tensor:
        scenes = self.scenes
        light = self.pick(LIGHT, world.TIMES, scenes.time)
        sky_bottom = self.pick({k: v[1] for k, v in SKY.items()}, world.TIMES, scenes.time)
        image = self.sky(sky_bottom)
        image = self.body(image)
        ridge = (self.pick(RIDGE, world.RIDGES, scenes.ridge) * light * 0.75) + sky_bottom * 0.25
        image = _over(image, self.coverage(self.ridge_line() - self.y), ridge)
        image = self.ground(image, self.pick(GROUND, world.GROUNDS, scenes.ground) * light)
        return self.subject(image).clamp(0, 1)

    def outline(self, width: float | Tensor) -> Tensor:
        half = torch.as_tensor(width, device=self.device).view(-1, 1, 1) / 2
        lines = torch.zeros(len(self.scenes), 1, self.y.shape[1], self.x.shape[2], device=self.device)
        shapes = [self.body_distance(), self.ridge_line() - self.y, self.horizon - self.y]
        everywhere = torch.ones_like(self.horizon, dtype=torch.bool)
        parts = [*((shape, everywhere) for shape in shapes), *(part[:2] for part in self.subject_shapes())]
        for distance, there in parts:
            lines = lines * (1 - self.coverage(distance) * there)[:, None]
            line = (0.5 + half - distance.abs() / self.pixel).clamp(0, 1) * there
            lines = torch.maximum(lines, line[:, None])
        return lines.expand(-1, 3, -1, -1)

    def pick(self, table: dict[str, tuple[float, ...]], names: tuple[str, ...], index: Tensor) -> Tensor:
        """Look one colour up for each scene: (N, 3)."""
        return torch.tensor([table[name] for name in names], device=self.device)[index]

    def coverage(self, distance: Tensor) -> Tensor:
        return (0.5 - distance / self.pixel).clamp(0, 1)

    def sky(self, bottom: Tensor) -> Tensor:
        top = self.pick({k: v[0] for k, v in SKY.items()}, world.TIMES, self.scenes.time)
        depth = (self.y / self.horizon).clamp(0, 1)[:, None]  # (N, 1, size, 1)
        sky = torch.lerp(top[:, :, None, None], bottom[:, :, None, None], depth)
        return sky.expand(-1, -1, -1, self.x.shape[-1])

    def body_distance(self) -> Tensor:
        scenes = self.scenes
        distance = torch.hypot(self.x - scenes.body_x[:, None, None], self.y - scenes.body_y[:, None, None])
        return distance - scenes.body_radius[:, None, None]

    def body(self, image: Tensor) -> Tensor:
        distance, color = self.body_distance(), self.pick(BODY, world.TIMES, self.scenes.time)
        strength = torch.tensor([GLOW[name] for name in world.TIMES], device=self.device)[self.scenes.time]
        image = _over(image, strength[:, None, None] * torch.exp(-distance.clamp(min=0) / 0.05), color)
        return _over(image, self.coverage(distance), color)

    def ridge_line(self) -> Tensor:
        """The ridge's y above the horizon: three sines for hills, three triangle waves for mountains."""
        phases = self.scenes.ridge_phases[:, :, None, None]
        hills = sum(
            a * torch.sin(w * self.x + phases[:, i]) for i, (w, a) in enumerate([(6, 0.5), (11, 0.3), (17, 0.2)])
        )
        mountains = sum(
            a * (2 / math.pi) * torch.asin(torch.sin(w * self.x + phases[:, 3 + i]))
            for i, (w, a) in enumerate([(8, 0.6), (19, 0.3), (37, 0.1)])
        )
        rough = (self.scenes.ridge == world.RIDGES.index("mountains"))[:, None, None]
        height = self.scenes.ridge_height[:, None, None]
        return self.horizon - height * (1 + torch.where(rough, 0.85 * mountains, 0.5 * hills))

    def ground(self, image: Tensor, color: Tensor) -> Tensor:
        land = self.coverage(self.horizon - self.y)
        image = _over(image, land, color)
        # A lake has soft ripples, thinner towards the horizon, as perspective would have them.
        depth = (self.y - self.horizon).clamp(min=0)
        bend = torch.sin(9 * self.x + self.scenes.ridge_phases[:, :1, None])
        ripple = torch.sin(60 * torch.sqrt(depth + 0.02) + 2 * bend)
        wet = (self.scenes.ground == world.GROUNDS.index("lake"))[:, None, None]
        return _over(image, land * wet * 0.12 * (1 + ripple), color * 0.4 + 0.6)

    def subject(self, image: Tensor) -> Tensor:
        for distance, there, paint in self.subject_shapes():
            image = _over(image, self.coverage(distance) * there, paint)
        return image

    def subject_shapes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The shapes of the subjects, one kind after the other: distances, the scenes that have them, their colours."""
        scenes = self.scenes
        color = self.pick(SUBJECT, world.COLORS, scenes.color)
        scale = scenes.subject_size[:, None, None]
        balloon = scenes.subject == world.SUBJECTS.index("balloon")
        foot = torch.where(balloon, scenes.balloon_y, scenes.horizon + 0.12)[:, None, None]
        x = (self.x - scenes.subject_x[:, None, None]) / scale
        y = (foot - self.y) / scale  # up, from the subject's foot (a balloon: from the middle of its envelope)
        for name, shapes in zip(world.SUBJECTS, (_house, _tree, _tent, _balloon), strict=True):
            chosen = (scenes.subject == world.SUBJECTS.index(name))[:, None, None]
            if chosen.any():
                yield from ((distance * scale, chosen, paint) for distance, paint in shapes(x, y, color))


Shapes = list[tuple[Tensor, Tensor]]
"""Signed distances in units of the subject's size, in painting order, each with its colour (N, 3)."""


def _house(x: Tensor, y: Tensor, color: Tensor) -> Shapes:
    roof = torch.maximum(x.abs() * 0.72 + (y - 1.7) * 0.70, 0.95 - y)
    window = _box(x.abs() - 0.46, y - 0.60, 0.15, 0.15)
    panes = torch.minimum((x.abs() - 0.46).abs(), (y - 0.60).abs()) - 0.018
    return [
        (_box(x, y - 0.5, 0.78, 0.5), color),
        (roof, color * 0.62),
        (_box(x, y - 0.26, 0.16, 0.26), color * 0.30),
        (window, color * 0.30),
        (torch.maximum(window, panes), color),
        (torch.hypot(x - 0.09, y - 0.26) - 0.025, color),
    ]


def _tree(x: Tensor, y: Tensor, color: Tensor) -> Shapes:
    crown = torch.hypot(x, y - 1.5) - 0.68
    for side in (-0.48, 0.48):
        crown = torch.minimum(crown, torch.hypot(x - side, y - 1.15) - 0.48)
    return [(_box(x, y - 0.45, 0.11, 0.45), color * 0 + color.new_tensor((0.36, 0.24, 0.14))), (crown, color)]


def _tent(x: Tensor, y: Tensor, color: Tensor) -> Shapes:
    side = torch.maximum(x.abs() * 0.78 + (y - 1.35) * 0.63, -y)
    door = torch.maximum(x.abs() * 0.93 + (y - 0.85) * 0.37, -y)
    return [(side, color), (door, color * 0.35)]


def _balloon(x: Tensor, y: Tensor, color: Tensor) -> Shapes:
    brown = color * 0 + color.new_tensor((0.42, 0.28, 0.14))
    envelope = torch.hypot(x, y) - 0.74
    band = torch.maximum(envelope, (y + 0.10).abs() - 0.13)
    ropes = torch.maximum((x.abs() - 0.17).abs() - 0.02, (y + 0.85).abs() - 0.28)
    return [(ropes, brown * 0.6), (_box(x, y + 1.2, 0.22, 0.15), brown), (envelope, color), (band, color * 0.62)]


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _over(image: Tensor, alpha: Tensor, color: Tensor) -> Tensor:
    """Paint a colour (N, 3) over images (N, 3, H, W) with opacity (N, H, W)."""
    return torch.lerp(image, color[:, :, None, None], alpha[:, None])
