"""Search of many shards by two versions of the library, in turn, on questions that are no rows of the memory.

    git archive COMMIT | tar -x -C BEFORE
    python -m tests.benchmarks.index_shards --before BEFORE --out FOLDER [--rows 10000000] [--dimension 64] [--key KEY]

Both versions add the same vectors and build ten shards for recall@10 .95: the older version chooses the key unless one
is given, and both choose their search parameters. The newer version is given questions to measure recall with, which
the older version cannot take. Then each version searches other questions with what it chose, and with other numbers of
lists and of candidates, in turn, in processes of their own with one thread. Times are CPU seconds, the least of several
rounds. `index_bytes` is what opening adds to the anonymous memory of a process; ids, vectors and uris are mapped files,
and the codes of labels and masks of rows are left out, 5 bytes a row. Prints one JSON document.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

K, SHARDS, TARGET = 10, 10, 0.95
LATENT, CLASSES, SPREAD, NOISE = 24, 2_000, 0.55, 0.02
BATCH, ALONE, ROUNDS = 500, 100, 5
BLOCK = 65_536
SAME = 1e-5  # similarities that differ by less are equal
BESIDE = 5  # bytes a row in anonymous memory that are no index: the code of its label, and whether it is live
WIDER = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # times the chosen number of lists


def made(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Vectors near a manifold of few dimensions, around the centres of classes, float16 [N, D] of unit length."""
    shape, random = np.random.default_rng(0), np.random.default_rng(seed)
    centres = shape.standard_normal((CLASSES, LATENT), np.float32)
    plane = shape.standard_normal((LATENT, dimension), np.float32) / LATENT**0.5
    found = np.empty((rows, dimension), np.float16)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        inner = centres[random.integers(0, CLASSES, count)] + SPREAD * random.standard_normal(
            (count, LATENT), np.float32
        )
        some = np.tanh(inner @ plane) + NOISE * random.standard_normal((count, dimension), np.float32)
        found[start : start + count] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return found


def border(base: Path, queries_QD: np.ndarray) -> np.ndarray:
    """The similarity of the tenth nearest row of each query, by exact search over the files of a folder."""
    import faiss

    best_QK = np.full((len(queries_QD), K), -np.inf, np.float32)
    for path in sorted(base.glob("*.npy")):
        vectors_ND = np.load(path, mmap_mode="r")
        for start in range(0, len(vectors_ND), BLOCK):
            block = np.ascontiguousarray(vectors_ND[start : start + BLOCK], np.float32)
            found_QK, _ = faiss.knn(queries_QD, block, K, metric=faiss.METRIC_INNER_PRODUCT)
            best_QK = -np.sort(-np.concatenate([best_QK, found_QK], axis=1), axis=1)[:, :K]
    return best_QK[:, -1]


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, after what is free has been returned."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^Anonymous:\s+(\d+)", text, re.MULTILINE)[0]) << 10


class Worker:
    """One version of the library, asked by lines of JSON. It imports nothing of its own but the library on its path."""

    def __init__(self, folder: Path) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        from pipeline.visual_memory import VisualMemory

        self._folder = folder
        self._memory = VisualMemory(folder / "memory")
        self._live: dict[str, Any] = {}

    def make(self, source: str, shard_rows: int, key: str | None, questions: str | None) -> dict:
        import faiss

        from pipeline.edits import index_growth

        try:
            from pipeline.index.build.plan import IndexOptions
        except ImportError:
            from pipeline.index.plan import IndexOptions
        faiss.omp_set_num_threads(2)
        index_growth.MAX_FRESH = 1 << 60  # the index is built on its own
        began = time.process_time()
        if not (self._folder / "memory").exists():
            self._memory.add(Path(source))
        asked = {"queries": np.load(questions)} if questions else {}
        options = IndexOptions(key=key, target_recall=TARGET, shard_rows=shard_rows, rebuild=True)
        index = self._memory.index(options, **asked).index
        return {
            "key": index.key,
            "parameters": index.parameters,
            "recall_said": index.recall_at_10,
            "shards": len(index.shards),
            "file_bytes": sum(shard.index.num_bytes for shard in index.shards if shard.index),
            "cpu_seconds": round(time.process_time() - began, 1),
        }

    def open(self) -> dict:
        """Open the memory and search it once. Returns what that takes."""
        before, began = anonymous_bytes(), time.process_time()
        live = self._opened(self._memory.state())
        live.search(np.full((1, live.dimension), live.dimension**-0.5, np.float32), K)
        took = time.process_time() - began
        parameters = self._memory.state().index.parameters
        self._live[parameters] = live
        num_bytes = anonymous_bytes() - before - BESIDE * len(live)
        return {"parameters": parameters, "index_bytes": num_bytes, "open_seconds": round(took, 2)}

    def _opened(self, state: Any) -> Any:
        """A version as a server opens it. What the version opened first has read is reused."""
        try:
            from pipeline.index.search.live_entries import LiveEntries
        except ImportError:
            return type(self._memory.live()).open(self._memory.log.storage, state)
        return LiveEntries.open(self._memory.log.storage, state, next(iter(self._live.values()), None), merged=True)

    def search(self, queries: str, borders: str, parameters: str) -> dict:
        """CPU milliseconds a query, of many and of one alone, and recall over all rows."""
        queries_QD, border_Q = np.load(queries), np.load(borders)
        if parameters not in self._live:
            state = self._memory.state()
            changes = {"parameters": parameters} | (
                {"rerank_for": "index"} if hasattr(state.index, "rerank_for") else {}
            )
            index = state.index.model_copy(update=changes)
            self._live = dict(list(self._live.items())[:1])  # the first, and this one
            self._live[parameters] = self._opened(state.model_copy(update={"index": index}))
        live = self._live[parameters]
        found_QK = live.search(queries_QD, K).similarities_QK
        together, alone = [], []
        for _ in range(ROUNDS):
            began = time.process_time()
            live.search(queries_QD[:BATCH], K)
            together.append((time.process_time() - began) / BATCH)
            began = time.process_time()
            for row in range(ALONE):
                live.search(queries_QD[row : row + 1], K)
            alone.append((time.process_time() - began) / ALONE)
        return {
            "parameters": parameters,
            "recall": round(float((found_QK >= border_Q[:, None] - SAME).mean()), 4),
            "batch_ms": round(1e3 * min(together), 4),
            "alone_ms": round(1e3 * min(alone), 4),
        }


