"""What one more single add costs, and reading it, while a memory grows by single adds alone.

    python -m tests.benchmarks.single_adds [--adds 100000] [--dimension 384] [--memory URI | --s3]

Vectors are given, so that no encoder is timed: 100 classes in a space of 32 dimensions, mapped into the dimension
asked, with noise. Entries go through the functions that `VisualMemory.add` calls for one image: commit, fold every 64,
index when many are fresh. At some sizes ten adds are timed: `write_ms` is an add until it is committed, `read_ms` what
a warm reader takes to see the new version and find its 10 nearest, both the median of ten beside the slowest. `open_ms`
is what a reader takes that opens the memory anew, first search included. The last ten are compared with the first ten
of a memory begun beside it at the end, in turns, so that a machine that slows down slows down both. Without --memory a
folder in TMPDIR is taken, and removed; with --s3 a bucket of a SeaweedFS started for it on this machine. Prints one
JSON document.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.edits import index_growth
from pipeline.edits.singles import NewEntry, add_singles
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.identity import GIVEN, Identity
from tests.store.seaweed import SeaweedFS

TIMED = 10
REPEATED = 5
K = 10
WARM_UP = 100  # adds before the first ten
WARM_SEARCHES = 1_000  # of a reader that was opened anew, which has every page of its shards to map: 10 ms a search
SIZES = (1_000, 10_000, 49_900, 58_000)

CLASSES, LATENT = 100, 32
SPREAD, NOISE = 0.7, 0.5  # within a class, and in the dimensions beyond those it lives in


@dataclass(frozen=True)
class Window:
    """Ten adds, up to `entries`."""

    entries: int
    write_ms: float
    slowest_write_ms: float
    read_ms: float
    slowest_read_ms: float
    open_ms: float
    fresh: int
    shards: int
    entries_files: int


class Given:
    """In the place of an encoder."""

    def __init__(self, dimension: int) -> None:
        self.identity = Identity.of_given(GIVEN, dimension)

    def keep(self, storage: Storage) -> None:
        """Vectors that are given have no weights to keep."""


def entries_like_embeddings(dimension: int, drawn: int = 0) -> Iterator[NewEntry]:
    """Entries without end, of the same classes whichever are `drawn`."""
    classes = np.random.default_rng(0)
    spread = classes.normal(size=(LATENT, dimension)).astype(np.float32)
    centres = classes.normal(size=(CLASSES, LATENT)).astype(np.float32)
    generator = np.random.default_rng(drawn + 1)
    number = 0
    while True:
        label = int(generator.integers(CLASSES))
        latent = centres[label] + SPREAD * generator.normal(size=LATENT).astype(np.float32)
        vector_D = latent @ spread + NOISE * generator.normal(size=dimension).astype(np.float32)
        vector_D /= np.linalg.norm(vector_D)
        yield NewEntry(f"/photos/{number:08d}.jpg", f"class {label}", "photos", vector_D, "0" * 64, 640, 480)
        number += 1


class Adding:
    """A process that adds one image after the other, as VisualMemory.add does."""

    def __init__(self, uri: str, dimension: int) -> None:
        self.log = VersionLog(open_storage(uri))
        self._origin = Given(dimension)
        self._entries = entries_like_embeddings(dimension)
        self._others = (entry.vector_D for entry in entries_like_embeddings(dimension, drawn=1))
        self.state: State | None = None
        self.added = 0
        self.indexing_seconds: list[float] = []

    def question(self) -> np.ndarray:
        """A vector of the same classes that is no entry, float32 [D]."""
        return next(self._others)

    def add(self) -> tuple[NewEntry, float]:
        """Add one; the entry, and the seconds until it was committed."""
        entry = next(self._entries)
        began = time.perf_counter()
        self.state, _ = add_singles(self.log, self.state, self._origin, [entry], "add")
        seconds = time.perf_counter() - began
        self.added += 1
        if self.state.num_fresh > index_growth.limit(self.state):
            began = time.perf_counter()
            self.state = index_growth.grow_index(self.log, self.state, "add")
            self.indexing_seconds.append(time.perf_counter() - began)
        return entry, seconds

    def until(self, entries: int) -> None:
        """Add until there are so many."""
        while self.added < entries:
            self.add()

    def window(self) -> Window:
        """Ten adds, each of them read."""
        reader = Reader(self)
        for _ in range(TIMED):
            reader.follow()
        return reader.window()


class Reader:
    """Another process's view of the same memory, which looks for each entry as soon as it is added."""

    def __init__(self, adding: Adding) -> None:
        self._adding = adding
        self._log = VersionLog(open_storage(adding.log.storage.uri))
        began = time.perf_counter()
        self._state = self._log.latest()
        self._live = LiveEntries.open(self._log.storage, self._state)
        self._live.search(adding.question()[None], K)
        self._opened = time.perf_counter() - began
        for _ in range(WARM_SEARCHES):
            self._live.search(adding.question()[None], K)
        self.writes: list[float] = []
        self.reads: list[float] = []

    def follow(self) -> None:
        """Add one entry and find it."""
        entry, seconds = self._adding.add()
        self.writes.append(seconds)
        began = time.perf_counter()
        self._state = self._log.latest()
        self._live = LiveEntries.open(self._log.storage, self._state, self._live)
        found = self._live.search(entry.vector_D[None], K)
        self.reads.append(time.perf_counter() - began)
        assert found.similarities_QK[0, 0] > 0.999, "the entry that was just added is its own nearest"

    def window(self) -> Window:
        """What was measured since the reader was opened."""
        return Window(
            entries=self._adding.added,
            write_ms=1e3 * statistics.median(self.writes),
            slowest_write_ms=1e3 * max(self.writes),
            read_ms=1e3 * statistics.median(self.reads),
            slowest_read_ms=1e3 * max(self.reads),
            open_ms=1e3 * self._opened,
            fresh=self._state.num_fresh,
            shards=len(self._state.index.shards) if self._state.index else 0,
            entries_files=len(self._state.entries_files()),
        )


