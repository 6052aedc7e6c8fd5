"""Bulk jobs: decisions about all images of a source.

A job is planned once and cut into parts. The workers of an add do the parts. A killed job can be continued. The
decisions have a place of their own, which may be far from the memory:

    job.json                            the source, the version and the options; the same command continues the job
    plan/ containers/                   the frozen source
    decisions/PART-ATTEMPT.parquet      one row per image, in the order of the source
    rejected/PART-ATTEMPT.parquet       the images that could not be read
    done/PART.json                      the completion mark of a part, which names its files
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from pipeline.decisions.decision import Decision
from pipeline.decisions.question import Question
from pipeline.embeddings.decoding import Decoding
from pipeline.embeddings.loading import open_encoder
from pipeline.embeddings.parts import PartEmbedder, Work
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.tally import Reject, Tally, read_rejects
from pipeline.images.containers.container import ImageChoice
from pipeline.images.sources.listing import Listing
from pipeline.index.search.live_entries import LiveEntries
from pipeline.progress import OnProgress, ignore_progress
from pipeline.questions import answering
from pipeline.questions.job_file import Job, claim_job, fingerprint_of, tidy
from pipeline.questions.snapshot import Snapshot, entries_of
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.part_marks import PartMark, PartWork, publish, read_marks
from pipeline.store.segments.reservations import Reservation, SegmentSpec, freeze
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.open_storage import open_storage

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

DECIDED_AT_ONCE = 1_024

NEIGHBOR = pa.struct(
    [
        pa.field("rank", pa.int32()),
        pa.field("id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("label", pa.string()),
        pa.field("similarity", pa.float32()),
        pa.field("reliability", pa.float64()),
        pa.field("weight", pa.float64()),
    ]
)
DECISIONS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),  # part << 20 | row, in the frozen plan of the source
        pa.field("uri", pa.string(), nullable=False),
        pa.field("source_label", pa.string()),  # the label that the source gives the image
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("abstained", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("votes", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("neighbors", pa.list_(NEIGHBOR), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class BulkReport:
    """The result of a job.

    `resumed` counts the images that earlier runs of the job did. `rejects` are the first of the `rejected` images.
    """

    out: str
    version: int
    planned: int
    decided: int
    rejected: int
    rejects: tuple[Reject, ...]
    seconds: float
    resumed: int
    stages: Stages = field(default_factory=Stages)

    @property
    def images_per_second(self) -> float:
        """The speed of this run: images of earlier runs do not count."""
        return (self.planned - self.resumed) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "out": self.out,
            "version": self.version,
            "planned": self.planned,
            "decided": self.decided,
            "rejected": self.rejected,
            "images_per_second": round(self.images_per_second, 1),
            "seconds": round(self.seconds, 2),
            "resumed": self.resumed,
            "stages": self.stages.to_json(),
            "bound_by": (self.stages.verdict() or (None,))[0],
            "rejects": [asdict(reject) for reject in self.rejects],
        }


@dataclass(frozen=True)
class Decide:
    """The work of a job: one version of a memory decides about the images of each part."""

    memory: Storage
    out: Storage
    version: int
    question: Question
    reservation: Reservation
    uses_gpu: ClassVar[bool] = True

    def open(
        self,
        num_cpus: int,
        node: str | None = None,
        encoder: "Encoder | None" = None,
        decoding: Decoding | None = None,
    ) -> "_Decider":
        state = VersionLog(self.memory).at(self.version)
        question = self.question
        live = entries_of(self.memory, state, question.label_set, question.where, question.assume)

        def load() -> "Encoder":
            return encoder or open_encoder(self.memory, self.reservation.identity)

        embedder = PartEmbedder(self.out, self.reservation, num_cpus, load, node, decoding)
        return _Decider(self, live, embedder, node)


class _Decider:
    def __init__(self, work: Decide, live: LiveEntries, embedder: PartEmbedder, node: str | None) -> None:
        self._work = work
        self._live = live
        self._embedder = embedder
        self._node = node

    def do(self, part: int) -> PartMark:
        """Decide about one part and publish it."""
        stages = Stages()
        embedded = self._embedder.embed(part, stages)
        accepted = embedded.accepted
        uris = [embedded.items[row].uri for row in accepted]
        began = time.perf_counter()
        decisions = [
            decision
            for start in range(0, len(accepted), DECIDED_AT_ONCE)
            for decision in answering.classify(
                self._live,
                embedded.vectors_ND[accepted[start : start + DECIDED_AT_ONCE]],
                uris[start : start + DECIDED_AT_ONCE],
                self._work.question,
                self._work.version,
            )
        ]
        stages.model += time.perf_counter() - began
        rows = [
            {"id": int(embedded.ids_N[row]), "source_label": embedded.items[row].label, **_columns(decision)}
            for row, decision in zip(accepted, decisions, strict=True)
        ]
        tables = {"decisions": pa.Table.from_pylist(rows, schema=DECISIONS), "rejected": embedded.rejected()}
        began = time.perf_counter()
        seconds = stages.to_json()
        work = PartWork(seconds=seconds, node=self._node, decoded_on=embedded.decoded_on)
        mark = publish(self._work.out, self._work.reservation, part, tables, work)
        stages.writing = time.perf_counter() - began
        return mark.model_copy(update={"seconds": stages.to_json()})

    def described(self, part: int) -> str:
        """A short description of a part's content, for a message."""
        return self._embedder.described(part)


