"""Batches of a listing put in the order of their uris, in bounded memory: an external merge sort in temporary files.

Most places list nearly in order, so a batch that is sorted in itself is never written twice unless its range of uris
overlaps that of another batch: the batches of the first file are permuted, and only those that overlap are merged into
a second file. Both files are memory-mapped and have no name.
"""

import bisect
import errno
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError
from pipeline.progress import OnProgress, Progress, ignore_progress

BATCH_ROWS = 65_536
_KEY = "uri"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class SortSizes:
    """How much is held in memory at once.

    `run_rows` and `run_bytes` bound the rows that are sorted together. A sorted batch is written as it comes if it
    continues one of `open_runs` ascending runs. Of every `sampled_every` rows one is a candidate for the bounds between
    which overlapping batches are merged.
    """

    batch_rows: int = BATCH_ROWS
    run_rows: int = 1 << 19
    run_bytes: int = 256 << 20
    open_runs: int = 64
    sampled_every: int = 512


@dataclass(frozen=True)
class _Written:
    """A batch in the first file: its number, by which it came, and its first and last uri."""

    number: int
    batch: pa.RecordBatch
    first: str
    last: str


def in_order(
    batches: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    sizes: SortSizes = SortSizes(),
    on_progress: OnProgress = ignore_progress,
) -> pa.Table:
    """A table of the batches by ascending uri; equal uris stay in the order in which they came.

    A single batch stays in memory. Otherwise the temporary folder takes the rows once, and once more those of batches
    that overlap. Memory holds `run_rows` rows at a time, besides pages of the mapped files. Raises StorageError if the
    temporary folder is full.
    """
    try:
        return _in_order(batches, schema, sizes, on_progress)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"there is no room for the list of the source in {tempfile.gettempdir()}: make room there, or set TMPDIR "
            "(some 124 bytes for each image, twice that for a source that is not listed in order)"
        ) from error


def _in_order(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, sizes: SortSizes, on_progress: OnProgress
) -> pa.Table:
    first = [batch for batch in itertools.islice(batches, 2) if batch.num_rows]
    if len(first) < 2:
        rest = next(batches, None)
        if rest is None:
            found = [piece for batch in first for piece in _sorted([batch], schema, sizes)]
            return pa.Table.from_batches(found, schema=schema)
        first.append(rest)
    written = _written(itertools.chain(first, batches), schema, sizes)
    first.clear()
    if all(one.last <= other.first for one, other in itertools.pairwise(written)):
        return pa.Table.from_batches([one.batch for one in written], schema=schema)
    return _merged(written, schema, sizes, on_progress)


def _written(batches: Iterator[pa.RecordBatch], schema: pa.Schema, sizes: SortSizes) -> list[_Written]:
    """The batches in a temporary file, each sorted in itself."""
    ends: list[str] = []  # the last uris of the open runs
    waiting: list[pa.RecordBatch] = []  # rows to be sorted together
    bounds: list[tuple[str, str]] = []

    def write(batch: pa.RecordBatch) -> None:
        uris = batch.column(_KEY)
        bounds.append((uris[0].as_py(), uris[-1].as_py()))
        writer.write_batch(batch)

    def write_waiting() -> None:
        for batch in _sorted(waiting, schema, sizes):
            write(batch)
        waiting.clear()

    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_file(file.name, schema) as writer:
            for batch in batches:
                if not batch.num_rows:
                    continue
                # While rows wait, all others wait behind them, so that numbers of batches are their order of arrival.
                if not waiting and _is_sorted(batch) and _continues(batch, ends, sizes.open_runs):
                    write(batch)
                    continue
                waiting.append(batch)
                if (
                    sum(one.num_rows for one in waiting) >= sizes.run_rows
                    or sum(one.nbytes for one in waiting) >= sizes.run_bytes
                ):
                    write_waiting()
            write_waiting()
        reader = pa.ipc.open_file(pa.memory_map(file.name))
        return [_Written(number, reader.get_batch(number), *pair) for number, pair in enumerate(bounds)]


def _continues(batch: pa.RecordBatch, ends: list[str], most: int) -> bool:
    """Whether a sorted batch can be written as it is: behind the end of an open run, the nearest, or as a new run."""
    uris = batch.column(_KEY)
    at = bisect.bisect_right(ends, uris[0].as_py())
    if at:
        ends.pop(at - 1)
    elif len(ends) >= most:
        return False
    bisect.insort(ends, uris[-1].as_py())
    return True


def _is_sorted(batch: pa.RecordBatch) -> bool:
    uris = batch.column(_KEY)
    return not pc.any(pc.less(uris[1:], uris[:-1])).as_py()


