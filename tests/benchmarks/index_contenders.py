"""The peers that `index_peers` measures, and the process that measures one of them.

    python -m tests.benchmarks.index_contenders NAME STEP SETTINGS

A step is `build`, `search` or `cold`; the settings are JSON. Each peer is imported only by its own class and nothing
else but NumPy, so that it may live in an environment of its own. Prints one JSON document as its last line.
"""

import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tests.benchmarks import measuring
from tests.benchmarks.measuring import Truth

K = 10
WIDE = 100
SINGLE_QUERIES = 300
WARM_QUERIES = 20
COLD_QUERIES = 100
EFFORTS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # candidates a graph keeps while it searches
CONNECTIVITY, CONSTRUCTION = 16, 200  # of every graph, where its maker lets one say so

Effort = dict[str, int | str]


@dataclass(frozen=True)
class Settings:
    """Where everything lies, and what a contender may use. `base` is float16 [N, D] in a .npy."""

    work: str
    base: str
    folder: str
    threads: int
    max_bytes: int
    key: str | None = None
    effort: Effort | None = None

    @classmethod
    def read(cls, text: str) -> "Settings":
        given = json.loads(text)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class Contender:
    """An index that is stored, built, opened and searched; `folder` holds all that it leaves on disk."""

    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # imported before anything is timed, or counted as memory

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)

    def base(self, dtype: type = np.float32) -> np.ndarray:
        """All vectors in memory, [N, D]."""
        return np.ascontiguousarray(np.load(self.settings.base, mmap_mode="r"), dtype)

    def load(self) -> None:
        """Import the peer and have in memory what it builds from. Not timed."""
        raise NotImplementedError

    def store(self) -> None:
        """Put the vectors where they are kept, for those that keep them apart from the index. Timed on its own."""

    def build(self) -> dict | None:
        """Build the index and write it to `folder`; returns what there is to say of it."""
        raise NotImplementedError

    def open(self) -> None:
        """What a process that only searches does before its first query."""
        raise NotImplementedError

    def efforts(self) -> list[Effort]:
        """What to search with, the least effort first."""
        return [{"ef": effort} for effort in EFFORTS]

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        """Rows int64 [Q, K], nearest first, -1 where there is none."""
        raise NotImplementedError

    def searched_files(self) -> list[Path]:
        """Those files on disk that a search reads."""
        return measuring.files_below(self.folder)


class Autofaiss(Contender):
    """`autofaiss.build_index`, held to a size, with its own choice of key and effort. Wants faiss-cpu below 1.15."""

    packages = ("autofaiss", "faiss-cpu")
    modules = ("faiss",)
    max_latency_ms = 10

    def load(self) -> None:
        import autofaiss

        self._autofaiss, self._base_ND = autofaiss, self.base()

    def build(self) -> dict:
        path = self.folder / "index.faiss"
        index, about = self._autofaiss.build_index(
            embeddings=self._base_ND,
            index_path=str(path),
            index_infos_path=str(self.folder / "about.json"),
            max_index_memory_usage=f"{self.settings.max_bytes / 1e6:g}MB",
            current_memory_available="8GB",
            max_index_query_time_ms=self.max_latency_ms,
            metric_type="ip",
            nb_cores=self.settings.threads,
            verbose=40,
        )
        if index is None:
            raise RuntimeError("autofaiss built nothing")
        return {"key": about["index_key"], "tuned": about["index_param"]}

    def open(self) -> None:
        import faiss

        faiss.omp_set_num_threads(self.settings.threads)
        self._space = faiss.ParameterSpace()
        self._index = faiss.read_index(str(self.folder / "index.faiss"))
        self._inverted = faiss.try_extract_index_ivf(self._index)

    def efforts(self) -> list[Effort]:
        tuned = json.loads((self.folder / "about.json").read_text())["index_param"]
        values = dict(pair.split("=") for pair in tuned.split(",") if pair)
        if self._inverted is None:
            return [{"efSearch": effort} for effort in EFFORTS] if "efSearch" in values else [{}]
        found = {int(values["nprobe"]), *(1 << power for power in range(self._inverted.nlist.bit_length()))}
        rest: Effort = {"efSearch": int(values["efSearch"])} if "efSearch" in values else {}
        return [{"nprobe": number} | rest for number in sorted(found) if number <= self._inverted.nlist]

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        for name, value in effort.items():
            of_lists = name == "efSearch" and self._inverted is not None
            self._space.set_index_parameter(self._index, "quantizer_efSearch" if of_lists else name, int(value))
        return self._index.search(queries_QD, k)[1]


