"""Where weights lie: a path, a hub id in the local cache, or what comes with cutdiff."""

from __future__ import annotations

import os
import re
from pathlib import Path

EMBEDDED = "weights/scenes"
PACKAGE = Path(__file__).parents[1]
HUB_ID = re.compile(r"\w[^/]*/[^/]+(?<!\.safetensors)")


def locate(path: str | Path | None, option: str = "") -> Path:
    """The folder or file that a path, a hub id or None stands for.

    Raises FileNotFoundError where there is none, headed `option=` where one is given.
    """
    if path is not None and os.path.exists(path):  # which takes any text for a path, as Path.exists does not
        return Path(path)
    if path is None or Path(path) == Path(EMBEDDED):
        return embedded(EMBEDDED)
    named = f"{option}={path}" if option else path or "''"
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"{named} is no file or folder, and no model in the local Hugging Face cache: check the path, or fetch "
                f"the model with `hf download {path}`"
            ) from None
    raise FileNotFoundError(f"{named} does not exist: pass a diffusers folder or a .safetensors file")


def embedded(folder: str) -> Path:
    """A folder of weights that comes with cutdiff, such as "weights/scenes". Raises FileNotFoundError without it."""
    for root in (PACKAGE, PACKAGE.parent):  # in a wheel, in a clone
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(f"the embedded model is missing from {PACKAGE.parent / folder}: reinstall, or pass a path")
