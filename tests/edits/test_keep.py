"""Columns that stay with the entries (`add --keep`): from every kind of source, through all that moves entries."""

import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.edits.add import AddOptions, run
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.parts import Work
from pipeline.errors import SourceError, UsageError
from pipeline.images.containers.kept_columns import ColumnsFound
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import list_source
from pipeline.runner import Here
from pipeline.store.lookup.kept_values import read_kept
from pipeline.store.segments.part_marks import PartMark
from pipeline.store.tables.kept_columns import FIXED, KeptColumn, as_type, value_of
from pipeline.store.tables.schemas import entries_schema, read_table
from tests.conftest import ENCODER, IMAGE_SIZE, identity_of
from tests.edits.test_sources import picture, write_tar
from tests.end_to_end.erasure_audit import Audit

UTC = datetime.UTC
NOON = datetime.datetime(2024, 5, 6, 12, tzinfo=UTC)
KEEP = ("camera", "taken", "stars", "iso", "flash", "day", "scene")
TYPES = {
    "camera": "string",
    "taken": "timestamp[us, UTC]",
    "stars": "int64",
    "iso": "float64",
    "flash": "bool",
    "day": "date32",
    "scene": "string",
}
SECRET = "Leica of grandmother"  # a value that one image alone has


@pytest.fixture(scope="module")
def options(weights: str) -> dict:
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}


def write_table(path: Path, first: int, columns: dict[str, Any], scenes: Sequence[str] = ()) -> Path:
    """A Parquet file of images; the integers of a column `scene` stand for names, as in a ClassLabel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    table = pa.table({"image": pa.array([picture(first + row) for row in range(rows)], pa.binary()), **columns})
    if scenes:
        features = {"info": {"features": {"scene": {"names": scenes, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Parquet files, of other widths and columns, a tar archive and two loose files: 9 images."""
    folder = tmp_path_factory.mktemp("kept") / "mixed"
    columns = {
        "label": ["cat", "dog", "cat"],
        "camera": pa.array([SECRET, "Nikon", "Nikon"]).dictionary_encode(),
        "taken": pa.array([NOON, NOON, None], pa.timestamp("ns", tz="Europe/Berlin")),
        "stars": pa.array([5, -3, None], pa.int8()),
        "iso": pa.array([12.5, float("nan"), 800], pa.float32()),
        "flash": pa.array([True, False, None]),
        "day": pa.array([NOON.date()] * 3, pa.date32()),
        "scene": pa.array([1, 0, None], pa.int32()),
    }
    write_table(folder / "a.parquet", 0, columns, ["sea", "wood"])
    write_table(folder / "b.parquet", 3, {"stars": pa.array([1, 2], pa.int32()), "camera": [None, "Canon"]})
    told = {"camera": "Sony", "taken": "2024-05-06T14:00:00+02:00", "stars": 4, "iso": "100", "flash": True, "x": []}
    members = {
        "one.png": picture(10),
        "one.json": json.dumps(told).encode(),
        "two.png": picture(11),
        "two.camera": b"Fuji\n",
        "two.json": b'{"stars": "many", "day": "2024-02-30", "taken": "noon"}',
    }
    write_tar(folder / "c.tar", members)
    for number in (1, 2):
        (folder / "cat").mkdir(exist_ok=True)
        (folder / f"cat/{number}.png").write_bytes(picture(20 + number))
    return folder


