"""What the benchmarks of indexes share: recall, rates, latencies, memory and the page cache.

Only NumPy is imported, so that a peer in an environment of its own is measured by the same lines.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

ROUNDS = 3
ENOUGH_SECONDS = 20.0  # of one measurement: a slow contender is not asked a second time
BLOCK = 65_536  # rows converted to float32 at a time
COMPARED = 64 << 20  # bytes of vectors gathered at a time for their true similarities
SAME = 1e-5  # similarities that differ by less are equal: float32 sums over 1,280 dimensions differ by as much

Search = Callable[[np.ndarray], np.ndarray]  # queries float32 [Q, D] to rows int64 [Q, K], -1 where there is none


@dataclass(frozen=True)
class Truth:
    """The true nearest rows: `base_ND` float16, `queries_QD` float32, rows int64 and similarities float32 [Q, K]."""

    base_ND: np.ndarray
    queries_QD: np.ndarray
    rows_QK: np.ndarray
    similarities_QK: np.ndarray

    @classmethod
    def of(cls, base_ND: np.ndarray, queries_QD: np.ndarray, k: int) -> "Truth":
        """By exact search with FAISS, a block of rows at a time."""
        import faiss

        similarities_QK = np.full((len(queries_QD), 0), -np.inf, np.float32)
        rows_QK = np.full((len(queries_QD), 0), -1, np.int64)
        for start in range(0, len(base_ND), BLOCK):
            block_BD = np.ascontiguousarray(base_ND[start : start + BLOCK], np.float32)
            found = faiss.knn(queries_QD, block_BD, min(k, len(block_BD)), metric=faiss.METRIC_INNER_PRODUCT)
            similarities_QK = np.concatenate([similarities_QK, found[0]], axis=1)
            rows_QK = np.concatenate([rows_QK, found[1] + start], axis=1)
            best_QK = np.argsort(-similarities_QK, axis=1, kind="stable")[:, :k]
            similarities_QK, rows_QK = (np.take_along_axis(a, best_QK, axis=1) for a in (similarities_QK, rows_QK))
        return cls(base_ND, queries_QD, rows_QK, similarities_QK)

    def write(self, folder: Path) -> None:
        """All but the base, which is a file already."""
        np.save(folder / "queries.npy", self.queries_QD)
        np.save(folder / "true-rows.npy", self.rows_QK)
        np.save(folder / "true-similarities.npy", self.similarities_QK)

    @classmethod
    def read(cls, folder: Path, base: Path) -> "Truth":
        names = ("queries", "true-rows", "true-similarities")
        return cls(np.load(base, mmap_mode="r"), *(np.load(folder / f"{name}.npy") for name in names))

    def recall(self, found_QK: np.ndarray, k: int) -> float:
        """recall@k of rows found, the best first. A row as near as the k-th true one is right, but only once."""
        found_QK = found_QK[:, :k]
        border_Q1 = self.similarities_QK[:, k - 1 : k] - SAME
        ordered_QK = np.sort(found_QK, axis=1)
        right = int(((self.similarities_of(ordered_QK) >= border_Q1) & _first_of_its_kind(ordered_QK)).sum())
        return right / (len(found_QK) * k)

    def similarities_of(self, rows_QK: np.ndarray) -> np.ndarray:
        """The true similarities of rows, float32 [Q, K]; -inf where the row is -1."""
        return true_similarities(self.base_ND, self.queries_QD, rows_QK)


def true_similarities(base_ND: np.ndarray, queries_QD: np.ndarray, rows_QK: np.ndarray) -> np.ndarray:
    """The inner products of each query with its rows, float32 [Q, K]; -inf where the row is -1."""
    similarities_QK = np.empty(rows_QK.shape, np.float32)
    step = max(COMPARED // (4 * base_ND.shape[1] * max(rows_QK.shape[1], 1)), 1)
    for start in range(0, len(rows_QK), step):
        rows = rows_QK[start : start + step]
        gathered = base_ND[np.maximum(rows, 0)].astype(np.float32)
        similarities_QK[start : start + step] = np.einsum("qkd,qd->qk", gathered, queries_QD[start : start + step])
    similarities_QK[rows_QK < 0] = -np.inf
    return similarities_QK


def _first_of_its_kind(ordered_QK: np.ndarray) -> np.ndarray:
    first_QK = np.ones(ordered_QK.shape, bool)
    first_QK[:, 1:] = ordered_QK[:, 1:] != ordered_QK[:, :-1]
    return first_QK


def batch_rate(search: Search, queries_QD: np.ndarray) -> float:
    """Queries/s when all are asked at once, the best of three rounds; fewer when they are slow."""
    best, spent = float("inf"), 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        search(queries_QD)
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds), spent + seconds
        if spent > ENOUGH_SECONDS:
            break
    return len(queries_QD) / best


def single_latencies(search: Search, queries_QD: np.ndarray) -> np.ndarray:
    """Milliseconds of each query when they are asked one by one, float64 [Q]."""
    latencies = []
    for row in range(len(queries_QD)):
        began = time.perf_counter()
        search(queries_QD[row : row + 1])
        latencies.append(1e3 * (time.perf_counter() - began))
    return np.array(latencies)


def latency_figures(latencies_Q: np.ndarray) -> dict[str, float]:
    return {
        "single_ms": round(float(np.median(latencies_Q)), 4),
        "single_p99_ms": round(float(np.percentile(latencies_Q, 99)), 4),
    }


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process: in all, its own (anonymous) and of mapped files, and the peak so far."""
    said = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: int(said[field]) << 10 for name, field in names.items()}


def forget_peak() -> None:
    """Let the peak of this process begin anew at what it has now (Linux, proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]


def num_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def drop_from_cache(folder: Path) -> None:
    """Write files out and let the kernel forget their pages, which it does where no process has them mapped."""
    for path in files_below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def hold_to(threads: int) -> None:
    """Let this process run on so many cores, which counts for every pool of threads that it starts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """What a figure means little without."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