def measure(uri: str, adds: int, dimension: int, sizes: Sequence[int] = SIZES) -> dict:
    """Single adds until there are so many; windows of ten after a warm-up, at some sizes and at the end.

    The ratios are of the last ten to the first ten of a memory begun at the end, in turns and five times over, so that
    what others do to the machine meanwhile, or it to itself, falls on both.
    """
    adding = Adding(uri, dimension)
    began = time.perf_counter()
    windows = []
    for size in [WARM_UP, *(size for size in sizes if size < adds)]:
        adding.until(size)
        windows.append(adding.window())
    adding.until(adds - REPEATED * TIMED)
    young = Adding(f"{uri}-young", dimension)
    young.until(WARM_UP)
    first, last = Reader(young), Reader(adding)
    for _ in range(REPEATED * TIMED):
        first.follow()
        last.follow()
    assert adding.state is not None
    return {
        "adds": adding.added,
        "dimension": dimension,
        "seconds": time.perf_counter() - began,
        "versions": adding.state.version,
        "indexing_seconds": adding.indexing_seconds,
        "write_ratio": statistics.median(last.writes) / statistics.median(first.writes),
        "read_ratio": statistics.median(last.reads) / statistics.median(first.reads),
        "windows": [asdict(window) for window in [*windows, last.window()]],
        "young": asdict(first.window()),
    }


def rounded(value: object) -> object:
    """The same document with numbers that can be read."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {name: rounded(item) for name, item in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adds", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--memory", help="a place where nothing is; it is left there")
    parser.add_argument("--s3", action="store_true", help="in an object store")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp()
    server = SeaweedFS(Path(folder)) if arguments.s3 else None
    try:
        if server:
            os.environ.update(server.admin)
        uri = server.uri() if server else arguments.memory or f"{folder}/memory"
        print(json.dumps(rounded(measure(uri, arguments.adds, arguments.dimension)), indent=1))
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