@pytest.fixture(scope="module")
def told(source: Path, options: dict, tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """Three segments: with all columns, with none, and with two, of which one has another type. Not to be changed."""
    memory = VisualMemory(tmp_path_factory.mktemp("told") / "memory")
    memory.add(source, keep=KEEP, **options)
    memory.add(source / "cat", dataset="plain")
    columns = {"stars": ["three", None], "lens": ["50 mm", "35 mm"], "label": ["cat", "dog"]}
    memory.add(write_table(source.parent / "more/d.parquet", 30, columns), keep=["lens", "stars"])
    return memory


@pytest.fixture
def memory(told: VisualMemory, tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(told.uri, tmp_path / "memory"))


def kept_by_uri(memory: VisualMemory) -> dict[str, dict]:
    """What is kept of each live entry, by the last part of its uri and its dataset."""
    state, live = memory.state(), memory.live()
    kept = read_kept(memory.log.storage, state, live.live_ids().tolist())
    found = {}
    for block in live.blocks:
        for entry_id, uri, dataset, lives in zip(
            block.ids_N.tolist(), block.uris.to_pylist(), block.datasets.to_pylist(), block.live_N, strict=True
        ):
            if lives:
                found[f"{uri.rpartition('/')[2]} of {dataset}"] = kept.get(entry_id, {})
    return found


NOTHING = dict.fromkeys(KEEP)
MIXED = {
    "a.parquet#row=0": {
        "camera": SECRET, "taken": "2024-05-06T12:00:00.000000Z", "stars": 5, "iso": 12.5, "flash": True,
        "day": "2024-05-06", "scene": "wood",
    },
    "a.parquet#row=1": {
        "camera": "Nikon", "taken": "2024-05-06T12:00:00.000000Z", "stars": -3, "iso": None, "flash": False,
        "day": "2024-05-06", "scene": "sea",
    },
    "a.parquet#row=2": NOTHING | {"camera": "Nikon", "iso": 800.0, "day": "2024-05-06"},
    "b.parquet#row=0": NOTHING | {"stars": 1},
    "b.parquet#row=1": NOTHING | {"stars": 2, "camera": "Canon"},
    "c.tar#one.png": NOTHING
    | {"camera": "Sony", "taken": "2024-05-06T12:00:00.000000Z", "stars": 4, "iso": 100.0, "flash": True},
    "c.tar#two.png": NOTHING | {"camera": "Fuji"},
    "1.png": NOTHING,
    "2.png": NOTHING,
}  # fmt: skip
TOLD = {f"{name} of mixed": kept for name, kept in MIXED.items()} | {
    "1.png of plain": {},
    "2.png of plain": {},
    "d.parquet#row=0 of more": {"lens": "50 mm", "stars": "three"},
    "d.parquet#row=1 of more": {"lens": "35 mm", "stars": None},
}


def test_what_every_kind_of_source_says_is_kept_in_one_type(told: VisualMemory) -> None:
    assert kept_by_uri(told) == TOLD
    state = told.state()
    assert [{c.name: c.type for c in segment.kept} for segment in state.segments][:2] == [TYPES, {}]
    for file in state.segments[0].entries:
        table = read_table(told.log.storage, file)
        assert table.schema.equals(entries_schema(state.identity, state.segments[0].kept), check_metadata=True)
        assert pq.read_schema(told.log.storage.local_path(file.path)).names == [*FIXED, *KEEP]
    assert told.status()["kept"] == TYPES | {"lens": "string", "stars": "string"}
    assert not told.verify().findings
    assert entries_schema(identity_of(4)).names == [*FIXED]


def test_the_same_columns_are_the_same_add_and_others_another(told: VisualMemory, source: Path) -> None:
    assert told.add(source, keep=KEEP[::-1]).segment is None
    assert told.add(source / "cat", dataset="plain").segment is None
    plans = [told.plan_add(source, AddOptions(keep=keep)) for keep in ((), ("camera",), KEEP)]
    assert [plan.already for plan in plans] == [None, None, told.state().segments[0]]
    assert len({plan.spec.fingerprint for plan in plans}) == 3


@pytest.mark.usefixtures("a_part_each")
@pytest.mark.parametrize("missing", [0, 3])
def test_an_add_that_goes_on_writes_what_it_would_have(
    source: Path, options: dict, tmp_path: Path, missing: int
) -> None:
    at_once, memory = VisualMemory(tmp_path / "at once"), VisualMemory(tmp_path / "memory")
    at_once.add(source, keep=KEEP, **options)

    class Interrupted(Here):
        def do_parts(self, work: Work, parts: Sequence[int], encoder: Encoder | None) -> Iterator[PartMark]:
            assert list(parts) == [0, 1, 2, 3]
            yield from super().do_parts(work, [part for part in parts if part != missing], encoder)
            raise KeyboardInterrupt

    known = VisualMemory(at_once.uri).plan_add(source, AddOptions(keep=KEEP))
    with pytest.raises(KeyboardInterrupt):
        run(memory.log, None, known, Interrupted(), "add")
    assert memory.add(source, keep=KEEP[::-1], **options).resumed > 0
    files = [[(f.rows, f.sha256) for f in m.state().segments[0].entries] for m in (at_once, memory)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_on_ray_the_same_is_kept(told: VisualMemory, source: Path, options: dict, tmp_path: Path) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    start_ray()
    memory = VisualMemory(tmp_path / "memory")
    memory.add(source, keep=KEEP, runner="ray", **options)
    assert kept_by_uri(memory) == {f"{name} of mixed": kept for name, kept in MIXED.items()}
    assert [f.rows for f in memory.state().segments[0].entries] == [f.rows for f in told.state().segments[0].entries]


LABEL_FILES = {
    "labels.csv": 'uri,label,stars,camera\ncat/1.png,tom,007,"a, b"\n{source}/c.tar#two.png,rex,3,\n',
    "labels.tsv": "uri\tlabel\tstars\tcamera\ncat/1.png\ttom\t007\ta, b\n{source}/c.tar#two.png\trex\t3\t\n",
    "labels.json": '{{"cat/1.png": {{"label": "tom", "stars": "007", "camera": "a, b"}}, '
    '"{source}/c.tar#two.png": {{"label": "rex", "stars": 3}}, "cat/2.png": "kit"}}',
}


@pytest.mark.parametrize("name", [*LABEL_FILES, "labels.parquet"])
def test_label_files_tell_of_files_and_of_what_containers_leave_out(source: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "labels.parquet":
        uris = ["cat/1.png", f"{source}/c.tar#two.png"]
        columns = {
            "uri": uris,
            "label": ["tom", "rex"],
            "stars": pa.array([7, 3], pa.int16()),
            "camera": ["a, b", None],
        }
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text(LABEL_FILES[name].format(source=source))
    labels = Labels(f"file:{path}")
    listing = list_source(str(source), labels, ["stars", "camera"])
    assert listing.kept == (KeptColumn(name="stars", type="int64"), KeptColumn(name="camera", type="string"))
    assert listing.images.select(["stars", "camera"]).to_pylist() == [
        {"stars": 7, "camera": "a, b"},
        {"stars": None, "camera": None},
    ]
    from pipeline.images.containers.container import Container, images_in

    rows = [Container(**row) for row in listing.containers.to_pylist()]
    kept = {i.uri.rpartition("/")[2]: i.kept for row in rows for i in images_in(row, labels, listing.kept)}
    assert (kept["c.tar#two.png"], kept["c.tar#one.png"], kept["b.parquet#row=0"]) == (
        (3, "Fuji"),
        (4, "Sony"),
        (1, None),
    )
    alone = list_source(str(source / "cat/1.png"), labels, ["stars"])
    assert alone.images.column("stars").to_pylist() == ([7] if name == "labels.parquet" else ["007"])


def test_a_single_file_and_its_label_file_become_a_segment(source: Path, options: dict, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("uri,label,camera\n1.png,tom,Nikon\n2.png,tim,Sony\ncat/2.png,tim,Sony\n")
    given = {"labels": f"file:{tmp_path / 'l.csv'}", "keep": ["camera"]}
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(source / "cat", **given, **options)
    assert (report.entries, report.to_json()["kept"]) == (2, {"camera": "string"})
    report = memory.add(source / "cat/2.png", dataset="one", **given)
    assert (report.entries, memory.state().singles) == (1, None)
    assert {name: kept["camera"] for name, kept in kept_by_uri(memory).items()} == {
        "1.png of cat": "Nikon",
        "2.png of cat": "Sony",
        "2.png of one": "Sony",
    }
    (tmp_path / "l.csv").write_text("uri,label,modified\n1.png,timmy,never\n2.png,tim,\n")
    with pytest.raises(SourceError, match=r"the column modified of .*l.csv has the name of one of the plan's: rename"):
        memory.add(source / "cat", dataset="two", labels=given["labels"], keep=["modified"])
    plan = read_table(memory.log.storage, memory.state().segments[0].plan)
    assert plan.column("camera").to_pylist() == ["Nikon", "Sony"]
    [erased] = memory.live().matching(label="tom").tolist()
    receipt = memory.forget(ids=[erased], erase=True, verify=True).receipt
    assert receipt is not None
    assert receipt.proven
    assert not Audit(np.empty((0, 4), np.float16), [], [], [], ["Nikon"]).search(Path(memory.uri))[0]
    assert not memory.verify().findings


def settled(*kinds: pa.DataType | None, tar: bool = False) -> str:
    """The type of a column `x` that files have in these types, None for a file without it."""
    found = ColumnsFound(["x"])
    for number, kind in enumerate(kinds):
        found.note(f"/{number}.parquet", pa.schema([("y", pa.int8())] if kind is None else [("x", kind)]))
    if tar:
        found.note_archive()
    [column] = found.settled(None)
    return column.type


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([pa.int8(), None, pa.uint32()], "int64"),
        ([pa.uint64()], "string"),
        ([pa.float16()], "float64"),
        ([pa.int64(), pa.float32()], "float64"),
        ([pa.int64(), pa.bool_()], "string"),
        ([pa.dictionary(pa.int8(), pa.large_string())], "string"),
        ([pa.dictionary(pa.int8(), pa.int16())], "int64"),
        ([pa.timestamp("s")], "timestamp[us]"),
        ([pa.timestamp("s"), pa.timestamp("us", tz="UTC")], "string"),
        ([pa.timestamp("ns", tz="Asia/Tokyo"), pa.timestamp("ms", tz="UTC")], "timestamp[us, UTC]"),
        ([pa.date64(), pa.date32()], "date32"),
        ([pa.null(), pa.date32()], "date32"),
        ([pa.null()], "string"),
    ],
)
def test_the_common_type(kinds: list, expected: str) -> None:
    assert settled(*kinds) == expected
    assert settled(*kinds[::-1], tar=True) == expected


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.binary(), pa.time64("us"), pa.decimal128(9, 2)]
)
def test_what_is_no_plain_type_is_refused(kind: pa.DataType) -> None:
    with pytest.raises(SourceError, match=r"the column x of /1.parquet is .* and cannot be kept: name a column"):
        settled(pa.string(), kind)


