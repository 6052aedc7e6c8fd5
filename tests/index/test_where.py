"""Expressions over columns of entries (`--where`): read, refused, and searched with as a filter before all else."""

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.edits.singles import NewEntry, add_singles
from pipeline.errors import SourceError, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.filter_expression import parse
from pipeline.store.lookup.kept_values import read_kept
from tests.conftest import unit
from tests.end_to_end.erasure_audit import Audit

KINDS = {
    "id": pa.int64(),
    "label": pa.string(),
    "year": pa.int64(),
    "iso": pa.float64(),
    "flash": pa.bool_(),
    "day": pa.date32(),
    "at": pa.timestamp("us"),
    "taken": pa.timestamp("us", tz="UTC"),
    "focal length": pa.int64(),
    "scene": pa.string(),
}
DAY = datetime.date(2024, 5, 6)
NOON = datetime.datetime(2024, 5, 6, 12)
ROWS = pa.Table.from_pylist(
    [
        {"id": 0, "label": "cat", "year": 2019, "iso": 100.0, "flash": True, "day": DAY, "at": NOON, "taken": NOON},
        {"id": 1, "label": "dog", "year": 2020, "iso": None, "flash": False, "focal length": 50, "scene": "dog"},
        {"id": 2, "label": None, "year": None, "iso": 12.5, "flash": None, "scene": "it's a %"},
        {"id": 3, "label": "CAT", "year": -1, "iso": 800.0, "flash": True, "day": DAY + datetime.timedelta(1)},
    ],
    schema=pa.schema(list(KINDS.items())),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label = 'cat'", [0]),
        ('label == "cat"', [0]),
        ("label != 'cat'", [1, 3]),
        ("label <> 'cat' AND year >= 2020", [1]),
        ("not label = 'cat'", [1, 3]),
        ("NOT (label = 'cat' or Year is null)".replace("Year", "year"), [1, 3]),
        ("label in ('cat', 'dog',)", [0, 1]),
        ("label Not In ['cat']", [1, 3]),
        ("not label in ('cat')", [1, 3]),
        ("year in (2019, -1.0)", [0, 3]),
        ("label is null", [2]),
        ("label IS NOT None and label like '%o%'", [1]),
        ("label like 'c_t'", [0]),
        ("label not like 'c%'", [1, 3]),
        (r"scene like '%\%'", [2]),
        ("scene = 'it''s a %'", [2]),
        ('scene = "it\'s a %"', [2]),
        ("year < 2020", [0, 3]),
        ("2019 < year", [1]),
        ("0 <= year < 2020", [0]),
        ("year > 2019.5", [1]),
        ("year < 99999999999999999999 and year>-1", [0, 1]),
        ("iso = 100", [0]),
        ("iso > 1.25e1 or iso is null", [0, 1, 3]),
        ("flash", [0, 3]),
        ("not flash", [1]),
        ("flash = false", [1]),
        ("flash and label = 'cat' or year = 2020", [0, 1]),
        ("year = 2020 or flash and label = 'cat'", [0, 1]),
        ("(year = 2020 or flash) and label = 'CAT'", [3]),
        ("day = '2024-05-06'", [0]),
        ("day > '2024-05-06'", [3]),
        ("at = '2024-05-06T12:00'", [0]),
        ("at > '2024-05-06'", [0]),
        ("taken = '2024-05-06T14:00:00+02:00'", [0]),
        ("taken <= '2024-05-06T12:00Z' and taken < '2025-01-01'", [0]),
        ("taken > '2024-05-06T12:00'", []),
        ("taken in ('2024-05-06 12:00')", [0]),
        ("label = scene", [1]),
        ("year > iso", [0]),
        ("`focal length` >= 50", [1]),
        ("  id  in  ( 1 , 3 )  ", [1, 3]),
        (" or ".join(["id = 2"] * 500), [2]),
        ("(" * 90 + "id = 2" + ")" * 90, [2]),
    ],
)
def test_what_holds_of_which_rows(text: str, expected: list[int]) -> None:
    condition = parse(text, KINDS)
    mask = condition.mask(dict(zip(ROWS.column_names, ROWS.columns, strict=True)))
    assert ROWS.filter(mask)["id"].to_pylist() == expected
    assert condition.columns <= KINDS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "where ends where a value must be: it is empty"),
        (
            "camera = 'Canon'",
            "where names camera, which is no column: there are id, label, year, .*, `focal length` and",
        ),
        ("label = cat", "where names cat, which is no column: .* and a text stands in quotes"),
        ("label in (cat)", "where has cat where a value must be: a text stands in quotes"),
        ("label = 'cat", "where has a quote at character 9 that is not closed"),
        ("label = 'cat' and", "where ends where a value must be"),
        ("label = 'cat' label = 'dog'", "where has label at character 15 and not and, or, or the end"),
        ("(label = 'cat'", r"where ends where \) must be"),
        ("label in 'cat'", r"where has 'cat' at character 10 and not \("),
        ("label in ()", r"where has \) at character 11 and not a value"),
        ("label not = 'cat'", "where has = at character 11 and not in or like"),
        ("label", "where ends where a comparison of the column label, such as = or in must be"),
        ("year and flash", "where has and at character 6 and not a comparison of the column year"),
        ("label = null", "which nothing equals: write `is null`"),
        ("label is 'cat'", "where has 'cat' at character 10 and not null"),
        ("year = '2020'", r"where cannot compare the column year \(int64\) with '2020': give a number"),
        ("year = true", "give a number"),
        ("label > 3", r"the column label \(string\) with 3: give a text in quotes"),
        ("flash = 1", "give true or false"),
        ("day = 'noon'", "give a date such as '2024-12-31'"),
        ("at > '2024-05-06T12:00Z'", "give a time such as '2024-12-31T23:59'$"),
        ("taken > 2024", "give a time such as"),
        ("label = year", r"where cannot compare the columns label \(string\) and year \(int64\): name columns of one"),
        ("year like '20%'", "where asks what the column year .* is like: only a text is"),
        ("label like 3", "where says label like 3: give a text in quotes"),
        ("1 = 1", "where compares 1 with a value and no column"),
        ("1", "where ends where a comparison must be"),
        ("label = 'cat' & flash", "where cannot be read from character 15 on, at &"),
        ("__import__('os')", "where names __import__, which is no column"),
        ("label.upper() = 'CAT'", "where cannot be read from character 6 on, at ."),
        ("year + 1 = 2020", r"where cannot be read from character 6 on, at \+"),
        ("year = 20x", "where cannot be read from character 8 on, at 2"),
        ("(" * 200 + "id = 2" + ")" * 200, "more than 100 brackets in brackets"),
        ("not " * 5000 + "flash", "more than 100 brackets in brackets"),
        (3, "where is 3: give an expression as text"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        parse(text, KINDS)
    assert "\n" not in str(raised.value)


DIMENSION = 24
CAMERAS = ("Canon", "Nikon", None)


def columns_of(rows: int, seed: int) -> dict[str, list]:
    generator = np.random.default_rng(seed)
    return {
        "label": [["cat", "dog", "eel", None][code] for code in generator.integers(0, 4, rows)],
        "camera": [CAMERAS[code] for code in generator.integers(0, 3, rows)],
        "year": generator.integers(2000, 2100, rows).tolist(),
    }


def vectors_of(rows: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, DIMENSION)))


