"""Samples drawn evenly from the classes: against a slow reference, and the same however the entries are parted."""

from collections import Counter

import numpy as np
import pytest

from pipeline.index.search.live_entries import LiveEntries
from pipeline.index.search.open_blocks import Share
from pipeline.index.search.sampling import QUERIES, SCRAMBLING, Sample, asked_classes, draw, draw_simply, each_of
from pipeline.store.lookup.digests import Digests
from tests.conftest import MakeMemory, add_vectors, sha256_of, unit
from tests.store.counting import CountingStorage


def reference(live: LiveEntries, each: int) -> dict[str, list[int]]:
    """By label, of all entries with it those whose scrambled ids are least."""
    by_label: dict[str, list[int]] = {}
    for entry_id in live.live_ids(labelled=True).tolist():
        label = live.labels[int(live.codes_of(np.array([entry_id]))[0])]
        by_label.setdefault(label, []).append(entry_id)
    return {
        label: sorted(ids, key=lambda entry_id: entry_id * int(SCRAMBLING) % 2**64)[:each]
        for label, ids in by_label.items()
    }


def by_label(sample: Sample, labels: tuple[str, ...]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry_id, code in zip(sample.ids_N.tolist(), sample.codes_N.tolist(), strict=True):
        found.setdefault(labels[code], []).append(entry_id)
    return found


@pytest.mark.parametrize("each", [1, 3, 40])
def test_a_sample_is_what_sorting_every_entry_gives(each: int, make_memory: MakeMemory) -> None:
    rng = np.random.default_rng(each)
    labels = [f"class {int(number)}" if number < 30 else None for number in rng.geometric(0.1, 900)]
    memory = make_memory(unit(rng.normal(size=(900, 8))), labels)
    memory.forget(labels=["class 2"])
    live = memory.live()
    assert by_label(draw(live, each), live.labels) == reference(live, each)


def test_a_sample_is_the_same_however_the_entries_are_parted(make_memory: MakeMemory) -> None:
    rng = np.random.default_rng(0)
    memory = make_memory(unit(rng.normal(size=(300, 8))), [f"class {row % 7}" for row in range(300)])
    for name in "bcd":
        more = unit(rng.normal(size=(5_000, 8)))
        add_vectors(memory.log, more, [f"class {row % 11}" for row in range(5_000)], name=name)
    whole = memory.live()
    parts = [LiveEntries.open(memory.log.storage, memory.state(), share=Share(number, 3)) for number in range(3)]
    together: dict[str, list[int]] = {}
    for part in parts:
        for label, ids in by_label(draw(part, 5), part.labels).items():
            together.setdefault(label, []).extend(ids)
    ids = np.array([entry_id for ids in together.values() for entry_id in ids])
    names = [label for label, ids in together.items() for _ in ids]
    codes = np.array([whole.labels.index(name) for name in names], np.int32)
    assert by_label(Sample(ids, codes, np.empty((len(ids), 0))).least(5), whole.labels) == reference(whole, 5)


@pytest.mark.parametrize("size", [1, 50, 400, 5_000])
def test_a_simple_sample_takes_every_entry_alike(size: int, make_memory: MakeMemory) -> None:
    rng = np.random.default_rng(size)
    labels = [f"class {int(number)}" if number < 20 else None for number in rng.geometric(0.1, 3_000)]
    memory = make_memory(unit(rng.normal(size=(3_000, 8))), labels)
    memory.forget(labels=["class 2"])
    live = memory.live()
    labelled = live.live_ids(labelled=True)
    ids_N, codes_N = draw_simply(live, size)
    assert len(ids_N) == len(set(ids_N.tolist())) == min(size, len(labelled))
    assert set(ids_N.tolist()) <= set(labelled.tolist())
    assert codes_N.tolist() == live.codes_of(ids_N).tolist()
    assert (np.diff(ids_N) > 0).all()  # in block order, so that vectors of a batch lie near each other
    shares_C = np.bincount(codes_N, minlength=len(live.labels)) / len(ids_N)
    of_all_C = live.label_counts() / len(labelled)
    assert (np.abs(shares_C - of_all_C) <= 5 * np.sqrt(of_all_C / len(ids_N)) + 1 / len(ids_N)).all()


def test_a_simple_sample_stays_when_entries_are_added(make_memory: MakeMemory) -> None:
    rng = np.random.default_rng(0)
    memory = make_memory(unit(rng.normal(size=(4_000, 8))), ["a"] * 4_000)
    before, _ = draw_simply(memory.live(), 400)
    add_vectors(memory.log, unit(rng.normal(size=(400, 8))), ["b"] * 400, name="more")
    after, _ = draw_simply(memory.live(), 400)
    assert len(np.intersect1d(before, after)) > 300


def test_of_very_many_classes_some_are_asked_and_always_the_same() -> None:
    labels = [f"class {number}" for number in range(3 * QUERIES)]
    counts_C = np.ones(len(labels), np.int64)
    assert each_of(counts_C) == 1
    asked = {labels[code] for code in asked_classes(labels, counts_C)}
    assert len(asked) == QUERIES
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    assert {shuffled[code] for code in asked_classes(shuffled, counts_C)} == asked
    few = [label for label in labels if int(label.split()[1]) % 2]  # a share of the memory has some of the classes
    assert {few[code] for code in asked_classes(few, np.ones(len(few), np.int64))} >= asked & set(few)
    counts_C[QUERIES:] = 0
    assert asked_classes(labels, counts_C).tolist() == list(range(QUERIES))


def test_sampling_keeps_little_of_a_large_memory(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    memory = make_memory(unit(rng.normal(size=(40_000, 4))), [f"class {row % 2}" for row in range(40_000)])
    live, seen = memory.live(), []
    least = Sample.least
    monkeypatch.setattr(Sample, "least", lambda self, each: (seen.append(len(self.ids_N)), least(self, each))[1])
    assert len(draw(live, 10).ids_N) == 20
    assert seen[0] < 400


def test_digests_are_those_of_the_files_of_entries(make_memory: MakeMemory) -> None:
    vectors_ND = unit(np.random.default_rng(0).normal(size=(50, 8)))
    memory = make_memory(vectors_ND, ["a"] * 50)
    ids = memory.live().live_ids()
    found = Digests(memory.log.storage, memory.state()).of(ids[::-1].reshape(5, 10))
    wanted = [int(sha256_of(vector_D)[:16], 16) for vector_D in vectors_ND]
    assert found.ravel()[::-1].tolist() == wanted
    assert Counter(found.ravel().tolist()).most_common(1)[0][1] == 1


def test_digests_hold_a_bounded_number_of_rows(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.lookup.digests.KEPT_BYTES", 16 * 1_000)
    vectors_ND = unit(np.random.default_rng(0).normal(size=(5_000, 8)))
    memory = make_memory(vectors_ND, ["a"] * 5_000)
    files, ids_N = memory.state().entries_files(), np.sort(memory.live().live_ids())
    wanted = [int(sha256_of(vector_D)[:16], 16) for vector_D in vectors_ND]
    storage = CountingStorage(memory.log.storage)
    digests = Digests(storage, memory.state())
    found = [digest for start in range(0, 5_000, 50) for digest in digests.of(ids_N[start : start + 50]).tolist()]
    assert found == wanted
    assert storage.counts.requests["local_path"] == len(files) > 16, "each file once"
    assert digests.of(ids_N).tolist() == wanted
    assert 0 < digests._read.num_bytes <= 16 * 1_000
