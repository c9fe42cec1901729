"""The methods by name. Each turns a denoiser for the native size into stages of canvas denoisers."""

from collections.abc import Callable

from cutdiff.methods.attention_scaling import attention_scaling
from cutdiff.methods.common import Run
from cutdiff.methods.cutdiffusion import cutdiffusion
from cutdiff.methods.direct import direct
from cutdiff.methods.hidiffusion import hidiffusion
from cutdiff.methods.multidiffusion import multidiffusion
from cutdiff.methods.scalecrafter import scalecrafter
from cutdiff.solvers import Stage

METHODS: dict[str, Callable[[Run], list[Stage]]] = {
    "direct": direct,
    "attention_scaling": attention_scaling,
    "scalecrafter": scalecrafter,
    "hidiffusion": hidiffusion,
    "multidiffusion": multidiffusion,
    "cutdiffusion": cutdiffusion,
}

__all__ = [
    "METHODS",
    "Run",
    "attention_scaling",
    "cutdiffusion",
    "direct",
    "hidiffusion",
    "multidiffusion",
    "scalecrafter",
]