KEEP = ("camera", "year")


def remember(memory: VisualMemory, folder: Path, rows: int, seed: int, keep: Sequence[str] = KEEP) -> None:
    """Add vectors with labels and columns, under the folder's name as dataset."""
    folder.mkdir()
    np.save(folder / "v.npy", vectors_of(rows, seed))
    uris = [f"/{folder.name}/{row}.png" for row in range(rows)]
    pq.write_table(pa.table({"uri": uris} | columns_of(rows, seed)), folder / "v.parquet")
    memory.add(folder, labels="column:label", keep=keep)


def teach(memory: VisualMemory, vectors_ND: np.ndarray, label: str) -> None:
    """Add vectors by themselves: they stay in their commits, and keep no columns."""
    state = memory.state()
    origin = cast(Any, SimpleNamespace(identity=state.identity, keep=lambda _: state.weights))
    entries = [
        NewEntry(f"/taught/{row}.png", label, "single", vector.astype(np.float32), "0" * 64, 1, 1)
        for row, vector in enumerate(vectors_ND)
    ]
    add_singles(memory.log, state, origin, entries, "add")


class Known:
    """What is known of every live entry, gathered from the files of the memory row by row."""

    def __init__(self, memory: VisualMemory, labels: dict[int, str | None] | None = None) -> None:
        live = memory.live()
        self.ids = live.live_ids()
        self.vectors = live.vectors_of(self.ids).astype(np.float64)
        kept = read_kept(memory.log.storage, memory.state(), self.ids.tolist())
        self.facts = {}
        for block in live.blocks:
            columns = (block.ids_N.tolist(), block.uris.to_pylist(), block.datasets.to_pylist(), block.codes_N.tolist())
            for entry_id, uri, dataset, code in zip(*columns, strict=True):
                label = live.labels[code] if code >= 0 else None
                own = {"camera": None, "year": None, "id": entry_id, "uri": uri, "dataset": dataset, "label": label}
                self.facts[entry_id] = own | kept.get(entry_id, {})
        for entry_id, label in (labels or {}).items():
            self.facts[entry_id]["label"] = label

    def matching(self, holds: Callable[[Any], bool | None]) -> list[int]:
        return [i for i in self.ids.tolist() if holds(SimpleNamespace(**self.facts[i]))]

    def nearest(self, query_D: np.ndarray, k: int, holds: Callable[[Any], bool | None]) -> list[int]:
        scores = np.float32(np.einsum("nd,d->n", self.vectors, query_D.astype(np.float64)))
        chosen = np.flatnonzero(np.isin(self.ids, self.matching(holds)))
        return [int(self.ids[row]) for row in sorted(chosen, key=lambda row: (-scores[row], self.ids[row]))[:k]]