class Hnswlib(Contender):
    """hnswlib's graph over float32 vectors."""

    packages = ("hnswlib",)
    modules = ("hnswlib",)

    def load(self) -> None:
        import hnswlib

        self._hnswlib, self._base_ND = hnswlib, self.base()

    def build(self) -> None:
        index = self._hnswlib.Index(space="ip", dim=self._base_ND.shape[1])
        index.init_index(len(self._base_ND), M=CONNECTIVITY, ef_construction=CONSTRUCTION)
        index.set_num_threads(self.settings.threads)
        index.add_items(self._base_ND)
        index.save_index(str(self.folder / "index.bin"))

    def open(self) -> None:
        import hnswlib

        dimension = np.load(self.settings.base, mmap_mode="r").shape[1]
        self._index = hnswlib.Index(space="ip", dim=dimension)
        self._index.load_index(str(self.folder / "index.bin"))
        self._index.set_num_threads(self.settings.threads)

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        self._index.set_ef(max(int(effort["ef"]), k))
        return self._index.knn_query(queries_QD, k)[0].astype(np.int64)


class Usearch(Contender):
    """USearch's graph over vectors of a type."""

    packages = ("usearch",)
    modules = ("usearch.index",)
    dtype = "f32"

    def load(self) -> None:
        from usearch.index import Index

        self._kind, self._base_ND = Index, self.base(np.float16 if self.dtype == "f16" else np.float32)

    def _empty(self, kind: type, dimension: int):  # of a package that need not be there
        return kind(
            ndim=dimension,
            metric="ip",
            dtype=self.dtype,
            connectivity=CONNECTIVITY,
            expansion_add=CONSTRUCTION,
        )

    def build(self) -> None:
        index = self._empty(self._kind, self._base_ND.shape[1])
        index.add(np.arange(len(self._base_ND)), self._base_ND, threads=self.settings.threads)
        index.save(str(self.folder / "index.usearch"))

    def open(self) -> None:
        from usearch.index import Index

        self._index = self._empty(Index, np.load(self.settings.base, mmap_mode="r").shape[1])
        self._index.load(str(self.folder / "index.usearch"))

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        self._index.expansion_search = max(int(effort["ef"]), k)
        keys_QK = self._index.search(queries_QD, k, threads=self.settings.threads).keys
        return np.asarray(keys_QK).reshape(len(queries_QD), -1).astype(np.int64)


class UsearchHalf(Usearch):
    """The same over float16."""

    dtype = "f16"


