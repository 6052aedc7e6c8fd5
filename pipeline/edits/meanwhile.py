"""Reports a conflict to a writer when other processes erase entries or drop versions while it works.

The files of the version that it started from may be deleted while it reads them. The memory is not damaged then: the
command only needs to run again.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pipeline.errors import CommitConflict, DamagedFile, MemoryMissing, MissingFile
from pipeline.store.checks.garbage import named_paths
from pipeline.store.layout import DESCRIPTION
from pipeline.store.log.version_log import VersionLog

Verb = TypeVar("Verb", bound=Callable[..., Any])


def explain_conflicts(verb: Verb) -> Verb:
    """Wrap a method of a memory: it raises CommitConflict if a missing file is one that no version names any more.

    It costs nothing unless a file is missing; then every version is read once.
    """

    @functools.wraps(verb)
    def asked(self: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return verb(self, *arguments, **named)
        except DamagedFile as error:
            if isinstance(error, MissingFile) and _was_dropped(self.log, error.path):
                raise CommitConflict(
                    f"another process has erased entries or dropped versions meanwhile, and {error.path} went with "
                    "them: run the command again",
                    "versions dropped",
                ) from error
            raise

    return cast(Verb, asked)


def _was_dropped(log: VersionLog, path: str) -> bool:
    """Whether no version needs the file, so that its deletion was correct."""
    if path.endswith(DESCRIPTION):  # no version ever names a description
        return False
    try:
        return path not in named_paths(log)
    except (DamagedFile, MemoryMissing):
        return False
