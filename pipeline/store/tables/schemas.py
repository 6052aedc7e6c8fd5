"""Arrow schemas of the Parquet files in a memory, and the one way to write and read them.

The schemas have only plain Arrow types, so that DuckDB, Polars, Spark and autofaiss can read the files. The embedding
column is stored for speed: non-null with non-null elements, PLAIN, uncompressed, without dictionary and statistics. It
reads eight times faster than with pyarrow's defaults (docs/formats.md has the figures), and normalised vectors do not
compress anyway.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store.storage.file_refs import FileRef, RowsFile, check_path, describe, reading, unaltered_path
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.kept_columns import KeptColumn

FORMAT = 1
ENCODER_KEY = "visual_memory.encoder"  # in the metadata of a file of vectors: their encoder
FINGERPRINT_KEY = "visual_memory.encoder_fingerprint"
ROW_GROUP_ROWS = 16_384
PAGE_BYTES = 1 << 20
PICTURES_A_GROUP = 512  # rows with a thumbnail of 3 KB each; reading one thumbnail reads a whole row group

PLAN = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("modified", pa.timestamp("us", tz="UTC")),
    ]
)
CONTAINERS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64()),
        pa.field("modified", pa.timestamp("us", tz="UTC")),
        pa.field("first_group", pa.int64()),
        pa.field("num_groups", pa.int64()),
        pa.field("images", pa.int64()),
    ]
)
REJECTED = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
THUMBNAILS = pa.schema(
    [pa.field("id", pa.int64(), nullable=False), pa.field("jpeg", pa.binary(), nullable=False)],
)
OFFSETS = pa.schema(  # the position of an image's bytes in the file at its uri, or in its archive
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
    ]
)
LABELS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("label_set", pa.string()),
        pa.field("label", pa.string()),
    ]
)
LABEL_MAP = pa.schema(
    [pa.field("label", pa.string(), nullable=False), pa.field("mapped", pa.string(), nullable=False)],
)
TOMBSTONES = pa.schema([pa.field("id", pa.int64(), nullable=False)])

_ENCODED_AS_DICTIONARY = {"label", "label_set", "dataset", "stage", "reason"}
_WITHOUT_STATISTICS = {"embedding", "sha256", "reason", "jpeg"}
_UNCOMPRESSED = {"embedding", "jpeg"}  # compression does not make them smaller


def entries_schema(identity: Identity, kept: Sequence[KeptColumn] = ()) -> pa.Schema:
    """The columns of an entries file, kept columns last; the metadata has the encoder's fingerprint."""
    element = pa.field("element", pa.float16(), nullable=False)
    fields = [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(element, identity.dimension), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        *(column.field for column in kept),
    ]
    metadata = {
        "visual_memory.format": str(FORMAT),
        ENCODER_KEY: identity.encoder,
        FINGERPRINT_KEY: identity.fingerprint,
    }
    return pa.schema(fields, metadata=metadata)


def embedding_column(vectors_ND: np.ndarray) -> pa.Array:
    """float16 [N, D] as a fixed-size list column with non-null elements, without copying."""
    values = pa.array(np.ascontiguousarray(vectors_ND).reshape(-1), type=pa.float16())
    element = pa.field("element", pa.float16(), nullable=False)
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(element, vectors_ND.shape[1]))


