"""The last commits of a log in one file, so that a memory opens in a few requests.

A writer replaces the roll-up after its first commit, and after each commit whose version is a multiple of ROLLUP_EVERY.
It holds all commits since a checkpoint, or the whole state where that is not much larger. Nothing depends on it.
Without it, the commits are read one by one.
"""

from dataclasses import dataclass

from pipeline.store.log.documents import Commit
from pipeline.store.log.state import State

CHECKPOINT_EVERY = 100
ROLLUP_EVERY = 10
MOST_ROLLED_BYTES = 1 << 17  # a larger roll-up waits for a multiple of ROLLUP_EVERY: it costs more than it saves
STATE_FACTOR = (
    2  # a larger roll-up has the whole state in place of commits if that takes no more than so many times that
)
MOST_COMMITS = 2 * CHECKPOINT_EVERY  # limits what a process holds that follows others


@dataclass(frozen=True)
class Tail:
    """Consecutive commits that lead from a checkpoint to the newest version seen.

    `start` is the version of the checkpoint, or of `begun`, a state that is given; 0 for the empty state. It is None if
    the commits seen do not begin at one. A commit that replaces the whole state begins anew.
    """

    start: int | None = None
    commits: tuple[Commit, ...] = ()
    begun: State | None = None

    @property
    def version(self) -> int | None:
        """The version of the last commit."""
        return None if self.start is None else self.start + len(self.commits)

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the commits follow a checkpoint: not if they begin at version 1 or `begun`, or replace the state."""
        return bool(self.start) and self.begun is None and not (self.commits and self.commits[0].sets_state)

    def after(self, commit: Commit) -> "Tail":
        """The tail with one more commit. A commit that it has already changes nothing."""
        if commit.sets_state or commit.version == 1:
            return Tail(commit.version - 1, (commit,))
        if self.start is None or self.version is None:
            return Tail()
        if commit.version <= self.version:
            known = self.commits[commit.version - self.start - 1] if commit.version > self.start else commit
            return self if known == commit else Tail()
        if commit.version != self.version + 1 or len(self.commits) == MOST_COMMITS:
            return Tail()
        return Tail(self.start, (*self.commits, commit), self.begun)
