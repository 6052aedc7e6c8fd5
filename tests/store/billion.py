"""The versions of a memory of a billion entries, made with the library's own records and writers.

All files are named as an add and an index name them: 61,035 parts of 16,384 rows, and 954 shards of 2 ** 20 rows. Only
the files that a test reads are on the disk: some parts, the digests of their uris, the counts. So it takes 100 MB.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.store.layout import digests_path, rows_path, segment_folder, shard_folder
from pipeline.store.log.records import Index, Segment, Shard
from pipeline.store.log.state import AddSegment, Counts, SetIdentity, SetIndex, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import SegmentSpec, reserve
from pipeline.store.storage.file_refs import DigestsFile, FileRef, RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.counts import counted, write_counts
from pipeline.store.tables.digest_files import digests_of_uris, write_digests
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.ids import MAX_PART_ROWS, first_id, part_ids
from pipeline.store.tables.schemas import DIGESTS, embedding_column, entries_schema, write_rows
from tests.conftest import unit

DIMENSION = 8
CLASSES = 1_000
IDENTITY = Identity.of_given("given", DIMENSION)
SHA256 = "0" * 64
SHARD_ROWS = 1 << 20
NUMBER = 1
DIGEST_FILES = 256


def uris_of(part: int) -> list[str]:
    return [f"/images/{part:06d}/{row:05d}.jpg" for row in range(MAX_PART_ROWS)]


def make(log: VersionLog, parts: int, shards: int, written: Sequence[int]) -> State:
    """Commit the versions; the entries of the parts in `written` can be read."""
    storage = log.storage
    with Lease(storage, "test") as lease:
        listed = {"uri": ["/images/a.jpg"], "label": [None], "num_bytes": [1], "modified": [None]}
        images = pa.table(listed).cast(
            pa.schema(
                {
                    "uri": pa.string(),
                    "label": pa.string(),
                    "num_bytes": pa.int64(),
                    "modified": pa.timestamp("us", "UTC"),
                }
            )
        )
        reserve(
            storage,
            SegmentSpec(fingerprint="a", source="/images", dataset="big", identity=IDENTITY),
            images,
            lease=lease,
        )
        entries = [_entries(storage, part) if part in written else _unwritten(part) for part in range(parts)]
        segment = Segment(
            number=NUMBER,
            source="/images",
            dataset="big",
            identity=IDENTITY.fingerprint,
            fingerprint="a",
            planned=parts * MAX_PART_ROWS,
            num_entries=parts * MAX_PART_ROWS,
            num_rejected=0,
            plan=None,
            entries=tuple(entries),
            rejected=(),
            uris=_digests(storage, written),
            sha256s=_digests(storage, ()),
        )
        labels = pa.array([f"class {number}" for number in range(CLASSES)])
        each = counted(pa.array(["big"] * CLASSES), labels, parts * MAX_PART_ROWS // CLASSES)
        rest = counted(pa.array(["big"]), pa.array(["class 0"]), parts * MAX_PART_ROWS % CLASSES)
        file = write_counts(storage, lease, 1, pa.concat_tables([each, rest]))
        actions = [
            SetIdentity(identity=IDENTITY, weights=None),
            AddSegment(segment=segment, counts=Counts(file=file)),
        ]
        state = log.commit(State(), "add", lambda *_: actions, lease)
        index = SetIndex(index=_index(parts, shards), replaces=None)
        return log.commit(state, "index", lambda *_: [index], lease)


def _entries(storage: Storage, part: int) -> RowsFile:
    ids_N = part_ids(NUMBER, part, MAX_PART_ROWS)
    vectors_ND = unit(np.random.default_rng(part).normal(size=(MAX_PART_ROWS, DIMENSION)))
    table = pa.table(
        [
            pa.array(ids_N),
            pa.array(uris_of(part)),
            pa.array([f"class {row % CLASSES}" for row in range(MAX_PART_ROWS)]),
            pa.array(["big"] * MAX_PART_ROWS),
            embedding_column(vectors_ND),
            pa.array([f"{entry_id:064x}" for entry_id in ids_N.tolist()]),
            pa.array([1] * MAX_PART_ROWS, pa.int32()),
            pa.array([1] * MAX_PART_ROWS, pa.int32()),
        ],
        schema=entries_schema(IDENTITY),
    )
    return write_rows(storage, rows_path(segment_folder(NUMBER), "entries", part, "abcdef"), table)


def _unwritten(part: int) -> RowsFile:
    first = first_id(NUMBER, part)
    path = rows_path(segment_folder(NUMBER), "entries", part, "abcdef")
    return RowsFile(
        path=path,
        rows=MAX_PART_ROWS,
        num_bytes=13_000_000,
        sha256=SHA256,
        first_id=first,
        last_id=first + MAX_PART_ROWS - 1,
    )


def _digests(storage: Storage, written: Sequence[int]) -> tuple[DigestsFile, ...]:
    """Files that share the range of digests; those with digests of written parts are there, beside random ones."""
    step = (1 << 64) // DIGEST_FILES
    found = [(digests_of_uris(uris_of(part)), part_ids(NUMBER, part, MAX_PART_ROWS)) for part in written]
    digests_N = np.concatenate([np.empty(0, np.uint64), *(digests for digests, _ in found)])
    ids_N = np.concatenate([np.empty(0, np.int64), *(ids for _, ids in found)])
    files = []
    for number in range(DIGEST_FILES):
        path = digests_path(NUMBER, "uri" if written else "sha256", number, "abcdef")
        here = digests_N // np.uint64(step) == number
        if here.any():
            others = np.random.default_rng(number).integers(number * step, (number + 1) * step, 100_000, np.uint64)
            rows_N = np.concatenate([digests_N[here], others])
            held_N = np.concatenate([ids_N[here], np.full(len(others), first_id(NUMBER, 0))])
            order = np.argsort(rows_N)
            files.append(write_digests(storage, path, pa.table([rows_N[order], held_N[order]], schema=DIGESTS)))
        else:
            ends = {"first": number * step, "last": (number + 1) * step - 1}
            files.append(DigestsFile(path=path, rows=4_000_000, num_bytes=50_000_000, sha256=SHA256, **ends))
    return tuple(files)


def _index(parts: int, shards: int) -> Index:
    each = SHARD_ROWS // MAX_PART_ROWS
    return Index(
        generation=1,
        key="IVF65536,PQ96x4fs",
        parameters="nprobe=16,rerank=50",
        trained=_file("index/1-abc/trained.faiss", 100_000_000),
        shards=tuple(_shard(number, range(number * each, min((number + 1) * each, parts))) for number in range(shards)),
    )


def _shard(number: int, parts: range) -> Shard:
    folder = shard_folder("index/1-abc/", number)
    rows = len(parts) * MAX_PART_ROWS
    covers = ((first_id(NUMBER, parts[0]), first_id(NUMBER, parts[-1]) + MAX_PART_ROWS - 1),) if len(parts) else ()
    return Shard(
        number=number,
        rows=rows,
        covers=covers,
        index=_file(f"{folder}index.faiss", 100_000_000, rows),
        ids=_file(f"{folder}ids.npy", 8 * rows, rows),
        labels=_file(f"{folder}labels.npy", 4 * rows, rows),
        vectors=_file(f"{folder}vectors.f16", 768 * rows, rows),
        entries=_file(f"{folder}entries.arrow", 100 * rows, rows),
        recall_at_10=0.95,
    )


def _file(path: str, num_bytes: int, rows: int = 0) -> FileRef:
    return FileRef(path=path, rows=rows, num_bytes=num_bytes, sha256=SHA256)