def _sorted(batches: Sequence[pa.RecordBatch], schema: pa.Schema, sizes: SortSizes) -> Iterator[pa.RecordBatch]:
    """The rows of some batches by uri, in new batches. Equal uris keep their order: Arrow's sort is stable."""
    if not batches:
        return
    if len(batches) == 1 and _is_sorted(batches[0]):
        yield batches[0]
        return
    # `take` makes one array of a column, and one of `string` cannot have 2 GiB.
    whole = pa.Table.from_batches(batches, schema=schema).cast(_with_large_strings(schema)).combine_chunks()
    order = pc.sort_indices(whole.column(_KEY))
    for start in range(0, len(order), sizes.batch_rows):
        yield from whole.take(order[start : start + sizes.batch_rows]).cast(schema).combine_chunks().to_batches()


def _with_large_strings(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in schema],
        metadata=schema.metadata,
    )


def _merged(written: Sequence[_Written], schema: pa.Schema, sizes: SortSizes, on_progress: OnProgress) -> pa.Table:
    """The batches by their first uris; those that overlap are merged into a file of their own."""
    by_first = sorted(written, key=lambda one: (one.first, one.number))
    groups: list[list[_Written]] = []
    last, newest = "", -1
    for one in by_first:
        is_behind = one.first > last or (one.first == last and one.number > newest)
        if not groups or is_behind:
            groups.append([])
            newest = -1
        groups[-1].append(one)
        last, newest = max(last, one.last), max(newest, one.number)
    found: list[pa.RecordBatch | None] = []
    done, total = 0, sum(len(one.batch) for group in groups if len(group) > 1 for one in group)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_file(file.name, schema) as writer:
            for group in groups:
                if len(group) == 1:
                    found.append(group[0].batch)
                    continue
                for batch in _merged_group(group, schema, sizes):
                    writer.write_batch(batch)
                    found.append(None)
                    done += batch.num_rows
                    on_progress(Progress("sorting", done, total))
        reader = pa.ipc.open_file(pa.memory_map(file.name))
        second = map(reader.get_batch, range(reader.num_record_batches))
        return pa.Table.from_batches([next(second) if one is None else one for one in found], schema=schema)


def _merged_group(group: list[_Written], schema: pa.Schema, sizes: SortSizes) -> Iterator[pa.RecordBatch]:
    """The rows of overlapping batches in order: those between two bounds are sorted together, then the next.

    `group` is ordered by the first uris. Between two bounds lie about `run_rows` rows: half of it, and at most
    `sampled_every` more for each batch that overlaps.
    """
    active: list[tuple[_Written, int]] = []  # batches that have begun, and how many of their rows are done
    coming = iter([*group, None])
    next_one = next(coming)
    for bound, is_included in [*_bounds(group, sizes), (None, True)]:
        while next_one is not None and (
            bound is None or next_one.first < bound or (is_included and next_one.first == bound)
        ):
            active.append((next_one, 0))
            next_one = next(coming)
        slices: list[tuple[int, pa.RecordBatch]] = []
        left: list[tuple[_Written, int]] = []
        for one, done in active:
            end = _position(one.batch, bound, done, is_included=is_included)
            if end > done:
                slices.append((one.number, one.batch.slice(done, end - done)))
            if end < one.batch.num_rows:
                left.append((one, end))
        active = left
        pieces = [piece for _, piece in sorted(slices, key=lambda pair: pair[0])]
        if is_included and bound is not None:  # all uris are the bound itself
            yield from pieces
        else:
            yield from _sorted(pieces, schema, sizes)


def _bounds(group: Sequence[_Written], sizes: SortSizes) -> list[tuple[str, bool]]:
    """Uris that divide the rows of a group: those below it, and if the uri is very frequent, those equal to it."""
    samples = [one.batch.column(_KEY).take(np.arange(0, len(one.batch), sizes.sampled_every)) for one in group]
    uris = pa.concat_arrays([array.cast(pa.large_string()) for array in samples])
    uris = uris.take(pc.sort_indices(uris))
    every = max(1, sizes.run_rows // 2 // sizes.sampled_every)
    chosen = uris[every::every].to_pylist()
    return [
        bound
        for uri, same in itertools.groupby(chosen)
        for bound in ([(uri, False), (uri, True)] if len(list(same)) > 1 else [(uri, False)])
    ]


def _position(batch: pa.RecordBatch, bound: str | None, start: int, *, is_included: bool) -> int:
    """The number of rows of a batch below a bound, or with `is_included` up to it. `start` rows are known to be."""
    if bound is None:
        return int(batch.num_rows)
    uris = batch.column(_KEY)
    find = bisect.bisect_right if is_included else bisect.bisect_left
    return int(find(range(batch.num_rows), bound, lo=start, key=lambda row: uris[row].as_py()))
