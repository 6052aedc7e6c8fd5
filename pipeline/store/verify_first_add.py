"""Checking a memory that has no version yet: what its first add has done so far is whole, or is named."""

from pipeline.errors import DamagedFile
from pipeline.progress import OnProgress
from pipeline.store import segments
from pipeline.store.contents import Contents, Named
from pipeline.store.findings import Finding, damage
from pipeline.store.first_add import how_far
from pipeline.store.layout import DESCRIPTION, SEGMENTS, mark_of_rows, segment_folder, split_rows
from pipeline.store.leases import live, standing
from pipeline.store.storage import Storage

_OF_A_PART = ("entries", "rejected", "thumbnails", "offsets")
GO_ON = "run the same `add` again, which goes on with it"
MAKE_AGAIN = "remove it and run the same `add` again, which makes it anew"


def first_add_contents(storage: Storage, on_progress: OnProgress) -> tuple[list[Finding], Named, set[str]]:
    """Read every file that a plan or a completion mark names: what is wrong, the files, and which are broken.

    What the add does not count as done is neither read nor damage.
    """
    working = live(storage, standing(storage))
    findings = [Finding("note", record.path, f"{record} is at work", "nothing: wait for it") for record in working]
    advice = "nothing: it is at work" if working else GO_ON
    said = f"there is no version yet, the first add is not finished: {how_far(storage)}"
    findings.append(Finding("note", f"{SEGMENTS}/", said, advice))
    everything, broken = Named(), set[str]()
    for number in segments.reserved(storage):
        if segments.is_given_up(storage, number):
            continue
        named, found = _named_by_segment(storage, number)
        contents = Contents(storage, named)
        findings += [*found, *(_to_be_made_again(each) for each in contents.read(on_progress))]
        everything.files |= named.files
        everything.identity = everything.identity or named.identity
        broken |= contents.broken
    return list(dict.fromkeys(findings)), everything, broken


def _named_by_segment(storage: Storage, number: int) -> tuple[Named, list[Finding]]:
    """What a segment's description and its marks name, and which of them cannot be read."""
    named, findings = Named(), list[Finding]()
    path = f"{segment_folder(number)}{DESCRIPTION}"
    try:
        reservation = segments.read_reservation(storage, number)
    except DamagedFile:
        if storage.exists(path):  # else whoever took the number died before it was described, or is about to
            findings.append(damage(path, "is not whole", "run the add again, which begins anew, and remove the file"))
        return named, findings
    if reservation is None:
        return named, findings
    named.identity = reservation.identity
    if reservation.plan is not None:
        named.plans[number] = {reservation.plan.path}
        named.files[reservation.plan.path] = (reservation.plan, "plan")
    if reservation.containers is not None:
        named.files[reservation.containers.path] = (reservation.containers, "other")
    for mark_path in segments.marks_of(storage, reservation):
        try:
            mark = segments.read_mark(storage, mark_path)
        except DamagedFile:
            findings.append(damage(mark_path, "is not whole", MAKE_AGAIN))
            continue
        for kind in _OF_A_PART:
            file = getattr(mark, kind)
            if file is not None:
                named.files[file.path] = (file, kind)
    return named, findings


def _to_be_made_again(finding: Finding) -> Finding:
    _, kind, _ = split_rows(finding.path)
    if finding.severity != "damage" or kind not in _OF_A_PART:
        return finding
    mark = mark_of_rows(finding.path)
    advice = f"remove {mark} and run the same `add` again, which makes it anew"
    return Finding(finding.severity, finding.path, finding.what, advice)
