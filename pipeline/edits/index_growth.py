"""Adds build an index by themselves, so that search stays fast while a memory grows.

No user asked for this index, so it must cost little. It has few inverted lists, of vectors as they are stored. Search
uses the least effort, widened until the recall is near 1. Once there is an index, an add builds a shard for far fewer
fresh entries, because that takes a second or two. Last shards that are small beside the fresh entries are merged with
them, so that there are few shards.

The process that adds gathers and populates the shards, unless its runner has others do it. So an add indexes only a few
million entries. With more, or with an index that would grow beyond its memory, nothing is gathered, and the add says
that `index` is due. Until then the entries are searched exactly. The same holds if an earlier run, which was stopped,
has put entries into an object store: to index them, the add that goes on would fetch all of them again.
"""

from dataclasses import replace

from pipeline.edits.fold import fold_singles
from pipeline.errors import CommitConflict
from pipeline.index.build.builder import build_index
from pipeline.index.build.key_candidates import ROW_NUMBER, TRAINING_ROWS_PER_CENTROID
from pipeline.index.build.plan import IndexOptions, IndexPlan, plan_index
from pipeline.progress import OnProgress, ignore_progress
from pipeline.steps import RunSteps, run_steps_here
from pipeline.store.log.single_adds import files_of_singles
from pipeline.store.log.state import FoldSingles, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import read_leases

MAX_FRESH = 50_000  # with more fresh entries a memory gets an index: exact search of so many takes 6 ms (384 dim.)
GROWS_FROM = 8_192  # with more fresh entries its index grows: searching so many takes 1 ms, indexing them 2 s

# The most entries that an add indexes by itself. With 384 dimensions they take 1.5 GB of vectors to read, 1.5 GB of
# index to write and as much memory; gathering, assigning to 256 lists and tuning takes a few minutes on two cores.
MOST_INDEXED = 2_000_000

# autofaiss proposes 1,024 lists. With 256 lists, 100,000 vectors (384 dim.) are indexed 3 times faster, and searched
# 1.4 times faster at recall .99: in so few rows, most of a search is the comparison with the centroids.
FIRST_LISTS = 256
FIRST = IndexOptions(max_latency_ms=0.1, target_recall=0.99)
LATER = IndexOptions()  # takes the parameters of the existing index


def limit(state: State) -> int:
    """The number of fresh entries above which an add indexes them."""
    return MAX_FRESH if state.index is None else GROWS_FROM


def is_being_indexed(storage: Storage) -> bool:
    """Whether a process builds an index. A process counts unless it is known to be dead."""
    return any(lease.work == "index" and lease.process.is_alive() is not False for lease in read_leases(storage))


def index_due(state: State, fetched: int = 0) -> str | None:
    """Why an add leaves the indexing of the fresh entries to `index`, and what they cost until then.

    None if there are few, or if an add indexes them itself. Reads nothing: the size of the index is expected from its
    rows and its key. `fetched` is the number of entries that this add would have to fetch again to index them, because
    an earlier run put them into an object store.
    """
    fresh = state.num_fresh
    if state.identity is None or state.num_entries <= limit(state) or fresh <= limit(state):
        return None
    vector_bytes = 2 * state.identity.dimension
    expected, most = _expected_bytes(state), LATER.max_memory_bytes
    if fresh > MOST_INDEXED:
        why = f"more than the {MOST_INDEXED:,} that an add indexes by itself"
    elif expected > most:
        why = f"and the index would take about {expected:,} bytes with them, of {most:,} that an add allows"
    elif fetched:
        why = f"and this add would have to fetch the {fetched:,} that an earlier run finished, to index them"
    else:
        return None
    return (
        f"{fresh:,} entries are in no index, {why}: run `index`; until then each process that searches holds their "
        f"vectors in memory ({fresh * vector_bytes:,} bytes) and compares every query with all of them"
    )


def _expected_bytes(state: State) -> int:
    """The bytes in memory of the index with the fresh entries: that of its shards so far, and in proportion to them."""
    assert state.identity is not None  # noqa: S101  # checked by the caller
    index = state.index
    rows = sum(shard.rows for shard in index.shards) if index else 0
    if index is None or not rows:
        return state.num_entries * (2 * state.identity.dimension + ROW_NUMBER)  # of FIRST's key, SQfp16
    return index.bytes_in_memory + index.bytes_in_memory * state.num_fresh // rows


def grow_index(
    log: VersionLog,
    state: State,
    command: str,
    on_progress: OnProgress = ignore_progress,
    run_steps: RunSteps = run_steps_here,
) -> State:
    """Index the fresh entries. Raises CommitConflict or IndexBuildError."""
    state = with_all_in_files(log, state)
    options = LATER
    if state.index is None:
        enough = state.num_live >= FIRST_LISTS * TRAINING_ROWS_PER_CENTROID  # false if most entries are forgotten
        options = replace(FIRST, key=f"IVF{FIRST_LISTS},SQfp16" if enough else None)
    plan = plan_index(state, options, merging=True)
    if not plan.shards:
        return state
    return build_index(log, state, plan, options, command, on_progress, run_steps, resumable=False)


def with_all_in_files(log: VersionLog, state: State) -> State:
    """Fold the single adds into files, where an index build reads them; return the newest state."""
    try:
        return fold_singles(log, state, wholly=True)
    except CommitConflict:  # another writer has folded them
        return log.latest()


def plan_with_all_in_files(state: State, options: IndexOptions) -> IndexPlan:
    """The plan of the index build that would follow the folding of single adds. Writes nothing."""
    if state.pending:
        first, last = state.pending[0].id, state.pending[-1].id
        rows = len(state.pending)
        file = RowsFile(path="to-come", rows=rows, num_bytes=0, sha256="0" * 64, first_id=first, last_id=last)
        number = state.singles.segment if state.singles else 0
        state = state.after(FoldSingles(segment=number, files=(*files_of_singles(state), file)))
    return plan_index(state, options)
