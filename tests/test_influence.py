"""Influence: what is told of a change is, to the last digit, what the changed memory answers."""

import numpy as np
import pytest

from pipeline import SourceError, UnknownName, UsageError, VisualMemory
from pipeline.decisions.evaluation import Score
from pipeline.index.build.plan import IndexOptions
from pipeline.questions.influence import InfluenceReport
from tests.conftest import MakeMemory
from tests.test_suspects import classes

KEYS = [None, "Flat", "IVF16,SQ8", "IVF16,PQ8x4fs", "HNSW16"]


@pytest.fixture(params=KEYS, ids=str)
def memory(request: pytest.FixtureRequest, make_memory: MakeMemory) -> VisualMemory:
    """600 entries of four classes that overlap, a tenth without a label; fresh, or in an index."""
    vectors_ND, labels = classes(np.random.default_rng(0), 4, 150, spread=1.2)
    told = [None if row % 10 == 9 else label for row, label in enumerate(labels)]
    memory = make_memory(vectors_ND, told)
    if request.param is not None:
        memory.index(IndexOptions(key=request.param, target_recall=0.5))
    return memory


def scored(memory: VisualMemory, k: int = 20) -> Score:
    found = memory.evaluate_leave_one_out(ks=(k,), votings=("softmax",))
    by_class = {memory.live().labels.index(label): share for label, share in found.by_label["softmax"][k].items()}
    return Score(found.accuracy["softmax"][k], found.balanced_accuracy["softmax"][k], by_class)


def assert_told(report: InfluenceReport, before: Score, after: Score) -> None:
    assert (report.before, report.after) == (before, after)


def test_forgetting_an_entry_gives_what_was_told(memory: VisualMemory) -> None:
    ids = memory.live().live_ids(labelled=True)[[3, 77, 240]].tolist()
    before = scored(memory)
    report = memory.influence(ids=ids, k=20, voting="softmax", limit=10_000)
    assert report.entries == 3
    assert report.num_questions == report.asked_of == 540
    assert report.voted_in > 3
    assert 0 < report.mean_share < 1
    memory.forget(ids=ids)
    assert_told(report, before, scored(memory))
    assert [after for _, after in report.by_label.values()] == list(scored(memory).by_class.values())
    assert all(each.id not in ids for each in report.swayed)
    assert report.flips == sum(each.flips for each in report.swayed)


def test_forgetting_a_class_gives_what_was_told(memory: VisualMemory) -> None:
    before = scored(memory)
    report = memory.influence(label="class 2", k=20, voting="softmax")
    assert report.flips > 0
    memory.forget(labels=["class 2"])
    assert_told(report, before, scored(memory))


def test_another_label_gives_what_was_told(memory: VisualMemory) -> None:
    ids = memory.live().live_ids(labelled=True)[:40].tolist()
    before = scored(memory)
    report = memory.influence(assume=dict.fromkeys(ids, "class 9"), k=20, voting="softmax")
    memory.relabel(ids=ids, label="class 9")
    assert_told(report, before, scored(memory))


def test_a_class_with_another_name_is_told_as_right_as_before(memory: VisualMemory) -> None:
    live = memory.live()
    ids = [int(i) for i in live.live_ids(labelled=True) if live.labels[live.codes_of(np.array([i]))[0]] == "class 3"]
    report = memory.influence(assume=dict.fromkeys(ids, "class 9"), k=20, voting="softmax")
    assert report.flips > 50
    assert (report.mended, report.spoiled) == (0, 0)
    assert report.before is not None
    assert report.after is not None
    assert report.before.accuracy == report.after.accuracy


def test_a_weight_of_none_is_as_if_the_vote_was_missing(make_memory: MakeMemory) -> None:
    vectors_ND, labels = classes(np.random.default_rng(1), 3, 30, spread=1.0)
    memory = make_memory(vectors_ND, labels)
    [first, *_] = memory.live().live_ids().tolist()
    report = memory.influence(weigh={first: 0.0}, k=5)
    assert report.before is not None
    unchanged = memory.influence(weigh={first: 1.0}, k=5)
    assert unchanged.flips == 0
    assert unchanged.before == unchanged.after == report.before
    decisions = memory.classify(embeddings=memory.live().vectors_of(np.array([first])), k=5, weigh={first: 0.0})
    assert decisions[0].neighbors[0].weight == 0.0


def test_what_it_votes_in_is_told_with_its_share(make_memory: MakeMemory) -> None:
    vectors_ND, labels = classes(np.random.default_rng(2), 2, 10, spread=0.1)
    memory = make_memory(vectors_ND, labels)
    ids = memory.live().live_ids()
    report = memory.influence(ids=[int(ids[0])], k=3, voting="plurality", limit=100)
    for each in report.swayed:
        [decision] = memory.classify(
            embeddings=memory.live().vectors_of(np.array([each.id])), k=3, voting="plurality", exclude=[each.id]
        )
        votes = {n.id: n.weight for n in decision.neighbors}
        assert votes[int(ids[0])] == pytest.approx(each.share)
        assert each.before == decision.label
    assert report.voted_in == len(report.swayed)


def test_a_sample_says_so(make_memory: MakeMemory) -> None:
    vectors_ND, labels = classes(np.random.default_rng(3), 3, 40)
    memory = make_memory(vectors_ND, labels)
    report = memory.influence(label="class 1", sample=50)
    assert (report.num_questions, report.asked_of) == (50, 120)


def test_what_cannot_be_asked(make_memory: MakeMemory) -> None:
    vectors_ND, labels = classes(np.random.default_rng(4), 2, 5)
    memory = make_memory(vectors_ND, labels)
    with pytest.raises(UsageError, match="name what to suppose"):
        memory.influence()
    with pytest.raises(UsageError, match="name what to suppose"):
        memory.influence(ids=[1], label="class 0")
    with pytest.raises(UnknownName, match="no entry with id 7"):
        memory.influence(ids=[7])
    with pytest.raises(UnknownName, match="no entry of the memory"):
        memory.influence(label="none")
    with pytest.raises(UsageError, match="voting"):
        memory.influence(label="class 0", voting="loud")  # type: ignore[arg-type]
    first = int(memory.live().live_ids()[0])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="weight"):
            memory.influence(weigh={first: weight})
    with pytest.raises(UsageError, match="is empty"):
        memory.influence(assume={first: " "})
    with pytest.raises(SourceError):
        make_memory(vectors_ND, [None] * 10, "unlabelled").influence(ids=[1])
