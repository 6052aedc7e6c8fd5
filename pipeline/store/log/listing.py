"""What lies in versions/, from one listing: commits and checkpoints."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pipeline.store.layout import checkpoint_number, commit_number


@dataclass(frozen=True)
class Listing:
    """The versions that have a file of each kind, ascending."""

    commits: tuple[int, ...]
    checkpoints: tuple[int, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Listing":
        """Parse the names (or paths) of one listing."""
        names = list(names)
        return cls(_numbers(map(commit_number, names)), _numbers(map(checkpoint_number, names)))

    @property
    def newest(self) -> int:
        """The newest version; 0 if there is none."""
        return self.commits[-1] if self.commits else 0

    @cached_property
    def lowest(self) -> int:
        """The first version from which on no commit is missing up to the newest."""
        there = set(self.commits)
        lowest = self.newest
        while lowest - 1 in there:
            lowest -= 1
        return lowest


def _numbers(found: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(sorted(number for number in found if number is not None))
