"""What a memory is at one version, and the actions whose folding makes it.

A commit lists actions; the state is what they add up to. Both are written as JSON, and unknown fields are refused, so
that a file of a later release is named rather than misread.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.store.files import FileRef, RowsFile
from pipeline.store.identity import Identity


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Frozen):
    """All parts of one `add`; entries + rejected = planned.

    `identity` is the encoder's fingerprint, `fingerprint` is over source, options and identity.
    """

    number: int
    source: str
    dataset: str
    identity: str
    fingerprint: str
    planned: int
    plan: FileRef
    entries: tuple[RowsFile, ...]
    rejected: tuple[RowsFile, ...]
    thumbnails: tuple[RowsFile, ...] = ()

    @property
    def num_entries(self) -> int:
        return sum(file.rows for file in self.entries)

    @property
    def num_rejected(self) -> int:
        return sum(file.rows for file in self.rejected)


class Shard(_Frozen):
    """One FAISS index over the live entries of some parts.

    `covers` holds inclusive id ranges: an entries file whose ids lie in one of them is searched through the shard.
    `index` is absent for the key Flat, whose vectors are their own index.
    """

    number: int
    rows: int
    covers: tuple[tuple[int, int], ...]
    index: FileRef | None
    ids: FileRef
    labels: FileRef
    vectors: FileRef
    entries: FileRef
    recall_at_10: float

    @property
    def num_bytes(self) -> int:
        files = (self.index, self.ids, self.labels, self.vectors, self.entries)
        return sum(file.num_bytes for file in files if file)


class Index(_Frozen):
    """A generation of shards that share one trained quantizer and one set of search parameters.

    `parameters` is FAISS's own notation ("nprobe=16"); `recall_at_10` is the lowest of any shard.
    """

    generation: int
    key: str
    parameters: str
    trained: FileRef | None
    shards: tuple[Shard, ...]

    @property
    def recall_at_10(self) -> float:
        return min((shard.recall_at_10 for shard in self.shards), default=1.0)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


class SetIdentity(_Frozen):
    """The encoder of the memory, fixed by the first add."""

    action: Literal["set_identity"] = "set_identity"
    identity: Identity
    weights: FileRef


class AddSegment(_Frozen):
    """A finished segment becomes part of the memory.

    `beside` numbers the segments of the same fingerprint that the writer knew of, all of whose entries are forgotten.
    """

    action: Literal["add_segment"] = "add_segment"
    segment: Segment
    beside: tuple[int, ...] = ()


class Forget(_Frozen):
    """Tombstones for the ids listed in a file. `forgotten` counts those that were live before."""

    action: Literal["forget"] = "forget"
    tombstones: FileRef
    forgotten: int


class SetIndex(_Frozen):
    """Search through this index from now on. `replaces` is the generation it was built beside, None for none."""

    action: Literal["set_index"] = "set_index"
    index: Index
    replaces: int | None
    replaces_shards: int = 0


Action = Annotated[SetIdentity | AddSegment | Forget | SetIndex, Field(discriminator="action")]


class State(_Frozen):
    """A memory at one version."""

    version: int = 0
    identity: Identity | None = None
    weights: FileRef | None = None
    segments: tuple[Segment, ...] = ()
    tombstones: tuple[FileRef, ...] = ()
    index: Index | None = None

    def after(self, action: SetIdentity | AddSegment | Forget | SetIndex) -> "State":
        """The state once an action is added to it."""
        match action:
            case SetIdentity():
                return self.model_copy(update={"identity": action.identity, "weights": action.weights})
            case AddSegment():
                # In order of their numbers, so that entries files are in order of their ids, whoever came first.
                segments = sorted((*self.segments, action.segment), key=lambda segment: segment.number)
                return self.model_copy(update={"segments": tuple(segments)})
            case Forget():
                return self.model_copy(update={"tombstones": (*self.tombstones, action.tombstones)})
            case SetIndex():
                return self.model_copy(update={"index": action.index})

    def conflict(self, action: SetIdentity | AddSegment | Forget | SetIndex) -> str | None:
        """Why an action prepared on an older state cannot follow this one; None when it can."""
        match action:
            case SetIdentity() if self.identity is not None and self.identity != action.identity:
                return f"another writer made this a memory of {self.identity}"
            case AddSegment() if self.identity is not None and self.identity.fingerprint != action.segment.identity:
                return f"another writer made this a memory of {self.identity}"
            case AddSegment() if any(
                segment.fingerprint == action.segment.fingerprint and segment.number not in action.beside
                for segment in self.segments
            ):
                return "another writer has added the same source"
            case SetIndex():
                generation = self.index.generation if self.index else None
                shards = len(self.index.shards) if self.index else 0
                if (generation, shards) != (action.replaces, action.replaces_shards):
                    return "another writer has changed the index"
        return None

    def entries_files(self) -> list[RowsFile]:
        """All entries files, in order of their ids."""
        return [file for segment in self.segments for file in segment.entries]

    def fresh_files(self) -> list[RowsFile]:
        """Entries files that no shard covers, in order of their ids."""
        files = self.entries_files()
        covers = [span for shard in self.index.shards for span in shard.covers] if self.index else []
        if not covers:
            return files
        spans = np.array(sorted(covers), dtype=np.int64)
        firsts = np.array([file.first_id for file in files], dtype=np.int64)
        at = np.searchsorted(spans[:, 0], firsts, side="right") - 1
        covered = (at >= 0) & (firsts <= spans[np.maximum(at, 0), 1])
        return [file for file, inside in zip(files, covered, strict=True) if not inside]
