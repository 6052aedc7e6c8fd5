"""A shard that is damaged: it is named, the others answer, and a disk that fills loses nothing."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DamagedFile
from pipeline.index.build.plan import IndexOptions
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory
from tests.index.test_search import clustered

OPTIONS = IndexOptions(key="IVF16,SQ8", shard_rows=1_024, target_recall=0.5)
FILLED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # a module cut short by the limit would be imported by the next process
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["visual-memory", "index", sys.argv[2], "--key", "IVF16,SQ8", "--shard-rows", "1024"]
from jobs.cli import main
main()
"""


def damaged(memory: VisualMemory, name: str, how: str) -> tuple[VisualMemory, Path]:
    """The memory as another process opens it, after a file of its second shard was damaged."""
    index = memory.state().index
    assert index is not None
    file = getattr(index.shards[1], name)
    path = Path(memory.uri) / file.path
    if how == "missing":
        path.unlink()
    elif how == "short":
        os.truncate(path, file.num_bytes - 7)
    else:
        content = bytearray(path.read_bytes())
        content[-4] ^= 255
        path.write_bytes(content)
    return VisualMemory(memory.uri), path


@pytest.mark.parametrize(
    ("name", "how"),
    [("index", "short"), ("index", "missing"), ("vectors", "short"), ("ids", "altered"), ("labels", "missing")],
)
def test_the_rest_answers(make_memory: MakeMemory, caplog: pytest.LogCaptureFixture, name: str, how: str) -> None:
    vectors, labels = clustered(3_000)
    memory = make_memory(vectors, labels)
    memory.index(OPTIONS)
    lost = set(memory.live().blocks[1].ids_N.tolist())
    memory, path = damaged(memory, name, how)
    queries = vectors[::50].astype(np.float32)
    with caplog.at_level(logging.WARNING):
        decisions = memory.classify(embeddings=queries, k=20)
    assert path.name in caplog.text
    assert "index --rebuild" in caplog.text
    assert {(d.shards_answered, d.shards_total) for d in decisions} == {(2, 3)}
    assert all(len(d.neighbors) == 20 and not lost & {n.id for n in d.neighbors} for d in decisions)
    assert all(len(found) == 5 for found in memory.search(embeddings=queries, k=5))
    with pytest.raises(DamagedFile, match=path.name):
        memory.live()
    assert memory.status()["entries"] == 3_000
    assert memory.forget(ids=[min(lost)]).forgotten == 1, "no shard is opened, so a damaged one holds up nobody"
    assert memory.relabel(ids=[max(lost)], label="other").relabelled == 1
    assert (memory.status()["entries"], memory.status()["entries_by_label"]["other"]) == (2_999, 1)
    memory.index(IndexOptions(key="IVF16,SQ8", shard_rows=1_024, target_recall=0.5, rebuild=True))
    [decision] = memory.classify(embeddings=queries[:1])
    assert (decision.shards_answered, decision.shards_total) == (3, 3)


@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_disk_that_fills_midway(make_memory: MakeMemory, limit: int) -> None:
    vectors, labels = clustered(3_000)
    memory = make_memory(vectors, labels)
    before = memory.state()
    filled = subprocess.run(
        [sys.executable, "-c", FILLED, str(limit), str(memory.uri)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert filled.returncode == 1, filled.stderr
    assert "Traceback" not in filled.stderr
    assert "large" in filled.stderr or "written" in filled.stderr
    assert VisualMemory(memory.uri).state() == before
    after = VisualMemory(memory.uri)
    index = after.index(OPTIONS).index
    assert index is not None
    assert len(index.shards) == 3
    assert not after.verify(clean=True).findings
