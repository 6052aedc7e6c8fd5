"""Checks which other users of this machine can read a file that only its owner should read."""

import stat
from pathlib import Path


def others_who_read(path: str | Path) -> str | None:
    """Who besides its owner can read a file or list a folder, in words; None if nobody can, or it does not exist.

    A file in a folder that nobody else may enter is safe whatever its own mode. This function does not check the
    folder.
    """
    try:
        mode = Path(path).expanduser().stat().st_mode
    except OSError:
        return None
    if mode & stat.S_IROTH:
        return "every user of this machine"
    return "its group" if mode & stat.S_IRGRP else None
