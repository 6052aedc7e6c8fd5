"""A memory of vectors you have already, with an index: needs neither images nor an encoder.

python docs/examples/vectors.py vectors.memory
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from visual_memory import IndexOptions, VisualMemory

ROWS, DIMENSION = 2_000, 32


def main(uri: str) -> None:
    rng = np.random.default_rng(0)
    vectors_ND = rng.normal(size=(ROWS, DIMENSION)).astype(np.float32)
    table = pa.table(
        {
            "embedding": pa.array(list(vectors_ND), pa.list_(pa.float32(), DIMENSION)),
            "label": [f"class {row % 10}" for row in range(ROWS)],
            "year": [2020 + row % 5 for row in range(ROWS)],
        }
    )
    memory = VisualMemory(uri)
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "vectors.parquet")
        memory.add(folder, labels="column:label", keep=["year"])
    memory.index(IndexOptions(key="Flat"))  # leave `key` out to have one chosen by measurement

    nearest = memory.search(embeddings=vectors_ND[:1], k=3)[0]
    print(*(f"{neighbor.id} {neighbor.label} {neighbor.similarity:.3f}" for neighbor in nearest), sep="\n")
    [decision] = memory.classify(embeddings=vectors_ND[:1], k=20, where="year >= 2023")
    print(decision)


if __name__ == "__main__":
    main(sys.argv[1])
