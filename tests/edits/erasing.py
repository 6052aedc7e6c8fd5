"""Memories with everything in them that an erasure has to reach, and what must hold once it is done."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline import VisualMemory
from pipeline.decisions.voting import VOTINGS
from pipeline.edits.singles import NewEntry, add_singles
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.log.records import Segment
from pipeline.store.log.state import AddSegment, SetIdentity, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.part_marks import PartMark, publish_part
from pipeline.store.segments.reservations import Reservation, SegmentSpec, read_plan, reserve
from pipeline.store.storage.file_refs import describe
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.schemas import REJECTED, THUMBNAILS, embedding_column, entries_schema
from tests.conftest import unit
from tests.end_to_end.erasure_audit import Audit
from tests.store.planned import identity_of_images

DIMENSION = 16
IDENTITY = identity_of_images(DIMENSION)
DAMAGED = "damaged"  # the label of an image that cannot be read


@dataclass(frozen=True)
class Item:
    """An image as it would be remembered."""

    uri: str
    label: str | None = None
    vector_D: bytes = b""
    sha256: str = ""

    @property
    def vector(self) -> np.ndarray:
        return np.frombuffer(self.vector_D, np.float16)

    @property
    def picture(self) -> bytes:
        """What stands for its thumbnail."""
        return b"picture of " + self.uri.encode()[::-1]


def item(uri: str, label: str | None = None) -> Item:
    """An image with a vector and a hash that nothing else has."""
    digest = hashlib.sha256(uri.encode())
    generator = np.random.default_rng(int.from_bytes(digest.digest()[:8], "big"))
    vector = unit(generator.normal(size=(1, DIMENSION)))[0]
    return Item(uri, label, vector.tobytes(), hashlib.sha256(vector.tobytes()).hexdigest())


def items(folder: str, count: int, labels: Sequence[str] = ("cat", "dog", "eel")) -> list[Item]:
    return [item(f"/{folder}/{number}.png", labels[number % len(labels)]) for number in range(count)]


def remember(
    memory: VisualMemory,
    images: Sequence[Item],
    name: str,
    *,
    dataset: str | None = None,
    thumbnails: bool = False,
    finished: bool = True,
) -> Segment | None:
    """Add a source of given items, if any, through the store's own functions, or begin to."""
    if not images:
        return None
    log, dataset = memory.log, dataset or name
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    plan = pa.table(
        {
            "uri": pa.array([image.uri for image in images]),
            "label": pa.array([image.label for image in images], pa.string()),
            "num_bytes": pa.array([1] * len(images), pa.int64()),
            "modified": pa.array([None] * len(images), pa.timestamp("us", tz="UTC")),
        }
    )
    with Lease(log.storage, "test") as lease:
        reservation = reserve(
            log.storage,
            SegmentSpec(
                fingerprint=fingerprint, source=f"/{name}", dataset=dataset, identity=IDENTITY, thumbnails=thumbnails
            ),
            plan,
            lease=lease,
        )
        marks = [_embedded(memory, reservation, part, images) for part in range(reservation.num_parts)]
        if not finished:
            return None
        segment = Segment(
            number=reservation.number,
            source=f"/{name}",
            dataset=dataset,
            identity=IDENTITY.fingerprint,
            fingerprint=fingerprint,
            planned=len(images),
            num_entries=sum(mark.num_entries for mark in marks),
            num_rejected=sum(mark.num_rejected for mark in marks),
            plan=reservation.plan,
            entries=tuple(mark.entries for mark in marks if mark.entries),
            rejected=tuple(mark.rejected for mark in marks if mark.rejected),
            thumbnails=tuple(mark.thumbnails for mark in marks if mark.thumbnails),
        )
        state = log.newest()
        beside = tuple(s.number for s in state.segments if s.fingerprint == fingerprint) if state else ()
        actions: list[AddSegment | SetIdentity] = [AddSegment(segment=segment, beside=beside)]
        if state is None:
            actions.insert(0, _identity(memory))
        log.commit(state or State(), f"add /{name}", lambda *_: actions, lease)
    return segment


def _identity(memory: VisualMemory) -> SetIdentity:
    path = IDENTITY.weights_path
    with memory.log.storage.publishing(path) as local:
        local.write_bytes(b"weights")
        return SetIdentity(identity=IDENTITY, weights=describe(path, local))