HOLDS: dict[str, Callable[[Any], bool | None]] = {
    "camera = 'Canon' and year >= 2050": lambda e: e.camera == "Canon" and (e.year or 0) >= 2050,
    "camera is null": lambda e: e.camera is None,
    "not (camera = 'Canon')": lambda e: e.camera is not None and e.camera != "Canon",
    "year = 2007": lambda e: e.year == 2007,  # one in a hundred
    "label in ('cat', 'new')": lambda e: e.label in ("cat", "new"),
    "dataset != 'a' or uri like '%/1_.png'": lambda e: e.dataset != "a" or (len(e.uri) == 9 and e.uri[3] == "1"),
}
QUERIES = vectors_of(5, 99).astype(np.float32)


def assert_filtered(memory: VisualMemory) -> None:
    """Searches and decisions with every expression are those over the entries that satisfy it, and no others."""
    known = Known(memory)
    for where, holds in HOLDS.items():
        for k in (1, 10, 400):
            found = memory.search(embeddings=QUERIES, k=k, where=where)
            assert [[n.id for n in row] for row in found] == [known.nearest(q, k, holds) for q in QUERIES], where
        decisions = memory.classify(embeddings=QUERIES, k=10, where=where, voting="distance")
        for query, decision in zip(QUERIES, decisions, strict=True):
            expected = known.nearest(query, 10, lambda e, holds=holds: e.label is not None and holds(e))
            assert [n.id for n in decision.neighbors] == expected, where
            assert decision.where == where


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """700 entries: 500 that keep columns, 200 that keep one of another type."""
    memory = VisualMemory(tmp_path / "memory")
    remember(memory, tmp_path / "a", 500, seed=1)
    remember(memory, tmp_path / "b", 200, seed=2, keep=("camera",))
    return memory


