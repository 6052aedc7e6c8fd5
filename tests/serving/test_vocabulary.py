"""Labels of groups are numbered once, with the result of a merge of all names, and known names are not sent."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decisions.neighbor_table import LabelStatistics, merge_labels
from pipeline.index.search.open_blocks import Share
from pipeline.serving.service.group import Asked, Group, Subject
from pipeline.serving.service.vocabulary import Ordered, Vocabulary, digest_of
from tests.conftest import MakeMemory
from tests.edits.given import vectors

COUNTS = st.dictionaries(st.text(max_size=3), st.integers(1, 9), max_size=6)


def statistics(counts: dict[str, int], *, named: bool = True) -> LabelStatistics:
    labels = tuple(sorted(counts))
    sizes = np.array([counts[label] for label in labels], np.int64)
    return LabelStatistics(labels, sizes, sum(counts.values()), 20, digest_of(labels) if named else "")


@given(st.lists(st.lists(COUNTS, min_size=2, max_size=2), min_size=1, max_size=5), st.booleans())
def test_versions_are_merged_as_each_by_itself(versions: list[list[dict[str, int]]], named: bool) -> None:
    vocabulary = Vocabulary()
    for groups in versions:
        parts = [statistics(counts, named=named) for counts in groups]
        (whole, translations), (wanted, _) = vocabulary.merge(parts), merge_labels(parts)
        found = {label: int(n) for label, n in zip(whole.labels, whole.counts_C, strict=True) if n}
        assert found == dict(zip(wanted.labels, wanted.counts_C.tolist(), strict=True))
        assert (whole.live, whole.whole) == (wanted.live, wanted.whole)
        for part, translation in zip(parts, translations, strict=True):
            assert tuple(whole.labels[code] for code in translation[:-1]) == part.labels
            assert translation[-1] == -1


@given(st.lists(st.text(max_size=3), unique=True), st.lists(st.text(max_size=3), unique=True))
def test_a_digest_names_one_list_of_labels(some: list[str], others: list[str]) -> None:
    assert (digest_of(some) == digest_of(others)) == (some == others)


def test_an_order_of_other_names_is_not_taken_over() -> None:
    """A new map of a label set gives its codes other names."""
    used = np.array([0, 1])
    before = Ordered.of(["b", "a"], used)
    assert Ordered.of(["b", "a", "c"], used, before) is before
    assert Ordered.of(["x", "y"], used, before).labels == ("x", "y")
    assert Ordered.of(["b", "a", "c"], np.array([0, 2]), before).labels == ("b", "c")


def test_known_labels_are_neither_looked_up_nor_sent_again(make_memory: MakeMemory) -> None:
    memory = make_memory(vectors(30), [f"label {row % 3}" for row in range(30)])
    group = Group(memory.log.storage, Share(0, 1))
    query_1D = vectors(1).astype(np.float32)

    def asked(vocabulary: str) -> LabelStatistics:
        subject = Subject(group.prepare())
        [answer] = group.answer([Asked(subject, query_1D, 3, "labelled", vocabulary=vocabulary)])
        assert not isinstance(answer, Exception)
        assert answer.standing is not None
        return answer.standing

    first = asked("")
    assert first.labels == ("label 0", "label 1", "label 2")
    memory.forget(ids=[int(memory.live().live_ids()[0])])
    again = asked(first.vocabulary)
    assert again.labels == ()
    assert (again.vocabulary, again.counts_C.tolist()) == (first.vocabulary, [9, 10, 10])
    memory.forget(labels=["label 1"])
    other = asked(first.vocabulary)
    assert (other.labels, other.counts_C.tolist()) == (("label 0", "label 2"), [9, 10])


def test_a_version_with_the_same_labels_costs_no_names() -> None:
    """Sixteen groups of 100,000 labels took a look-up for each name at every version."""
    labels = tuple(f"label {number:06d}" for number in range(100_000))
    digest = digest_of(labels)
    parts = [LabelStatistics(labels, np.full(len(labels), n), 1, 1, digest) for n in range(16)]
    vocabulary = Vocabulary()
    vocabulary.merge(parts)
    took, took_by_name = [], []
    for _ in range(3):
        began = time.process_time()
        whole, _ = vocabulary.merge(parts)
        took.append(time.process_time() - began)
        began = time.process_time()
        wanted, _ = merge_labels(parts)
        took_by_name.append(time.process_time() - began)
    assert np.array_equal(whole.counts_C, wanted.counts_C)
    assert min(took) < min(took_by_name) / 4, (took, took_by_name)
