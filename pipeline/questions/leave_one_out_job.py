"""Leave-one-out over all labelled entries as a job: part by part, in this process or on Ray; killed, it goes on.

Its place is that of a bulk job (job_file.py). The file of a part has one row for each labelled entry:

    decisions/PART-ATTEMPT.parquet      id · label · right_VOTING_K (bool) for each voting and k
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.decisions.question import check_k
from pipeline.embeddings.decoding import Decoding
from pipeline.embeddings.parts import Work
from pipeline.index.search.live_entries import LiveEntries
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions.evaluation import (
    ASKING,
    Evaluation,
    Rights,
    Scoring,
    check_labelled,
    evaluation_of,
    rights_among,
)
from pipeline.questions.job_file import Job, claim_job, fingerprint_of, tidy
from pipeline.questions.others import labelled_in_part, others_of, starts_of_parts
from pipeline.questions.snapshot import Snapshot, entries_of
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.digests import Digests
from pipeline.store.segments.part_marks import READ_AT_ONCE, PartMark, PartWork, publish, read_marks
from pipeline.store.segments.reservations import Reservation, SegmentSpec
from pipeline.store.storage.interface import Storage, released
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import MAX_PART_ROWS
from pipeline.store.tables.schemas import read_table

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

LEAVE_ONE_OUT = "leave-one-out"


@dataclass(frozen=True)
class AskOthers:
    """The work of a job: each entry of a part is decided by the others, as one version of the memory has them.

    `opened` are the entries, if this process has them opened already; another process opens them itself.
    """

    memory: Storage
    out: Storage
    version: int
    scoring: Scoring
    label_set: str | None
    where: str | None
    starts: tuple[int, ...]
    reservation: Reservation
    opened: LiveEntries | None = None
    uses_gpu: ClassVar[bool] = False

    def open(
        self,
        num_cpus: int,  # noqa: ARG002
        node: str | None = None,
        encoder: "Encoder | None" = None,  # noqa: ARG002
        decoding: Decoding | None = None,  # noqa: ARG002
    ) -> "_Asker":
        """See Work. Raises DamagedFile unless every shard is whole."""
        state = VersionLog(self.memory).at(self.version)
        live = self.opened or entries_of(self.memory, state, self.label_set, self.where)
        if live.damaged:
            raise live.damaged[0]
        return _Asker(self, live, Digests(self.memory, state), node)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}


class _Asker:
    def __init__(self, work: AskOthers, live: LiveEntries, digests: Digests, node: str | None) -> None:
        self._work = work
        self._live = live
        self._digests = digests
        self._node = node
        self._names = pa.array(live.labels, pa.string())

    def do(self, part: int) -> PartMark:
        """Ask about the entries of one part and publish which were decided rightly: some 30 bytes an entry."""
        work, counts_C = self._work, self._live.label_counts()
        ids_N, codes_N = labelled_in_part(self._live, work.starts, part)
        columns: dict[str, list[np.ndarray]] = {column_of(*key): [] for key in work.scoring.keys}
        for others in others_of(self._live, self._digests, max(work.scoring.ks), ids_N, codes_N):
            for key, right_Q in rights_among(others, work.scoring, counts_C).items():
                columns[column_of(*key)].append(right_Q)
        none = np.empty(0, bool)
        table = pa.table(
            {"id": ids_N, "label": self._names.take(pa.array(codes_N))}
            | {name: np.concatenate([none, *rights]) for name, rights in columns.items()}
        )
        return publish(work.out, work.reservation, part, {"decisions": table}, PartWork(node=self._node))

    def described(self, part: int) -> str:
        """A short description of a part's content, for a message."""
        return f"the search for neighbours of the entries from id {self._work.starts[part]} on"


def column_of(voting: str, k: int) -> str:
    """The column that says whether a voting of the k nearest was right."""
    return f"right_{voting}_{k}"


def run(
    snapshot: Snapshot,
    at: Callable[[int], Snapshot],
    out_uri: str,
    scoring: Scoring,
    label_set: str | None,
    where: str | None,
    do_parts: Callable[[Work, Sequence[int]], Iterable[PartMark]],
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Ask about every labelled entry, and write to `out_uri` which were decided rightly; `do_parts` does given parts.

    A begun job goes on by the version that it began with; `at` opens it. Costs one search for each entry, some 30 bytes
    written for each, and all of these read again for the result, READ_AT_ONCE files at a time.

    Raises UsageError if `out_uri` holds another job or files, SourceError if no entry has a label, DamagedFile.
    """
    for k in scoring.ks:
        check_k(k)
    out = open_storage(out_uri)
    job = _job(out, snapshot.storage.uri, snapshot.state, scoring, label_set, where)
    if job.version != snapshot.state.version:
        snapshot = at(job.version)
    live = snapshot.live
    labelled = check_labelled(live)
    work = AskOthers(snapshot.storage, out, job.version, scoring, label_set, where, job.starts, job.reservation, live)
    marks = read_marks(out, job.reservation)
    rights = Rights(live, scoring)
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for counted in pool.map(lambda mark: _read(out, mark), marks.values()):
            _count(rights, counted, live, scoring)
    on_progress(Progress(ASKING, rights.num_queries, labelled))
    for mark in do_parts(work, [part for part in range(len(job.starts)) if part not in marks]):
        marks[mark.part] = mark
        _count(rights, _read(out, mark), live, scoring)
        on_progress(Progress(ASKING, rights.num_queries, labelled))
    tidy(out, marks.values())
    return evaluation_of(rights, live, scoring, job.version, labelled)


def _job(
    out: Storage, memory_uri: str, state: State, scoring: Scoring, label_set: str | None, where: str | None
) -> Job:
    """The job at `out`; a new one if there is none. Raises UsageError if `out` holds another job or other files."""
    assert state.identity is not None  # noqa: S101  # an empty memory has no labelled entry, which was checked
    identity = state.identity
    said = {
        "ask": LEAVE_ONE_OUT,
        "ks": scoring.sorted_ks,
        "votings": list(scoring.votings),
        "rule": asdict(scoring.rule),
        "label_set": label_set,
        "where": where,
    }
    fingerprint = fingerprint_of({"memory": memory_uri, "options": said, "identity": identity.fingerprint})

    def planned() -> Job:
        starts = starts_of_parts(state)
        spec = SegmentSpec(
            fingerprint=fingerprint, source=memory_uri, dataset=LEAVE_ONE_OUT, identity=identity, labels="none"
        )
        # Its parts are counted when they are done, as containers are.
        reservation = Reservation(
            **dict(spec), number=0, planned=0, rows_per_part=MAX_PART_ROWS, plan=None, num_containers=len(starts)
        )
        return Job(memory=memory_uri, version=state.version, options=said, reservation=reservation, starts=starts)

    return claim_job(out, fingerprint, planned)


def _read(out: Storage, mark: PartMark) -> pa.Table | None:
    """The rows of a part; None if it has no labelled entry. Raises DamagedFile."""
    if mark.decisions is None:
        return None
    with released(out, mark.decisions.path):
        return read_table(out, mark.decisions)


def _count(rights: Rights, table: pa.Table | None, live: LiveEntries, scoring: Scoring) -> None:
    if table is None:
        return
    names = table.column("label").combine_chunks().dictionary_encode()
    codes = np.array([live.label_codes[name] for name in names.dictionary.to_pylist()], np.int64)
    columns = {key: table.column(column_of(*key)).to_numpy() for key in scoring.keys}
    rights.count(codes[names.indices.to_numpy()], columns)
