"""Single adds of given vectors, as edits/singles.py makes them of images."""

from collections.abc import Sequence

import numpy as np

from pipeline.edits.singles import NewEntry, add_singles
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from tests.benchmarks.single_adds import Given
from tests.conftest import sha256_of, unit


def vectors(num_rows: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(num_rows, dimension)))


def add_given(
    log: VersionLog,
    vectors_ND: np.ndarray,
    labels: Sequence[str | None] | None = None,
    name: str = "single",
    state: State | None = None,
) -> tuple[State, list[int]]:
    """One commit of entries with these vectors (float16 [N, D]), after the newest version where no state is given."""
    labels = labels or [f"label {row % 3}" for row in range(len(vectors_ND))]
    entries = [
        NewEntry(f"/{name}/{row}.png", label, "singles", vector_D.astype(np.float32), sha256_of(vector_D), 1, 1)
        for row, (vector_D, label) in enumerate(zip(vectors_ND, labels, strict=True))
    ]
    return add_singles(log, state or log.newest(), Given(vectors_ND.shape[1]), entries, "add")
