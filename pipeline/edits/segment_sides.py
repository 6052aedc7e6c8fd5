"""What a commit of a segment writes beside its entries: the counts of its labels, and the digests that find entries."""

import itertools
from collections.abc import Iterable, Sequence

import pyarrow as pa

from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.log.label_counts import changed_counts, count_singles
from pipeline.store.log.records import Segment
from pipeline.store.log.state import Counts, State
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.segments.part_marks import PartMark
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import added, counted, write_counts
from pipeline.store.tables.digest_files import DigestWriter, digests_in, digests_of_uris
from pipeline.store.tables.ids import SEGMENT_SHIFT
from pipeline.store.tables.parquet_columns import read_columns_of
from pipeline.store.tables.schemas import COUNTS


def with_digests(
    storage: Storage,
    nonce: str,
    segment: Segment,
    files: Sequence[RowsFile],
    on_progress: OnProgress = ignore_progress,
) -> Segment:
    """The segment with files of digests, which are published here under `nonce`; `files` hold its entries, and others.

    Reads the columns `id`, `uri` and `sha256` of its entries, file by file: 3 s of CPU for a million entries. The
    digests take 32 bytes for each entry on the local disk, and about 24 in the memory.
    """
    uris, sha256s = DigestWriter(segment.num_entries), DigestWriter(segment.num_entries)
    done = 0
    for rows in read_columns_of(storage, files, ["id", "uri", "sha256"]):
        table = rows.filter(pa.array(rows["id"].to_numpy() >> SEGMENT_SHIFT == segment.number))
        ids_N = table["id"].to_numpy()
        uris.add(digests_of_uris(table["uri"].to_pylist()), ids_N)
        sha256s.add(digests_in(table["sha256"]), ids_N)
        done += len(ids_N)
        on_progress(Progress("noting uris and hashes", done, segment.num_entries))
    sides = {
        "uris": uris.publish(storage, segment.number, "uri", nonce),
        "sha256s": sha256s.publish(storage, segment.number, "sha256", nonce),
    }
    return segment.model_copy(update=sides)


def counts_of(storage: Storage, segment: Segment, marks: Iterable[PartMark]) -> pa.Table:
    """Rows of counts of a segment, from its marks; the labels of a part with many of them are read from its entries."""
    known, read = [], []
    for mark in marks:
        if mark.entries is not None and mark.labels is not None:
            known.append(_rows(segment.dataset, mark.labels, mark.entries.rows))
        elif mark.entries is not None:
            read.append(mark.entries)
    tables = (
        counted(pa.array([segment.dataset] * table.num_rows, pa.string()), table["label"])
        for table in read_columns_of(storage, read, ["label"])
    )
    return added(itertools.chain(known, tables))


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


def _rows(dataset: str, labels: dict[str, int], num_entries: int) -> pa.Table:
    """Rows of counts of a part, with its entries without a label."""
    numbers = [*labels.values(), num_entries - sum(labels.values())]
    return pa.table([[dataset] * len(numbers), [*labels, None], numbers], schema=COUNTS)
