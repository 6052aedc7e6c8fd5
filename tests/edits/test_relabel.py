"""Correcting: as if the labels had been stored so, by one id, by file, by label set; and what is said of bad files."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.errors import CommitConflict, SourceError, UnknownName, UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.store.log.state import SetState
from pipeline.store.tables.labels import read_label_rows
from tests.conftest import ENCODER, IMAGE_SIZE, MakeMemory, add_vectors, unit

ANIMALS = ["cat", "dog", "eel", "fly"] * 30
BIGGER = {"cat": "mammal", "dog": "mammal", "eel": "other", "fly": "other"}
TURNS = 69


def vectors(seed: int = 0, num_rows: int = 120) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(num_rows, 8)))


@pytest.fixture
def memory(make_memory: MakeMemory) -> VisualMemory:
    return make_memory(vectors(), ANIMALS)


@pytest.fixture
def ids(memory: VisualMemory) -> list[int]:
    return memory.live().live_ids().tolist()


def answers(memory: VisualMemory, **options: object) -> list:
    """What is decided, whatever version decides it."""
    found = []
    for voting in ("plurality", "distance", "softmax", "rank"):
        decisions = memory.classify(
            embeddings=vectors(9, 12), k=15, voting=voting, balance=0.5, **options  # type: ignore[arg-type]
        )  # fmt: skip
        found.append([(d.label, d.confidence, d.margin, d.votes, d.neighbors) for d in decisions])
    return found


def contents(memory: VisualMemory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(memory.uri).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("key", [None, "Flat", "IVF4,Flat"])
def test_as_if_the_label_had_been_stored_so(
    memory: VisualMemory, ids: list[int], make_memory: MakeMemory, key: str | None
) -> None:
    labels: list[str | None] = list(ANIMALS)
    for row in (3, 17, 50, 51):
        labels[row] = "gnu"
    labels[4] = "dog"
    stored = make_memory(vectors(), labels, name="stored")
    for one in (memory, stored):
        if key:
            one.index(IndexOptions(key=key, target_recall=1.0))
    report = memory.relabel(ids=[ids[row] for row in (3, 17, 50, 51)], label="gnu")
    assert (report.relabelled, report.unchanged, report.labels, report.label_set) == (4, 0, 5, None)
    memory.relabel(ids=[ids[4]], label="dog")
    assert answers(memory) == answers(stored)
    assert memory.status()["entries_by_label"] == stored.status()["entries_by_label"]
    ours, theirs = (m.evaluate_leave_one_out(ks=[5], balance="auto").to_json() for m in (memory, stored))
    assert ours | {"version": 0} == theirs | {"version": 0}
    if key == "Flat":  # a shard built over them keeps the labels they have now
        memory.index(IndexOptions(key=key, target_recall=1.0, rebuild=True))
        assert answers(memory) == answers(stored)


def test_the_last_word_counts_and_the_past_keeps_its_own(memory: VisualMemory, ids: list[int]) -> None:
    before = answers(memory)
    for label in ("gnu", "hen", "gnu"):
        memory.relabel(ids=ids[:30], label=label)
    assert memory.status()["entries_by_label"]["gnu"] == 30
    assert "hen" not in memory.status()["entries_by_label"]
    assert VisualMemory(memory.uri, at=3).status()["entries_by_label"]["hen"] == 30
    assert answers(VisualMemory(memory.uri, at=1)) == before != answers(memory)


def test_nothing_to_change_commits_nothing(memory: VisualMemory, ids: list[int]) -> None:
    before = contents(memory)
    report = memory.relabel(ids=[ids[0], ids[4]], label="cat")
    assert (report.relabelled, report.unchanged, report.version, report.committed) == (0, 2, 1, False)
    assert contents(memory) == before
    assert memory.relabel(ids=[ids[0], ids[1]], label="cat").relabelled == 1


def test_an_entry_without_a_label_gets_one(make_memory: MakeMemory) -> None:
    memory = make_memory(vectors(), [None] * 120)
    memory.relabel(ids=memory.live().live_ids()[:7], label=" cat ")
    assert memory.status()["entries_by_label"] == {"cat": 7}
    [decision] = memory.classify(embeddings=vectors(1, 1))
    assert (decision.label, len(decision.neighbors)) == ("cat", 7)


WRITERS: dict[str, Callable[[Path, dict[str, list]], Path]] = {
    "csv": lambda path, columns: _written(path / "l.csv", _rows(columns, ",")),
    "tsv": lambda path, columns: _written(path / "l.tsv", _rows(columns, "\t")),
    "parquet": lambda path, columns: _parquet(path / "l.parquet", columns),
    "json": lambda path, columns: _written(
        path / "l.json", json.dumps(dict(zip(*list(columns.values())[:2], strict=True)))
    ),
}


def _rows(columns: dict[str, list], separator: str) -> str:
    return "\n".join(separator.join(map(str, row)) for row in [list(columns), *zip(*columns.values(), strict=True)])


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _parquet(path: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("by", ["id", "uri"])
def test_by_file(memory: VisualMemory, ids: list[int], tmp_path: Path, kind: str, by: str) -> None:
    names = ids[:3] if by == "id" else [f"/a/{row}.png" for row in range(3)]
    file = WRITERS[kind](tmp_path, {by: names, "label": ["007", "tête", "cat"], "comment": ["", "x", "y"]})
    report = memory.relabel(file=file)
    assert (report.relabelled, report.unchanged, report.version) == (3, 0, 2)
    live = memory.live()
    assert [live.labels[code] for code in live.codes_of(np.array(ids[:3]))] == ["007", "tête", "cat"]
    assert memory.relabel(file=str(file)).committed is False


def test_a_file_may_say_a_thing_twice_but_not_two_things(memory: VisualMemory, ids: list[int], tmp_path: Path) -> None:
    rows = f"id,label\n{ids[0]},gnu\n{ids[0]}, gnu \n"
    assert memory.relabel(file=_written(tmp_path / "l.csv", rows)).relabelled == 1
    with pytest.raises(SourceError, match=f"gives id {ids[0]} both 'gnu' and 'hen'"):
        memory.relabel(file=_written(tmp_path / "l.csv", f"{rows}{ids[0]},hen\n"))


def test_every_entry_of_a_uri_and_paths_as_the_shell_has_them(
    digits: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = VisualMemory(tmp_path / "memory")
    flags = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    for dataset in ("one", "two"):
        memory.add(digits / "ask", dataset=dataset, **flags)
    monkeypatch.chdir(digits / "ask")
    first, second, third = sorted((digits / "ask/3").iterdir())[:3]
    rows = f"uri,label\n3/{first.name},8\nfile://{second},8\n{third},8\n"
    assert memory.relabel(file=_written(tmp_path / "l.csv", rows)).relabelled == 6
    twice = _written(tmp_path / "t.csv", f"uri,label\n3/{first.name},5\n{first},6\n")
    with pytest.raises(SourceError, match="both '5' and '6'"):
        memory.relabel(file=twice)


def test_many_relabels_are_folded(memory: VisualMemory, ids: list[int]) -> None:
    memory.relabel(label_set="size", map={"cat": "small", "dog": "large"})
    reader = VisualMemory(memory.uri)
    for turn in range(TURNS):
        memory.relabel(ids=[ids[turn % 7]], label=f"turn {turn}")
        memory.relabel(ids=[ids[turn % 5]], label=f"size {turn}", label_set="size")
        reader.status()
    state = memory.state()
    assert len(state.labels) <= 5, "one file for each doubling of the rows"
    for file in state.labels:
        assert read_label_rows(memory.log.storage, [file]).num_rows <= 12  # of each id and set, the newest
    for seen in (memory, reader, VisualMemory(memory.uri)):
        live, sizes = seen.live(), seen.live().in_label_set(memory.log.storage, state, "size")
        expected = [max(turn for turn in range(TURNS) if turn % 7 == row) for row in range(7)]
        assert [live.labels[code] for code in live.codes_of(np.array(ids[:7]))] == [f"turn {n}" for n in expected]
        expected = [max(turn for turn in range(TURNS) if turn % 5 == row) for row in range(5)]
        assert [sizes.labels[code] for code in sizes.codes_of(np.array(ids[:5]))] == [f"size {n}" for n in expected]


def test_racing_writers_lose_nothing(memory: VisualMemory, ids: list[int]) -> None:
    failed: list[Exception] = []
    barrier = threading.Barrier(6)

    def writer(number: int) -> None:
        own = VisualMemory(memory.uri)
        barrier.wait()
        try:
            for turn in range(5):
                own.relabel(ids=[ids[number * 10 + turn], ids[100]], label=f"{number}")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    counts = memory.status()["entries_by_label"]
    assert sorted(counts[str(number)] for number in range(6)) == [5, 5, 5, 5, 5, 6]
    assert sum(counts.values()) == 120
    for commit, _ in memory.log.states():  # what lost a race left nothing behind
        for action in commit.actions:
            assert getattr(action, "relabelled", 1) <= 2
    named = {file.path for _, state in memory.log.states() for file in state.labels}
    assert {str(path.relative_to(memory.uri)) for path in Path(memory.uri).glob("labels/*")} == named
    assert list(Path(memory.uri).glob("leases/*")) == []


def test_ids_forgotten_meanwhile_are_left_out(memory: VisualMemory, ids: list[int]) -> None:
    late = VisualMemory(memory.uri)
    old = late.log.latest()
    late.log.latest = lambda: old  # type: ignore[method-assign]  # it read the memory before the other came
    late.live()
    memory.forget(ids=ids[:2])
    assert late.relabel(ids=ids[:3], label="gnu").relabelled == 1
    assert memory.status()["entries_by_label"]["gnu"] == 1


def test_a_rollback_meanwhile_is_a_conflict(memory: VisualMemory, ids: list[int]) -> None:
    late = VisualMemory(memory.uri)
    base = late.log.latest()
    late.log.latest = lambda: base  # type: ignore[method-assign]
    other = base.model_copy(update={"rewrites": base.rewrites + 1})
    memory.log.commit(base, "rollback", lambda *_: [SetState(why="rollback", state=other)])
    for change in ({"ids": ids[:1], "label": "gnu"}, {"label_set": "size", "map": BIGGER}):
        with pytest.raises(CommitConflict, match="rolled the memory back meanwhile, and nothing was changed"):
            late.relabel(**change)  # type: ignore[arg-type]


def test_a_label_set_by_map_answers_as_if_stored_so(memory: VisualMemory, make_memory: MakeMemory) -> None:
    before = answers(memory)
    report = memory.relabel(label_set="bigger", map=BIGGER)
    assert (report.relabelled, report.labels, report.label_set, report.version) == (120, 2, "bigger", 2)
    assert report.to_json() | {"covered": 4, "lacking": [], "unused": []} == report.to_json()
    stored = make_memory(vectors(), [BIGGER[label] for label in ANIMALS], name="stored")
    assert answers(memory, label_set="bigger") == answers(stored)
    assert answers(memory) == before
    assert memory.status()["label_sets"] == {"bigger": 2}
    assert memory.status()["labels"] == 4
    ours = memory.evaluate_leave_one_out(ks=[5], balance="auto", label_set="bigger").to_json()
    theirs = stored.evaluate_leave_one_out(ks=[5], balance="auto").to_json()
    assert ours | {"version": 0, "label_set": None} == theirs | {"version": 0}
    [decision] = memory.classify(embeddings=vectors(1, 1), label_set="bigger")
    assert decision.to_json()["label_set"] == "bigger"
    with pytest.raises(UnknownName, match="has no label set 'biger': it has bigger"):
        memory.classify(embeddings=vectors(1, 1), label_set="biger")
    with pytest.raises(UnknownName, match="it has none"):
        VisualMemory(memory.uri, at=1).search(embeddings=vectors(1, 1), label_set="bigger")


@pytest.mark.parametrize("key", [None, "Flat", "IVF4,Flat"])
def test_entries_without_a_label_in_the_set_take_up_no_rank(
    memory: VisualMemory, ids: list[int], make_memory: MakeMemory, key: str | None
) -> None:
    if key:
        memory.index(IndexOptions(key=key, target_recall=0.5))
    report = memory.relabel(label_set="wings", map={"fly": "two", "cat": "none", "bat": "two"})
    assert report.coverage is not None
    assert (report.coverage.covered, report.coverage.lacking, report.coverage.unused) == (2, ("dog", "eel"), ("bat",))
    assert (report.relabelled, report.labels) == (60, 2)
    names = {"cat": "none", "fly": "two"}
    stored = make_memory(vectors(), [names.get(label) for label in ANIMALS], name="stored")
    if key != "IVF4,Flat":
        assert answers(memory, label_set="wings") == answers(stored)
    [decision] = memory.classify(embeddings=vectors(1, 1), k=60, label_set="wings")
    assert len(decision.neighbors) == 60
    [found] = memory.search(embeddings=vectors(1, 1), k=120, label_set="wings")
    assert sum(neighbor.label is None for neighbor in found) == 60
    with_dog = memory.classify(
        embeddings=vectors(1, 1), k=60, label_set="wings", assume={ids[1]: "none"}, exclude=[ids[0]]
    )
    assert ids[1] in {neighbor.id for neighbor in with_dog[0].neighbors}
    assert ids[0] not in {neighbor.id for neighbor in with_dog[0].neighbors}


def test_an_entrys_own_label_comes_before_the_map(memory: VisualMemory, ids: list[int]) -> None:
    def label_of(row: int) -> str | None:
        live = memory.live().in_label_set(memory.log.storage, memory.state(), "bigger")
        code = live.codes_of(np.array([ids[row]]))[0]
        return live.labels[code] if code >= 0 else None

    assert memory.relabel(ids=[ids[0]], label="huge", label_set="bigger").labels == 1
    assert memory.status()["label_sets"] == {"bigger": 1}
    assert memory.relabel(label_set="bigger", map=BIGGER).relabelled == 119
    assert (label_of(0), label_of(1), label_of(2)) == ("huge", "mammal", "other")
    memory.relabel(ids=[ids[1]], label="eel")  # corrected as stored, so the map makes another label of it
    assert label_of(1) == "other"
    same = memory.relabel(ids=[ids[2]], label="other", label_set="bigger")  # as the map has it, but said of the entry
    assert (same.relabelled, same.unchanged, same.committed) == (0, 1, True)
    assert memory.relabel(ids=[ids[2]], label="other", label_set="bigger").committed is False
    report = memory.relabel(label_set="bigger", map={"eel": "fish", "cat": "mammal"})
    assert (label_of(0), label_of(1), label_of(2), label_of(3), label_of(6)) == ("huge", "fish", "other", None, "fish")
    assert report.relabelled == 89  # all but the cats, and the eel that has a label of its own
    assert memory.relabel(label_set="bigger", map={"cat": "mammal", "eel": "fish"}).committed is False


def test_a_label_set_of_single_entries_only(memory: VisualMemory, ids: list[int], tmp_path: Path) -> None:
    file = WRITERS["csv"](tmp_path, {"id": ids[:6], "label": ["sharp"] * 4 + ["blurred"] * 2})
    report = memory.relabel(file=file, label_set="quality")
    assert (report.relabelled, report.labels) == (6, 2)
    [plain] = memory.classify(embeddings=vectors(1, 1), voting="plurality", label_set="quality")
    assert (plain.label, plain.votes["sharp"], len(plain.neighbors)) == ("sharp", 4 / 6, 6)
    [even] = memory.classify(embeddings=vectors(1, 1), voting="plurality", balance=1.0, label_set="quality")
    assert even.votes == pytest.approx({"sharp": 0.5, "blurred": 0.5})
    memory.forget(ids=ids[:6])
    [none] = memory.classify(embeddings=vectors(1, 1), label_set="quality")
    assert none.reason == "no entry of the memory has a label in the label set 'quality'"
    with pytest.raises(SourceError, match="no entry with a label in the label set 'quality' to ask about"):
        memory.evaluate_leave_one_out(label_set="quality")


def test_what_is_added_later_is_mapped_too(memory: VisualMemory) -> None:
    memory.relabel(label_set="bigger", map=BIGGER)
    add_vectors(memory.log, vectors(3, 10), ["cat"] * 10, name="later")
    assert memory.live().in_label_set(memory.log.storage, memory.state(), "bigger").label_counts().tolist() == [70, 60]


def test_forgetting_by_label_means_the_label_now(memory: VisualMemory, ids: list[int]) -> None:
    memory.relabel(ids=ids[:2], label="eel")
    assert memory.forget(labels=["eel"]).forgotten == 32
    with pytest.raises(UnknownName, match=f"has no entry with id {ids[0]}"):
        memory.relabel(ids=ids[:1], label="cat")


MAPS = {
    "one to one": {"cat": "mammal", "dog": "mammal", "eel": "other", "fly": "other"},
    "lists": {"mammal": ["cat", "dog"], "other": ["eel", "fly"]},
    "csv": "label,mapped\ncat,mammal\ndog,mammal\neel,other\nfly,other\n",
}


@pytest.mark.parametrize("form", list(MAPS))
def test_maps_in_every_form(memory: VisualMemory, tmp_path: Path, form: str) -> None:
    given = MAPS[form]
    is_text = isinstance(given, str)
    file = _written(tmp_path / ("m.csv" if is_text else "m.json"), given if is_text else json.dumps(given))
    assert memory.relabel(label_set="bigger", map=file).labels == 2
    live = memory.live().in_label_set(memory.log.storage, memory.state(), "bigger")
    assert dict(zip(live.labels, live.label_counts().tolist(), strict=True)) == {"mammal": 60, "other": 60}
    if not is_text:
        assert memory.relabel(label_set="bigger", map=given).committed is False
    parquet = _parquet(tmp_path / "m.parquet", {"label": list(BIGGER), "mapped": list(BIGGER.values())})
    assert memory.relabel(label_set="bigger", map=parquet).committed is False


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.csv", None, "there is no file"),
        ("l.txt", "id,label", "is no file of labels: give a .csv"),
        ("l.csv", "", "cannot be read"),
        ("l.csv", "id,label\n", "names no entry"),
        ("l.csv", "id,name\n{id},cat\n", "has no column label, but 'id', 'name'"),
        ("l.csv", "image,label\n1,cat\n", "has no column id or uri, but 'image', 'label'"),
        ("l.csv", "id,label,label\n{id},cat,dog\n", "has two columns label"),
        ("l.csv", "id,label\n{id},\n", "is empty: give it a label"),
        ("l.csv", "id,label\n{id}.0,cat\n", "in row 1 of .* is not a whole number"),
        ("l.csv", "id,label\n{id},gnu\nnan,cat\n", "id 'nan' in row 2"),
        ("l.csv", "id,label\n,cat\n", "id '' in row 1"),
        ("l.csv", "id,label\n-5,cat\n", "id '-5' in row 1"),
        ("l.csv", "id,label\n{id},gnu\n12,cat\n", "has no entry with id 12 that .*l.csv names"),
        ("l.csv", "id,label\n99999999999999999999,cat\n", "has no entry with id 99999999999999999999"),
        ("l.csv", "uri,label\n/a/0.png,gnu\n/a/999.png,cat\n", "has no entry with uri '/a/999.png'"),
        ("l.csv", "id,label\n{id},gnu\n{id},hen\n", "both 'gnu' and 'hen'"),
        ("l.csv", "id,label\n1,2,3\n", "cannot be read"),
        ("l.parquet", "no parquet", "cannot be read"),
        ("l.json", "[1, 2]", "is no JSON object"),
        ("l.json", '{"1": ', "cannot be read as JSON"),
        ("l.json", '{"{id}": null}', "is None: give a string"),
        ("l.json", '{"{id}": NaN}', "is nan: give a string"),
        ("l.json", '{"{id}": "a", "{id}": "b"}', "both 'a' and 'b'"),
        ("l.json", '{"{id}": "\\ud800"}', "is no text"),
    ],
)
def test_bad_files_change_nothing(
    memory: VisualMemory, ids: list[int], tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        _written(tmp_path / name, text.replace("{id}", str(ids[0])))
    before = contents(memory)
    with pytest.raises((SourceError, UnknownName), match=message) as caught:
        memory.relabel(file=tmp_path / name)
    assert len(str(caught.value)) < 400 + 2 * len(str(tmp_path))
    assert contents(memory) == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1.0, float("nan")], "label": ["a", "b"]}, "the column id of .* holds double"),
        ({"id": [1, None], "label": ["a", "b"]}, "row 2 of .* has no id"),
        ({"id": [1, 2], "label": ["a", None]}, "row 2 of .* has no label"),
        ({"id": [1, 2], "label": [None, None]}, "row 1 of .* has no label"),
        ({"id": [1, 2], "label": [1.5, 2.5]}, "the column label of .* holds double"),
    ],
)
def test_bad_columns(memory: VisualMemory, tmp_path: Path, columns: dict[str, list], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        memory.relabel(file=_parquet(tmp_path / "l.parquet", columns))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the map is empty"),
        ({"mammal": []}, "the map is empty"),
        ({"cat": ""}, "neither may be empty"),
        ({" ": "x"}, "neither may be empty"),
        ({"cat": 1.5}, "what 'cat' is mapped to in the map is 1.5: give a string"),
        ({"cat": {"a": "b"}}, "give a string"),
        ({"a": ["cat"], "b": ["cat"]}, "gives the label 'cat' both 'a' and 'b'"),
        ({"a": ["cat", None]}, "a label under 'a' in the map is None"),
    ],
)
def test_bad_maps_change_nothing(memory: VisualMemory, tmp_path: Path, given: dict, message: str) -> None:
    before = contents(memory)
    with pytest.raises(SourceError, match=message):
        memory.relabel(label_set="bigger", map=given)
    with pytest.raises(SourceError, match=message.replace("the map", ".*")):
        memory.relabel(label_set="bigger", map=_written(tmp_path / "m.json", json.dumps(given)))
    assert contents(memory) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing was named to relabel: give `ids` with `label`"),
        ({"label_set": "bigger"}, "nothing was named to relabel"),
        ({"ids": [1]}, "`ids` was given with no `label`"),
        ({"ids": [1], "label": " "}, "`ids` was given with an empty `label`"),
        ({"label": "cat"}, "`label` was given without `ids`: name the entries"),
        ({"ids": [1], "label": "cat", "file": "l.csv"}, "two of `ids`, `file` and `map`"),
        ({"file": "l.csv", "map": "m.json", "label_set": "x"}, "two of `ids`, `file` and `map`"),
        ({"file": "l.csv", "label": "cat"}, "`label` was given without `ids`: a file"),
        ({"map": "m.json"}, "`map` was given without `label_set`"),
        ({"map": "m.json", "label_set": " "}, "`label_set` is empty"),
        ({"ids": [1.0], "label": "cat"}, "id 1.0 is not a whole number"),
        ({"ids": ["1"], "label": "cat"}, "id '1' is not a whole number"),
        ({"ids": 5, "label": "cat"}, "ids is 5: give a list"),
    ],
)
def test_wrong_usage(memory: VisualMemory, options: dict, message: str) -> None:
    before = contents(memory)
    with pytest.raises(UsageError, match=message):
        memory.relabel(**options)
    assert contents(memory) == before


def test_evaluating_in_a_label_set(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    import shutil

    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))
    memory.relabel(label_set="parity", map={"even": ["0", "2", "4"], "odd": ["1", "3"]})
    fine = memory.evaluate(digits / "ask", ks=[10]).accuracy["rank"][10]
    coarse = memory.evaluate(digits / "ask", ks=[10], label_set="parity")
    assert (coarse.num_queries, coarse.skipped, coarse.label_set) == (50, 0, "parity")
    assert coarse.accuracy["rank"][10] >= fine
    assert set(coarse.by_label["rank"][10]) == {"even", "odd"}
    for name, digit in (("even", "2"), ("odd", "3"), ("4", "4"), ("prime", "3")):  # as stored, of the set, of neither
        shutil.copytree(digits / "ask" / digit, tmp_path / "mixed" / name)
    mixed = memory.evaluate(tmp_path / "mixed", ks=[10], label_set="parity")
    assert mixed.num_queries == 40
    assert mixed.by_label["rank"][10]["prime"] == 0
    memory.relabel(label_set="parity", map={"2": "even", "3": "odd"})
    left = memory.evaluate(digits / "ask", ks=[10], label_set="parity")  # the set leaves 0, 1 and 4 out
    assert (left.num_queries, left.skipped) == (20, 30)
    memory.relabel(ids=[memory.live().live_ids()[0]], label="good", label_set="quality")
    with pytest.raises(
        SourceError, match="is named by a label that the label set 'quality' has a word for: it has good"
    ):
        memory.evaluate(digits / "ask", label_set="quality")
