"""Removing what belongs to nobody. What a version names, a live lease holds or somebody else put there stays."""

from dataclasses import dataclass

from pipeline.edits.erasure.redact import finish_erasures
from pipeline.store.checks.findings import Finding
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.checks.version_files import read_chain
from pipeline.store.layout import LEASES, VERSIONS, folder_at_the_top, is_aside
from pipeline.store.log.version_log import VersionLog


@dataclass(frozen=True)
class CleanReport:
    """How many files were removed, and why none were if that was refused."""

    removed: int
    refusal: Finding | None = None


def clean(log: VersionLog, command: str) -> CleanReport:
    """Finish erasures that were cut off, then remove garbage.

    Nothing is removed while a version cannot be read, for what it names is not known. Raises CommitConflict while
    another process is erasing.
    """
    damaged = read_chain(log).findings
    if damaged:
        what = f"nothing was removed: what {damaged[0].path} names is not known"
        return CleanReport(0, Finding("note", f"{VERSIONS}/", what, "mend the versions, then clean up"))
    before = {path for path in log.storage.walk() if not _comes_and_goes(path)}
    finish_erasures(log)
    removed = remove_garbage(log, take_census(log), command)
    gone = before - set(log.storage.walk())
    return CleanReport(len(gone.union(removed)))


def _comes_and_goes(path: str) -> bool:
    """Whether a file may be gone by the doing of others."""
    return folder_at_the_top(path) == LEASES or is_aside(path)
