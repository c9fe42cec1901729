"""Windows without an average: side by side on a torus, or overlapping with every pixel taken from one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

import torch
from cutdiff_kernels.checks import check_views
from torch import Tensor

from cutdiff.sampling.operators import FromNetwork, ToNetwork, Views, carry_back, upload, view_grid


@dataclass(frozen=True)
class Torus:
    """Windows side by side on a canvas whose borders meet, shifted: (B·V·copies, C, *window).

    SpotDiffusion (Frolov et al. 2024, arXiv 2407.15507): windows that do not overlap cost the least, and another shift
    at every step (`Draws.torus_shifts`) hides their seams. Where windows do not fill an axis, the last one is moved
    back, and the mean is taken where two overlap; the published code sets what is left over to 0. ValueError where a
    window is larger than the canvas.
    """

    shifts: Tensor
    """(B, 2) of (down, right), int64, on the CPU: the corner of the first window."""
    window: tuple[int, int]
    size: tuple[int, int]
    """The size (H, W) of the canvas."""
    device: torch.device | str = "cpu"
    """The device of the canvas."""
    views: Views = field(init=False, repr=False)
    """The windows on the canvas that is shifted back."""

    def __post_init__(self) -> None:
        if self.shifts.ndim != 2 or self.shifts.shape[1] != 2 or self.shifts.dtype != torch.int64:
            raise ValueError(f"shifts {tuple(self.shifts.shape)} of {self.shifts.dtype} must be int64 (B, 2)")
        grid = view_grid(self.size, self.window, self.window)
        origins = grid.expand(len(self.shifts), *grid.shape)
        object.__setattr__(self, "views", Views(origins, self.window, self.size, device=self.device))

    @property
    def origins(self) -> Tensor:
        """The corners of the windows on the canvas, (B, V, 2), on the CPU; a window goes on at the opposite border."""
        grid = view_grid(self.size, self.window, self.window)
        return (grid + self.shifts[:, None]) % torch.tensor(self.size, device="cpu")

    @property
    def crops(self) -> Tensor:
        """The corners (B, V, 2) of the crops that the windows are most like: their own, and for one that goes over a
        border that of the nearest window which does not, around the border where it is nearer."""
        size, origins = torch.tensor(self.size, device="cpu"), self.origins
        last = size - torch.tensor(self.window, device="cpu")
        return torch.where(origins <= last, origins, torch.where(origins - last <= size - origins, last, 0))

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        return self.views.gather(self._shifted(canvas, -self.shifts), backend, **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        if (canvas := how.get("canvas")) is not None:
            how = {**how, "canvas": self._shifted(canvas, -self.shifts)}
        return self._shifted(self.views.scatter(values, backend, **how), self.shifts)

    def items(self, canvas: Tensor) -> tuple[int, tuple[int, int]]:
        """Return the number of windows of all images of the canvas, and their (h, w)."""
        return self.views.items(canvas)

    def _shifted(self, canvas: Tensor, shifts: Tensor) -> Tensor:
        if len(canvas) != len(shifts):
            raise ValueError(f"a canvas of {len(canvas)} images does not fit the shifts of {len(shifts)}")
        return torch.stack([image.roll(tuple(by), (1, 2)) for image, by in zip(canvas, shifts.tolist(), strict=True)])


@dataclass(frozen=True)
class Swapped:
    """Overlapping windows as those of `Views`, of which every pixel of the canvas takes its value from one, by turns.

    SaFa (Dai et al. 2025, arXiv 2502.05130) swaps every other column where two windows overlap, because a mean of
    windows that do not quite agree is smooth, and a pixel of either is not. Here, in two dimensions, pixel (i, j) that
    k windows cover takes the value of number (i · round(√k) + j) mod k of them. So windows take turns along every row,
    all alike often, and pixels of one window lie as far apart as those of a lattice can (for k up to 12): two windows
    make a chessboard, and four give one pixel each to every block of 2×2. ValueError where no window covers a pixel.
    """

    origins: Tensor
    """(B, V, 2) of (top, left), int64, on the CPU; a window may reach past the canvas."""
    window: tuple[int, int]
    size: tuple[int, int]
    """The size (H, W) of the canvas."""
    device: torch.device | str = "cpu"
    """The device of the canvas."""
    views: Views = field(init=False, repr=False)
    """The same windows, averaged where they overlap."""
    taken: Tensor = field(init=False, repr=False)
    """(B, 1, H·W), int64, on the device: the pixel, of all of an image's windows one after the other, that each pixel
    of the canvas is taken from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", Views(self.origins, self.window, self.size, device=self.device))
        taken = torch.stack([_by_turns(origins, self.window, self.size) for origins in self.origins.tolist()])
        object.__setattr__(self, "taken", upload(taken.flatten(1)[:, None], self.device))

    def gather(self, canvas: Tensor, backend: str = "auto", **how: Unpack[ToNetwork]) -> Tensor:
        return self.views.gather(canvas, backend, **how)

    def scatter(self, values: Tensor, backend: str = "auto", **how: Unpack[FromNetwork]) -> Tensor:
        check_views(self.origins, self.window, self.size, len(values), how.get("copies", 1), None, covered=True)
        return carry_back(values, self._swap, **how)

    def items(self, canvas: Tensor) -> tuple[int, tuple[int, int]]:
        """Return the number of windows of all images of the canvas, and their (h, w)."""
        return self.views.items(canvas)

    def _swap(self, windows: Tensor) -> Tensor:
        """Windows (B·V, C, h, w) -> canvas (B, C, H, W)."""
        pixels = windows.unflatten(0, (len(self.taken), -1)).transpose(1, 2).flatten(2)  # (B, C, V·h·w)
        return pixels.gather(2, self.taken.expand(-1, pixels.shape[1], -1)).unflatten(2, self.size)


def _by_turns(origins: list[list[int]], window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The pixel (H, W), int64, of all windows one after the other, that each pixel of a canvas is taken from."""
    number = torch.arange(len(origins) * window[0] * window[1], device="cpu").view(-1, *window)
    places, parts = [], []
    for (top, left), pixels in zip(origins, number, strict=True):
        rows = slice(max(top, 0), max(top + window[0], 0))
        columns = slice(max(left, 0), max(left + window[1], 0))
        places.append((rows, columns))
        within = (slice(rows.start - top, max(size[0] - top, 0)), slice(columns.start - left, max(size[1] - left, 0)))
        parts.append(pixels[within])
    covering, before, taken = torch.zeros(3, *size, dtype=torch.int64, device="cpu")
    for place in places:
        covering[place] += 1
    rows, columns = (torch.arange(side, device="cpu") for side in size)
    turn = rows[:, None] * covering.float().sqrt().round().long() + columns
    turn %= covering
    for place, pixels in zip(places, parts, strict=True):
        taken[place] = torch.where(before[place] == turn[place], pixels, taken[place])
        before[place] += 1
    return taken
