"""Forgetting: exactly what was named, in the very next version, and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.errors import UnknownName, UsageError
from tests.conftest import MakeMemory, add_vectors, unit


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    generator = np.random.default_rng(0)
    made = make_memory(unit(generator.normal(size=(60, 8))), ["cat", "dog", "eel"] * 20)
    add_vectors(made.log, unit(generator.normal(size=(10, 8))), ["cat"] * 10, dataset="second", name="b")
    return made


def test_by_id_uri_label_and_dataset(memory: VisualMemory) -> None:
    ids = memory.live().live_ids()
    assert memory.forget(ids=[int(ids[1])]).forgotten == 1
    assert memory.forget(uris=["/a/2.png"]).forgotten == 1
    assert memory.forget(labels=["cat"]).forgotten == 30
    report = memory.forget(datasets=["given"])
    assert (report.forgotten, report.version) == (38, 6)
    status = memory.status()
    assert (status["entries"], status["forgotten"], status["datasets"], status["labels"]) == (0, 70, {}, 0)


def test_several_at_once_count_each_entry_once(memory: VisualMemory) -> None:
    [cat] = memory.live().matching(uri="/a/0.png").tolist()
    report = memory.forget(ids=[cat], labels=["cat", "dog"], datasets=["second"])
    assert report.forgotten == 50
    assert memory.status()["entries_by_label"] == {"eel": 20}


def test_unlearning_is_exact(memory: VisualMemory, make_memory: MakeMemory) -> None:
    generator = np.random.default_rng(0)
    queries = unit(generator.normal(size=(5, 8)))
    memory.forget(datasets=["second"])
    never = make_memory(unit(np.random.default_rng(0).normal(size=(60, 8))), ["cat", "dog", "eel"] * 20, name="never")
    for voting in ("plurality", "distance", "softmax", "rank"):
        ours = memory.classify(embeddings=queries, k=20, voting=voting, balance=0.5)
        theirs = never.classify(embeddings=queries, k=20, voting=voting, balance=0.5)
        assert [(d.votes, d.neighbors) for d in ours] == [(d.votes, d.neighbors) for d in theirs]


def test_an_older_version_still_has_it(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    assert VisualMemory(memory.uri, at=2).status()["entries"] == 70
    assert VisualMemory(memory.uri).status()["entries"] == 40


def test_a_reader_that_was_open_before_sees_it_go(memory: VisualMemory) -> None:
    reader = VisualMemory(memory.uri)
    assert reader.status()["entries"] == 70
    memory.forget(labels=["cat"])
    assert reader.status()["entries"] == 40


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"ids": [5]}, "has no entry with id 5"),
        ({"uris": ["/a/99.png"]}, "has no entry with uri '/a/99.png'"),
        ({"labels": ["cot"]}, "has no entry with label 'cot': it has cat"),
        ({"datasets": ["secnd"]}, "has no entry with dataset 'secnd': it has second"),
        ({"labels": ["cat", "cow"]}, "has no entry with label 'cow'"),
    ],
)
def test_unknown_names_forget_nothing(memory: VisualMemory, selection: dict, message: str) -> None:
    before = sorted(Path(memory.uri).rglob("*"))
    with pytest.raises(UnknownName, match=message):
        memory.forget(**selection)
    assert sorted(Path(memory.uri).rglob("*")) == before


def test_nothing_named_is_wrong_usage(memory: VisualMemory) -> None:
    with pytest.raises(UsageError, match="nothing was named"):
        memory.forget()


def test_what_is_forgotten_is_unknown(memory: VisualMemory) -> None:
    memory.forget(labels=["cat"])
    with pytest.raises(UnknownName, match="has no entry with label 'cat': it has"):
        memory.forget(labels=["cat"])
