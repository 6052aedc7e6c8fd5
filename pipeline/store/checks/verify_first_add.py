"""Verifies a memory that has no version yet: the finished parts of its first add."""

from pipeline.errors import DamagedFile
from pipeline.progress import OnProgress
from pipeline.store.checks.file_contents import Contents
from pipeline.store.checks.findings import Finding, damage
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import DESCRIPTION, SEGMENTS, mark_of_rows, segment_folder, split_rows
from pipeline.store.segments import part_marks, reservations
from pipeline.store.segments.first_add import how_far
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import live_leases, read_leases

_OF_A_PART = ("entries", "rejected", "thumbnails", "offsets")
GO_ON = "run the same `add` again, which goes on with it"
MAKE_AGAIN = "remove it and run the same `add` again, which makes it anew"


def first_add_contents(storage: Storage, on_progress: OnProgress) -> tuple[list[Finding], Inventory, set[str]]:
    """Read every plan and every file that a completion mark names; return findings, inventory and broken paths.

    Parts without a completion mark are not read, and are not damage.
    """
    working = live_leases(storage, read_leases(storage))
    findings = [Finding("note", record.path, f"{record} is at work", "nothing: wait for it") for record in working]
    advice = "nothing: it is at work" if working else GO_ON
    said = f"there is no version yet, the first add is not finished: {how_far(storage)}"
    findings.append(Finding("note", f"{SEGMENTS}/", said, advice))
    everything, broken = Inventory(), set[str]()
    for number in reservations.reserved_numbers(storage):
        if reservations.is_given_up(storage, number):
            continue
        inventory, found = _inventory_of_segment(storage, number)
        contents = Contents(storage, inventory)
        findings += [*found, *(_to_be_made_again(each) for each in contents.read(on_progress))]
        everything.files |= inventory.files
        everything.identity = everything.identity or inventory.identity
        broken |= contents.broken
    return list(dict.fromkeys(findings)), everything, broken


def _inventory_of_segment(storage: Storage, number: int) -> tuple[Inventory, list[Finding]]:
    """The files that a segment's description and marks name, and findings for a damaged description or mark."""
    inventory, findings = Inventory(), list[Finding]()
    path = f"{segment_folder(number)}{DESCRIPTION}"
    try:
        reservation = reservations.read_reservation(storage, number)
    except DamagedFile:
        if storage.exists(path):  # else its process died before describing it, or has not done so yet
            findings.append(damage(path, "is not whole", "run the add again, which begins anew, and remove the file"))
        return inventory, findings
    if reservation is None:
        return inventory, findings
    inventory.identity = reservation.identity
    if reservation.plan is not None:
        inventory.plans[number] = {reservation.plan.path}
    named = [reservation.plan, reservation.containers]
    for mark_path in part_marks.marks_of(storage, reservation):
        try:
            mark = part_marks.read_mark(storage, mark_path)
        except DamagedFile:
            findings.append(damage(mark_path, "is not whole", MAKE_AGAIN))
            continue
        named += [getattr(mark, kind) for kind in _OF_A_PART]
    for file in filter(None, named):
        inventory.add_file(file)
    return inventory, findings


def _to_be_made_again(finding: Finding) -> Finding:
    _, kind, _ = split_rows(finding.path)
    if finding.severity != "damage" or kind not in _OF_A_PART:
        return finding
    mark = mark_of_rows(finding.path)
    advice = f"remove {mark} and run the same `add` again, which makes it anew"
    return Finding(finding.severity, finding.path, finding.what, advice)
