"""A memory of given vectors as a contender of `index_peers`: added, indexed and searched as the library does it."""

import multiprocessing
import time
from pathlib import Path

import faiss
import numpy as np

from pipeline.edits import index_growth
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.ann import ListFinder
from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.quantizer import Coarse
from pipeline.index.search.together import find_together
from pipeline.progress import Progress
from pipeline.visual_memory import VisualMemory
from tests.benchmarks import measuring
from tests.benchmarks.index_contenders import Contender, Effort, Settings

WHOLE, CANDIDATES = "whole", "candidates"
FURTHEST = 8  # times the lists that were tuned; beyond, recall hardly rises and a search takes longer and longer
RERANKS = (100, 200)  # candidates scored again


class Ours(Contender):
    """The key and its size as asked, or chosen; `whole` is `LiveEntries.search`, `candidates` what it ranks."""

    packages = ("visual-memory", "faiss-cpu", "autofaiss", "numpy", "pyarrow")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._memory = VisualMemory(self.folder / "memory")

    def load(self) -> None:
        """Nothing: `store` reads the vectors from their file, `build` from the memory."""
        faiss.omp_set_num_threads(self.settings.threads)

    def store(self) -> None:
        """In a process of its own, so that what an add loads does not count as memory of the build."""
        process = multiprocessing.get_context("spawn").Process(target=add_rows, args=(self.settings,))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the add ended with status {process.exitcode}")

    def build(self) -> dict:
        stages = Stages()
        options = IndexOptions(key=self.settings.key, max_memory_bytes=self.settings.max_bytes)
        state = self._memory.index(options, on_progress=stages.note)
        index = state.index
        assert index is not None
        return {
            "key": index.key,
            "tuned": index.parameters,
            "shards": len(index.shards),
            "stage_seconds": stages.ended(),
            "index_bytes": sum(shard.index.num_bytes for shard in index.shards if shard.index),
            "vectors_bytes": sum(shard.vectors.num_bytes for shard in index.shards),
        }

    def open(self) -> None:
        faiss.omp_set_num_threads(self.settings.threads)
        self._live = self._memory.live()
        ids = [block.ids_N for block in self._live.blocks]
        self._ids_N = np.sort(np.concatenate(ids)) if len(ids) > 1 else ids[0]

    def efforts(self) -> list[Effort]:
        numbers = list_counts(self._live)
        swept = [{"nprobe": n, "rerank": rerank, "path": WHOLE} for rerank in RERANKS for n in numbers]
        return [{"nprobe": n, "path": CANDIDATES} for n in numbers] + (swept or [{"path": WHOLE}])

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        if "nprobe" in effort:
            set_effort(self._live, int(effort["nprobe"]), int(effort.get("rerank", RERANKS[0])))
        ids_QK = self._live.search(queries_QD, k).ids_QK if effort["path"] == WHOLE else self._found(queries_QD, k)
        return np.where(ids_QK >= 0, np.searchsorted(self._ids_N, ids_QK), -1)

    def _found(self, queries_QD: np.ndarray, k: int) -> np.ndarray:
        """What the finders return, in the order of the similarities they give."""
        finders = [block.finder("live") for block in self._live.blocks]
        lengths = [len(block.ids_N) for block in self._live.blocks]
        hits, _ = find_together(finders, lengths, queries_QD, k, Coarse(queries_QD))
        best_QK = np.argsort(-hits.similarities_QK, axis=1, kind="stable")[:, :k]
        blocks_QK, rows_QK = (np.take_along_axis(array, best_QK, axis=1) for array in hits.places())
        ids_QK = np.full(rows_QK.shape, -1, np.int64)
        for number, block in enumerate(self._live.blocks):
            there = (blocks_QK == number) & (rows_QK >= 0)
            ids_QK[there] = block.ids_N[rows_QK[there]]
        return ids_QK

    def searched_files(self) -> list[Path]:
        """The shards; the Parquet files of the memory are what they are made from."""
        return measuring.files_below(self.folder / "memory" / "index")


def add_rows(settings: Settings) -> None:
    """Remember the base, and see that entries come in the order of its rows."""
    measuring.hold_to(settings.threads)
    base = Path(settings.base)
    rows = len(np.load(base, mmap_mode="r"))
    index_growth.MAX_FRESH = rows  # the index is built on its own
    memory = VisualMemory(Path(settings.folder) / "memory")
    memory.add(base.parent)
    blocks = memory.live().blocks
    found = [int(uri.rpartition("=")[2]) for block in blocks for uri in block.uris.to_pylist()]
    ids_N = np.concatenate([block.ids_N for block in blocks])
    if found != list(range(rows)) or (np.diff(ids_N) <= 0).any():
        raise AssertionError("entries are not in the order of the rows they were made from")


class Stages:
    """Seconds from the first note of each stage of a build to the first of another."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stage, self._began = "planning", time.perf_counter()

    def note(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._add()
            self._stage = progress.stage

    def ended(self) -> dict[str, float]:
        self._add()
        return {stage: round(seconds, 2) for stage, seconds in self._seconds.items()}

    def _add(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._began
        self._began = now


def set_effort(live: LiveEntries, nprobe: int, rerank: int) -> None:
    """Search so many lists, and score so many candidates again, from now on. Reaches into the library."""
    for block in live.blocks:
        finder = block.finder("live")
        if isinstance(finder, ListFinder):
            finder.values = finder.values | {"nprobe": nprobe}
            finder._rerank = rerank


def list_counts(live: LiveEntries) -> list[int]:
    """Powers of two, and what was tuned, up to eight times as many; none for exact search."""
    found: set[int] = set()
    for block in live.blocks:
        finder = block.finder("live")
        if isinstance(finder, ListFinder):
            tuned = finder.values["nprobe"]
            stack, _ = finder.seat.place
            powers = {1 << power for power in range(int(stack.inverted.nlist).bit_length())}
            found |= {tuned} | {power for power in powers if power <= FURTHEST * tuned}
    return sorted(found)
