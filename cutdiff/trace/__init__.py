"""A trace: what happened at each step of a run, as one HTML page that needs nothing else, and as a folder of tensors.

Read `recorder` first: the observer that makes a `Moment` of each step. `page` writes moments into a page as the run
goes along, `folder` into a folder; `run` does it for a picture, and `assets` holds the page's own scripts. The module
itself can be called, as `cutdiff.trace(model, prompt)`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from cutdiff.trace.folder import Trace, load
from cutdiff.trace.recorder import Items, Moment, Recorder
from cutdiff.trace.run import Unwritable, is_page_of, trace, tracing

__all__ = ["Items", "Moment", "Recorder", "Trace", "Unwritable", "is_page_of", "load", "trace", "tracing"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return trace(*args, **options)


_Callable.__call__.__doc__ = trace.__doc__
__signature__ = inspect.signature(trace)
sys.modules[__name__].__class__ = _Callable
