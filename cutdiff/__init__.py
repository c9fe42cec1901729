"""CutDiffusion from scratch: pretrained latent diffusion past the size it was trained at, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cutdiff.settings import VERSION as __version__

if TYPE_CHECKING:
    from cutdiff.checkpoint import load
    from cutdiff.given.regions import Region
    from cutdiff.pipeline import Result, decode, denoise, encode, generate
    from cutdiff.sampling.denoiser import Observer
    from cutdiff.sampling.draws import Draws
    from cutdiff.sampling.stages import Step
    from cutdiff.settings import Settings
    from cutdiff.trace.run import trace

__all__ = [
    "Draws",
    "Observer",
    "Region",
    "Result",
    "Settings",
    "Step",
    "__version__",
    "decode",
    "denoise",
    "encode",
    "generate",
    "load",
    "trace",
]

_HOMES = {
    "load": "cutdiff.checkpoint",
    "Draws": "cutdiff.sampling.draws",
    "Observer": "cutdiff.sampling.denoiser",
    "Region": "cutdiff.given.regions",
    "Result": "cutdiff.pipeline",
    "decode": "cutdiff.pipeline",
    "denoise": "cutdiff.pipeline",
    "encode": "cutdiff.pipeline",
    "generate": "cutdiff.pipeline",
    "Settings": "cutdiff.settings",
    "Step": "cutdiff.sampling.stages",
    "trace": "cutdiff.trace",
}


def __getattr__(name: str) -> Any:
    """Import late: `python -m cutdiff.sample --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cutdiff' has no attribute {name!r}")
    import importlib

    if name == "trace":
        return importlib.import_module("cutdiff.trace")
    return getattr(importlib.import_module(_HOMES[name]), name)
