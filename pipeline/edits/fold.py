"""Folding: entries that lie in commits, because they were added by themselves, move into files."""

from pipeline.errors import CommitConflict
from pipeline.store.log.single_adds import files_beside_singles, files_of_singles, fold, fresh_singles
from pipeline.store.log.state import FoldSingles, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease


def fold_singles(log: VersionLog, state: State, command: str = "fold single adds", *, wholly: bool = False) -> State:
    """Move the entries that lie in commits into a file. Raises CommitConflict when another writer has done so.

    With `wholly` all that no shard covers ends in one file, so that shards do not leave many small ones behind.
    """
    folded = FoldSingles(segment=0, files=())
    files: object = None

    def prepare(_: int, now: State) -> list[FoldSingles]:
        nonlocal folded, files
        if now.singles is None or now.pending[: len(state.pending)] != state.pending:
            raise CommitConflict("another writer has folded the single adds meanwhile: there is nothing to do")
        found = files_of_singles(now), fresh_singles(now), files_beside_singles(now)
        if found != files:  # else what was written before a lost race fits still, and later adds stay where they are
            if not now.pending and len(found[1]) < 2:
                raise CommitConflict("another writer has indexed the single adds meanwhile: there is nothing to do")
            folded, files = fold(log.storage, lease, now, wholly=wholly), found
        return [folded]

    if not state.pending and not (wholly and len(fresh_singles(state)) > 1):
        return state
    with Lease(log.storage, "fold single adds") as lease:
        return log.commit(state, command, prepare, lease)
