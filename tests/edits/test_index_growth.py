"""What an add indexes by itself, and what it leaves to `index`: nothing is gathered that would be thrown away."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits import index_growth
from pipeline.errors import WorkerError
from pipeline.index.build.plan import IndexOptions
from pipeline.runner import Here
from pipeline.steps import Step
from tests.conftest import unit

DIMENSION = 16


def save(folder: Path, name: str, rows: int) -> Path:
    """A source of random vectors."""
    (folder / name).mkdir()
    np.save(folder / name / "x.npy", unit(np.random.default_rng(rows).normal(size=(rows, DIMENSION))))
    return folder / name


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An add indexes from 100 fresh entries on, and 20 where there is an index; 1,000 at most."""
    for name, value in (("MAX_FRESH", 100), ("GROWS_FROM", 20), ("MOST_INDEXED", 1_000)):
        monkeypatch.setattr(index_growth, name, value)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_growth, "build_index", lambda *_, **__: pytest.fail("it was built"))


def test_more_than_an_add_indexes_is_left_to_index(tmp_path: Path, no_build: None) -> None:
    memory = VisualMemory(tmp_path / "memory")
    memory.add(save(tmp_path, "first", 90))
    report = memory.add(save(tmp_path, "a", 950))
    assert (report.entries, report.index_error, report.state.index) == (950, None, None)
    due = str(report.index_due)
    assert due.startswith(
        "1,040 entries are in no index, more than the 1,000 that an add indexes by itself: run `index`"
    )
    assert f"{1_040 * 2 * DIMENSION:,} bytes" in due
    assert report.to_json()["index_due"] == memory.status()["index_due"] == due
    assert len(memory.search(embeddings=unit(np.ones((1, DIMENSION))), k=1_040)[0]) == 1_040
    assert list((tmp_path / "memory").glob("index/*")) == []


def test_nothing_is_due_once_it_is_indexed(tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    assert memory.add(save(tmp_path, "a", 1_100)).index_due is not None
    memory.index(IndexOptions(key="Flat"))
    assert memory.status()["index_due"] is None
    report = memory.add(save(tmp_path, "b", 300))
    assert (report.index_due, report.index_error, report.state.num_fresh) == (None, None, 0)
    assert memory.add(save(tmp_path, "c", 15)).index_due is None  # few fresh entries are searched at once


@pytest.mark.parametrize("indexed", [False, True])
def test_an_index_that_would_outgrow_its_memory_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    memory = VisualMemory(tmp_path / "memory")
    if indexed:
        memory.add(save(tmp_path, "a", 400))
        assert memory.state().index is not None
    monkeypatch.setattr(index_growth, "LATER", IndexOptions(max_memory_bytes=30_000))
    monkeypatch.setattr(index_growth, "build_index", lambda *_, **__: pytest.fail("it was built"))
    report = memory.add(save(tmp_path, "b", 800))
    assert "and the index would take about" in str(report.index_due)
    assert "of 30,000 that an add allows" in str(report.index_due)
    assert report.index_error is None


@dataclasses.dataclass
class Elsewhere(Here):
    """A runner whose steps are counted, and may fail as Ray's may."""

    steps: int = 0
    fails: bool = False

    def run_steps(self, steps: Iterable[Step]) -> Iterator[tuple[int, Any]]:
        if self.fails:
            raise WorkerError("a node died")
        for found in super().run_steps(steps):
            self.steps += 1
            yield found


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_runner_builds_and_its_failure_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    runner = Elsewhere(fails=fails)
    monkeypatch.setattr("pipeline.visual_memory.runner_of", lambda _: runner)
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(save(tmp_path, "a", 400), runner="ray")
    assert report.entries == memory.status()["entries"] == 400
    if fails:
        assert (report.index_error, report.state.index) == ("a node died", None)
        assert list((tmp_path / "memory").glob("index/*")) == []
    else:
        assert report.state.num_fresh == 0
        assert runner.steps > 0
