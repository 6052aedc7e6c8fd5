"""What `--balance auto` costs as the number of classes grows: 30,000 vectors in more and more classes, 20 questions.

    python tests/benchmarks/many_classes.py

Prints seconds of CPU of the questions without a balance and with `auto`, whose sample is drawn and asked in them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import VisualMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 3_000, 10_000, 30_000])
    given = parser.parse_args()
    vectors_ND = np.random.default_rng(0).normal(size=(given.rows, 32)).astype(np.float16)
    queries_QD = vectors_ND[:20].astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for classes in given.classes:
            source = Path(folder) / f"source-{classes}"
            source.mkdir()
            np.save(source / "a.npy", vectors_ND)
            labels = [f"class {row % classes:06d}" for row in range(given.rows)]
            pq.write_table(pa.table({"label": labels}), source / "a.parquet")
            memory = VisualMemory(Path(folder) / f"memory-{classes}")
            memory.add(source)
            memory.classify(embeddings=queries_QD)  # opens it
            seconds = []
            for balance in (0.0, "auto"):
                began = time.process_time()
                memory.classify(embeddings=queries_QD, balance=balance)  # type: ignore[arg-type]
                seconds.append(time.process_time() - began)
            print(f"{classes:>7,} classes: {seconds[0]:.2f} s without, {seconds[1]:.2f} s with auto", flush=True)


if __name__ == "__main__":
    main()