def _embedded(memory: VisualMemory, reservation: Reservation, part: int, images: Sequence[Item]) -> PartMark:
    rows = read_plan(memory.log.storage, reservation, part)
    start = part * reservation.rows_per_part
    there = list(zip(rows.column("id").to_pylist(), images[start : start + rows.num_rows], strict=True))
    good = [(entry_id, image) for entry_id, image in there if image.label != DAMAGED]
    bad = [(entry_id, image) for entry_id, image in there if image.label == DAMAGED]
    ids = pa.array([entry_id for entry_id, _ in good], pa.int64())
    entries = pa.table(
        [
            ids,
            pa.array([image.uri for _, image in good]),
            pa.array([image.label for _, image in good], pa.string()),
            pa.array([reservation.dataset] * len(good)),
            embedding_column(np.stack([image.vector for _, image in good])),
            pa.array([image.sha256 for _, image in good]),
            pa.array([1] * len(good), pa.int32()),
            pa.array([1] * len(good), pa.int32()),
        ],
        schema=entries_schema(IDENTITY),
    )
    rejects = [{"id": entry_id, "uri": image.uri, "stage": "decode", "reason": "no image"} for entry_id, image in bad]
    pictures = pa.table([ids, pa.array([image.picture for _, image in good])], schema=THUMBNAILS)
    rejected = pa.Table.from_pylist(rejects, schema=REJECTED)
    kept = pictures if reservation.thumbnails else None
    return publish_part(memory.log.storage, reservation, part, entries, rejected, kept)


def teach(memory: VisualMemory, images: Iterable[Item], dataset: str = "single") -> None:
    """Add items by themselves, one commit each."""
    origin = cast(Any, SimpleNamespace(identity=IDENTITY, keep=lambda _: _identity(memory).weights))
    for each in images:
        vector = each.vector.astype(np.float32)
        entry = NewEntry(each.uri, each.label, dataset, vector, each.sha256, 1, 1)
        add_singles(memory.log, memory.log.newest(), origin, [entry], f"add {each.uri}")


def ids_of(memory: VisualMemory, images: Iterable[Item]) -> list[int]:
    """Ids of the live entries with the items' uris."""
    return memory.live().with_uris([image.uri for image in images])[1].tolist()


def by_uri(memory: VisualMemory) -> dict[tuple[str, str], list[int]]:
    """Ids of the live entries by uri and dataset."""
    return _by_uri(memory.live())


def _by_uri(live: LiveEntries) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for block in live.blocks:
        rows = zip(block.ids_N.tolist(), block.uris.to_pylist(), block.datasets.to_pylist(), block.live_N, strict=True)
        for entry_id, uri, dataset, lives in rows:
            if lives:
                found.setdefault((uri, dataset), []).append(entry_id)
    return found


def every_version(memory: VisualMemory) -> dict[int, dict]:
    """Ids of the live entries by uri and dataset, at each version there is."""
    log, live, found = VersionLog(memory.log.storage), None, {}
    for commit, state in log.states():
        live = LiveEntries.open(log.storage, state, live)
        assert commit.rows_after == len(live)
        found[commit.version] = _by_uri(live)
    return found


def answers(memory: VisualMemory, label_set: str | None = None) -> list[Any]:
    """Decisions of every voting, classes balanced, with all that is behind them but for the ids."""
    queries = unit(np.random.default_rng(99).normal(size=(6, DIMENSION)))
    return [
        (d.label, d.votes, d.confidence, [replace(n, id=0) for n in d.neighbors])
        for voting in VOTINGS
        for d in memory.classify(embeddings=queries, k=25, voting=voting, balance=1.0, label_set=label_set)
    ]


@dataclass
class Doomed:
    """Items about to be erased, with every id that some version of a memory has for them."""

    images: list[Item]
    ids: list[int]

    @classmethod
    def of(cls, memory: VisualMemory, images: Sequence[Item]) -> "Doomed":
        uris = {image.uri for image in images}
        versions = every_version(memory).values()
        ids = {i for entries in versions for (uri, _), found in entries.items() if uri in uris for i in found}
        return cls(list(images), sorted(ids))

    def audit(self, folder: str | Path) -> list[str]:
        """Everything the audit finds of them."""
        vectors = np.stack([image.vector for image in self.images])
        wanted = Audit(vectors, self.ids, [i.uri for i in self.images], [i.sha256 for i in self.images])
        wanted.texts |= {image.picture: f"thumbnail of {image.uri}" for image in self.images}
        return wanted.search(Path(folder))[0]


def assert_erased(memory: VisualMemory, doomed: Doomed, before: dict[int, dict]) -> None:
    """Nothing of the doomed is left in any file or version, and nothing else is lost.

    `before` is `every_version` of the memory as it was.
    """
    assert doomed.audit(memory.uri) == []
    gone = set(doomed.ids)
    for version, entries in every_version(memory).items():
        if version in before:
            expected = {key: [i for i in ids if i not in gone] for key, ids in before[version].items()}
            assert entries == {key: ids for key, ids in expected.items() if ids}, version
    assert_sound(memory)


def assert_sound(memory: VisualMemory) -> None:
    """Every invariant holds, what versions tell of entries before and after them adds up, and old ones can be asked."""
    assert VisualMemory(memory.uri).verify().findings == ()
    told = VisualMemory(memory.uri).history()[::-1]
    assert [later.rows_before for later in told[1:]] == [earlier.rows_after for earlier in told[:-1]]
    for summary in told[:: max(len(told) // 5, 1)]:
        older = VisualMemory(memory.uri, at=summary.version)
        assert len(older.live()) == summary.rows_after
        older.classify(embeddings=np.ones((1, older.live().dimension)))


def in_base64(image: Item) -> str:
    return base64.b64encode(image.vector_D).decode()
