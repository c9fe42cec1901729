"""The methods, one file each: a denoiser for the native size becomes stages of denoisers for the canvas.

`cutdiffusion.py` is the one to read first. What several methods share is in `shared.py`, and what those of views and
patches do in `tiled.py`; no method imports another. A method is a frozen dataclass, whose fields are its options, with
`stages(run)`, or a plain function of a `Run`. The names are in `cutdiff.specs`; a method of one's own needs none.
"""

from cutdiff.specs import METHODS

__all__ = ["METHODS"]
