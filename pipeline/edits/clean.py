"""Removes garbage. Files that a version names, that a live lease holds or that are foreign to the memory stay."""

from dataclasses import dataclass

from pipeline.edits.erasure.redact import finish_erasures
from pipeline.errors import FirstAddUnfinished
from pipeline.store.checks.findings import Finding
from pipeline.store.checks.garbage import remove_garbage, take_census
from pipeline.store.checks.verify_first_add import GO_ON
from pipeline.store.checks.version_files import check_rollup, read_chain
from pipeline.store.layout import LEASES, SEGMENTS, VERSIONS, folder_at_the_top, is_aside
from pipeline.store.log.version_log import VersionLog


@dataclass(frozen=True)
class CleanReport:
    """The number of removed files. `refusal` is the reason if the clean-up refused to remove any."""

    removed: int
    refusal: Finding | None = None


def clean(log: VersionLog, command: str) -> CleanReport:
    """Finish interrupted erasures, then remove garbage.

    Nothing is removed while a version cannot be read, because the files that it names are unknown, and nothing of a
    first add that is not finished, which goes on with them. Raises CommitConflict while another process is erasing.
    """
    try:
        damaged = read_chain(log).findings
    except FirstAddUnfinished:
        what = "nothing was removed: the first add goes on with what is there"
        return CleanReport(0, Finding("note", f"{SEGMENTS}/", what, GO_ON))
    if damaged:
        what = f"nothing was removed: what {damaged[0].path} names is not known"
        return CleanReport(0, Finding("note", f"{VERSIONS}/", what, "mend the versions, then clean up"))
    before = {path for path in log.storage.walk() if not _comes_and_goes(path)}
    finish_erasures(log)
    removed = remove_garbage(log, take_census(log), command)
    if any(check_rollup(log, read_chain(log))):  # a killed writer may have left text that was erased
        log.remove_rollup()
        log.renew_rollup()
    gone = before - set(log.storage.walk())
    return CleanReport(len(gone.union(removed)))


def _comes_and_goes(path: str) -> bool:
    """Whether another process may delete the file at any time."""
    return folder_at_the_top(path) == LEASES or is_aside(path)
