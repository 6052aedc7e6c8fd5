"""Adds build an index by themselves, so that search stays fast while a memory grows.

No user asked for this index, so it must cost little. It has few inverted lists, of vectors as they are stored. Search
uses the least effort, widened until the recall is near 1. Once there is an index, an add builds a shard for far fewer
fresh entries, because that takes a second or two. Last shards that are small beside the fresh entries are merged with
them, so that there are few shards.
"""

from dataclasses import replace

from pipeline.edits.fold import fold_singles
from pipeline.errors import CommitConflict
from pipeline.index.build.builder import build_index
from pipeline.index.build.key_candidates import TRAINING_ROWS_PER_CENTROID
from pipeline.index.build.plan import IndexOptions, IndexPlan, plan_index
from pipeline.progress import OnProgress, ignore_progress
from pipeline.store.log.single_adds import files_of_singles
from pipeline.store.log.state import FoldSingles, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import read_leases

MAX_FRESH = 50_000  # with more fresh entries a memory gets an index: exact search of so many takes 6 ms (384 dim.)
GROWS_FROM = 8_192  # with more fresh entries its index grows: searching so many takes 1 ms, indexing them 2 s

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


def grow_index(log: VersionLog, state: State, command: str, on_progress: OnProgress = ignore_progress) -> State:
    """Index the fresh entries. Raises CommitConflict or IndexBuildError."""
    state = with_all_in_files(log, state)
    options = LATER
    if state.index is None:
        enough = state.num_live >= FIRST_LISTS * TRAINING_ROWS_PER_CENTROID  # false if most entries are forgotten
        options = replace(FIRST, key=f"IVF{FIRST_LISTS},SQfp16" if enough else None)
    plan = plan_index(state, options, merging=True)
    if not plan.shards:
        return state
    return build_index(log, state, plan, options, command, on_progress, resumable=False)


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
