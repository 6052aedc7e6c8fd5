"""The part of an add's report about the labels of its images and about the files it passed over."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.labels.census import LabelCensus
from pipeline.images.names.leftovers import PassedOver
from pipeline.images.sources.listing import Listing
from pipeline.store.log.label_counts import by_label, num_unlabelled
from pipeline.store.log.records import Segment
from pipeline.store.segments.part_marks import PartMark


def label_report(listing: Listing, segment: Segment, marks: Collection[PartMark], added: pa.Table) -> dict[str, Any]:
    """The fields of an AddReport about labels and about the files that were passed over. Reads nothing.

    `added` are the rows of counts of the segment, which have no rejected image. If no image was rejected and all are
    image files, the counts of the listing are used. The reasons why images have no label come from the listing and
    from the marks of the parts.
    """
    census = listing.census
    passed, notes = gather_notes(listing.passed_over, marks)
    if listing.containers.num_rows or segment.num_rejected:
        counts = Counter(by_label(added))
        reasons = census.unlabelled + _summed(mark.unlabelled for mark in marks)
        reasons = _of_entries(reasons, num_unlabelled(added))
        matched = max(0, sum(counts.values()) - census.labelled) if listing.containers.num_rows else 0
        unmatched = max(0, census.num_unmatched - matched)
        # It is unknown which rows of a label file the images in containers matched.
        census = LabelCensus(counts, reasons, 0, census.num_rows, unmatched, () if matched else census.unmatched)
    return {"census": census, "passed_over": passed, "notes": notes}


def _of_entries(reasons: Counter[str], without: int) -> Counter[str]:
    """Adjust the counts of reasons to the number of entries without a label: rejected images were counted too."""
    found = Counter(reasons)
    surplus = found.total() - without
    for reason, number in reasons.most_common():
        found[reason] -= max(0, min(surplus, number))
        surplus -= number
    if found.total() < without:
        found["nothing names it"] += without - found.total()
    return +found


def gather_notes(passed: PassedOver, marks: Collection[PartMark]) -> tuple[PassedOver, ContainerNotes]:
    """All that the listing and the readers of containers passed over, and the readers' notes."""
    kinds = {kind: _summed(mark.noted.get(kind, {}) for mark in marks) for kind in NOTED}
    whole = PassedOver(
        passed.endings + kinds["endings"],
        passed.leftovers + kinds["leftovers"],
        passed.excluded + sum(kinds["excluded"].values()),
        passed.unreadable,
        passed.label_files,
    )
    notes = ContainerNotes(whole, kinds["masks"], kinds["together"], kinds["sidecars"], kinds["mask_like"])
    return whole, notes


NOTED = ("endings", "leftovers", "excluded", "masks", "together", "sidecars", "mask_like")


def _summed(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total
