"""Conflicts carry the reason as a value, and errors cross processes whole."""

import json
import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pipeline import VisualMemory, errors
from pipeline.errors import CommitConflict, ConflictCause, FormatError, MissingFile, VisualMemoryError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.layout import commit_path
from tests.conftest import MakeMemory, add_vectors, unit

VECTORS = unit(np.random.default_rng(0).normal(size=(40, 8)))


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    return make_memory(VECTORS, ["cat", "dog"] * 20)


def test_reasons_are_values(memory: VisualMemory, tmp_path: Path) -> None:
    base = memory.state()
    memory.index(IndexOptions(key="Flat"))
    indexed = memory.state()
    memory.rollback(base.version)
    action = next(action for commit in memory.log.commits([indexed.version]) for action in commit.actions)
    memory.index(IndexOptions(key="Flat"))
    with pytest.raises(CommitConflict) as raised:
        memory.log.commit(base, "index", lambda *_: [action])
    assert raised.value.reason == "index changed"
    assert raised.value.reason in get_args(ConflictCause)
    (tmp_path / "memory" / "erasures").mkdir()
    (tmp_path / "memory" / "erasures" / f"{'0' * 16}.json").write_text("{}")
    with pytest.raises(CommitConflict) as raised:
        memory.expire(1)
    assert raised.value.reason == "erasure unfinished"


def test_a_later_format_is_told_by_numbers(memory: VisualMemory, tmp_path: Path) -> None:
    add_vectors(memory.log, VECTORS, ["eel"] * 40, name="b")
    path = tmp_path / "memory" / commit_path(2)
    path.write_text(json.dumps({"format": 7}))
    with pytest.raises(FormatError) as raised:
        VisualMemory(memory.uri).state()
    assert (raised.value.found, raised.value.reads) == (7, 2)
    [finding] = [f for f in VisualMemory(memory.uri).verify().findings if f.severity == "damage"]
    assert finding.what == "is in format 7 and this release reads format 2"


@pytest.mark.parametrize(
    "error",
    [
        CommitConflict("x: y", "at work"),
        FormatError("x: y", 2, 1),
        MissingFile("x: y", "segments/1"),
        errors.Overloaded("x: y", 3.0),
        errors.SourceError("x: y"),
    ],
)
def test_an_error_crosses_processes_whole(error: VisualMemoryError) -> None:
    by_arguments = getattr(errors, type(error).__name__)(*json.loads(json.dumps(error.args)))
    for other in (pickle.loads(pickle.dumps(error)), by_arguments):
        assert (type(other), str(other), vars(other)) == (type(error), "x: y", vars(error))
