"""Rows found by names, and labels by rows, as a dictionary and a list have them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.images.labels import name_index
from pipeline.images.labels.name_index import LabelColumn, NameIndex

names_of_few = st.lists(st.text(st.sampled_from("abé\U0001f600/"), max_size=3), max_size=40)


@given(names_of_few, st.integers(1, 7))
def test_the_first_row_of_each_name_is_found(names: list[str], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name_index, "CHUNK_ROWS", at_once)
        index = NameIndex(names)
    first = {name: names.index(name) for name in names}
    assert {name: index.get(name) for name in names} == first
    assert (index.get("absent"), len(index)) == (None, len(names))
    assert [*index.repeated()] == [(row, first[name]) for row, name in enumerate(names) if first[name] != row]


def test_names_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_index, "hash", len, raising=False)
    index = NameIndex(["aa", "bb", "c", "aa", "dd"])
    assert [index.get(name) for name in ("aa", "bb", "c", "dd", "ee")] == [0, 1, 2, 4, None]
    assert [*index.repeated()] == [(3, 0)]


@given(st.lists(st.none() | st.sampled_from(["cat", "dog", "é"]), max_size=30), st.data())
def test_labels_of_rows(labels: list[str | None], data: st.DataObject) -> None:
    column = LabelColumn(labels)
    assert [column[row] for row in range(len(column))] == labels
    rows = data.draw(st.lists(st.integers(-1, len(labels) - 1), max_size=20))
    found = column.of_rows(np.array(rows, np.int64))
    assert found.to_pylist() == [None if row < 0 else labels[row] for row in rows]