def test_a_column_that_is_nowhere_is_named_with_those_there_are(source: Path) -> None:
    assert settled(tar=True) == "string"
    with pytest.raises(SourceError, match="nothing in the source has a column x, it has y: name one of"):
        settled(None)
    with pytest.raises(SourceError, match=r"a column cam, it has camera, day, flash, iso, scene, stars, taken: name"):
        list_source(str(source / "a.parquet"), Labels(), ["cam"])
    with pytest.raises(SourceError, match="has a column camera, it has none to keep"):
        list_source(str(source / "cat"), Labels(), ["camera"])
    assert list_source(str(source), Labels(), ["anything"]).kept == (KeptColumn(name="anything", type="string"),)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["label"], "`keep` label is the name of a column that every entry has .*: rename the column in the source"),
        (["URI"], "`keep` URI is the name"),
        (["camera", "Camera"], "`keep` names Camera twice"),
        ([" "], "`keep` is empty"),
        ("camera", r"keep is 'camera': give a list, such as \['camera'\]"),
    ],
)
def test_names_that_cannot_be(source: Path, tmp_path: Path, keep: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VisualMemory(tmp_path / "memory").add(source, keep=keep)
    assert not (tmp_path / "memory").exists()


def test_what_a_plan_has_of_its_own_is_not_taken_for_kept(source: Path, options: dict, tmp_path: Path) -> None:
    write_table(tmp_path / "s/t.parquet", 0, {"modified": ["yesterday"], "num_bytes": pa.array([7], pa.uint64())})
    shutil.copy(source / "cat/1.png", tmp_path / "s/1.png")
    memory = VisualMemory(tmp_path / "memory")
    memory.add(tmp_path / "s", keep=["modified", "num_bytes"], **options)
    assert kept_by_uri(memory) == {
        "1.png of s": {"modified": None, "num_bytes": None},
        "t.parquet#row=0 of s": {"modified": "yesterday", "num_bytes": "7"},
    }


def test_values_are_of_their_type_or_null() -> None:
    assert as_type(pa.array([1.5, None], pa.float16()), pa.float64()).to_pylist() == [1.5, None]
    assert as_type(pa.array([True]), pa.timestamp("us")).to_pylist() == [None]
    times = pa.array([1, 1_000_000_001, None], pa.timestamp("ns"))
    assert as_type(times, pa.timestamp("us")).cast(pa.int64()).to_pylist() == [0, 1_000_000, None]
    assert as_type(pa.array(["1", "x", None, "2.5"]), pa.int64()).to_pylist() == [1, None, None, None]
    assert as_type(pa.array([2**62 + 1, None]), pa.float64()).to_pylist() == [2.0**62, None]
    assert value_of("2024-05-06", pa.date32()) == (NOON.date() - datetime.date(1970, 1, 1)).days
    assert value_of("99999-01-01", pa.timestamp("us")) is None
    assert value_of("", pa.int64()) is None


def test_packed_with_others_nothing_is_lost(memory: VisualMemory) -> None:
    before, state = memory.search([picture(0)], k=20), memory.state()
    assert memory.compact().committed
    [file] = memory.state().entries_files()
    schema = read_table(memory.log.storage, file).schema
    assert schema.names == [*FIXED, *KEEP, "lens"]
    assert (schema.field("stars").type, schema.field("iso").type) == (pa.string(), pa.float64())
    assert kept_by_uri(memory) == TOLD
    assert [[n.to_json() for n in found] for found in memory.search([picture(0)], k=20)] == [
        [n.to_json() for n in found] for found in before
    ]
    memory.relabel(ids=[before[0][0].id], label="lion")
    assert kept_by_uri(memory) == TOLD
    assert not memory.compact().committed
    assert not memory.verify().findings
    memory.rollback(state.version)
    assert kept_by_uri(memory) == TOLD
    assert not memory.verify().findings


def test_a_copy_keeps_all(memory: VisualMemory, tmp_path: Path) -> None:
    memory.compact()
    memory.copy(tmp_path / "copy")
    there = VisualMemory(tmp_path / "copy")
    assert kept_by_uri(there) == TOLD
    assert there.status()["kept"] == memory.status()["kept"]
    assert not there.verify().findings


@pytest.mark.parametrize("compacted", [False, True])
def test_what_is_erased_is_kept_nowhere(memory: VisualMemory, compacted: bool) -> None:
    if compacted:
        memory.compact()
    [entry_id] = [n.id for n in memory.search([picture(0)], k=20)[0] if n.uri.endswith("a.parquet#row=0")]
    told = memory.forget(ids=[entry_id], verify=True).receipt
    assert told is not None
    assert {found.what for found in told.found} >= {"id", "uri", "kept camera", "kept scene"}
    assert not {found.what for found in told.found} & {"kept day", "kept flash"}  # others have the same
    audit = Audit(np.empty((0, 4), np.float16), [entry_id], [], [], [SECRET, "12.5", "wood"])
    assert {hit.rpartition(": ")[2] for hit in audit.search(Path(memory.uri))[0]} >= {f"kept {SECRET}", "kept 12.5"}
    receipt = memory.forget(ids=[entry_id], erase=True, verify=True).receipt
    assert receipt is not None
    assert receipt.proven
    assert audit.search(Path(memory.uri))[0] == []
    assert kept_by_uri(memory) == {name: kept for name, kept in TOLD.items() if name != "a.parquet#row=0 of mixed"}
    assert not memory.verify().findings


def test_verify_tells_of_columns_that_are_gone(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a writer would leave it that knows nothing of kept columns."""
    import pipeline.edits.compact as compacting

    lose = lambda tables: pa.concat_tables(table.select(FIXED) for table in tables)  # noqa: E731
    monkeypatch.setattr(compacting, "join_entries", lose)
    memory.compact()
    [finding, *others] = [finding.what for finding in memory.verify().findings]
    assert finding.startswith("keeps camera (string) of segment 1, not so in packs/")
    assert len(others) == len(KEEP) - 1 + 2


def test_commands_know_of_it(source: Path, told: VisualMemory, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*words: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == status, err
        return out if status == 0 else err

    uri, place = told.uri, str(source)
    planned = json.loads(said("add", uri, place, "--keep", "camera", "--keep", "stars", "--dry-run", "--json"))
    assert planned["kept"] == {"camera": "string", "stars": "int64"}
    assert "keeping camera (string), taken (timestamp[us, UTC])" in said(
        "add", uri, place, "--keep", "camera", "--keep", "taken", "--dry-run"
    )
    assert "--keep sha256 is the name" in said("add", uri, place, "--keep", "sha256", status=2)
    assert json.loads(said("status", uri, "--json"))["kept"]["taken"] == "timestamp[us, UTC]"
    assert "kept      camera (string), taken" in said("status", uri)
    image = tmp_path / "asked.png"
    image.write_bytes(picture(0))
    [found] = json.loads(said("search", uri, str(image), "-k", "20", "--json"))
    by_uri = {n["uri"].rpartition("/")[2]: n.get("kept") for n in found}
    assert by_uri["a.parquet#row=0"] == MIXED["a.parquet#row=0"]
    assert [n for n in found if n["dataset"] == "plain" and "kept" in n] == []
    assert f"camera={SECRET}" in said("explain", uri, str(image), "-k", "20")
    explained = json.loads(said("explain", uri, str(image), "-k", "20", "--json"))["neighbors"]
    assert {n["uri"].rpartition("/")[2]: n.get("kept") for n in explained}["d.parquet#row=0"]["lens"] == "50 mm"


def test_commands_ask_only_where_it_holds(
    source: Path, told: VisualMemory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def said(*words: str, status: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == status, err
        return out, err

    image = tmp_path / "asked.png"
    image.write_bytes(picture(0))
    asked, where = (told.uri, str(image), "-k", "5"), "taken >= '2024-05-06' AND camera in ('Nikon', 'Sony')"
    out, err = said("search", *asked, "--where", where, "--json")
    assert sorted(n["kept"]["camera"] for n in json.loads(out)[0]) == ["Nikon", "Sony"]
    assert "2 entries satisfy --where, so there are no 5 neighbours to show" in err
    [decision] = json.loads(said("classify", *asked, "--where", where, "--json")[0])
    assert decision["where"] == where
    assert {n["uri"].rpartition("/")[2] for n in decision["neighbors"]} == {"a.parquet#row=1"}  # the other has no label
    page = tmp_path / "why.html"
    out, _ = said("explain", *asked, "--where", "label = 'cat' and stars = '5'", "--html", str(page))
    assert "where label = 'cat' and stars = '5'" in out
    assert "where label = &#x27;cat&#x27;" in page.read_text()
    assert (
        "no entry satisfies where: flash is null and flash"
        in said("classify", *asked, "--where", "flash is null and flash")[0]
    )
    report = json.loads(said("evaluate", told.uri, "--leave-one-out", "-k", "1", "--where", "flash", "--json")[0])
    assert (report["num_queries"], report["where"]) == (1, "flash")
    out, _ = said("evaluate", told.uri, str(source), "-k", "1", "--where", "not flash")
    assert "where not flash, version 3" in out
    jobs = ("classify", told.uri, str(source / "cat"), "--out", str(tmp_path / "out"), "--where")
    assert json.loads(said(*jobs, "day is not null", "--json")[0])["decided"] == 2
    assert "made with other options" in said(*jobs, "day is null", status=2)[1]
    _, err = said("search", *asked, "--where", "lens > 3", status=2)
    assert "where cannot compare the column lens (string) with 3: give a text in quotes" in err
    _, err = said("classify", *asked, "--where", "Kamera = 'x'", status=2)
    assert "where names Kamera, which is no column: there are id, uri, label, dataset, camera, taken" in err
    assert "Traceback" not in err
