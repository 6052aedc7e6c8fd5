"""Who else of a machine may read what should be read by its owner alone."""

import stat
from pathlib import Path


def others_who_read(path: str | Path) -> str | None:
    """Who besides its owner may read a file or look into a folder, in words; None where nobody may, or none is there.

    What lies in a folder that nobody else may enter is safe, whatever its own mode; that is not looked at.
    """
    try:
        mode = Path(path).expanduser().stat().st_mode
    except OSError:
        return None
    if mode & stat.S_IROTH:
        return "every user of this machine"
    return "its group" if mode & stat.S_IRGRP else None
