"""Read a picture of a scene: how many sky bodies and subjects it shows, and every attribute that a caption names.

It goes by colours and connected blobs only, so that every answer can be retraced; the same rules hold for true renders
and for generated pictures of any size. It recognises everything by the distance to the colours that `render` paints
with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cutdiff.scenes import world
from cutdiff.scenes.blobs import blob_sizes, count_blobs, label_blobs, largest_blob, opened, silhouettes
from cutdiff.scenes.render import BODY, GROUND, LIGHT, RIDGE, SKY, SUBJECT, render

SMALLEST_BODY, SMALLEST_SUBJECT = 0.003, 0.01
"""Shares of a native picture that the smallest body and subject to be counted cover: about a third of the smallest that
is ever drawn there (0.0095 and 0.03). A blob of fewer pixels is not counted in a picture of any size, because what
repeats in a large picture is as small as in a native one."""
FINE, COARSE = 256, 64
"""Shorter sides in pixels: blobs are counted at the first at most; sky, ridge and ground are read at the second."""
SHADE, LIT = 0.6, 0.81
"""A subject is painted in its colour, and partly (roof, band) in that colour times 0.62. Its lit parts are those above
`LIT`, which lies half way between the two."""
SUBJECT_TOLERANCE, BODY_TOLERANCE, SCENERY_TOLERANCE = 0.14, 0.20, 0.15
"""Largest distances in RGB at which a pixel still has a colour."""
SKY_ROWS, RIDGE_ROWS, GROUND_ROWS = (0.0, 0.3), (0.4, 0.75), (0.75, 1.0)
"""Rows in which sky, ridge and ground are looked for: the first and the last, in fractions of the height."""
ENOUGH, ENOUGH_RIDGE = 0.2, 0.02
"""Smallest shares of its rows that a sky or a ground must cover, and that a ridge must cover."""
SAME_SHAPE = 0.45
"""Smallest overlap (intersection over union) of silhouettes at which a blob is a subject of that kind. The overlap is
above 0.69 for true renders at 128 px, about 0.5 for a generated house with crooked windows, and about 0.25 for two
tents that have grown together."""
PART = 16
"""Number of pictures that are read at once, to bound memory."""


@dataclass(frozen=True)
class Reading:
    """The contents of N pictures as (N,) int64 tensors: two counts, then indices into the lists of `world`.

    An index is -1 where the picture shows none of the list. Subject and colour are those of the largest subject.
    """

    bodies: Tensor
    """Number of suns and moons."""
    subjects: Tensor
    """Number of blobs in the colours of subjects, counted for each colour separately."""
    subject: Tensor
    color: Tensor
    ridge: Tensor
    ground: Tensor
    time: Tensor

    def matches(self, choices: Tensor) -> Tensor:
        """Tell which pictures have one body and one subject, of the kind and colour of the caption: (N,) bool.

        `choices` (N, 5) are those of the captions, as in `Scenes.choices`.
        """
        named = (self.color == choices[:, 0]) & (self.subject == choices[:, 1])
        return (self.bodies == 1) & (self.subjects == 1) & named

    def caption_right(self, choices: Tensor) -> Tensor:
        """Tell which pictures match and also have the ridge, ground and time of the caption: (N,) bool."""
        scenery = torch.stack([self.ridge, self.ground, self.time], dim=1)
        return self.matches(choices) & (scenery == choices[:, 2:]).all(1)


def read(images: Tensor, native: int = 128) -> Reading:
    """Read pictures (N, 3, H, W) in [0, 1].

    `native` is the side in pixels of the pictures that the model was trained on: it scales what is too small to count.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures are (N, 3, H, W), not {tuple(images.shape)}")
    parts = [_read_part(part.float(), native) for part in images.split(PART)]
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def places(images: Tensor, native: int = 128) -> dict[str, Tensor]:
    """The places of the largest "subject", the "ridge" and the "ground" in pictures (N, 3, H, W) in [0, 1], as `read`
    recognises them: masks (N, h, w), bool, whose shorter side has at most `FINE` pixels. A picture without one has an
    empty mask."""
    parts = [_places_of(part.float(), native) for part in images.split(PART)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _places_of(images: Tensor, native: int) -> dict[str, Tensor]:
    coarse, fine = _shrink(images, COARSE), _shrink(images, FINE)
    native_pixels = native**2 * (fine.shape[2] * fine.shape[3]) / (images.shape[2] * images.shape[3])
    subject = _subjects(fine, SMALLEST_SUBJECT * native_pixels)[2].any(1)
    time = _time(_rows(coarse, SKY_ROWS)).clamp(min=0)
    light = _table(LIGHT, world.TIMES, images.device)[time, None]
    top, bottom = (ends[time, None] for ends in _sky(images.device))
    ridges = 0.75 * _table(RIDGE, world.RIDGES, images.device) * light + 0.25 * bottom
    grounds = _table(GROUND, world.GROUNDS, images.device) * light
    rippled = _rippled(grounds)
    starts, ends = torch.cat([grounds, ridges, top], dim=1), torch.cat([rippled, ridges, bottom], dim=1)
    distance, nearest = _distances(fine, starts, ends).min(1)
    nearest = torch.where((distance < SCENERY_TOLERANCE) & ~subject, nearest, -1)
    is_ground = (nearest >= 0) & (nearest < len(world.GROUNDS))
    is_ridge = (nearest >= len(world.GROUNDS)) & (nearest < len(world.GROUNDS) + len(world.RIDGES))
    return {"subject": subject, "ridge": opened(is_ridge), "ground": opened(is_ground)}


def _read_part(images: Tensor, native: int) -> tuple[Tensor, ...]:
    coarse, fine = _shrink(images, COARSE), _shrink(images, FINE)
    native_pixels = native**2 * (fine.shape[2] * fine.shape[3]) / (images.shape[2] * images.shape[3])
    time = _time(_rows(coarse, SKY_ROWS))
    bodies = count_blobs(_body_mask(fine, time), SMALLEST_BODY * native_pixels)
    subjects, color, largest = _subjects(fine, SMALLEST_SUBJECT * native_pixels)
    subject = torch.where(color < 0, -1, _kind(largest))
    ridge = _ridge(_rows(coarse, RIDGE_ROWS), time)
    return bodies, subjects, subject, color, ridge, _ground(_rows(coarse, GROUND_ROWS)), time


def _body_mask(images: Tensor, time: Tensor) -> Tensor:
    """Mark the pixels in the colour of the sun or moon of that time: (N, H, W) bool. An unknown time counts as day."""
    time = time.clamp(min=0)
    body = _table(BODY, world.TIMES, images.device)[time]
    # Sunlit snow is almost as bright: a pixel must be nearer to the sun than to it.
    snow = _table(LIGHT, world.TIMES, images.device)[time] * torch.tensor(GROUND["snowfield"], device=images.device)
    colors = torch.stack([body, snow], dim=1)
    to_body, to_snow = _distances(images, colors, colors).unbind(1)
    return (to_body < BODY_TOLERANCE) & (to_body < to_snow)


def _subjects(images: Tensor, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """The number of subjects (N,), the colour of the largest (N,) or -1, and its lit and shaded parts (N, 2, H, W)."""
    colors = _table(SUBJECT, world.COLORS, images.device)
    distance, nearest = _distances(images, SHADE * colors[None], colors[None]).min(1)
    nearest = torch.where(distance < SUBJECT_TOLERANCE, nearest, -1)
    masks = nearest[:, None] == torch.arange(len(colors), device=images.device)[:, None, None]
    masks = opened(masks.flatten(0, 1)).view_as(masks)  # (N, 5, H, W)
    present = masks.sum((2, 3)) >= smallest
    sizes = blob_sizes(label_blobs(masks[present]))
    counts, largest = torch.zeros_like(present, dtype=torch.int64), torch.zeros_like(present, dtype=torch.int64)
    counts[present], largest[present] = (sizes >= smallest).sum(1), sizes.amax(1)
    count, main = counts.sum(1), largest.argmax(1)
    blob = largest_blob(masks[torch.arange(len(main), device=images.device), main])
    shade = torch.einsum("nchw, nc -> nhw", images, colors[main]) / colors.square().sum(1)[main, None, None]
    lit = shade > LIT
    return count, torch.where(count > 0, main, -1), torch.stack([blob & lit, blob & ~lit], dim=1)


def _kind(parts: Tensor) -> Tensor:
    """The subject whose lit and shaded parts look like these (N, 2, H, W), or -1: (N,)."""
    shown, known = silhouettes(parts)[:, None].flatten(2), _known_silhouettes().to(parts.device).flatten(1)
    overlap = torch.minimum(shown, known).sum(2) / torch.maximum(shown, known).sum(2)
    best = overlap.max(1)
    return torch.where(best.values >= SAME_SHAPE, best.indices, -1)


@cache
def _known_silhouettes() -> Tensor:
    """The silhouettes of a true render of each subject: (4, 2, size, size)."""
    scene = world.sample(1, torch.Generator().manual_seed(0))[torch.zeros(len(world.SUBJECTS), dtype=torch.int64)]
    images = render(replace(scene, subject=torch.arange(len(world.SUBJECTS))), FINE) / 2 + 0.5
    return silhouettes(_subjects(images, 1)[2])


def _time(rows: Tensor) -> Tensor:
    """The time whose sky covers most of the upper rows (N, 3, h, W), or -1: (N,)."""
    top, bottom = _sky(rows.device)
    return _vote(_distances(rows, top[None], bottom[None]), among=len(world.TIMES))


def _ground(rows: Tensor) -> Tensor:
    """The ground that covers most of the lower rows (N, 3, h, W), whatever the light, or -1: (N,)."""
    lit = _table(LIGHT, world.TIMES, rows.device)[:, None] * _table(GROUND, world.GROUNDS, rows.device)  # (3, 4, 3)
    of_grounds = _distances(rows, lit.flatten(0, 1)[None], _rippled(lit).flatten(0, 1)[None])
    of_grounds = of_grounds.unflatten(1, lit.shape[:2]).amin(1)  # (N, 4, h, W)
    top, bottom = _sky(rows.device)
    return _vote(torch.cat([of_grounds, _distances(rows, top[None], bottom[None])], dim=1), among=len(world.GROUNDS))


def _rippled(lit: Tensor) -> Tensor:
    """The colours of grounds (..., 4, 3) where a lake has the crest of a ripple."""
    lake = torch.arange(len(world.GROUNDS), device=lit.device) == world.GROUNDS.index("lake")
    return torch.where(lake[:, None], torch.lerp(lit, 0.4 * lit + 0.6, 0.24), lit)


def _ridge(rows: Tensor, time: Tensor) -> Tensor:
    """The ridge whose colour at that time (N,) covers most of the middle rows (N, 3, h, W), or -1: (N,)."""
    time = time.clamp(min=0)
    light = _table(LIGHT, world.TIMES, rows.device)[time, None]
    top, bottom = (ends[time, None] for ends in _sky(rows.device))
    ridges = 0.75 * _table(RIDGE, world.RIDGES, rows.device) * light + 0.25 * bottom  # (N, 2, 3)
    grounds = _table(GROUND, world.GROUNDS, rows.device) * light
    starts, ends = torch.cat([ridges, top, grounds], dim=1), torch.cat([ridges, bottom, grounds], dim=1)
    return _vote(_distances(rows, starts, ends), among=len(world.RIDGES), enough=ENOUGH_RIDGE)


def _sky(device: torch.device) -> tuple[Tensor, Tensor]:
    """The colours of the sky at its top and at the horizon, for each time: two (3, 3)."""
    colors = torch.tensor([SKY[name] for name in world.TIMES], device=device)
    return colors[:, 0], colors[:, 1]


def _vote(distances: Tensor, among: int, enough: float = ENOUGH) -> Tensor:
    """Choose the colour that is nearest to most pixels, or -1 where these are too few: (N, K, h, W) -> (N,).

    Only the first `among` colours can be chosen; the others take pixels from them.
    """
    distance, nearest = distances.min(1)
    votes = F.one_hot(nearest, distances.shape[1])[..., :among] * (distance < SCENERY_TOLERANCE)[..., None]
    most = votes.float().mean((1, 2)).max(1)
    return torch.where(most.values >= enough, most.indices, -1)


def _distances(images: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Distance of each pixel to the line between two colours: (N, 3, H, W), 2 × (N or 1, K, 3) -> (N, K, H, W)."""
    pixels = images[:, None]  # (N, 1, 3, H, W)
    start, along = starts[..., None, None], (ends - starts)[..., None, None]
    offset = pixels - start
    share = (offset * along).sum(2, keepdim=True) / along.square().sum(2, keepdim=True).clamp(min=1e-9)
    return (offset - share.clamp(0, 1) * along).square().sum(2).sqrt()


def _table(colors: dict[str, tuple[float, ...]], names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([colors[name] for name in names], device=device)


def _rows(images: Tensor, rows: tuple[float, float]) -> Tensor:
    height = images.shape[2]
    return images[:, :, round(rows[0] * height) : round(rows[1] * height)]


def _shrink(images: Tensor, side: int) -> Tensor:
    """Average larger pictures down so that their shorter side has `side` pixels."""
    height, width = images.shape[2:]
    scale = side / min(height, width)
    return images if scale >= 1 else F.adaptive_avg_pool2d(images, (round(height * scale), round(width * scale)))
