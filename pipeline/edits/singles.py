"""Single adds: each call adds a few images with one commit that holds their entries, whatever the memory's size.

A single add has no plan, no segment of its own and no completion mark: the commit is all of it. So a kill leaves
either nothing or everything. From time to time the entries in commits are folded into files
(store/log/single_adds.py).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.edits.fold import fold_singles
from pipeline.embeddings.apart import pixels_here_or_apart
from pipeline.embeddings.pixels import Pixels
from pipeline.errors import CommitConflict, SourceError, UsageError
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.label_files import given_label
from pipeline.images.names.uris import printable, uri_of
from pipeline.images.reading.files import read_file
from pipeline.store.layout import ENCODER
from pipeline.store.log.records import Single
from pipeline.store.log.single_adds import FOLD_EVERY, encode_thumbnail, encode_vector
from pipeline.store.log.state import AddSingles, SetIdentity, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import give_up, reserve_for_singles
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.ids import first_id

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

MAX_AT_ONCE = 256  # entries in one commit; every later reader has to read them


class Origin(Protocol):
    """The source of vectors: an encoder, or any object with an identity that can store its weights in a memory."""

    @property
    def identity(self) -> Identity: ...

    def keep(self, storage: Storage) -> FileRef: ...


@dataclass(frozen=True)
class NewEntry:
    """An image to be added: its vector float32 [D] of unit length, and the other fields of its entry.

    `thumbnail` is a JPEG (None: the entry stores none). `num_bytes` is the size of the file that was read at `uri`
    (None: the bytes did not come from there, and the uri is only a name).
    """

    uri: str
    label: str | None
    dataset: str
    vector_D: np.ndarray
    sha256: str
    width: int
    height: int
    thumbnail: bytes | None = None
    num_bytes: int | None = None


def embed_singles(
    encoder: "Encoder",
    images: Sequence[bytes | str | Path],
    uris: Sequence[str | None],
    labels: Sequence[str | None],
    dataset: str,
    *,
    thumbnails: bool = False,
) -> list[NewEntry]:
    """Entries from image files, given by path or as their bytes; with `thumbnails` each has a thumbnail.

    If an image has no uri, it gets the uri of its path, or one made of the hash of its bytes. The vector of an image,
    as float16, equals its vector as a query to the last bit. Raises SourceError naming the first image that cannot be
    read, and UsageError.
    """
    if len(images) > MAX_AT_ONCE:
        raise UsageError(f"{len(images):,} images are many for one call: give at most {MAX_AT_ONCE}, or add a folder")
    if not printable(dataset).strip():
        raise UsageError("the dataset is empty: give a name")
    names = [None if label is None else given_label(str(label)) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if label is not None and name is None:
            raise UsageError("a label is empty: give its name, or None for an image without a label")
    loaded = [_loaded(encoder, image, thumbnails=thumbnails) for image in images]
    vectors_ND = encoder.embed_queries(np.stack([pixels.pixels_SS3 for pixels, _ in loaded]))
    return [
        NewEntry(
            uri=printable(str(uri)) if uri else _own_uri(image, pixels.facts.sha256),
            label=label,
            dataset=printable(dataset),
            vector_D=vector_D,
            sha256=pixels.facts.sha256,
            width=pixels.facts.width,
            height=pixels.facts.height,
            thumbnail=pixels.facts.thumbnail,
            num_bytes=size if not uri or str(uri) == _own_uri(image, pixels.facts.sha256) else None,
        )
        for image, (pixels, size), uri, label, vector_D in zip(images, loaded, uris, names, vectors_ND, strict=True)
    ]


def add_singles(
    log: VersionLog, state: State | None, origin: Origin, entries: Sequence[NewEntry], command: str
) -> tuple[State, list[int]]:
    """Commit entries as a single add; return the state and their ids. Raises CommitConflict for another identity."""
    if state is not None and state.identity is not None:
        committed, ids = _commit(log, state, origin, entries, command, None)
    else:
        with Lease(log.storage, "add") as lease:  # the lease holds the weights until a version names them
            lease.hold(f"{ENCODER}/")
            committed, ids = _commit(log, state or State(), origin, entries, command, lease)
    if len(committed.pending) >= FOLD_EVERY:
        with contextlib.suppress(CommitConflict):  # another writer has folded them, or the next single add will
            committed = fold_singles(log, committed)
    return committed, ids


def _commit(
    log: VersionLog, state: State, origin: Origin, entries: Sequence[NewEntry], command: str, lease: Lease | None
) -> tuple[State, list[int]]:
    identity = origin.identity
    own = [] if state.identity else [SetIdentity(identity=identity, weights=origin.keep(log.storage))]
    reserved = None if state.singles else reserve_for_singles(log.storage)
    ids: list[int] = []

    def prepare(_: int, now: State) -> list[SetIdentity | AddSingles]:
        segment = now.singles.segment if now.singles else reserved
        if segment is None:
            raise CommitConflict(
                "the memory was made anew meanwhile, and nothing was changed: run the command again",
                "rewritten",
            )
        row = now.singles.next_row if now.singles else 0
        ids[:] = range(first_id(segment, 0) + row, first_id(segment, 0) + row + len(entries))
        singles = tuple(_single(entry_id, entry) for entry_id, entry in zip(ids, entries, strict=True))
        added = AddSingles(segment=segment, next_row=row + len(entries), identity=identity.fingerprint, entries=singles)
        return [*own, added]

    committed = log.commit(state, command, prepare, lease)
    if reserved is not None and committed.singles is not None and committed.singles.segment != reserved:
        give_up(log.storage, reserved)  # another writer made the first single add before this one
    return committed, ids


def _single(entry_id: int, entry: NewEntry) -> Single:
    return Single(
        id=entry_id,
        uri=entry.uri,
        label=entry.label,
        dataset=entry.dataset,
        embedding=encode_vector(entry.vector_D),
        sha256=entry.sha256,
        width=entry.width,
        height=entry.height,
        thumbnail=encode_thumbnail(entry.thumbnail),
        num_bytes=entry.num_bytes,
    )


def _loaded(encoder: "Encoder", image: bytes | str | Path, *, thumbnails: bool = False) -> tuple[Pixels, int | None]:
    """The pixels of an image, and the size of its file (None: it was given as bytes)."""
    if not isinstance(image, bytes | str | Path):
        raise SourceError(f"an image to add is a {type(image).__name__}: give a path, or the bytes of an image file")
    try:
        data = image if isinstance(image, bytes) else read_file(uri_of(str(image)))
        size = None if isinstance(image, bytes) else len(data)
        return pixels_here_or_apart(data, encoder.identity.pixels, thumbnails=thumbnails), size
    except Rejected as rejected:
        named = "given as bytes" if isinstance(image, bytes) else image
        raise SourceError(f"the image {named} cannot be used ({rejected.reason}): check the path or the file") from None


def _own_uri(image: bytes | str | Path, sha256: str) -> str:
    return f"sha256:{sha256}" if isinstance(image, bytes) else uri_of(str(image))
