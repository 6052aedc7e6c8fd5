"""Leave-one-out without copies: against comparing every entry with every other one."""

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.leave_one_out import search_others
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.questions import evaluation, others
from pipeline.store.lookup.digests import Digests
from pipeline.visual_memory import VisualMemory
from tests.conftest import MakeMemory, unit
from tests.edits.given import add_given


def reference(vectors_ND: np.ndarray, ids: np.ndarray, digests: np.ndarray, k: int) -> list[list[int]]:
    similarities = vectors_ND.astype(np.float64) @ vectors_ND.astype(np.float64).T
    found = []
    for row in range(len(ids)):
        others = np.flatnonzero(digests != digests[row])
        order = np.lexsort((ids[others], -similarities[row, others].astype(np.float32)))
        found.append(ids[others[order[:k]]].tolist())
    return found


def found_by(memory: VisualMemory, k: int) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    live, digests = memory.live(), Digests(memory.log.storage, memory.state())
    ids = live.live_ids(labelled=True)
    found = search_others(live, digests, live.vectors_of(ids), k, ids)
    assert found.ids_QK.shape[1] >= k or len(ids) <= k
    return ids, [[entry_id for entry_id in row if entry_id >= 0] for row in found.ids_QK.tolist()], digests.of(ids)


@pytest.mark.parametrize(
    "copies",
    [
        {0: 1},  # one image twice
        dict.fromkeys(range(60), 1),  # all of them twice: a folder copied
        {3: 90, 7: 1, 8: 40},  # more copies than neighbours asked for
        {row: row % 5 for row in range(60)},
    ],
)
def test_copies_are_left_out_and_others_take_their_place(copies: dict[int, int], make_memory: MakeMemory) -> None:
    base = unit(np.random.default_rng(0).normal(size=(60, 8)))
    rows = np.concatenate([np.arange(60), *([row] * number for row, number in copies.items())]).astype(int)
    rows = np.random.default_rng(1).permutation(rows)
    memory = make_memory(base[rows], [f"class {row % 3}" for row in rows])
    ids, found, digests = found_by(memory, 10)
    assert found == reference(base[rows], ids, digests, 10)


def test_without_copies_the_same_is_found_as_by_leaving_out_the_entry_itself(make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(400, 8))), ["a"] * 400)
    live = memory.live()
    ids = live.live_ids()
    plain = live.search(live.vectors_of(ids), 20, Restrictions("labelled", own_Q=ids))
    _, found, _ = found_by(memory, 20)
    assert found == plain.ids_QK.tolist()


def test_near_images_that_are_no_copies_stay(make_memory: MakeMemory) -> None:
    base = unit(np.random.default_rng(0).normal(size=(30, 8)))
    near = unit(base.astype(np.float32) + 1e-3)
    assert not (near == base).all(axis=1).any()
    memory = make_memory(np.concatenate([base, near]), ["a"] * 60)
    ids, found, _ = found_by(memory, 5)
    assert all(neighbors[0] == ids[(row + 30) % 60] for row, neighbors in enumerate(found))


def test_a_memory_of_copies_alone_has_no_others(make_memory: MakeMemory) -> None:
    vectors_ND = np.repeat(unit(np.ones((1, 8))), 300, axis=0)
    memory = make_memory(vectors_ND, ["a"] * 300)
    _, found, _ = found_by(memory, 10)
    assert found == [[]] * 300
    scores = memory.evaluate_leave_one_out(ks=[1, 10])
    assert {percent for by_k in scores.accuracy.values() for percent in by_k.values()} == {0.0}


def test_copies_among_single_adds_and_forgotten_entries(make_memory: MakeMemory) -> None:
    base = unit(np.random.default_rng(0).normal(size=(40, 8)))
    memory = make_memory(base, ["a"] * 40)
    add_given(memory.log, base[:20], ["b"] * 20)
    memory.forget(ids=memory.live().live_ids()[:5].tolist())
    ids, found, digests = found_by(memory, 12)
    live = memory.live()
    assert found == reference(live.vectors_of(ids), ids, digests, 12)


@pytest.mark.parametrize("refine", ["float16", "none"])
def test_copies_are_left_out_where_an_index_answers(refine: str, make_memory: MakeMemory) -> None:
    base = unit(np.random.default_rng(0).normal(size=(500, 16)))
    rows = np.concatenate([np.arange(500), np.arange(100), np.full(40, 3)])
    memory = make_memory(base[rows], ["a"] * len(rows))
    memory.index(IndexOptions(key="IVF1,SQ8" if refine == "none" else "IVF1,Flat", refine=refine))
    ids, found, digests = found_by(memory, 10)
    of = dict(zip(ids.tolist(), digests.tolist(), strict=True))
    assert all(len(neighbors) == 10 for neighbors in found)
    assert not any(of[own] == of[other] for own, row in zip(ids.tolist(), found, strict=True) for other in row)