class LancePQ(Contender):
    """LanceDB's IVF_PQ, codes of half a byte a dimension, refined with the vectors of its table."""

    packages = ("lancedb", "pyarrow")
    modules = ("lancedb", "lancedb.index", "pyarrow")
    num_lists = 512
    asked_at_once = 100

    def load(self) -> None:
        import lancedb
        import pyarrow as pa

        self._lancedb = lancedb
        base_ND = self.base()
        column = pa.FixedSizeListArray.from_arrays(pa.array(base_ND.ravel()), base_ND.shape[1])
        self._table = pa.table({"row": np.arange(len(base_ND)), "vector": column})

    def store(self) -> None:
        self._stored = self._lancedb.connect(str(self.folder)).create_table("vectors", self._table)

    def config(self, rows: int, dimension: int) -> object:
        from lancedb.index import IvfPq

        lists = min(self.num_lists, max(rows // 39, 1))
        return IvfPq(distance_type="dot", num_partitions=lists, num_sub_vectors=dimension // 2)

    def build(self) -> None:
        dimension = self._table.schema.field("vector").type.list_size
        self._stored.create_index("vector", config=self.config(len(self._table), dimension))

    def open(self) -> None:
        import lancedb

        self._stored = lancedb.connect(str(self.folder)).open_table("vectors")

    def efforts(self) -> list[Effort]:
        return [{"nprobes": n, "refine_factor": r} for r in (5, 20) for n in (8, 16, 32, 64)]  # 1 stays below .90

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        rows_QK = np.full((len(queries_QD), k), -1, np.int64)
        for start in range(0, len(queries_QD), self.asked_at_once):
            asked_QD = queries_QD[start : start + self.asked_at_once]
            query = self._stored.search(asked_QD, vector_column_name="vector").limit(k).select(["row", "_distance"])
            for name, value in effort.items():
                least = k * int(effort["refine_factor"]) if name == "ef" else 1  # Lance refuses fewer
                query = getattr(query, name)(max(int(value), least))
            found = query.to_arrow()
            if len(asked_QD) == 1:
                rows_QK[start, : len(found)] = found.column("row").to_numpy()
                continue
            numbers = found.column("query_index").to_numpy()
            order = np.lexsort((found.column("_distance").to_numpy(), numbers))
            ranks = np.arange(len(found)) - np.searchsorted(numbers[order], numbers[order])
            rows_QK[start + numbers[order], ranks] = found.column("row").to_numpy()[order]
        return rows_QK


class LanceGraph(LancePQ):
    """LanceDB's IVF_HNSW_SQ with the number of lists that it takes by itself, refined with the vectors."""

    def config(self, rows: int, dimension: int) -> object:
        from lancedb.index import HnswSq

        return HnswSq(distance_type="dot", m=CONNECTIVITY, ef_construction=CONSTRUCTION)

    def efforts(self) -> list[Effort]:
        return [{"ef": ef, "nprobes": 20, "refine_factor": refine} for refine in (1, 5) for ef in EFFORTS]


class Qdrant(Contender):
    """Qdrant's own engine in this process (Qdrant Edge), HNSW over float32. The client's local mode has no index."""

    packages = ("qdrant-edge-py",)
    modules = ("qdrant_edge",)
    stored_at_once = 2_000

    def load(self) -> None:
        import qdrant_edge

        self._edge, self._base_ND = qdrant_edge, self.base()

    def store(self) -> None:
        edge = self._edge
        graph = edge.HnswIndexConfig(
            m=CONNECTIVITY,
            ef_construct=CONSTRUCTION,
            full_scan_threshold=10,
            max_indexing_threads=self.settings.threads,
        )
        vectors = edge.EdgeVectorParams(size=self._base_ND.shape[1], distance=edge.Distance.Dot, hnsw_config=graph)
        options = edge.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=1_000)
        config = edge.EdgeConfig(vectors=vectors, optimizers=options, max_search_threads=self.settings.threads)
        self._shard = edge.EdgeShard.create(str(self.folder), config)
        for start in range(0, len(self._base_ND), self.stored_at_once):
            block = self._base_ND[start : start + self.stored_at_once].tolist()
            points = [edge.Point(row, vector) for row, vector in enumerate(block, start)]
            self._shard.update(edge.UpdateOperation.upsert_points(points))

    def build(self) -> dict:
        self._shard.optimize()
        self._shard.flush()
        about = self._shard.info()
        self._shard.close()
        return {"indexed": about.indexed_vectors_count, "segments": about.segments_count}

    def open(self) -> None:
        import qdrant_edge

        self._edge = qdrant_edge
        self._shard = qdrant_edge.EdgeShard.load(str(self.folder))

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        edge, params = self._edge, self._edge.SearchParams(hnsw_ef=max(int(effort["ef"]), k))
        requests = [
            edge.QueryRequest(limit=k, query=edge.Query.Nearest(query), params=params) for query in queries_QD.tolist()
        ]
        if len(requests) == 1:
            return _padded([[point.id for point in self._shard.query(requests[0])]], k)
        found = self._shard.query_batch(edge.QueryBatchRequest(requests))
        return _padded([[point.id for point in points] for points in found], k)


class Milvus(Contender):
    """Milvus Lite through pymilvus, HNSW over float32; asked by gRPC within the process, as it comes."""

    packages = ("milvus-lite", "pymilvus", "faiss-cpu")
    modules = ("pymilvus", "faiss", "milvus_lite.adapter.grpc.server")
    stored_at_once = 5_000
    name = "vectors"

    def _connect(self) -> None:
        from pymilvus import MilvusClient

        self._client = MilvusClient(str(self.folder / "milvus.db"))

    def load(self) -> None:
        self._connect()
        self._base_ND = self.base()

    def store(self) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._base_ND.shape[1])
        self._client.create_collection(self.name, schema=schema)
        for start in range(0, len(self._base_ND), self.stored_at_once):
            block = self._base_ND[start : start + self.stored_at_once]
            self._client.insert(self.name, [{"row": row, "vector": v} for row, v in enumerate(block, start)])
        self._client.flush(self.name)

    def build(self) -> dict:
        index = self._client.prepare_index_params()
        params = {"M": CONNECTIVITY, "efConstruction": CONSTRUCTION}
        index.add_index(field_name="vector", index_type="HNSW", metric_type="IP", params=params)
        self._client.create_index(self.name, index)
        self._client.load_collection(self.name)
        about = self._client.describe_index(self.name, "vector")
        self._client.close()
        return {"key": about["index_type"], "indexed": about["indexed_rows"]}

    def open(self) -> None:
        self._connect()
        self._client.load_collection(self.name)

    def search(self, queries_QD: np.ndarray, k: int, effort: Effort) -> np.ndarray:
        params = {"metric_type": "IP", "params": {"ef": max(int(effort["ef"]), k)}}
        found = self._client.search(
            self.name, data=list(queries_QD), limit=k, anns_field="vector", search_params=params
        )
        return _padded([[hit["row"] for hit in hits] for hits in found], k)


PEERS: dict[str, type[Contender]] = {
    "autofaiss-small": Autofaiss,
    "autofaiss-large": Autofaiss,
    "hnswlib": Hnswlib,
    "usearch-f32": Usearch,
    "usearch-f16": UsearchHalf,
    "lancedb-ivf-pq": LancePQ,
    "lancedb-ivf-hnsw-sq": LanceGraph,
    "qdrant-edge": Qdrant,
    "milvus-lite": Milvus,
}


def _padded(rows: Sequence[Sequence[int]], k: int) -> np.ndarray:
    padded_QK = np.full((len(rows), k), -1, np.int64)
    for query, found in enumerate(rows):
        padded_QK[query, : len(found)] = found
    return padded_QK


def contender_of(name: str, settings: Settings) -> Contender:
    if name.startswith("ours"):
        from tests.benchmarks.index_ours import Ours

        return Ours(settings)
    return PEERS[name](settings)


def built(contender: Contender) -> dict:
    """Store and build in this process, which has done nothing before but load the vectors."""
    shutil.rmtree(contender.folder, ignore_errors=True)
    contender.folder.mkdir(parents=True)
    contender.load()
    measuring.forget_peak()
    before = measuring.resident_bytes()
    began = time.perf_counter()
    contender.store()
    stored = time.perf_counter()
    between = measuring.resident_bytes()
    measuring.forget_peak()
    said = contender.build() or {}
    done = time.perf_counter()
    return {
        "store_seconds": round(stored - began, 2),
        "seconds": round(done - stored, 2),
        "store_peak_bytes": between["peak"] - before["resident"],
        "peak_bytes": measuring.resident_bytes()["peak"] - before["resident"],
        "loaded_bytes": before["resident"],
        "disk_bytes": measuring.num_bytes(measuring.files_below(contender.folder)),
        "searched_bytes": measuring.num_bytes(contender.searched_files()),
        "versions": measuring.versions(contender.packages),
        **said,
    }


def swept(contender: Contender, truth: Truth) -> dict:
    """Every effort, warm: the queries are asked once before they are timed.

    The memory is what opening and one batch with the most effort add, before anything is compared with the truth.
    """
    before = measuring.resident_bytes()
    began = time.perf_counter()
    contender.open()
    opened = time.perf_counter() - began
    contender.search(truth.queries_QD, K, contender.efforts()[-1])
    after = measuring.resident_bytes()
    points = []
    singles_QD = truth.queries_QD[:SINGLE_QUERIES]
    for effort in contender.efforts():

        def search(queries_QD: np.ndarray, effort: Effort = effort) -> np.ndarray:
            return contender.search(queries_QD, K, effort)

        found_QK = search(truth.queries_QD)
        measuring.single_latencies(search, singles_QD[:WARM_QUERIES])
        point: dict = {
            "effort": effort,
            "recall_at_1": round(truth.recall(found_QK, 1), 5),
            "recall_at_10": round(truth.recall(found_QK, K), 5),
            "recall_at_100": round(truth.recall(contender.search(truth.queries_QD, WIDE, effort), WIDE), 5),
            "batch_per_second": round(measuring.batch_rate(search, truth.queries_QD), 1),
        }
        point |= measuring.latency_figures(measuring.single_latencies(search, singles_QD))
        points.append(point)
        print(json.dumps(point), file=sys.stderr, flush=True)
    growth = {f"{name}_bytes": after[name] - before[name] for name in ("resident", "anonymous", "file")}
    return {"open_seconds": round(opened, 3), "memory": growth, "points": points}


def cold(contender: Contender, truth: Truth) -> dict:
    """The first queries of a process whose files are not in the page cache."""
    effort = contender.settings.effort or {}
    before = measuring.resident_bytes()
    began = time.perf_counter()
    contender.open()
    opened = time.perf_counter() - began
    latencies = measuring.single_latencies(
        lambda queries_QD: contender.search(queries_QD, K, effort), truth.queries_QD[:COLD_QUERIES]
    )
    after = measuring.resident_bytes()
    return {
        "effort": effort,
        "open_seconds": round(opened, 3),
        "first_ms": round(float(latencies[0]), 3),
        **measuring.latency_figures(latencies),
        "slowest_ms": round(float(latencies.max()), 3),
        **{f"{name}_bytes": after[name] - before[name] for name in ("resident", "anonymous", "file")},
    }


def main() -> None:
    name, step, text = sys.argv[1:]
    settings = Settings.read(text)
    measuring.hold_to(settings.threads)
    contender = contender_of(name, settings)
    try:
        for module in contender.modules:
            importlib.import_module(module)
        if step == "build":
            result = built(contender)
        else:
            truth = Truth.read(Path(settings.work), Path(settings.base))
            result = swept(contender, truth) if step == "search" else cold(contender, truth)
    except ModuleNotFoundError as error:
        result = {"skipped": f"{error.name} is not installed for {sys.executable}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
