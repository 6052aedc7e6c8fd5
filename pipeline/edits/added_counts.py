"""The counts of a segment that an add is about to commit."""

import pyarrow as pa

from pipeline.store.log.label_counts import changed_counts, count_singles
from pipeline.store.log.records import Segment
from pipeline.store.log.state import Counts, State
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, counted, write_counts
from pipeline.store.tables.parquet_columns import read_columns_of


def counts_of_segment(storage: Storage, segment: Segment) -> pa.Table:
    """Rows of counts of a segment. Reads the column `label` of its entries."""
    columns = (table["label"] for table in read_columns_of(storage, segment.entries, ["label"]))
    return added(counted(pa.array([segment.dataset] * len(labels), pa.string()), labels) for labels in columns)


def publish_counts(storage: Storage, lease: Lease, version: int, now: State, segment: pa.Table) -> Counts:
    """Publish the counts of a segment that `version` adds to a state.

    If the state has no counts, because an older release wrote it, all of its entries are counted first.
    """
    counts = changed_counts(storage, lease, version, now, segment)
    if counts is None:
        entries = EntryLookup(storage, now).counts()
        rows = added([entries, count_singles(now.pending, -1), segment])
        counts = Counts(file=write_counts(storage, lease, version, rows), folds=True)
    return counts
