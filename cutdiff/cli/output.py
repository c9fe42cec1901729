"""The folder that a command line writes to, which is tried before a long run."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path

from cutdiff.cli.arguments import BadArgument


def check_output(flag: str, folder: Path) -> None:
    """Raise BadArgument where the folder that `flag` names cannot be made or written to."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.is_symlink() or path.exists())
        # The modes of a folder do not tell root, nor of a disk that is only read. A picture's file will be locked, too.
        with tempfile.TemporaryFile(dir=place) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise BadArgument(f"{flag} {folder} cannot be written to ({error.strerror}): choose another folder") from None
