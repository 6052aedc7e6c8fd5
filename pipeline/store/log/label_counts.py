"""The numbers of live entries by dataset and label, which versions keep as files of changes that add up."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.log.records import Single
from pipeline.store.log.state import Counts, State
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import FOLD_EVERY, FOLDED_BYTES, added, counted, read_counts, write_counts


def count_singles(singles: Sequence[Single], sign: int = 1) -> pa.Table:
    """Rows of counts of single adds, by their labels as stored, multiplied by `sign`."""
    datasets, labels = [single.dataset for single in singles], [single.label for single in singles]
    return counted(pa.array(datasets, pa.string()), pa.array(labels, pa.string()), sign)


def changed_counts(storage: Storage, lease: Lease, version: int, state: State, changes: pa.Table) -> Counts | None:
    """Publish changes of the counts of a state, which `version` follows; None if the state has no counts.

    If the state has many files of counts, or small ones, the new file has the sums and replaces them. So a memory with
    few labels has one file of counts, which takes a request to read.
    """
    files = state.known_counts
    if files is None:
        return None
    are_small = sum(file.num_bytes for file in files) <= FOLDED_BYTES
    folds = are_small or len(files) >= FOLD_EVERY - 1
    rows = added([read_counts(storage, files), changes]) if folds else changes
    return Counts(file=write_counts(storage, lease, version, rows), folds=folds)


def by_label(counts: pa.Table) -> dict[str, int]:
    """The number of live entries of each label that has any, ordered by label."""
    return _summed(counts.filter(pc.is_valid(counts["label"])), "label")


def by_dataset(counts: pa.Table) -> dict[str, int]:
    """The number of live entries of each dataset that has any, ordered by dataset."""
    return _summed(counts, "dataset")


def num_unlabelled(counts: pa.Table) -> int:
    """The number of live entries without a label."""
    return int(pc.sum(counts.filter(pc.is_null(counts["label"]))["count"]).as_py() or 0)


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The same counts, the largest first."""
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def _summed(counts: pa.Table, column: str) -> dict[str, int]:
    sums = counts.group_by(column).aggregate([("count", "sum")]).sort_by(column)
    pairs = zip(sums[column].to_pylist(), sums["count_sum"].to_pylist(), strict=True)
    return {name: number for name, number in pairs if number > 0}
