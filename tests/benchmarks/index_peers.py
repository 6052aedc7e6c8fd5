"""The index of a memory beside autofaiss, hnswlib, USearch, LanceDB, Qdrant and Milvus Lite, in one run.

    python -m venv peer && peer/bin/pip install "numpy<2" "pyarrow<26" faiss-cpu==1.13.2 autofaiss hnswlib usearch \
        lancedb qdrant-edge-py pymilvus milvus-lite
    python -m tests.benchmarks.index_peers --vectors FOLDER --out FOLDER --peers-python peer/bin/python

The vectors are those that `vectors.py` writes. Each contender has the same base and the same queries, processes of its
own and the same cores: one that stores and builds, one that searches with every effort, and with --cold one that is
asked first thing after the files were dropped from the page cache. `seconds` of a build begin when the vectors are in
memory and the peer is imported (a memory has them in its own files: adding them is its `store_seconds`), and end when
the index is on disk. autofaiss and a memory measure and tune within that time, the others do not.

autofaiss 2.18 fails with faiss-cpu 1.15 (`OPQMatrix.__init__() got an unexpected keyword argument 'M'`), hence 1.13.2
beside it. It runs twice: held to --small-bytes, and to what a memory's index takes together with its vectors. qdrant-
client without a server compares with every vector, so Qdrant's engine is measured as Qdrant Edge.

recall@1 and @10 are of a search for 10, recall@100 of one for 100 with the same effort, though a graph keeps 100
candidates at least. Rates and latencies are of searches for 10. Peak bytes are beyond what the process had once loaded.
A peer that is not there is said to be skipped. Prints one JSON document, and keeps it in --out.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from tests.benchmarks import measuring
from tests.benchmarks.index_contenders import PEERS, WIDE, Effort, Settings
from tests.benchmarks.measuring import Truth
from tests.benchmarks.vectors import RealVectors

GOOD = 0.95  # recall@10 of the effort that a cold process searches with
ROOT = Path(__file__).parents[2]
DEFAULT_BYTES = 16 << 30
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class Run:
    """One run: what all contenders share, and the processes that measure them."""

    def __init__(self, work: Path, threads: int, limit: float, peers_python: str) -> None:
        self.work = work
        self.base = work / "source" / "base.npy"
        self.threads = threads
        self._limit = limit
        self._peers_python = peers_python

    def prepare(self, base_ND: np.ndarray, queries_QD: np.ndarray) -> None:
        """Write the base (float16) and the queries where every contender finds them, and what is true of them."""
        self.base.parent.mkdir(parents=True, exist_ok=True)
        np.save(self.base, base_ND)
        Truth.of(np.load(self.base, mmap_mode="r"), queries_QD, WIDE).write(self.work)

    def settings(self, name: str, max_bytes: int, key: str | None = None) -> Settings:
        return Settings(str(self.work), str(self.base), str(self.work / name), self.threads, max_bytes, key)

    def step(self, name: str, step: str, settings: Settings) -> dict:
        """One step of a contender in a process of its own; what went wrong in place of what it says."""
        python = self._peers_python if name in PEERS else sys.executable
        command = [python, "-W", "ignore", "-m", "tests.benchmarks.index_contenders", name, step]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | {"PYTHONPATH": str(ROOT)}
        print(f"{name}: {step}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                [*command, json.dumps(asdict(settings))],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                timeout=self._limit,
                check=True,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"{step} took more than {self._limit:g} s"}
        except subprocess.CalledProcessError as error:
            return {"failed": f"{step} ended with status {error.returncode}"}
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def measured(self, name: str, settings: Settings, *, cold: bool) -> dict:
        """All steps of a contender."""
        result: dict = {"name": name, "threads": self.threads}
        build = self.step(name, "build", settings)
        if "skipped" in build or "failed" in build:
            return result | build
        result |= {"build": build, **self.step(name, "search", settings)}
        if cold and result.get("points"):
            measuring.drop_from_cache(Path(settings.folder))
            effort = good_effort(result["points"])
            result["cold"] = self.step(name, "cold", replace(settings, effort=effort))
        return result


def good_effort(points: Sequence[dict]) -> Effort:
    """The effort of the fastest single search with recall@10 of 0.95, or of the best recall where none has that.

    Of a memory, as its users search it: the path that ends with the candidates is no search of theirs.
    """
    points = [point for point in points if point["effort"].get("path") != "candidates"]
    good = [point for point in points if point["recall_at_10"] >= GOOD]
    best = min(good, key=lambda p: p["single_ms"]) if good else max(points, key=lambda p: p["recall_at_10"])
    return dict(best["effort"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True, help="what vectors.py has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3_600, help="seconds a step of a contender may take")
    parser.add_argument("--small-bytes", type=int, default=60_000_000)
    parser.add_argument("--large-bytes", type=int, help="default: index and vectors of the memory built first")
    parser.add_argument("--max-memory", type=int, default=DEFAULT_BYTES, help="bytes the memory's index may take")
    parser.add_argument("--keys", nargs="*", default=[], help="keys of further indexes of the memory, one each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of ours, {', '.join(PEERS)}")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    run = Run(out, arguments.threads, arguments.limit, arguments.peers_python)
    given = RealVectors.read(arguments.vectors, arguments.dimension)
    run.prepare(given.base_ND[: arguments.rows], given.queries_QD[: arguments.queries])
    document: dict = {
        "machine": measuring.machine(),
        "rows": min(arguments.rows, len(given.base_ND)),
        "dimension": arguments.dimension,
        "queries": arguments.queries,
        "threads": arguments.threads,
        "k": 10,
        "contenders": [],
    }
    sizes = {"autofaiss-small": arguments.small_bytes, "autofaiss-large": arguments.large_bytes or 0}
    names = {"ours": None} | {f"ours {key}": key for key in arguments.keys} | dict.fromkeys(PEERS)
    for name, key in names.items():
        if arguments.only and name.split()[0] not in arguments.only:
            continue
        max_bytes = sizes.get(name, arguments.max_memory)
        if not max_bytes:
            document["contenders"].append({"name": name, "skipped": "no memory was measured: give --large-bytes"})
            continue
        settings = replace(run.settings(name.replace(",", "-").replace(" ", "-"), max_bytes), key=key)
        result = run.measured(name, settings, cold=arguments.cold)
        document["contenders"].append(result)
        if name == "ours" and "build" in result and not arguments.large_bytes:
            sizes["autofaiss-large"] = result["build"]["index_bytes"] + result["build"]["vectors_bytes"]
        (out / "index_peers.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
