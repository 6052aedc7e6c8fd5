"""What an add tells of the labels of its images, and of what it passed over, when it is done."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import pyarrow.compute as pc

from pipeline.images.census import LabelCensus
from pipeline.images.leftovers import PassedOver
from pipeline.images.listing import Listing
from pipeline.images.notes import ContainerNotes
from pipeline.store.schemas import read_table
from pipeline.store.segments import PartMark
from pipeline.store.state import Segment
from pipeline.store.storage import Storage

COUNTED_FILES = 256  # files of entries whose labels are counted: 4 million images, a second on a disk


def label_report(storage: Storage, listing: Listing, segment: Segment, marks: Collection[PartMark]) -> dict[str, Any]:
    """The fields of an AddReport that tell of labels and of what was passed over.

    Labels of image files are counted in the listing. Those in containers are read from the column label of the entries,
    of the first COUNTED_FILES files; reasons why there is none come from the marks of the parts.
    """
    census = listing.census
    passed, notes = noted(listing.passed_over, marks)
    if listing.containers.num_rows:
        files = segment.entries[:COUNTED_FILES]
        counts: Counter[str] = Counter()
        without = 0
        for file in files:
            for pair in pc.value_counts(read_table(storage, file, ["label"]).column("label")).to_pylist():
                if pair["values"] is None:
                    without += pair["counts"]
                else:
                    counts[pair["values"]] += pair["counts"]
        reasons = census.unlabelled + _summed(mark.unlabelled for mark in marks)
        if len(files) == len(segment.entries) and sum(reasons.values()) < without:
            reasons["nothing names it"] += without - sum(reasons.values())
        matched = sum(counts.values()) - census.labelled
        unmatched = max(0, census.num_unmatched - max(0, matched))
        census = LabelCensus(counts, reasons, 0, census.num_rows, unmatched, census.unmatched[:unmatched])
    return {"census": census, "passed_over": passed, "notes": notes}


def noted(passed: PassedOver, marks: Collection[PartMark]) -> tuple[PassedOver, ContainerNotes]:
    """What the listing and the readers of containers passed over together, and the readers' notes."""
    kinds = {kind: _summed(mark.noted.get(kind, {}) for mark in marks) for kind in NOTED}
    whole = PassedOver(
        passed.endings + kinds["endings"],
        passed.leftovers + kinds["leftovers"],
        passed.excluded + sum(kinds["excluded"].values()),
        passed.unreadable,
        passed.label_files,
    )
    return whole, ContainerNotes(whole, kinds["masks"], kinds["together"])


NOTED = ("endings", "leftovers", "excluded", "masks", "together")


def _summed(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total
