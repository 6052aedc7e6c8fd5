"""The place of an entry's original image, if an add read it there.

A uri alone does not prove that: data sets of vectors, and callers who add images by their bytes, can use any uri.
"""

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.store.log.records import Segment
from pipeline.store.log.state import State
from pipeline.store.segments.container_parts import IMAGE_CONTAINERS, rows_of_part
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import split_id
from pipeline.store.tables.parquet_columns import files_with, read_row_group, read_rows, read_rows_of
from pipeline.store.tables.row_groups import row_groups_of


@dataclass(frozen=True)
class Original:
    """The image of an entry: its uri, the sha256 of its bytes, and where an add read them.

    `read_from` is "file" for the file at the uri, "tar" or "parquet" for a container there, and "named" if no add read
    anything there. `offset` and `num_bytes` are the position of the bytes in the file or archive; None if it was not
    recorded. `vector` is true if the entry was given as a vector and not as an image.
    """

    uri: str
    sha256: str
    read_from: Literal["file", "tar", "parquet", "named"] = "named"
    offset: int | None = None
    num_bytes: int | None = None
    vector: bool = False


def original_of(storage: Storage, state: State, entry_id: int, uri: str, sha256: str) -> Original:
    """The original of an entry with this uri and hash. Raises DamagedFile.

    Reads one row group of offsets, and for an image in a container also one row group of the list of containers.
    """
    number, part, _ = split_id(entry_id)
    for single in state.pending:
        if single.id == entry_id:
            return _single(uri, sha256, single.num_bytes)
    segment = next((segment for segment in state.segments if segment.number == number), None)
    if segment is None:
        return Original(uri, sha256)
    offset, num_bytes = _span(storage, segment, entry_id)
    if state.singles is not None and state.singles.segment == number:
        return _single(uri, sha256, num_bytes)
    was_read = is_below(uri, segment.source)
    if segment.containers_from is None or part < segment.containers_from:
        return Original(uri, sha256, "file" if was_read and "#" not in uri else "named")
    rows = rows_of_part(segment.container_parts, part - segment.containers_from)
    kinds = _containers(storage, segment.containers, rows)
    if not set(kinds.values()) & set(IMAGE_CONTAINERS):  # a part holds either images or vectors
        return Original(uri, sha256, vector=True)
    kind = kinds.get(uri.partition("#")[0])
    if not was_read or "#" not in uri or kind not in IMAGE_CONTAINERS:
        return Original(uri, sha256)
    return Original(uri, sha256, "tar" if kind == "tar" else "parquet", offset, num_bytes)


def read_originals(storage: Storage, state: State, ids: Sequence[int]) -> dict[int, Original]:
    """The originals of some ids; ids that are not entries are left out. Raises DamagedFile."""
    asked = set(ids)
    known = {single.id: (single.uri, single.sha256) for single in state.pending if single.id in asked}
    wanted = [(file, here, ["id", "uri", "sha256"]) for file, here in files_with(state.entries_files(), ids)]
    for table in read_rows_of(storage, wanted):
        known |= {row["id"]: (row["uri"], row["sha256"]) for row in table.to_pylist()}
    return {entry_id: original_of(storage, state, entry_id, *said) for entry_id, said in known.items()}


def is_below(uri: str, source: str) -> bool:
    """Whether a uri is the source, a file below it, or a member of one of these; no step of the uri may be ".."."""
    steps = urllib.parse.unquote(uri.partition("#")[0]).split("/")
    folder = source.rstrip("/")
    return ".." not in steps and (uri == source or uri.startswith((f"{folder}/", f"{source}#")))


def _single(uri: str, sha256: str, num_bytes: int | None) -> Original:
    return Original(uri, sha256) if num_bytes is None else Original(uri, sha256, "file", 0, num_bytes)


def _span(storage: Storage, segment: Segment, entry_id: int) -> tuple[int | None, int | None]:
    for file in segment.offsets:
        if file.first_id <= entry_id <= file.last_id:
            for row in read_rows(storage, file, [entry_id], ["id", "offset", "num_bytes"]).to_pylist():
                return row["offset"], row["num_bytes"]
    return None, None


def _containers(storage: Storage, containers: FileRef | None, rows: range) -> dict[str, str]:
    """The kinds of some containers by their uris, from their rows in the list of containers; rows beyond it are none.

    Reads two columns of a row group, or of two if the rows lie in both.
    """
    kinds: dict[str, str] = {}
    if containers is None or rows.start < 0:
        return kinds
    for group, first, count in row_groups_of(range(rows.start, min(rows.stop, containers.rows))):
        table = read_row_group(storage, containers, group, ["kind", "uri"]).slice(first, count)
        kinds |= dict(zip(table["uri"].to_pylist(), table["kind"].to_pylist(), strict=True))
    return kinds
