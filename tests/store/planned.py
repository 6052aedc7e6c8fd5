"""Entries as an add of images plans and writes them, with the file of an encoder's weights, and no encoder to load."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.store.log.records import Segment
from pipeline.store.log.state import AddSegment, SetIdentity, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.part_marks import publish_part
from pipeline.store.segments.reservations import SegmentSpec, read_plan, reserve
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.identity import Identity, Preprocessing
from pipeline.store.tables.schemas import REJECTED, embedding_column, entries_schema
from tests.conftest import sha256_of


def identity_of_images(dimension: int) -> Identity:
    preprocessing = Preprocessing(resize=8, crop=8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    return Identity(encoder="made up", weights_sha256="0" * 64, preprocessing=preprocessing, dimension=dimension)


def add_planned(
    log: VersionLog, vectors_ND: np.ndarray, labels: Sequence[str | None], dataset: str = "given", name: str = "a"
) -> State:
    """Commit a segment of planned images with these float16 vectors, through the store's own functions."""
    storage = log.storage
    state = log.newest()
    identity = identity_of_images(vectors_ND.shape[1])
    images = pa.table(
        {
            "uri": pa.array([f"/{name}/{row}.png" for row in range(len(labels))]),
            "label": pa.array(labels, pa.string()),
            "num_bytes": pa.array([1] * len(labels), pa.int64()),
            "modified": pa.array([None] * len(labels), pa.timestamp("us", tz="UTC")),
        }
    )
    with Lease(storage, "test") as lease:
        spec = SegmentSpec(fingerprint=name, source=f"/{name}", dataset=dataset, identity=identity)
        reservation = reserve(storage, spec, images, lease=lease)
    entries, start = [], 0
    for part in range(reservation.num_parts):
        plan = read_plan(storage, reservation, part)
        rows = plan.num_rows
        table = pa.table(
            [
                plan.column("id"),
                plan.column("uri"),
                plan.column("label"),
                pa.array([dataset] * rows),
                embedding_column(vectors_ND[start : start + rows]),
                pa.array([sha256_of(vector_D) for vector_D in vectors_ND[start : start + rows]]),
                pa.array([1] * rows, pa.int32()),
                pa.array([1] * rows, pa.int32()),
            ],
            schema=entries_schema(identity),
        )
        mark = publish_part(storage, reservation, part, table, REJECTED.empty_table())
        assert mark.entries is not None
        entries.append(mark.entries)
        start += rows
    segment = Segment(
        number=reservation.number,
        source=f"/{name}",
        dataset=dataset,
        identity=identity.fingerprint,
        fingerprint=name,
        planned=len(labels),
        num_entries=len(labels),
        num_rejected=0,
        plan=reservation.plan,
        entries=tuple(entries),
        rejected=(),
    )
    actions: list[AddSegment | SetIdentity] = [AddSegment(segment=segment)]
    if state is None:
        storage.replace(identity.weights_path, b"")
        weights = FileRef(path=identity.weights_path, num_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
        actions.insert(0, SetIdentity(identity=identity, weights=weights))
    return log.commit(state or State(), "add", lambda _number, _state: actions)
