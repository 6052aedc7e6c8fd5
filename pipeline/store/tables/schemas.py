"""Arrow schemas of the Parquet files in a memory, and the one way to write and read them.

The schemas have only plain Arrow types, so that DuckDB, Polars, Spark and autofaiss can read the files. The embedding
column is stored for speed: non-null with non-null elements, PLAIN, uncompressed, without dictionary and statistics. It
reads eight times faster than with pyarrow's defaults (docs/formats.md has the figures), and normalised vectors do not
compress anyway.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
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
PICTURES_A_GROUP = 128  # rows with a thumbnail of 3 KB each; reading one thumbnail reads a whole row group

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
DIGESTS = pa.schema(  # ordered by digest, so that an entry is found by its uri or its bytes
    [pa.field("digest", pa.uint64(), nullable=False), pa.field("id", pa.int64(), nullable=False)],
)
COUNTS = pa.schema(  # numbers of live entries, or changes of them
    [
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("count", pa.int64(), nullable=False),
    ]
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


def write_without_rows(storage: Storage, path: str, table: pa.Table) -> FileRef:
    """Publish a table that has no ids, or no rows."""
    with storage.publishing(path) as local:
        write_table(table, local)
        return describe(path, local, table.num_rows)


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
        check_rows(parquet, file)
        if row_group is not None:
            table = parquet.read_row_group(row_group, columns=columns)
        else:
            table = parquet.read(columns=columns)
        table.validate(full=True)  # finds strings that are not UTF-8, which Parquet's reader does not check
        return table


def check_rows(parquet: pq.ParquetFile, file: FileRef) -> None:
    """Raises ValueError if an opened file has another number of rows than was written."""
    if parquet.metadata.num_rows != file.rows:
        raise ValueError(f"it has {parquet.metadata.num_rows:,} rows where {file.rows:,} were written")
