"""The index that adds build by themselves, so that search stays quick however a memory grows.

Nobody asked for it, so it has to cost little: few inverted lists, of vectors as they are stored, searched with the
least effort, widened until the recall is near 1. Once there is an index, shards are added for far fewer fresh entries,
because that takes a second or two; while the last shards are small beside what is new they become one with it, so that
shards stay few.
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

MAX_FRESH = 50_000  # beyond so many fresh entries a memory gets an index: searching them exactly takes 6 ms (384 dim.)
GROWS_FROM = 8_192  # beyond so many its index grows: searching them takes 1 ms, indexing them 2 s

# With 256 lists 100,000 vectors (384 dim.) are indexed 3 times faster than with the 1,024 that autofaiss proposes, and
# searched 1.4 times faster at recall .99: comparing a query with the centroids is most of a search in so few rows.
FIRST_LISTS = 256
FIRST = IndexOptions(max_latency_ms=0.1, target_recall=0.99)
LATER = IndexOptions()  # the parameters are those of the index there is


def limit(state: State) -> int:
    """Fresh entries beyond which an add indexes them."""
    return MAX_FRESH if state.index is None else GROWS_FROM


def is_being_indexed(storage: Storage) -> bool:
    """Whether a process that is not known to be dead builds an index."""
    return any(lease.work == "index" and lease.process.is_alive() is not False for lease in read_leases(storage))


def grow_index(log: VersionLog, state: State, command: str, on_progress: OnProgress = ignore_progress) -> State:
    """Index what is fresh. Raises CommitConflict or IndexBuildError."""
    state = with_all_in_files(log, state)
    options = LATER
    if state.index is None:
        enough = state.num_live >= FIRST_LISTS * TRAINING_ROWS_PER_CENTROID  # else most are forgotten
        options = replace(FIRST, key=f"IVF{FIRST_LISTS},SQfp16" if enough else None)
    plan = plan_index(state, options, merging=True)
    if not plan.shards:
        return state
    return build_index(log, state, plan, options, command, on_progress, resumable=False)


def with_all_in_files(log: VersionLog, state: State) -> State:
    """The newest state with its single adds in files, which is where an index finds them."""
    try:
        return fold_singles(log, state, wholly=True)
    except CommitConflict:  # another writer has done it
        return log.latest()


def plan_with_all_in_files(state: State, options: IndexOptions) -> IndexPlan:
    """What would be indexed once single adds are in files. Writes nothing."""
    if state.pending:
        first, last = state.pending[0].id, state.pending[-1].id
        rows = len(state.pending)
        file = RowsFile(path="to-come", rows=rows, num_bytes=0, sha256="0" * 64, first_id=first, last_id=last)
        number = state.singles.segment if state.singles else 0
        state = state.after(FoldSingles(segment=number, files=(*files_of_singles(state), file)))
    return plan_index(state, options)
