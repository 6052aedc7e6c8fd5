"""Checks every invariant of a memory: its versions, every file they name, and whether all of it agrees.

Nothing is changed. Each finding comes with advice. A damaged file does not stop the check of the others.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DamagedFile, FirstAddUnfinished, MissingFile, NotPermitted
from pipeline.progress import OnProgress, ignore_progress
from pipeline.steps import RunSteps
from pipeline.store.checks.consistency import Consistency
from pipeline.store.checks.file_contents import Contents
from pipeline.store.checks.findings import CLEAN, RESTORE, Finding, damage, not_looked_at
from pipeline.store.checks.garbage import Census, take_census
from pipeline.store.checks.inventory import inventory_of
from pipeline.store.checks.unfinished_erasures import advise, carry_out_in, read_plans, unfinished_erasures
from pipeline.store.checks.verify_first_add import first_add_contents
from pipeline.store.checks.verify_steps import StepwiseContents
from pipeline.store.checks.version_files import Chain, check_hint, check_rollup, check_steps, read_chain
from pipeline.store.layout import DESCRIPTION, VERSIONS, folder_at_the_top, is_listing, segment_folder
from pipeline.store.log.records import Index
from pipeline.store.log.state import file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments import reservations
from pipeline.store.storage.interface import Storage
from pipeline.tabular import Tabular

_UNSOUND = ("damage", "unread")


@dataclass(frozen=True)
class Verification(Tabular):
    """The findings and what was checked. `removed` counts files that a clean-up removed before (None: no clean-up).

    `indexes` are the indexes of the retained versions, over vectors of `dimension`; only pipeline/index can open their
    files. `broken` are files that are damaged or may not be read.
    """

    findings: tuple[Finding, ...]
    version: int
    versions: int
    files: int
    num_bytes: int
    garbage_bytes: int
    indexes: tuple[Index, ...]
    dimension: int
    broken: frozenset[str]
    removed: int | None = None

    def _rows(self) -> list[dict[str, Any]]:
        """A row for each finding."""
        return [vars(finding) for finding in self.findings]

    @property
    def sound(self) -> bool:
        """Whether every file could be read and no invariant is broken; garbage is allowed."""
        return not any(finding.severity in _UNSOUND for finding in self.findings)

    def to_json(self) -> dict:
        return {
            "sound": self.sound,
            "version": self.version,
            "versions": self.versions,
            "files": self.files,
            "bytes": self.num_bytes,
            "findings": [finding.to_json() for finding in self.findings],
            "garbage_bytes": self.garbage_bytes,
            "removed": self.removed,
        }


def verify(
    log: VersionLog, on_progress: OnProgress = ignore_progress, run_steps: RunSteps | None = None
) -> Verification:
    """Verify the whole memory. Raises MemoryMissing, StorageError, or DamagedFile if no version is left at all.

    With `run_steps` the files are read in steps (verify_steps.py), else in this process, each once in its turn.
    While the first add is not finished, its finished parts are verified; the version is 0 then.
    """
    plans = read_plans(log.storage)
    try:
        chain = read_chain(log)
    except FirstAddUnfinished:
        findings, inventory, broken = first_add_contents(log.storage, on_progress)
        num_bytes = sum(file.num_bytes for file in inventory.files.values())
        dimension = inventory.identity.dimension if inventory.identity else 0
        files = len(inventory.files)
        return Verification(tuple(findings), 0, 0, files, num_bytes, 0, (), dimension, frozenset(broken))
    rollup = list(check_rollup(log, chain))
    plans |= read_plans(log.storage)  # an erasure may have been committed meanwhile
    chain = carry_out_in(chain, (plan for plan in plans.values() if not isinstance(plan, Finding)))
    inventory = inventory_of(chain)
    contents: Contents | StepwiseContents = Contents(log.storage, inventory)
    if run_steps is not None:
        contents = StepwiseContents(log.storage, inventory, run_steps)
    findings = [*chain.findings, *rollup, *check_steps(chain), *check_hint(log, chain)]
    findings += [damage(path, "is described in two ways by two versions") for path in inventory.contradicted]
    findings += _with_way_out(contents.read(on_progress), chain)
    agreement = Consistency(contents.facts)
    for step in chain.steps():
        findings += agreement.check(step)
    findings += _numbers(log.storage, agreement.numbers)
    if any(finding.severity in _UNSOUND for finding in findings):
        findings = _still_true(log, findings)
    garbage_bytes = 0
    if chain.findings:
        what = "what is garbage cannot be told while versions are missing or cannot be read"
        findings.append(Finding("note", f"{VERSIONS}/", what, "mend the versions first"))
    else:
        try:
            census = take_census(log)
            garbage_bytes = census.garbage_bytes
            findings += _whose(census)
        except NotPermitted as error:
            findings.append(not_looked_at(error))
        except DamagedFile as error:  # a link in the place of a folder
            findings.append(damage(*_in_the_way(error, log.storage)))
    findings += strangers(log.storage)
    unfinished = list(unfinished_erasures(log.storage, chain, plans))
    if unfinished:
        findings = [*unfinished, *advise(findings)]
    version_bytes = sum(log.storage.walk(VERSIONS).values())
    return Verification(
        findings=tuple(dict.fromkeys(findings)),
        version=chain.newest,
        versions=chain.newest - chain.first + 1,
        files=len(inventory.files) + len(chain.commits) + len(chain.checkpoints),
        num_bytes=version_bytes + sum(file.num_bytes for file in inventory.files.values()),
        garbage_bytes=garbage_bytes,
        indexes=_indexes(chain),
        dimension=inventory.identity.dimension if inventory.identity else 0,
        broken=frozenset(contents.broken),
    )


def _with_way_out(findings: Iterator[Finding], chain: Chain) -> Iterator[Finding]:
    """Change the advice for damaged files that the newest version does not need."""
    newest = chain.newest_state
    needed = {file.path for file in file_refs(newest)} if newest else None
    for finding in findings:
        if needed is None or finding.path in needed:
            yield finding
        else:
            advice = f"{RESTORE}, or `expire` the older versions: the newest does without it"
            yield Finding(finding.severity, finding.path, finding.what, advice)


def _still_true(log: VersionLog, findings: list[Finding]) -> list[Finding]:
    """The findings that still hold: other writers may have dropped or redacted versions meanwhile."""
    plans = read_plans(log.storage)
    now = read_chain(log)
    plans |= read_plans(log.storage)
    carried = carry_out_in(now, (plan for plan in plans.values() if not isinstance(plan, Finding)))
    named = inventory_of(carried).files
    versions = {f"{VERSIONS}/{name}" for name in log.storage.list(VERSIONS)} | {f.path for f in now.findings}

    def counts(finding: Finding) -> bool:
        return finding.path in (versions if folder_at_the_top(finding.path) == VERSIONS else named)

    return [f for f in findings if f.severity not in _UNSOUND or counts(f) or f.path.endswith(DESCRIPTION)]


def _numbers(storage: Storage, numbers: set[int]) -> Iterator[Finding]:
    """Check that the description of every segment is there: it keeps a segment number from being used twice."""
    for number in sorted(numbers):
        path = f"{segment_folder(number)}{DESCRIPTION}"
        try:
            reservation = reservations.read_reservation(storage, number)
        except NotPermitted as error:
            yield not_looked_at(error)
            continue
        except DamagedFile as error:
            yield damage(path, "is missing" if isinstance(error, MissingFile) else "is not whole", RESTORE)
            continue
        if reservation is not None and reservation.number != number:
            yield damage(path, f"tells of segment {reservation.number}", RESTORE)


def _whose(census: Census) -> Iterator[Finding]:
    """Findings about garbage, work in progress, and files that are not part of a memory."""
    for record in census.working:
        yield Finding("note", record.path, f"{record} is at work", "nothing: what it writes is left to it")
    for number in census.unfinished:
        folder = segment_folder(number)
        advice = f"run the same `add` again, which goes on with it, or {CLEAN}"
        yield _waste(census, [path for path in census.garbage if path.startswith(folder)], folder, "unfinished", advice)
    unfinished = tuple(segment_folder(number) for number in census.unfinished)
    by_folder = defaultdict(list)
    for path in census.garbage:
        if not path.startswith(unfinished):
            by_folder[path.rpartition("/")[0]].append(path)
    for folder, paths in by_folder.items():
        place = paths[0] if len(paths) == 1 else f"{folder}/"
        if is_listing(place):
            advice = f"run the same `add` again, which goes on with it, or {CLEAN}"
            yield _waste(census, paths, place, "are the record of a listing that was stopped", advice)
            continue
        yield _waste(census, paths, place, "named by no version and held by no live lease", CLEAN)
    for top, count in Counter(path.split("/")[0] for path in census.foreign).items():
        what = f"is not a memory's ({count:,} files)" if count > 1 else "is not a memory's"
        yield Finding("note", top, what, "nothing: it is left alone")


def strangers(storage: Storage) -> Iterator[Finding]:
    """Links, FIFOs and devices, which are never part of a memory. They are not followed, opened or removed."""
    for path, kind in sorted(storage.strangers().items()):
        yield Finding("note", path, f"is {kind}, which is not a memory's", "nothing: it is left alone and not followed")


def _in_the_way(error: DamagedFile, storage: Storage) -> tuple[str, str, str]:
    """The path, the problem and the advice, parsed from a storage error."""
    said, _, advice = str(error).rpartition(": ")
    path, _, what = said.partition(f" in the memory at {storage.uri} ")
    return path, what, advice


def _waste(census: Census, paths: list[str], place: str, why: str, advice: str) -> Finding:
    size = sum(census.files.get(path, 0) for path in paths)
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    return Finding("waste", place, f"{files} of {size:,} bytes {why}", advice)


def _indexes(chain: Chain) -> tuple[Index, ...]:
    found: dict[int, Index] = {}
    for step in chain.steps():
        if step.after is not None and step.after.index is not None:
            found[id(step.after.index)] = step.after.index
    return tuple(found.values())
