"""Write the memory of this folder, and what it answers. Run by the release that is to stay readable, from its checkout:

PYTHONPATH=. python PATH/TO/tests/old_release/make.py OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import VisualMemory
from pipeline.edits.add import AddOptions

ROWS, DIMENSION, CLASSES = 300, 16, 5
QUESTIONS = {
    "plurality": {"k": 7, "voting": "plurality"},
    "distance": {"k": 9, "voting": "distance"},
    "softmax": {"k": 12, "voting": "softmax"},
    "rank": {"k": 20, "voting": "rank"},
    "balanced": {"k": 20, "voting": "rank", "balance": 0.5},
    "balanced by itself": {"k": 20, "voting": "rank", "balance": "auto"},
    "of some": {"k": 5, "where": "camera = 'b' and year >= 2022"},
    "coarser": {"k": 9, "label_set": "coarse"},
}


def vectors(rows: int, seed: int) -> np.ndarray:
    """Vectors float32 [rows, DIMENSION] of unit length, around one of CLASSES centres each, in turn."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(CLASSES, DIMENSION))
    made = centres[np.arange(rows) % CLASSES] + 0.8 * rng.normal(size=(rows, DIMENSION))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def write_source(folder: Path, rows: int, seed: int) -> None:
    """A Parquet file of vectors with labels and two more columns."""
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "embedding": pa.array(list(vectors(rows, seed)), pa.list_(pa.float32(), DIMENSION)),
            "label": [f"class {row % CLASSES}" if row % 11 else None for row in range(rows)],
            "camera": ["ab"[row % 2] for row in range(rows)],
            "year": [2019 + row % 6 for row in range(rows)],
        }
    )
    pq.write_table(table, folder / "vectors.parquet")


def answers(memory: VisualMemory) -> dict:
    """What the memory answers to every question, as the command line prints it."""
    queries = vectors(3, 99)
    found = {name: memory.classify(embeddings=queries, **asked) for name, asked in QUESTIONS.items()}
    said = {name: [decision.to_json() for decision in decisions] for name, decisions in found.items()}
    said["search"] = [[vars(n) for n in hits] for hits in memory.search(embeddings=queries, k=20)]
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]


def main() -> None:
    out = Path(sys.argv[1])
    memory = VisualMemory(out / "memory")
    from pipeline.index.plan import IndexOptions  # where it was in that release

    for name, rows, seed in (("first", ROWS, 2), ("second", 60, 3)):
        write_source(Path(f"/tmp/old-release/{name}"), rows, seed)
        plan = memory.plan_add(f"/tmp/old-release/{name}", AddOptions(labels="column:label", keep=("camera", "year")))
        memory.carry_out(plan)
        if name == "first":
            memory.index(IndexOptions(key="IVF8,Flat"))
    first = memory.state().segments[0].number << 39
    memory.forget(ids=[first + row for row in (0, 7, 30)])
    memory.relabel(ids=[first + 1, first + 2], label="class 4")
    memory.relabel(label_set="coarse", map={f"class {n}": "even" if n % 2 == 0 else "odd" for n in range(CLASSES)})
    memory.relabel(ids=[first + 5], label="odd", label_set="coarse")
    (out / "answers.json").write_text(json.dumps(answers(memory), separators=(",", ":")))


if __name__ == "__main__":
    main()