def embedding_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size list column as float16 [N, D]."""
    width = column.type.list_size
    chunks = [np.asarray(chunk.flatten()).reshape(-1, width) for chunk in column.chunks]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.float16)


def write_table(table: pa.Table, path: Path, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Write one Parquet file with the settings of every file of a memory."""
    with open_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_rows)


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer for a Parquet file in pieces, with the settings of every file of a memory."""
    leaves = {name: "embedding.list.element" if name == "embedding" else name for name in schema.names}
    return pq.ParquetWriter(
        path,
        schema,
        data_page_size=PAGE_BYTES,
        compression={leaf: "none" if name in _UNCOMPRESSED else "zstd" for name, leaf in leaves.items()},
        use_dictionary=[name for name in leaves if name in _ENCODED_AS_DICTIONARY],
        write_statistics=[leaf for name, leaf in leaves.items() if name not in _WITHOUT_STATISTICS],
        write_page_checksum=True,
        store_schema=True,
    )


def write_rows(storage: Storage, path: str, table: pa.Table) -> RowsFile:
    """Publish rows with ids. The rows must be ordered by id, and there must be at least one."""
    with storage.publishing(path) as local:
        write_table(table, local, PICTURES_A_GROUP if "jpeg" in table.column_names else ROW_GROUP_ROWS)
        file = describe(path, local, table.num_rows)
    entry_ids = table.column("id")
    return RowsFile(**file.model_dump(), first_id=entry_ids[0].as_py(), last_id=entry_ids[-1].as_py())


def read_table(
    storage: Storage,
    file: FileRef,
    columns: Sequence[str] | None = None,
    row_group: int | None = None,
    *,
    hashed: bool | None = None,
) -> pa.Table:
    """Read a Parquet file of a memory, or one row group of it, checking the checksum of every page.

    The checksums do not cover the footer and the page headers. So with `hashed` the whole file is hashed first, once in
    a process. None means: hashed, unless a row group is asked for. A scan of a few columns passes False.

    Raises DamagedFile if the file is missing, cut short or altered.
    """
    hashed = row_group is None if hashed is None else hashed
    local = (unaltered_path if hashed else check_path)(storage, file)
    with reading(storage.uri, file.path), pq.ParquetFile(local, page_checksum_verification=True) as parquet:
        return _rows_of(parquet, file, columns, row_group)


def read_parquet(
    stream: pa.NativeFile,
    storage: Storage,
    file: FileRef,
    columns: Sequence[str] | None = None,
    row_group: int | None = None,
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """Rows of a file of a memory, read from a stream of its bytes; otherwise like `read_table`.

    `footer` is the file's footer if it is known already: then it is not read again.
    """
    options = {"metadata": footer, "page_checksum_verification": True, "pre_buffer": True}
    names = None if columns is None else [*columns]
    with reading(storage.uri, file.path), pq.ParquetFile(stream, **options) as parquet:
        return _rows_of(parquet, file, names, row_group)


def _rows_of(parquet: pq.ParquetFile, file: FileRef, columns: Sequence[str] | None, row_group: int | None) -> pa.Table:
    """The requested rows and columns of a file, with every value validated. Raises Arrow's errors or ValueError."""
    _check_rows(parquet, file)
    if row_group is not None:
        table = parquet.read_row_group(row_group, columns=columns)
    else:
        table = parquet.read(columns=columns)
    table.validate(full=True)  # finds strings that are not UTF-8, which Parquet's reader does not check
    return table


def _check_rows(parquet: pq.ParquetFile, file: FileRef) -> None:
    if parquet.metadata.num_rows != file.rows:
        raise ValueError(f"it has {parquet.metadata.num_rows:,} rows where {file.rows:,} were written")


def read_rows(storage: Storage, file: RowsFile, ids: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """The rows of some ids, each at most once. Only row groups that may hold one of the ids are decoded.

    `columns` must include `id`. Raises DamagedFile.
    """
    local = check_path(storage, file)
    wanted = sorted(entry_id for entry_id in ids if file.first_id <= entry_id <= file.last_id)
    with reading(storage.uri, file.path), pq.ParquetFile(local, page_checksum_verification=True) as parquet:
        _check_rows(parquet, file)
        groups = [group for group in range(parquet.num_row_groups) if _may_hold(parquet, group, wanted)]
        table = parquet.read_row_groups(groups, columns=columns)
        table.validate(full=True)
    return table.filter(pc.is_in(table.column("id"), pa.array(wanted, pa.int64())))


def _may_hold(parquet: pq.ParquetFile, group: int, wanted: Sequence[int]) -> bool:
    """Whether a row group may hold one of the ids (ascending), by its statistics; True if it has no statistics."""
    footer = parquet.metadata.row_group(group)
    of_id = footer.column(parquet.schema_arrow.get_field_index("id")).statistics
    if of_id is None or not of_id.has_min_max:
        return True
    at = bisect.bisect_left(wanted, of_id.min)
    return at < len(wanted) and wanted[at] <= of_id.max
