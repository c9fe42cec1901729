"""Finding weights: at a path, under a hub id in the local cache, or in the package itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

EMBEDDED = "weights/scenes"
PACKAGE = Path(__file__).parents[1]
HUB_ID = re.compile(r"\w[^/]*/[^/]+(?<!\.safetensors)")
SNAPSHOT = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/[^/]+(?P<below>/.+)?")
"""The place of a model in the local Hugging Face cache."""


def locate(path: str | Path | None, option: str = "") -> Path:
    """The folder or file that a path, a hub id or None (the embedded model) stands for.

    Raises FileNotFoundError where there is none; the message begins with `option=` if that is given.
    """
    if path is not None and os.path.exists(path):  # any text may be a path here, and Path.exists raises for some
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


def name_of(path: str | Path) -> str:
    """The name of a model's folder or file, wherever it lies: the hub id of one in the local Hugging Face cache,
    "weights/scenes" of the embedded model, and else the last part of the path."""
    place = os.path.abspath(path)
    if snapshot := SNAPSHOT.fullmatch(place):
        return snapshot["id"].replace("--", "/") + (snapshot["below"] or "")
    if any(place == str(root / EMBEDDED) for root in (PACKAGE, PACKAGE.parent)):
        return EMBEDDED
    return os.path.basename(place)


def embedded(folder: str) -> Path:
    """The place of a folder of weights that comes with cutdiff, such as "weights/scenes"; FileNotFoundError if none."""
    for root in (PACKAGE, PACKAGE.parent):  # in a wheel, in a clone
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(f"the embedded model is missing from {PACKAGE.parent / folder}: reinstall, or pass a path")
