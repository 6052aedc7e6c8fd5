"""A build that is killed at random moments and begun again goes on where it was, and answers as one left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.edits.erasure.byte_search import VectorSearch
from pipeline.errors import IndexBuildError
from pipeline.index.build import shard_steps
from pipeline.index.build.plan import IndexOptions
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory
from tests.index.test_search import clustered

OPTIONS = IndexOptions(key="IVF32,PQ16x4fs", shard_rows=1_000, target_recall=0.5)
BUILD = """
import sys
from pipeline.visual_memory import VisualMemory
from tests.index.test_resume import OPTIONS
print("begun", flush=True)
VisualMemory(sys.argv[1]).index(OPTIONS)
"""


def contents(memory: VisualMemory) -> list:
    """The hashes of every shard's files. Parameters are not compared: they are those that took least time."""
    index = memory.state().index
    assert index is not None
    assert index.recall_at_10 >= OPTIONS.target_recall
    return [[f.sha256 for f in (s.index, s.ids, s.labels, s.vectors, s.entries) if f] for s in index.shards]


class Stop(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the work end after so many marks, as an interrupt would end it."""
    left = [steps]
    create = shard_steps.ShardWork.once

    def once(self: shard_steps.ShardWork, name: str, *rest: object) -> object:
        if not left[0]:
            raise Stop
        left[0] -= 1
        return create(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_steps.ShardWork, "once", once)


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
def test_an_interrupted_build_goes_on(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    memory = make_memory(*clustered(4_000))
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        with pytest.raises(Stop):
            memory.index(OPTIONS)
    made = {path for path in memory.log.storage.walk("index") if not path.endswith(".json")}
    index = memory.index(OPTIONS).index
    assert index is not None
    used = {path for path in made if any(path.startswith(shard.ids.path[:-8]) for shard in index.shards)}
    assert len(used) >= 5 * min(steps, 4) - 5  # side files that were gathered before
    left = memory.log.storage.walk("index")
    assert not [path for path in left if "sample" in path or "begun" in path]
    assert memory.verify().sound


def test_other_options_begin_anew(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(*clustered(4_000))
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Stop):
            memory.index(OPTIONS)
    index = memory.index(IndexOptions(key="IVF16,Flat", target_recall=0.5)).index
    assert index is not None
    assert index.key == "IVF16,Flat"
    assert len(index.shards) == 1


def test_an_erasure_gives_up_builds_that_were_cut_off(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = clustered(4_000)
    memory = make_memory(vectors, labels)
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Stop):
            memory.index(OPTIONS)
    assert memory.log.storage.walk("index")
    doomed = memory.live().live_ids()[:3]
    report = memory.forget(ids=doomed.tolist(), erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert not memory.log.storage.walk("index")
    assert VectorSearch(vectors[:3]).rows_in(b"".join(p.read_bytes() for p in files_of(memory))) == []


def files_of(memory: VisualMemory) -> list[Path]:
    return [path for path in Path(memory.uri).rglob("*") if path.is_file()]


def test_what_misses_the_target_leaves_nothing(make_memory: MakeMemory) -> None:
    memory = make_memory(np.random.default_rng(0).normal(size=(3_000, 64)), ["a"] * 3_000)
    with pytest.raises(IndexBuildError, match="below the target"):
        memory.index(IndexOptions(key="IVF8,PQ2x4", target_recall=1.0))
    assert not memory.log.storage.walk("index")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_ten_random_moments(make_memory: MakeMemory) -> None:
    vectors, labels = clustered(20_000)
    memory = make_memory(vectors, labels)
    began = time.monotonic()
    assert begin(memory.uri).wait() == 0
    alone = time.monotonic() - began
    expected = contents(memory)
    moments = random.Random(0)
    for _ in range(10):
        memory.rollback(memory.state().version - 1)
        killed = begin(memory.uri)
        assert killed.stdout is not None
        killed.stdout.readline()
        time.sleep(moments.uniform(0, alone))
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert begin(memory.uri).wait() == 0
        assert contents(VisualMemory(memory.uri)) == expected
    memory.verify(clean=True)
    assert memory.verify().sound


def begin(uri: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, uri], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
    )
