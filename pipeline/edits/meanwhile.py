"""What a writer is told when others erase entries, or drop versions, under its hands.

The files of what it began with may go while it reads them. Nothing is missing then: it need only be asked again.
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
    """A method of a memory that raises CommitConflict for a file that is missing and that no version names any more.

    Costs nothing unless a file is missing; then every version is read once.
    """

    @functools.wraps(verb)
    def asked(self: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return verb(self, *arguments, **named)
        except DamagedFile as error:
            if isinstance(error, MissingFile) and _was_dropped(self.log, error.path):
                raise CommitConflict(
                    f"another process has erased entries or dropped versions meanwhile, and {error.path} went with "
                    "them: run the command again"
                ) from error
            raise

    return cast(Verb, asked)


def _was_dropped(log: VersionLog, path: str) -> bool:
    """Whether a file is none that a version needs, so that it has gone as it should."""
    if path.endswith(DESCRIPTION):  # which no version names
        return False
    try:
        return path not in named_paths(log)
    except (DamagedFile, MemoryMissing):
        return False
