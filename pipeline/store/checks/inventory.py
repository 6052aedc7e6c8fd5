"""Every file that the retained versions of a memory name, from one walk over the versions."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.store.checks.version_files import Chain
from pipeline.store.layout import Kind, kind_of
from pipeline.store.log.records import Segment, Shard, Single
from pipeline.store.log.state import AddSegment, AddSingles, SetIdentity, SetIndex, SetState, State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.tables.identity import Identity


@dataclass
class Inventory:
    """The contents of versions up to `version`, the newest one walked over (0 before the walk).

    `files` is keyed by path. `segments` are the numbers of committed segments, `plans` the paths of their plans by
    number. `shards` is keyed by the path of the shard's ids file, `singles` by id. `quantizers` holds trained indexes
    by path, each with its shards (paths of ids files). `identity` is the last identity set. `contradicted` are paths
    that two versions describe differently.
    """

    version: int = 0
    files: dict[str, FileRef] = field(default_factory=dict)
    segments: set[int] = field(default_factory=set)
    plans: dict[int, set[str]] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    quantizers: dict[str, tuple[FileRef, set[str]]] = field(default_factory=dict)
    singles: dict[int, Single] = field(default_factory=dict)
    identity: Identity | None = None
    contradicted: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, log: VersionLog, first: int | None = None, last: int | None = None) -> "Inventory":
        """The inventory of the retained versions, from `first` to `last` if these are given. Raises DamagedFile."""
        inventory = cls()
        inventory.walk(log, first, last)
        return inventory

    def walk(self, log: VersionLog, first: int | None = None, last: int | None = None) -> None:
        """Add the retained versions that are newer than `version`. Raises DamagedFile."""
        kept = log.retained()
        start = max(first or 0, kept[0])
        if not self.version:
            self.add(log.at(start))
        stop = kept[-1] if last is None else last
        for commit in log.commits(range(max(self.version + 1, start), stop + 1)):
            for action in commit.actions:
                self.add(action)
        self.version = stop

    def of_kind(self, *kinds: Kind) -> list[FileRef]:
        """The files of the given kinds."""
        return [file for path, file in self.files.items() if kind_of(path) in kinds]

    def add(self, part: object) -> None:
        """Add a state, or an action of a commit."""
        for file in file_refs(part):
            self.add_file(file)
        if isinstance(part, SetState):
            part = part.state
        if isinstance(part, SetIdentity | State) and part.identity is not None:
            self.identity = part.identity
        for segment in _segments(part):
            self.segments.add(segment.number)
            if segment.plan is not None:
                self.plans.setdefault(segment.number, set()).add(segment.plan.path)
        if isinstance(part, AddSingles):
            self.segments.add(part.segment)
        if isinstance(part, AddSingles | State):
            singles = part.entries if isinstance(part, AddSingles) else part.pending
            self.singles |= {single.id: single for single in singles}
        if isinstance(part, SetIndex | State) and part.index is not None:
            shards = {shard.ids.path: shard for shard in part.index.shards}
            self.shards |= shards
            if (trained := part.index.trained) is not None:
                self.quantizers.setdefault(trained.path, (trained, set()))[1].update(shards)

    def add_file(self, file: FileRef) -> None:
        """Add a file that a version names."""
        if self.files.setdefault(file.path, file) != file:
            self.contradicted.append(file.path)


def inventory_of(chain: Chain) -> Inventory:
    """The inventory of all commits and checkpoints that can be read."""
    inventory = Inventory()
    for state in chain.checkpoints.values():
        inventory.add(state)
    for commit in chain.commits.values():
        for action in commit.actions:
            inventory.add(action)
    return inventory


def _segments(part: object) -> Iterator[Segment]:
    if isinstance(part, AddSegment):
        yield part.segment
    elif isinstance(part, State):
        yield from part.segments