def test_leave_one_out_of_a_doubled_memory_says_what_it_said_of_the_single_one(make_memory: MakeMemory) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    labels = rng.integers(0, 4, 120)
    base = unit(centres[labels] + 1.2 * rng.normal(size=(120, 8)))
    names = [f"class {label}" for label in labels]
    once = make_memory(base, names, "once").evaluate_leave_one_out(ks=[1])
    twice = make_memory(np.concatenate([base, base]), names * 2, "twice").evaluate_leave_one_out(ks=[1])
    assert once.accuracy["plurality"][1] < 95
    assert twice.accuracy["plurality"] == once.accuracy["plurality"]
    chosen = make_memory(np.concatenate([base, base]), names * 2, "auto")
    assert chosen.evaluate_leave_one_out(ks=[1], balance="auto").num_queries == 240


def test_a_sample_estimates_the_accuracy_of_all_within_its_error(
    make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3_000)
    vectors_ND = unit(rng.normal(size=(4, 8))[labels] + 1.2 * rng.normal(size=(3_000, 8)))
    memory = make_memory(vectors_ND, [f"class {label}" for label in labels])
    whole = memory.evaluate_leave_one_out(ks=[1, 10])
    assert (whole.num_queries, whole.labelled, whole.sampling_error) == (3_000, 3_000, None)
    asked_at_once: list[int] = []
    vectors_of = LiveEntries.vectors_of
    monkeypatch.setattr(
        LiveEntries, "vectors_of", lambda self, ids: (asked_at_once.append(len(ids)), vectors_of(self, ids))[1]
    )
    sample = memory.evaluate_leave_one_out(ks=[1, 10], sample=1_500)
    assert (sample.num_queries, sample.labelled) == (1_500, 3_000)
    assert sum(asked_at_once) == 1_500
    assert max(asked_at_once) <= others.QUERIES_AT_ONCE
    assert sample.sampling_error is not None
    for voting, by_k in whole.accuracy.items():
        for k, percent in by_k.items():
            error = sample.sampling_error[voting][k]
            assert 0 < error < 3
            assert 0 < abs(sample.accuracy[voting][k] - percent) < 2 * error
    assert memory.evaluate_leave_one_out(ks=[1, 10], sample=1_500) == sample
    assert memory.evaluate_leave_one_out(ks=[1, 10], sample="all") == whole
    assert memory.evaluate_leave_one_out(ks=[1, 10], sample=0) == whole
    assert memory.evaluate_leave_one_out(ks=[1, 10], sample=9_000) == whole
    monkeypatch.setattr(evaluation, "SAMPLED_ABOVE", 2_999)
    monkeypatch.setattr(evaluation, "DEFAULT_SAMPLE", 1_500)
    assert memory.evaluate_leave_one_out(ks=[1, 10]) == sample
    monkeypatch.setattr(evaluation, "SAMPLED_ABOVE", 3_000)
    assert memory.evaluate_leave_one_out(ks=[1, 10]) == whole


@pytest.mark.parametrize("size", [-1, 0.5, "half", True])
def test_an_impossible_sample_is_refused(size: object, make_memory: MakeMemory) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(9, 8))), ["a"] * 9)
    with pytest.raises(UsageError, match="`sample` .* give 1 or more, or all"):
        memory.evaluate_leave_one_out(sample=size)  # type: ignore[arg-type]


def test_a_doubled_memory_chooses_the_balance_of_the_single_one(make_memory: MakeMemory) -> None:
    """An entry's copy would decide for it under every balance, so that none seemed as good as any."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [150, 120, 100, 80, 12, 8])
    base = unit(rng.normal(size=(6, 8))[labels] + 0.9 * rng.normal(size=(len(labels), 8)))
    names = [f"class {label}" for label in labels]
    chosen = []
    for copies in (1, 2, 4):
        memory = make_memory(np.concatenate([base] * copies), names * copies, f"memory {copies}")
        chosen.append(memory.classify(embeddings=base[:1], k=1, balance="auto", voting="plurality")[0].balance)
        evaluated = memory.evaluate_leave_one_out(ks=[1, 20 * copies], balance=1.0, votings=["plurality"])
        assert evaluated.accuracy["plurality"][1] < 90
    assert len({*chosen}) == 1
