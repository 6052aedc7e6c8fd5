"""Lies: what a wrong writer could commit, each file as its version tells, is found although every hash fits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.store.checks.findings import Finding
from pipeline.store.layout import commit_path
from pipeline.store.log.records import LabelSet, Single
from pipeline.store.log.single_adds import encode_vector
from pipeline.store.log.state import AddSingles, SetState, State
from pipeline.store.segments.reservations import reserve_for_singles
from pipeline.store.storage.file_refs import RowsFile
from pipeline.store.storage.leases import Lease
from pipeline.store.tables.labels import label_rows, write_label_map, write_labels
from pipeline.store.tables.schemas import embedding_column, embedding_matrix, read_table, write_rows
from pipeline.store.tables.tombstones import write_tombstones
from tests.conftest import MakeMemory, unit
from tests.store.planned import add_planned
from tests.store.test_verify import in_steps

Update = dict[str, Any]


@dataclass
class Liar:
    """Commits states that are not true of a small memory: 200 entries under an index, 20 fresh ones, all forgotten."""

    memory: VisualMemory
    lease: Lease

    @property
    def state(self) -> State:
        return self.memory.log.latest()

    def commit(self, update: Update) -> list[Finding]:
        state = self.state.model_copy(update=update)
        self.memory.log.commit(self.state, "lie", lambda *_: [SetState(why="compact", state=state)])
        report = VisualMemory(self.memory.uri).verify()
        assert in_steps(self.memory.uri) == {*report.findings}
        return [finding for finding in report.findings if finding.severity == "damage"]

    def segment(self, **update: object) -> Update:
        """Another first segment, searched exactly."""
        first, *others = self.state.segments
        return {"segments": (first.model_copy(update=update), *others), "index": None}

    def file(self, change: Callable[[pa.Table], pa.Table]) -> Update:
        """Another first entries file, described as it is."""
        first, *rest = self.state.segments[0].entries
        return self.segment(entries=(self.written(change(read_table(self.memory.log.storage, first))), *rest))

    def written(self, table: pa.Table) -> RowsFile:
        return write_rows(self.memory.log.storage, f"packs/{self.lease.nonce}-{table.nbytes}.parquet", table)

    def shard(self, **update: object) -> Update:
        index = self.state.index
        assert index is not None
        return {"index": index.model_copy(update={"shards": (index.shards[0].model_copy(update=update),)})}

    def single(self, **update: object) -> Single:
        fields = {
            "id": 3 << 39,
            "uri": "/s.png",
            "label": None,
            "dataset": "s",
            "embedding": encode_vector(np.eye(8)[0]),
            "sha256": "0" * 64,
            "width": 1,
            "height": 1,
        }
        return Single(**(fields | update))

    def pending(self, *singles: Single, next_row: int = 1) -> Update:
        """Single adds that their segment tells of."""
        assert self.state.identity is not None
        if self.state.singles is None:
            assert reserve_for_singles(self.memory.log.storage) == 3
        added = AddSingles(
            segment=3, next_row=next_row, identity=self.state.identity.fingerprint, entries=tuple(singles)
        )
        after = self.state.after(added)
        return {name: getattr(after, name) for name in ("segments", "singles", "pending")}

    def tombstones(self, *ids: int) -> Update:
        written = write_tombstones(self.memory.log.storage, self.lease, 1, np.array(ids, np.int64))
        return {"tombstones": (*self.state.tombstones, written)}

    def labels(self, entry_id: int, label_set: str | None) -> Update:
        rows = label_rows(np.array([entry_id]), ["x"], label_set)
        return {"labels": (write_labels(self.memory.log.storage, self.lease, 1, rows),)}

    def map(self, table_of: dict[str, str]) -> Update:
        file = write_label_map(self.memory.log.storage, self.lease, 1, table_of)
        return {"label_sets": (LabelSet(name="s", map=file.model_copy(update={"rows": 5})),)}


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    generator = np.random.default_rng(0)
    memory = VisualMemory(tmp_path / "memory")
    add_planned(memory.log, unit(generator.normal(size=(200, 8))), ["cat", "dog"] * 100)
    memory.index(IndexOptions(key="Flat"))
    add_planned(memory.log, unit(generator.normal(size=(20, 8))), ["eel"] * 20, name="b")
    memory.forget(labels=["eel"])
    assert VisualMemory(memory.uri).verify().findings == ()
    with Lease(memory.log.storage, "lie") as lease:
        yield Liar(memory, lease)


FIRST = 1 << 39

LIES: list[tuple[Callable[[Liar], Update], str]] = [
    (lambda liar: liar.segment(planned=201), "where 201 were planned"),
    (lambda liar: liar.segment(num_entries=199, num_rejected=1), "tells of 199 entries in segment 1 where 200 are"),
    (lambda liar: liar.segment(entries=liar.state.segments[0].entries[:1]), "in segment 1 where 128 are there"),
    (lambda liar: liar.segment(entries=liar.state.segments[0].entries[::-1]), "overlap or do not ascend"),
    (lambda liar: liar.segment(entries=liar.state.segments[0].entries[:1] * 2), "overlap or do not ascend"),
    (lambda liar: liar.segment(identity="f" * 64), "of another encoder"),
    (lambda liar: liar.segment(plan=liar.state.segments[1].plan), "a plan of segment 1 with ids of another"),
    (lambda liar: liar.segment(plan=None), "tells of 200 planned images in segment 1 where 0 are there"),
    (lambda liar: liar.segment(entries=()), "tells of 200 entries in segment 1 where 0 are there"),
    (lambda liar: {"segments": liar.state.segments + liar.state.segments[:1]}, "holds a segment twice"),
    (lambda liar: {"segments": liar.state.segments[1:]}, "ids in shard 0 that are no entries"),
    (lambda liar: {"segments": liar.state.segments[:1]}, "forgets 20 ids that are no entries"),
    (lambda liar: {"packs": liar.state.segments[0].entries}, "in segment 1 where 400 are there"),
    (lambda liar: {"packs": liar.state.segments[0].entries, "segments": (), "index": None}, "and no such segment"),
    (lambda liar: {"retired": (2,)}, "holds segment 2, which was retired"),
    (lambda liar: {"weights": None}, "names other weights"),
    (lambda liar: {"identity": None}, "names no encoder"),
    (lambda liar: liar.tombstones(5), "forgets 1 ids that are no entries, the first 5"),
    (lambda liar: liar.tombstones(2 << 39), "forgets an id twice"),
    (lambda liar: liar.labels(5, None), "labels 1 ids that are no entries, the first 5"),
    (lambda liar: liar.labels(FIRST, "nowhere"), "in the label set nowhere, which it does not have"),
    (lambda liar: liar.pending(liar.single(id=FIRST)), "single adds that lie in files too"),
    (lambda liar: liar.pending(liar.single(), next_row=0), "would give an id of a single add to another"),
    (lambda liar: liar.pending(liar.single(), liar.single(), next_row=2), "single adds whose ids do not ascend"),
    (lambda liar: liar.pending(liar.single(embedding="AAAA")), "whose vectors cannot be read"),
    (lambda liar: liar.pending(liar.single(embedding="AAA")), "whose vectors cannot be read"),
    (lambda liar: liar.pending(liar.single(embedding=encode_vector(np.full(8, np.nan)))), "not of unit length"),
    (lambda liar: liar.pending(liar.single(embedding=encode_vector(np.ones(8)))), "not of unit length"),
    (lambda liar: liar.pending(liar.single(dataset="")), "without a uri or a dataset"),
    (lambda liar: liar.pending(liar.single()) | {"pending": ()}, "tells of 1 single adds where 0 are there"),
    (lambda liar: liar.pending(liar.single()) | {"singles": None}, "does not say where the next goes"),
    (lambda liar: liar.shard(covers=((FIRST, FIRST + 127),)), "that its ranges do not cover"),
    (lambda liar: liar.shard(covers=((FIRST, FIRST + 50),)), "a shard covers some of its entries"),
    (lambda liar: liar.shard(covers=((FIRST + 50, FIRST << 1),)), "a shard covers some of its entries"),
    (lambda liar: liar.shard(covers=((FIRST, FIRST << 1),) * 2), "searches entries through two shards"),
    (lambda liar: liar.segment(num_entries=200) | {"index": liar.state.index, "tombstones": ()}, ""),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=[message or "none" for _, message in LIES])
def test_a_state_that_does_not_fit_its_files_is_found(liar: Liar, lie: Callable[[Liar], Update], message: str) -> None:
    found = liar.commit(lie(liar))
    if not message:
        assert found == []
        return
    assert message in "; ".join(finding.what for finding in found)
    assert {finding.path for finding in found} == {commit_path(liar.state.version)}


def test_another_encoder_than_the_entries_is_found(liar: Liar) -> None:
    assert liar.state.identity is not None
    other = liar.state.identity.model_copy(update={"weights_sha256": "1" * 64})
    found = {finding.what for finding in liar.commit({"identity": other})}
    assert found >= {"names other weights than its encoder's", "holds segment 1 of another encoder than its own"}
    assert "holds vectors of another encoder than the memory's" in found


def replaced(name: str, values: list) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        column = pa.array(table.column(name).to_pylist()[: -len(values)] + values, table.schema.field(name).type)
        return table.set_column(at, table.schema.field(name), column)

    return change


def vectors(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("embedding")
        matrix = change(np.array(embedding_matrix(table.column("embedding"))))
        return table.set_column(at, table.schema.field("embedding"), embedding_column(matrix))

    return changed


def with_row(matrix: np.ndarray, values: object) -> np.ndarray:
    matrix[7] = values
    return matrix


FILES: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
    (lambda table: table.drop_columns(["width"]), "has other columns than entries"),
    (lambda table: table.cast(table.schema.remove_metadata()), "holds vectors of another encoder"),
    (lambda table: table.take(list(range(128))[::-1]), "has ids that do not ascend"),
    (replaced("uri", ["/other.png"]), "has uris other than those planned"),
    (replaced("label", [None]), "has labels other than those planned"),
    (replaced("uri", [""]), "has entries without a uri"),
    (replaced("dataset", [""]), "has entries without a dataset"),
    (vectors(lambda matrix: with_row(matrix, np.nan)), f"not of unit length, the first of entry {FIRST + 7}"),
    (vectors(lambda matrix: with_row(matrix, np.inf)), "1 vectors that are not of unit length"),
    (vectors(lambda matrix: with_row(matrix, 0)), "1 vectors that are not of unit length"),
    (vectors(lambda matrix: matrix * np.float16(1.02)), "128 vectors that are not of unit length"),
]


@pytest.mark.parametrize(("change", "message"), FILES, ids=[message for _, message in FILES])
def test_entries_that_cannot_be_are_found(liar: Liar, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    found = [finding for finding in liar.commit(liar.file(change)) if finding.path.startswith("packs/")]
    assert message in "; ".join(finding.what for finding in found)


@pytest.mark.parametrize(
    ("update", "message"), [({"rows": 127}, "has 128 rows"), ({"last_id": FIRST + 126}, "has other ids than")]
)
def test_a_file_with_other_rows_than_told_is_found(liar: Liar, update: Update, message: str) -> None:
    first, *rest = liar.state.segments[0].entries
    wrong = liar.written(read_table(liar.memory.log.storage, first)).model_copy(update=update)
    found = liar.commit(liar.segment(entries=(wrong, *rest)))
    assert message in "; ".join(finding.what for finding in found if finding.path == wrong.path)


def test_packs_hold_entries_of_segments_whole_or_in_part(liar: Liar) -> None:
    first = liar.state.segments[0]
    assert liar.commit(liar.segment(entries=first.entries[:1]) | {"packs": first.entries[1:]}) == []
    assert liar.commit(liar.segment(entries=()) | {"packs": first.entries}) == []
    found = liar.commit({"packs": first.entries[:1]})
    assert "tells of 200 entries in segment 1 where 128 are there" in "; ".join(finding.what for finding in found)


@pytest.mark.parametrize("kind", ["vectors", "labels", "entries", "ids"])
def test_a_shard_made_of_other_entries_is_found(liar: Liar, make_memory: MakeMemory, kind: str) -> None:
    other = make_memory(
        unit(np.random.default_rng(7).normal(size=(200, 8))), ["cat", "cat", "dog", "dog"] * 50, name="other"
    )
    other.index(IndexOptions(key="Flat"))
    index = other.log.latest().index
    assert index is not None
    file = getattr(index.shards[0], kind)
    path = f"index/other-{liar.lease.nonce}/{file.path.rpartition('/')[2]}"
    data = other.log.storage.read(file.path)
    liar.memory.log.storage.replace(path, data)
    found = liar.commit(liar.shard(**{kind: file.model_copy(update={"path": path})}))
    if kind in ("ids", "entries"):  # they are the same in both memories
        assert found == []
    else:
        assert [(finding.path, finding.what.partition(" than")[0]) for finding in found] == [
            (path, f"has other {kind}")
        ]


def test_a_label_map_with_a_label_twice_is_found(liar: Liar) -> None:
    [found] = liar.commit(liar.map({"a": "b"}))
    assert found.what == "has 1 rows where versions tell of 5"
