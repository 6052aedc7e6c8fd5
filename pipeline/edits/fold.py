"""Folding moves the entries of single adds from their commits into files."""

from pipeline.errors import CommitConflict
from pipeline.store.log.single_adds import files_beside_singles, files_of_singles, fold, fresh_singles
from pipeline.store.log.state import FoldSingles, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease


def fold_singles(log: VersionLog, state: State, command: str = "fold single adds", *, wholly: bool = False) -> State:
    """Move the entries of pending single adds into a file. Raises CommitConflict if another writer has done so.

    With `wholly` all single adds that no shard covers are merged into one file, so that a shard does not cover many
    small files.
    """
    folded = FoldSingles(segment=0, files=())
    files: object = None

    def prepare(_: int, now: State) -> list[FoldSingles]:
        nonlocal folded, files
        if now.singles is None or now.pending[: len(state.pending)] != state.pending:
            raise CommitConflict(
                "another writer has folded the single adds meanwhile: there is nothing to do",
                "entries moved",
            )
        found = files_of_singles(now), fresh_singles(now), files_beside_singles(now), now.counts
        if found != files:  # otherwise files written before a lost race still fit, and later adds stay in their commits
            if not now.pending and len(found[1]) < 2:
                raise CommitConflict(
                    "another writer has indexed the single adds meanwhile: there is nothing to do",
                    "entries moved",
                )
            folded, files = fold(log.storage, lease, now, wholly=wholly), found
        return [folded]

    if not state.pending and not (wholly and len(fresh_singles(state)) > 1):
        return state
    with Lease(log.storage, "fold single adds") as lease:
        return log.commit(state, command, prepare, lease)
