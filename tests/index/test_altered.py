"""A fuzz of altered files: no process dies, nothing unforeseen is raised, no answer differs without a warning."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.store.lookup.frozen_digests import FrozenDigests
from pipeline.store.storage.file_refs import describe
from pipeline.store.storage.local import LocalStorage
from tests.conftest import MakeMemory, add_vectors
from tests.index.test_search import clustered

KEYS = ("IVF16,SQ8", "HNSW16", "IVF16,PQ16x4fs", "Flat", "RR32,IVF16,RaBitQ")


def outcomes(make_memory: MakeMemory, tmp_path: Path, key: str, count: int, *, deep: bool) -> Counter:
    vectors, labels = clustered(1_500)
    memory = make_memory(vectors, labels)
    memory.index(IndexOptions(key=key, shard_rows=512, target_recall=0.1))
    memory.forget(ids=memory.live().live_ids()[:30].tolist())
    memory.relabel(ids=memory.live().live_ids()[:30].tolist(), label="other")
    add_vectors(memory.log, *clustered(100, seed=5), name="fresh")
    words = [sys.executable, "-m", "tests.index.altered", str(memory.uri), str(tmp_path / "copy"), "0", str(count)]
    ran = subprocess.run(
        [*words, "deep"] if deep else words, check=False, capture_output=True, text=True, timeout=60 + 10 * count
    )
    assert ran.returncode == 0, ran.stderr[-2_000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == count
    foreseen = {"warned", "refused"} | ({"same", "different"} if deep else set())
    assert [each for each in found if each["outcome"] not in foreseen] == []
    return Counter(each["outcome"] for each in found)


@pytest.mark.parametrize(
    ("key", "count"),
    [(KEYS[0], 20), (KEYS[1], 15), (KEYS[2], 15), *(pytest.param(key, 50, marks=pytest.mark.slow) for key in KEYS)],
)
def test_what_is_altered_is_told(make_memory: MakeMemory, tmp_path: Path, key: str, count: int) -> None:
    found = outcomes(make_memory, tmp_path, key, count, deep=False)
    assert found["warned"] > found["refused"]  # by what only the labels, the forgotten and the fresh lie in


@pytest.mark.parametrize(
    ("key", "count"),
    [(KEYS[0], 20), *(pytest.param(key, 50, marks=pytest.mark.slow) for key in KEYS)],
)
def test_what_is_altered_and_hashed_anew_kills_nobody(
    make_memory: MakeMemory, tmp_path: Path, key: str, count: int
) -> None:
    """Whoever makes a memory writes its hashes: such a file answers as it says, or is told."""
    found = outcomes(make_memory, tmp_path, key, count, deep=True)
    assert found["warned"] + found["refused"] > 0


@pytest.mark.parametrize("header", ["{'descr': ((", "{'descr': '<i4', 'shape': (3", "\x00", "[" * 5_000, "1L+", "'a"])
def test_a_header_of_an_array_that_is_no_python(tmp_path: Path, header: str) -> None:
    path = tmp_path / "held.npy"
    padded = header.ljust(8_000).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(12))
    with pytest.raises(DamagedFile, match=r"held\.npy"):
        FrozenDigests(LocalStorage(tmp_path), describe("held.npy", path, 3))