def _columns(decision: Decision) -> dict:
    found = decision.to_json()
    return {name: found[name] for name in DECISIONS.names if name in found and name != "votes"} | {
        "votes": list(decision.votes.items()),
        "neighbors": [{name: n[name] for name in NEIGHBOR.names} for n in found["neighbors"]],
    }


def run(
    snapshot: Snapshot,
    listing: Listing,
    labels: str,
    question: Question,
    out_uri: str,
    work: Callable[[Work, Sequence[int]], Iterable[PartMark]],
    max_rejected: float | None = None,
    on_progress: OnProgress = ignore_progress,
) -> BulkReport:
    """Decide about every image of a source and write the decisions to `out_uri`; `work` does the given parts.

    Raises UsageError if `out_uri` holds other decisions or files, SourceError if too many images are rejected.
    """
    began = time.monotonic()
    out, memory = open_storage(out_uri), snapshot.storage
    job = _job(out, memory.uri, snapshot.state, listing, labels, question)
    marks = read_marks(out, job.reservation)
    tally = Tally(out, job.reservation, marks.values(), max_rejected, on_progress)
    resumed = tally.done
    decide = Decide(memory, out, job.version, question, job.reservation)
    for mark in work(decide, [part for part in range(job.reservation.num_parts) if part not in marks]):
        marks[mark.part] = mark
        tally.count(mark)
    tidy(out, marks.values())
    rejected = [mark.rejected for _, mark in sorted(marks.items()) if mark.rejected]
    return BulkReport(
        out=out.uri,
        version=job.version,
        planned=tally.done,
        decided=sum(mark.decisions.rows for mark in marks.values() if mark.decisions),
        rejected=sum(mark.num_rejected for mark in marks.values()),
        rejects=read_rejects(out, rejected),
        seconds=time.monotonic() - began,
        resumed=resumed,
        stages=tally.stages,
    )


def _job(
    out: Storage,
    memory_uri: str,
    state: State,
    listing: Listing,
    labels: str,
    question: Question,
) -> Job:
    """The job at `out`; a new one if there is none. Raises UsageError if `out` holds another job or other files."""
    assert state.identity is not None  # noqa: S101  # the caller has checked it and has the encoder
    identity = state.identity
    said = _told(question) | {"labels": labels}
    if listing.choice != ImageChoice():
        said |= {"exclude": list(listing.choice.exclude), "image_extension": listing.choice.extension}
    about = {"source": listing.uri, "memory": memory_uri, "options": said, "identity": identity.fingerprint}
    fingerprint = fingerprint_of(about)

    def planned() -> Job:
        spec = SegmentSpec(
            fingerprint=fingerprint,
            source=listing.uri,
            dataset=listing.name,
            identity=identity,
            labels=labels,
            exclude=listing.choice.exclude,
            image_extension=listing.choice.extension,
        )
        reservation = freeze(out, spec, listing.images, listing.containers, number=0, nonce=secrets.token_hex(8))
        return Job(memory=memory_uri, version=state.version, options=said, reservation=reservation)

    return claim_job(out, fingerprint, planned)


def _told(question: Question) -> dict:
    """A question in the form of a job file. The form must not change: it identifies the jobs of earlier releases."""
    document = question.to_json()
    del document["voting"], document["balance"]
    return document | {"rule": asdict(question.rule), "auto_balance": False}
