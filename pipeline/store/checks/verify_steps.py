"""Reads the files of a memory in steps that any process can do: plans and others first, then entries beside shards.

A step of entries has whole shards, so that each file of a shard is read once. Shards of several generations may
overlap; those that do, and their entries, are one step. Of a plan, a step reads the rows of its own entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.steps import PROCESS_BYTES, RunSteps, Step
from pipeline.store.checks.file_contents import MAPPED_BYTES, THREADS, Contents, FileFacts
from pipeline.store.checks.findings import Finding
from pipeline.store.checks.inventory import Inventory
from pipeline.store.checks.row_checks import ShardSides
from pipeline.store.layout import kind_of
from pipeline.store.log.records import Shard
from pipeline.store.storage.file_refs import FileRef, RowsFile
from pipeline.store.storage.interface import Storage

FILES_A_STEP = 256
BYTES_A_STEP = 1 << 30
READ_FACTOR = 4  # memory of a file that is read and decoded, over its bytes
COMPARED = ("rejected",)  # like entries, with the plan


@dataclass(frozen=True)
class Checked:
    """What a step found in its files, as `Contents` has it after reading."""

    findings: tuple[Finding, ...]
    facts: dict[str, FileFacts]
    broken: frozenset[str]
    num_files: int


@dataclass(frozen=True)
class CheckFiles:
    """The work of a step. It can be pickled: `inventory` has the files of the step alone."""

    storage: Storage
    inventory: Inventory
    planned: dict[str, FileRef]

    def __call__(self) -> Checked:
        """Read and check the files."""
        contents = Contents(self.storage, self.inventory, self.planned)
        findings = tuple(contents.read(ignore_progress))
        return Checked(findings, contents.facts, frozenset(contents.broken), len(self.inventory.files))

    @property
    def memory_bytes(self) -> int:
        """The most memory that it needs."""
        sizes = sorted((file.num_bytes for file in self.inventory.files.values()), reverse=True)
        read = READ_FACTOR * sum(min(size, MAPPED_BYTES) for size in sizes[:THREADS])
        sides = sum(shard.ids.num_bytes + shard.labels.num_bytes for shard in self.inventory.shards.values())
        return PROCESS_BYTES + read + sides


class StepwiseContents:
    """Reads the files of an inventory as `Contents` does, in steps."""

    def __init__(self, storage: Storage, inventory: Inventory, run_steps: RunSteps) -> None:
        self._storage = storage
        self._inventory = inventory
        self._run_steps = run_steps
        self._done = 0
        self.facts: dict[str, FileFacts] = {}
        self.broken: set[str] = set()

    def read(self, on_progress: OnProgress) -> Iterator[Finding]:
        """Read every file and yield what is wrong with it."""
        files = self._inventory.files
        sides = {file.path for shard in self._inventory.shards.values() for file in ShardSides(shard).files}
        compared = [path for path in files if kind_of(path) in ("entries", *COMPARED) or path in sides]
        first = _filled([files[path] for path in sorted({*files} - {*compared})])
        yield from self._checked([_part(self._inventory, some) for some in first], {}, on_progress)
        plans = {path for paths in self._inventory.plans.values() for path in paths}
        planned = {path: files[path] for path in plans if path in self.facts}
        yield from self._checked(_together(self._inventory, compared, sides), planned, on_progress)

    def _checked(
        self, parts: Sequence[Inventory], planned: dict[str, FileRef], on_progress: OnProgress
    ) -> Iterator[Finding]:
        works = [CheckFiles(self._storage, part, _plans_of(part, planned)) for part in parts]
        found: dict[int, tuple[Finding, ...]] = {}
        for number, checked in self._run_steps(Step(at, work, work.memory_bytes) for at, work in enumerate(works)):
            self.facts |= checked.facts
            self.broken |= checked.broken
            self._done += checked.num_files
            found[number] = checked.findings
            on_progress(Progress("verifying files", self._done, len(self._inventory.files)))
        for number in sorted(found):
            yield from found[number]


def _plans_of(part: Inventory, planned: dict[str, FileRef]) -> dict[str, FileRef]:
    """The plans of the segments that a part has entries of."""
    return {path: planned[path] for paths in part.plans.values() for path in paths if path in planned}


def _part(inventory: Inventory, files: Sequence[FileRef], shards: Sequence[Shard] = ()) -> Inventory:
    """An inventory of some of the files, and of some shards."""
    numbers = {id_ >> 39 for file in files if isinstance(file, RowsFile) for id_ in (file.first_id, file.last_id)}
    lowest, highest = min(numbers, default=0), max(numbers, default=-1)
    return replace(
        Inventory(),
        files={file.path: file for file in files},
        plans={number: paths for number, paths in inventory.plans.items() if lowest <= number <= highest},
        shards={shard.ids.path: shard for shard in shards},
        identity=inventory.identity,
    )


def _filled(files: Sequence[FileRef]) -> Iterator[list[FileRef]]:
    """Files in lists of up to FILES_A_STEP files and BYTES_A_STEP bytes; a larger file is a list of its own."""
    some: list[FileRef] = []
    size = 0
    for file in files:
        if some and (len(some) == FILES_A_STEP or size + file.num_bytes > BYTES_A_STEP):
            yield some
            some, size = [], 0
        some.append(file)
        size += file.num_bytes
    if some:
        yield some


def _together(inventory: Inventory, compared: Sequence[str], sides: set[str]) -> list[Inventory]:
    """Parts of entries and of the shards beside them, in the order of their ids. No shard is in two parts."""
    spans: list[tuple[int, int, Shard | FileRef]] = []
    for shard in inventory.shards.values():
        side = ShardSides(shard)
        spans.append((side.first_id, side.last_id, shard))
    for path in compared:
        file = inventory.files[path]
        if path not in sides:
            spans.append((file.first_id, file.last_id, file) if isinstance(file, RowsFile) else (0, -1, file))
    spans.sort(key=lambda span: span[:2])
    parts: list[Inventory] = []
    files, shards, size, end = list[FileRef](), list[Shard](), 0, -1

    def cut() -> None:
        if files or shards:
            held = [inventory.files[f.path] for s in shards for f in ShardSides(s).files if f.path in inventory.files]
            parts.append(_part(inventory, [*files, *{file.path: file for file in held}.values()], shards))

    for first, last, what in spans:
        is_full = bool(shards) or len(files) >= FILES_A_STEP or size >= BYTES_A_STEP
        if first > end and is_full:
            cut()
            files, shards, size = [], [], 0
        if isinstance(what, Shard):
            shards.append(what)
        else:
            files.append(what)
            size += what.num_bytes
        end = max(end, last)
    cut()
    return parts