@pytest.mark.parametrize("few", [4_096, 0])
@pytest.mark.parametrize("key", [None, "Flat", "IVF4,Flat", "IVF8,SQ8"])
def test_only_what_satisfies_it_is_found(
    memory: VisualMemory, key: str | None, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards of every kind, fresh entries and single adds, with entries forgotten and relabelled."""
    monkeypatch.setattr("pipeline.index.search.live_entries.FEW_ROWS", few)
    monkeypatch.setattr(
        "pipeline.index.search.shard_files.values_of", lambda *_, **__: {"nprobe": 8}
    )  # all of it, or nothing is exact
    ids = memory.live().live_ids()
    if key:
        memory.index(IndexOptions(key=key, shard_rows=300, target_recall=0.3))
    memory.forget(ids=ids[::9].tolist())
    memory.relabel(ids=ids[1::9].tolist(), label="new")
    assert_filtered(memory)
    remember(memory, tmp_path / "c", 90, seed=3)
    teach(memory, vectors_of(6, 4), "cat")
    assert_filtered(memory)
    memory.compact()
    assert_filtered(VisualMemory(memory.uri))


def test_k_are_found_where_one_in_a_hundred_satisfies_it(tmp_path: Path) -> None:
    """Beyond the rows that are searched exactly too, by an index that was tuned for all of them."""
    memory = VisualMemory(tmp_path / "memory")
    remember(memory, tmp_path / "a", 6_000, seed=1)
    memory.index(IndexOptions(key="IVF64,SQfp16", target_recall=0.3, max_latency_ms=0.01))
    known = Known(memory)
    [rare] = memory.search(embeddings=QUERIES[:1], k=30, where="year = 2050")
    assert [n.id for n in rare] == known.nearest(QUERIES[0], 30, lambda e: e.year == 2050)
    assert len(rare) == 30
    found = memory.search(embeddings=QUERIES, k=30, where="year < 2090")
    assert {len(neighbors) for neighbors in found} == {30}
    assert {n.kept["year"] < 2090 for neighbors in found for n in neighbors} == {True}


def test_an_index_is_searched_further_where_fewer_satisfy_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters were tuned for all rows: among a few of them the nearest lie in more lists."""
    monkeypatch.setattr("pipeline.index.search.live_entries.FEW_ROWS", 0)
    monkeypatch.setattr("pipeline.index.search.shard_files.values_of", lambda *_, **__: {"nprobe": 16})
    memory = VisualMemory(tmp_path / "memory")
    remember(memory, tmp_path / "a", 6_000, seed=1)
    memory.index(IndexOptions(key="IVF64,Flat", target_recall=0.6))
    known = Known(memory)
    recalls = []
    for year in (2100, 2020, 2005):
        found = memory.search(embeddings=QUERIES, k=20, where=f"year < {year}")
        wanted = [known.nearest(query, 20, lambda e, year=year: e.year < year) for query in QUERIES]
        right = [len({n.id for n in row} & {*ids}) / 20 for row, ids in zip(found, wanted, strict=True)]
        recalls.append(float(np.mean(right)))
    assert 0.5 < recalls[0] < 1
    assert min(recalls[1:]) >= recalls[0], recalls


def test_shards_of_before_are_asked_through_the_entries_files(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.index(IndexOptions(key="Flat"))
    assert memory.live().blocks[0].kept.keys() == {"camera", "year"}
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.index.search.shard_files.kept_after", lambda *_: ())  # as a release wrote them
        memory.index(IndexOptions(key="Flat", rebuild=True))
    before = memory.live().blocks[0]
    assert before.kept == {}
    assert_filtered(memory)
    assert memory.live().blocks[0].kept.keys() == {"camera", "year"}
    memory.forget(ids=[int(before.ids_N[3])], erase=True)
    assert_filtered(memory)
    remember(memory, tmp_path / "c", 80, seed=3)
    assert_filtered(memory)


def test_what_if_and_where(memory: VisualMemory) -> None:
    """Exclusions, assumed labels and weights hold beside it; what is counted for a balance satisfies it."""
    known = Known(memory)
    canon: Callable[[Any], bool] = lambda e: e.camera == "Canon"  # noqa: E731
    nearest = known.nearest(QUERIES[0], 12, lambda e: canon(e) and e.label is not None)
    [decision] = memory.classify(
        embeddings=QUERIES[:1], k=10, where="camera = 'Canon'", exclude=nearest[:2], weigh={nearest[2]: 0.0}
    )
    assert [n.id for n in decision.neighbors] == nearest[2:]
    assert decision.neighbors[0].weight == 0
    others = [i for i in known.ids.tolist() if i not in known.matching(canon)]
    memory.classify(embeddings=QUERIES[:1], k=3, where="camera = 'Canon'", exclude=others[:3])  # which is no mistake
    assumed = {nearest[0]: "new", others[0]: "new", known.nearest(QUERIES[0], 1, lambda e: e.label is None)[0]: "new"}
    told = Known(memory, dict(assumed))
    [decision] = memory.classify(embeddings=QUERIES[:1], k=3, where="label = 'new'", assume=assumed)
    assert [n.id for n in decision.neighbors] == told.nearest(QUERIES[0], 3, lambda e: e.label == "new")
    assert decision.votes == {"new": 1.0}
    asked = {"embeddings": QUERIES, "k": 20, "balance": 1.0, "voting": "plurality"}
    for decision in memory.classify(where="camera = 'Canon'", assume=assumed, **asked):
        facts = [told.facts[i] for i in told.matching(canon)]
        counts = {label: sum(fact["label"] == label for fact in facts) for label in decision.votes}
        own = {label: sum(n.label == label for n in decision.neighbors) / n for label, n in counts.items()}
        expected = {label: share / sum(own.values()) for label, share in own.items()}
        assert decision.votes == pytest.approx(expected)
    assert memory.classify(**asked, where="id >= 0") == [
        replace(decision, where="id >= 0") for decision in memory.classify(**asked)
    ]


def test_labels_are_those_of_the_label_set(memory: VisualMemory) -> None:
    memory.relabel(label_set="coarse", map={"cat": "pet", "dog": "pet"})
    known = Known(memory)
    [found] = memory.search(embeddings=QUERIES[:1], k=9, label_set="coarse", where="label = 'pet'")
    assert [n.id for n in found] == known.nearest(QUERIES[0], 9, lambda e: e.label in ("cat", "dog"))
    [found] = memory.search(embeddings=QUERIES[:1], k=9, label_set="coarse", where="label is null")
    assert [n.id for n in found] == known.nearest(QUERIES[0], 9, lambda e: e.label in ("eel", None))
    [decision] = memory.classify(embeddings=QUERIES[:1], label_set="coarse", where="label = 'eel'")
    assert decision.reason == "no entry satisfies where: label = 'eel'"


def test_evaluation_asks_only_these(memory: VisualMemory, tmp_path: Path) -> None:
    where = "camera = 'Nikon' and label != 'eel'"
    nikon = Known(memory).matching(lambda e: e.camera == "Nikon" and e.label in ("cat", "dog"))
    alone = VisualMemory(tmp_path / "alone")
    shutil.copytree(memory.uri, alone.uri)
    alone.forget(ids=[i for i in memory.live().live_ids().tolist() if i not in nikon])
    options: dict[str, Any] = {"ks": [1, 20], "balance": "auto"}
    expected = alone.evaluate_leave_one_out(**options)
    found = memory.evaluate_leave_one_out(**options, where=where)
    assert found == replace(expected, version=memory.state().version, where=where)
    assert found.num_queries == len(nikon)
    remember(VisualMemory(tmp_path / "other"), tmp_path / "ask", 50, seed=7, keep=())
    expected = alone.evaluate(tmp_path / "ask", **options)
    found = memory.evaluate(tmp_path / "ask", **options, where=where)
    assert found == replace(expected, version=memory.state().version, where=where)
    with pytest.raises(SourceError, match="with a label satisfies where: year = 1"):
        memory.evaluate(tmp_path / "ask", where="year = 1")
    with pytest.raises(SourceError, match="the others do not satisfy where: year = 1"):
        memory.evaluate_leave_one_out(where="year = 1")


def test_numbers_of_two_kinds_are_compared_as_numbers(memory: VisualMemory, tmp_path: Path) -> None:
    for name, stars in (("c", [1, 2, None]), ("d", [1.5, 2.0, float("nan")]), ("e", [7, 8, 9])):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "v.npy", vectors_of(3, len(name)))
        pq.write_table(
            pa.table({"stars": stars, "camera": [1, 2, 3] if name == "e" else ["x"] * 3}), folder / "v.parquet"
        )
        memory.add(folder, labels="none", keep=["stars", "camera"])
    for _ in range(2):
        [found] = memory.search(embeddings=QUERIES[:1], k=9, where="1 < stars <= 2")
        assert sorted((n.dataset, n.kept["stars"]) for n in found) == [("c", 2), ("d", 1.5), ("d", 2.0)]
        [found] = memory.search(embeddings=QUERIES[:1], k=9, where="stars is null and camera = 'x'")
        assert sorted(n.dataset for n in found) == ["c", "d"]
        [found] = memory.search(embeddings=QUERIES[:1], k=9, where="camera in ('1', '3')")
        assert sorted(n.kept["camera"] for n in found) == [1, 3]
        with pytest.raises(UsageError, match=r"the column camera \(string\) with 1: give a text in quotes"):
            memory.search(embeddings=QUERIES[:1], where="camera = 1")
        memory.index(IndexOptions(key="Flat"))
        memory.compact()


def test_nothing_that_satisfies_it(memory: VisualMemory) -> None:
    [decision] = memory.classify(embeddings=QUERIES[:1], where="year > 3000")
    assert (decision.abstained, decision.votes, decision.neighbors) == (True, {}, ())
    assert decision.reason == "no entry satisfies where: year > 3000"
    assert decision.to_json()["where"] == "year > 3000"
    [decision] = memory.classify(embeddings=QUERIES[:1], where="label is null")
    assert decision.reason == "no entry that satisfies where (label is null) has a label"
    assert memory.search(embeddings=QUERIES[:1], where="year > 3000") == [()]
    with pytest.raises(
        UsageError, match="where names lens, which is no column: there are id, uri, label, dataset, camera"
    ):
        memory.classify(embeddings=QUERIES[:1], where="lens = 3")


def test_the_same_question_is_not_worked_out_again(memory: VisualMemory) -> None:
    memory.search(embeddings=QUERIES, where="year = 2007")
    storage, state, live = memory.log.storage, memory.state(), memory.live()
    first = live.satisfying(storage, state, "year = 2007")
    for year in range(2000, 2003):
        live.satisfying(storage, state, f"year = {year}")
    assert live.satisfying(storage, state, "year = 2007") is first
    assert live.satisfying(storage, state, "label = 'cat'") is not live.satisfying(
        storage, state, "label = 'cat'", {int(live.live_ids()[0]): "cat"}
    )
    memory.forget(ids=[int(live.live_ids()[0])])
    assert_filtered(memory)


@pytest.mark.parametrize("key", ["Flat", "IVF4,Flat"])
def test_what_is_erased_is_in_no_shard(memory: VisualMemory, tmp_path: Path, key: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    np.save(secret / "v.npy", vectors_of(3, 9))
    told = {"camera": ["Leica of grandmother", "Nikon", "Canon"], "year": [2345, 2000, 2000]}
    pq.write_table(pa.table(told), secret / "v.parquet")
    memory.add(secret, labels="none", keep=KEEP)
    memory.index(IndexOptions(key=key, target_recall=0.3))
    [[found]] = memory.search(embeddings=QUERIES[:1], where="year = 2345")
    audit = Audit(np.empty((0, DIMENSION), np.float16), [], [], [], ["Leica of grandmother"])
    before = audit.search(Path(memory.uri))[0]
    assert [hit for hit in before if "entries.arrow" in hit]
    told = memory.forget(ids=[found.id], verify=True).receipt
    assert {found.what for found in told.found if found.path.endswith("entries.arrow")} >= {"uri", "kept camera"}
    receipt = memory.forget(ids=[found.id], erase=True, verify=True).receipt
    assert receipt is not None
    assert receipt.proven
    assert audit.search(Path(memory.uri))[0] == []
    assert memory.search(embeddings=QUERIES[:1], where="year = 2345 or camera like 'Leica%'") == [()]
    assert memory.live().blocks[0].kept.keys() == {"camera", "year"}
    assert memory.verify().findings == ()
    assert_filtered(memory)


def test_a_bulk_job_is_another_with_another_expression(memory: VisualMemory, tmp_path: Path) -> None:
    remember(VisualMemory(tmp_path / "other"), tmp_path / "ask", 20, seed=7, keep=())
    out = tmp_path / "out"
    where = "camera = 'Canon'"
    memory.classify_source(tmp_path / "ask", out, k=5, where=where)
    [file] = (out / "decisions").iterdir()
    expected = memory.classify(embeddings=vectors_of(20, 7), k=5, where=where)
    for row, decision in zip(pq.read_table(file).to_pylist(), expected, strict=True):
        assert [n["id"] for n in row["neighbors"]] == [n.id for n in decision.neighbors]
    assert json.loads((out / "job.json").read_text())["options"]["where"] == where
    assert memory.classify_source(tmp_path / "ask", out, k=5, where=where).resumed == 20
    with pytest.raises(UsageError, match="made with other options"):
        memory.classify_source(tmp_path / "ask", out, k=5, where="camera = 'Nikon'")
    with pytest.raises(UsageError, match="which is no column"):
        memory.classify_source(tmp_path / "ask", tmp_path / "no", where="lens = 3")
    assert not (tmp_path / "no").exists()