def work(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = Worker(folder)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(**arguments)), file=answers, flush=True)


class Side:
    """A process of one version of the library."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self._command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--work", str(folder)]
        self._environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
        self._tree = tree
        self.restart()

    def restart(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=self._tree, env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, name: str, **arguments: object) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the version in {self._tree} ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def lists_changed(parameters: str, factor: float) -> str:
    """The parameters with another number of lists."""
    return re.sub(r"nprobe=(\d+)", lambda found: f"nprobe={max(round(int(found[1]) * factor), 1)}", parameters)


def cheapest(points: list[dict], recall: float, name: str) -> dict | None:
    """The point with the least time of those that have a recall."""
    able = [point for point in points if point["recall"] >= recall]
    return min(able, key=lambda point: point[name]) if able else None


def ratios(before: Mapping, after: Mapping) -> dict:
    """How many times as fast the newer version is, as chosen and at equal recall, and its bytes over those before."""
    chosen = {name: round(before["chosen"][name] / after["chosen"][name], 2) for name in ("batch_ms", "alone_ms")}
    equal = {}
    for name in ("batch_ms", "alone_ms"):
        for recall in (0.95, before["chosen"]["recall"]):
            pair = [cheapest(side["points"], recall, name) for side in (before, after)]
            if pair[0] and pair[1]:
                equal[f"{name} at {recall}"] = round(pair[0][name] / pair[1][name], 2)
    return {
        "as chosen": chosen,
        "at equal recall": equal,
        "index_bytes": round(after["opened"]["index_bytes"] / before["opened"]["index_bytes"], 3),
    }


def prepare(out: Path, rows: int, dimension: int, num_queries: int) -> None:
    """Write the vectors, the questions to tune with, other questions, and the answers to these."""
    source = out / "vectors"
    source.mkdir(parents=True, exist_ok=True)
    for number in range(SHARDS):
        if not (source / f"{number:02}.npy").exists():
            np.save(source / f"{number:02}.npy", made(rows // SHARDS, dimension, seed=2 + number))
    asked_QD = made(num_queries, dimension, seed=1).astype(np.float32)
    np.save(out / "tuned-with.npy", made(num_queries, dimension, seed=99))
    np.save(out / "asked.npy", asked_QD)
    if not (out / "borders.npy").exists():
        np.save(out / "borders.npy", border(source, asked_QD))


def measured(out: Path, rows: int, trees: Mapping[str, Path], key: str | None) -> dict:
    """What each version built, what it takes when it is opened, and its searches, in turn."""
    part = min(max(rows // 128, 128), 16_384)
    shard_rows = -(-rows // SHARDS // part) * part
    sides = {name: Side(tree, out / name) for name, tree in trees.items()}
    found: dict = {name: {} for name in trees}
    for name, side in sides.items():
        known = out / f"{name}-built.json"
        if not known.exists():
            questions = str(out / "tuned-with.npy") if name == "after" else None
            asked = {"source": str(out / "vectors"), "shard_rows": shard_rows, "key": key, "questions": questions}
            known.write_text(json.dumps(side.ask("make", **asked)))
        found[name]["built"] = json.loads(known.read_text())
        key = found[name]["built"]["key"]  # the newer version takes that of the older, so that codes are the same
        print(name, found[name]["built"], file=sys.stderr, flush=True)
    for name, side in sides.items():
        side.end()
        side.restart()
        found[name] |= {"opened": side.ask("open"), "points": []}
        print(name, found[name]["opened"], file=sys.stderr, flush=True)
    files = {"queries": str(out / "asked.npy"), "borders": str(out / "borders.npy")}
    for factor in sorted(WIDER, key=lambda factor: abs(factor - 1)):
        for name, side in sides.items():
            parameters = lists_changed(found[name]["opened"]["parameters"], factor)
            point = side.ask("search", **files, parameters=parameters)
            found[name]["points"].append(point)
            print(name, point, file=sys.stderr, flush=True)
            if factor == 1.0:
                found[name]["chosen"] = point
    for side in sides.values():
        side.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="the source tree of the older version")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--key", help="the FAISS key; without it, the older version chooses one")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--keep", action="store_true", help="keep the memories, and use those that exist")
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    from tests.benchmarks import measuring

    out: Path = arguments.out.resolve()
    prepare(out, arguments.rows, arguments.dimension, arguments.queries)
    trees = {"before": arguments.before.resolve(), "after": Path(__file__).resolve().parents[2]}
    found = measured(out, arguments.rows, trees, arguments.key)
    document = {"machine": measuring.machine(), "rows": arguments.rows, "shards": SHARDS}
    document |= {"dimension": arguments.dimension}
    document |= found | {"ratios": ratios(found["before"], found["after"])}
    print(json.dumps(document, indent=1))
    if not arguments.keep:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
