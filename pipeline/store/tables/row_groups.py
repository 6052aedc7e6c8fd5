"""Reads and rewrites Parquet files of a memory one row group at a time, so that RAM holds one row group.

A plan is one file however many images a source has: with a billion images it has 13 GB.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path, describe, unaltered_path
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_ranges import may_hold, open_parquet
from pipeline.store.tables.schemas import ROW_GROUP_ROWS, open_writer


def chosen_row_groups(
    storage: Storage,
    file: FileRef,
    columns: Sequence[str] | None = None,
    *,
    wanted: Mapping[str, Sequence[Any]] | None = None,
    hashed: bool = False,
) -> Iterator[pa.Table]:
    """The rows of a file, one row group after the other, with the checksum of every page checked.

    With `wanted`, row groups are left out whose statistics say that no column in it has any of its values (ascending).
    From an object store, only the footer and the bytes of `columns` are fetched. With `hashed` the whole file is
    fetched and hashed first. Raises DamagedFile.
    """
    whole = unaltered_path if hashed else check_path
    source = whole(storage, file) if hashed or "://" not in storage.uri else None
    with open_parquet(storage, file, source) as parquet:
        for group in range(parquet.num_row_groups):
            if wanted is not None and not any(may_hold(parquet, group, *each) for each in wanted.items()):
                continue
            table = parquet.read_row_group(group, columns=columns)
            table.validate(full=True)  # finds strings that are not UTF-8, which Parquet's reader does not check
            yield table


def row_groups_of(rows: range) -> Iterator[tuple[int, int, int]]:
    """The row groups of a file that hold some of its rows: the number of each, its first such row, and how many."""
    while len(rows):
        group, first = divmod(rows.start, ROW_GROUP_ROWS)
        here = rows[: ROW_GROUP_ROWS - first]
        yield group, first, len(here)
        rows = rows[len(here) :]


def write_some_rows(
    storage: Storage, file: FileRef, path: str, chosen: Callable[[pa.Table], pa.Array]
) -> FileRef | RowsFile | None:
    """Publish the rows of a file that `chosen` selects (bool for each row of a row group) as `path`.

    Row groups stay separate; empty ones are left out. The file is fetched and hashed whole. Returns None, and publishes
    nothing, if no row is selected. The new reference has the type of the old one. Raises DamagedFile.
    """
    tables = (table.filter(chosen(table)) for table in chosen_row_groups(storage, file, hashed=True))
    left = (table for table in tables if table.num_rows)
    first = next(left, None)
    if first is None:
        return None
    rows, last = 0, first
    with storage.publishing(path) as local:
        with open_writer(local, first.schema) as writer:
            for last in itertools.chain([first], left):
                writer.write_table(last)
                rows += last.num_rows
        written = describe(path, local, rows)
    if not isinstance(file, RowsFile):
        return written
    first_id, last_id = first.column("id")[0].as_py(), last.column("id")[-1].as_py()
    return RowsFile(**written.model_dump(), first_id=first_id, last_id=last_id)
