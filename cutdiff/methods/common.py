"""What every method is given."""

from __future__ import annotations

from dataclasses import dataclass

from cutdiff.denoiser import Denoiser, Size
from cutdiff.draws import Draws


@dataclass(frozen=True)
class Run:
    """One run on a canvas: the denoiser for the native size, the draws, and the options that methods read."""

    denoiser: Denoiser
    draws: Draws
    size: Size
    """Of the canvas, in latents."""
    num_steps: int
    stride: int | None = None
    """Between views, in latents; half of the window where it is None."""
    structure_fraction: float = 0.5
    interaction: str = "channel"
    size_conditioning: str = "native"

    @property
    def window(self) -> Size:
        """Of a view: the native size, or the canvas where that is smaller."""
        native = self.denoiser.native_size
        return min(native, self.size[0]), min(native, self.size[1])

    @property
    def strides(self) -> Size:
        """Between views, on each axis."""
        wanted = max(1, self.denoiser.native_size // 2) if self.stride is None else self.stride
        return min(wanted, self.window[0]), min(wanted, self.window[1])
