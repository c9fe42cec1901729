"""The methods by name. Each turns a denoiser for the native size into stages of canvas denoisers."""

from collections.abc import Callable, Sequence

from cutdiff.methods.accdiffusion import accdiffusion
from cutdiff.methods.attention_scaling import attention_scaling
from cutdiff.methods.cutdiffusion import cutdiffusion
from cutdiff.methods.demofusion import demofusion
from cutdiff.methods.direct import direct
from cutdiff.methods.hidiffusion import hidiffusion
from cutdiff.methods.magnify import magnify
from cutdiff.methods.multidiffusion import multidiffusion
from cutdiff.methods.scalecrafter import scalecrafter
from cutdiff.methods.shared import Run
from cutdiff.sampling.solvers import Phase, Stage

METHODS: dict[str, Callable[[Run], Sequence[Stage | Phase]]] = {
    "direct": direct,
    "attention_scaling": attention_scaling,
    "scalecrafter": scalecrafter,
    "hidiffusion": hidiffusion,
    "multidiffusion": multidiffusion,
    "cutdiffusion": cutdiffusion,
    "demofusion": demofusion,
    "accdiffusion": accdiffusion,
    "magnify": magnify,
}

__all__ = [
    "METHODS",
    "Run",
    "accdiffusion",
    "attention_scaling",
    "cutdiffusion",
    "demofusion",
    "direct",
    "hidiffusion",
    "magnify",
    "multidiffusion",
    "scalecrafter",
]
