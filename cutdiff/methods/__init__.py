"""The methods by name. Each turns a denoiser for the native size into stages of canvas denoisers."""

from collections.abc import Callable

from cutdiff.methods.common import Run
from cutdiff.methods.cutdiffusion import cutdiffusion
from cutdiff.methods.direct import direct
from cutdiff.methods.multidiffusion import multidiffusion
from cutdiff.solvers import Stage

METHODS: dict[str, Callable[[Run], list[Stage]]] = {
    "direct": direct,
    "multidiffusion": multidiffusion,
    "cutdiffusion": cutdiffusion,
}

__all__ = ["METHODS", "Run", "cutdiffusion", "direct", "multidiffusion"]
