"""How fast an embedding column is read into one matrix, written as the store writes it and with pyarrow's defaults.

    python tests/benchmarks/parquet.py [--rows 100000] [--dimension 384]

One thread, page cache hot, best of five. Prints one JSON document.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.tables.schemas import embedding_column, embedding_matrix, write_table


def best_read(path: Path, checksums: bool) -> float:
    def read() -> float:
        began = time.perf_counter()
        with pq.ParquetFile(path, page_checksum_verification=checksums) as parquet:
            embedding_matrix(parquet.read(["embedding"], use_threads=False).column("embedding"))
        return time.perf_counter() - began

    return min(read() for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    arguments = parser.parse_args()
    vectors = np.random.default_rng(0).normal(size=(arguments.rows, arguments.dimension)).astype(np.float16)
    ours = pa.table(
        [embedding_column(vectors)],
        schema=pa.schema([pa.field("embedding", embedding_column(vectors[:1]).type, nullable=False)]),
    )
    plain = pa.table(
        {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), arguments.dimension)}
    )
    megabytes = vectors.nbytes / 1e6
    with tempfile.TemporaryDirectory() as folder:
        write_table(ours, Path(folder) / "ours.parquet")
        pq.write_table(plain, Path(folder) / "defaults.parquet")
        rates = {
            "as the store writes it": megabytes / best_read(Path(folder) / "ours.parquet", checksums=False),
            "the same, page checksums verified": megabytes / best_read(Path(folder) / "ours.parquet", checksums=True),
            "pyarrow's defaults": megabytes / best_read(Path(folder) / "defaults.parquet", checksums=False),
        }
    print(json.dumps({"MB/s": {name: round(rate) for name, rate in rates.items()}}, indent=1))


if __name__ == "__main__":
    main()
