"""Runs of ids say what the ids written out say; verify holds few shards at a time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.store.checks import file_contents
from pipeline.store.checks.id_runs import IdRuns
from tests.conftest import MakeMemory
from tests.edits.given import vectors

IDS = st.lists(st.integers(0, 30), max_size=20)


def runs(ids: list[int]) -> IdRuns:
    return IdRuns.of(np.array(ids, np.int64))


@given(IDS)
def test_runs_are_the_ids_in_their_order(ids: list[int]) -> None:
    found = runs(ids)
    assert found.ids_N.tolist() == ids
    assert len(found) == len(ids)
    assert found.ascend == (sorted(set(ids)) == ids)
    assert found.within(5, 20).ids_N.tolist() == [i for i in ids if 5 <= i <= 20]
    assert sorted(found.ordered().ids_N.tolist()) == sorted(ids)


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.integers(0, 5))
def test_sets_of_ids_are_compared_by_their_runs(some: set[int], others: set[int], pieces: int) -> None:
    shuffled = [runs(sorted(others)[start :: pieces + 1]) for start in range(pieces + 1)]
    one, other = runs(sorted(some)).ordered(), IdRuns.joined(shuffled).ordered()
    assert other.ascend
    assert one.same_as(other) == (some == others)
    assert one.hold(other) == (others <= some)
    assert not IdRuns.joined([other, other]).ordered().ascend or not others


def test_the_runs_of_a_part_are_few() -> None:
    ids = np.delete(np.arange(7 << 39, (7 << 39) + 16_384), [5, 900])
    assert len(IdRuns.of(ids).first_R) == 3
    assert IdRuns.of(ids).segments() == {7}


def test_verify_holds_few_shards_at_a_time(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(vectors(4_096), [f"label {row % 3}" for row in range(4_096)])
    memory.index(IndexOptions(key="Flat", shard_rows=256))
    monkeypatch.setattr(file_contents, "FILES_AT_ONCE", 2)
    held: list[int] = []
    checked = file_contents.Contents._checked

    def counted(self: file_contents.Contents, file: file_contents.FileRef) -> list:
        held.append(sum(side.ids_N is not None for side in self._shards))
        return checked(self, file)

    monkeypatch.setattr(file_contents.Contents, "_checked", counted)
    report = VisualMemory(memory.uri).verify()
    assert report.findings == ()
    assert len(memory.state().index.shards) == 16  # type: ignore[union-attr]
    assert len(held) == len(
        {*memory.log.storage.walk("segments"), *memory.log.storage.walk("counts")}
    ) + 16 * 4 - _descriptions(memory)
    assert max(held) <= 3
    shard = memory.state().index.shards[9]  # type: ignore[union-attr]
    codes = Path(memory.uri.removeprefix("file://")) / shard.labels.path
    data = codes.read_bytes()
    codes.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    assert any(finding.path == shard.labels.path for finding in VisualMemory(memory.uri).verify().findings)


def _descriptions(memory: VisualMemory) -> int:
    """The files of segments that no version names: descriptions and marks."""
    return sum(path.endswith(".json") for path in memory.log.storage.walk("segments"))
