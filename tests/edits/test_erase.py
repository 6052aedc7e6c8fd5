"""Erasing: no byte of what was erased is left, every version can be read, and the rest is as if it had never been."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from pipeline import VisualMemory
from pipeline.edits.compact import compact
from pipeline.edits.erasure.byte_search import BYTES_AT_ONCE, VectorSearch, quantizer_holds
from pipeline.edits.erasure.erase import erase
from pipeline.edits.erasure.redact import finish_erasures
from pipeline.edits.erasure.traces import InFile, Traces
from pipeline.edits.relabel import Correction
from pipeline.edits.singles import fold_singles
from pipeline.errors import CommitConflict, UnknownName
from pipeline.index.build.plan import IndexOptions
from pipeline.runner import Here
from pipeline.store.log.documents import Commit
from pipeline.store.log.erasure_plan import REDACTED, ErasurePlan
from pipeline.store.log.state import FoldSingles, Forget, Relabel, SetIndex, SetState, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import SegmentSpec, reserve
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.schemas import PLAN, read_table
from tests.edits.erasing import (
    DAMAGED,
    DIMENSION,
    IDENTITY,
    Doomed,
    Item,
    answers,
    assert_erased,
    assert_sound,
    by_uri,
    every_version,
    ids_of,
    in_base64,
    item,
    items,
    remember,
    teach,
)
from tests.store.dying import Died, DyingStorage, bury
from tests.store.seaweed import SeaweedFS
from tests.store.test_verify import run_pickled

Keep = Callable[[Sequence[Item]], list[Item]]

NAMES = ["cat one.png", "50%25 off.png", "straße's.png", "plain.png", 'quote"d.png', "single.png", "folded.png"]
MIXED = [item(f"/doomed/{name}", label) for name, label in zip(NAMES, "abcabca", strict=True)]
SECRET = items("secret", 9, ("cat", "secret-label"))
BASE = items("base", 140)
LATER = items("later", 30)
SINGLES = items("one by one", 103)


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    return VisualMemory(tmp_path / "memory")


def tell(memory: VisualMemory, keep: Keep) -> None:
    """A story with everything in it, but for the images that are not kept."""
    damaged = [Item("/base/damaged.png", DAMAGED), Item("/doomed/single.png", DAMAGED)]
    remember(memory, keep([*BASE[:50], *MIXED[:3], *damaged, *BASE[50:], *MIXED[3:5]]), "base", thumbnails=True)
    for image in keep([BASE[7], MIXED[0]]):
        memory.forget(uris=[image.uri], command=f"forget --uri '{image.uri}'")
    teach(memory, keep([*SINGLES[:20], MIXED[6], *SINGLES[20:70]]))
    remember(memory, keep(SECRET), "secret")
    memory.index(IndexOptions(key="Flat", shard_rows=60), command="index --key Flat")
    teach(memory, keep([*SINGLES[70:], MIXED[5]]))
    remember(memory, keep(LATER), "later")
    memory.index(IndexOptions(shard_rows=60), command="index")
    relabel(memory, keep([*MIXED[1:], BASE[0]]), "fox")
    relabel(memory, [BASE[0]], "cat")
    memory.relabel(label_set="size", map={"fox": "small", "cat": "small", "dog": "large", "secret-label": "large"})
    relabel(memory, keep([*MIXED[1:3], *SECRET[:2], BASE[3]]), "huge", "size")
    teach(memory, keep(items("last", 3)))


def relabel(memory: VisualMemory, images: Sequence[Item], label: str, label_set: str | None = None) -> None:
    if ids := ids_of(memory, images):
        given = " ".join(f"--id {entry_id}" for entry_id in ids)
        memory.relabel(ids=ids, label=label, label_set=label_set, command=f"relabel {given} --label {label}")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    """The whole story. Tests must not change it: they copy it."""
    memory = VisualMemory(tmp_path_factory.mktemp("told") / "memory")
    tell(memory, list)
    assert memory.log.latest().version > 100
    return memory


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Item]], VisualMemory]:
    """The story as it is without some images."""
    known: dict[frozenset[Item], VisualMemory] = {}

    def twin(doomed: Sequence[Item]) -> VisualMemory:
        if frozenset(doomed) not in known:
            known[frozenset(doomed)] = VisualMemory(tmp_path_factory.mktemp("untold") / "memory")
            # The image that was damaged before it was added by itself goes by its uri too.
            uris = {image.uri for image in doomed}
            tell(known[frozenset(doomed)], lambda images: [image for image in images if image.uri not in uris])
        return known[frozenset(doomed)]

    return twin


def copied(memory: VisualMemory, target: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(memory.uri, target))


def listed(tmp_path: Path, names: Sequence[object]) -> Path:
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    return tmp_path / "list.txt"


SELECTIONS: dict[str, tuple[list[Item], Callable[[Doomed, Path], dict]]] = {
    "ids": (MIXED, lambda doomed, _: {"ids": doomed.ids}),
    "uris": (MIXED, lambda doomed, _: {"uris": [image.uri for image in doomed.images]}),
    "label": (MIXED[1:], lambda *_: {"labels": ["fox"]}),
    "dataset": (SECRET, lambda *_: {"datasets": ["secret"]}),
    "file of uris": (MIXED, lambda doomed, tmp: {"file": listed(tmp, [image.uri for image in doomed.images])}),
    "file of ids": ([*MIXED, *SECRET], lambda doomed, tmp: {"file": listed(tmp, doomed.ids)}),
    "all but a few": ([*BASE, *LATER, *SINGLES], lambda doomed, _: {"uris": [image.uri for image in doomed.images]}),
}
QUICK = {("ids", True), ("label", False), ("dataset", False)}  # the others take minutes together


@pytest.mark.parametrize(
    ("name", "compacted"),
    [
        pytest.param(name, compacted, marks=() if (name, compacted) in QUICK else pytest.mark.slow)
        for name in SELECTIONS
        for compacted in (False, True)
    ],
)
def test_nothing_is_left_and_the_rest_is_as_if_it_had_never_been(
    told: VisualMemory, untold: Callable, tmp_path: Path, name: str, compacted: bool
) -> None:
    memory = copied(told, tmp_path / "memory")
    if compacted:
        compact(memory.log)
    images, selection = SELECTIONS[name]
    doomed, before = Doomed.of(memory, images), every_version(memory)
    assert len(doomed.ids) == len(images)
    live = len(ids_of(memory, images))
    report = memory.forget(**selection(doomed, tmp_path), erase=True, verify=True)
    assert (report.forgotten, report.erased, report.duplicates) == (live, len(images), ())
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert {entry["uri"] for entry in report.receipt.entries} == {image.uri for image in images}
    assert_erased(memory, doomed, before)
    twin = untold(images)
    assert answers(memory) == answers(twin)
    assert answers(memory, "size") == answers(twin, "size")
    assert memory.status()["entries_by_label"] == twin.status()["entries_by_label"]


def test_no_id_is_given_twice(told: VisualMemory, tmp_path: Path) -> None:
    memory = copied(told, tmp_path / "memory")
    taken = {entry_id for entries in every_version(memory).values() for ids in entries.values() for entry_id in ids}
    memory.forget(datasets=["single", "later"], erase=True)
    teach(memory, items("new", 70))
    remember(memory, items("newer", 20), "newer")
    new = {i for (uri, _), ids in by_uri(memory).items() if uri.startswith("/new") for i in ids}
    assert len(new) == 90
    assert not new & taken
    memory.index(IndexOptions())
    assert_sound(memory)


def test_a_whole_memory(told: VisualMemory, tmp_path: Path) -> None:
    memory = copied(told, tmp_path / "memory")
    images = [*BASE, *MIXED, *SECRET, *LATER, *SINGLES, *items("last", 3)]
    doomed = Doomed.of(memory, images)
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert_erased(memory, doomed, {})
    assert memory.status()["entries"] == 0
    assert memory.log.latest().index is None
    remember(memory, items("base", 5), "base")
    assert memory.status()["entries"] == 5


@pytest.mark.slow
def test_one_after_the_other(told: VisualMemory, untold: Callable, tmp_path: Path) -> None:
    memory = copied(told, tmp_path / "memory")
    doomed, before = Doomed.of(memory, [*MIXED, *SECRET]), every_version(memory)
    for entry_id in doomed.ids[::2]:
        assert memory.forget(ids=[entry_id], erase=True, verify=True).receipt.proven  # type: ignore[union-attr]
    memory.forget(ids=ids_of(memory, [*MIXED, *SECRET]))  # what is forgotten can be erased later
    assert memory.forget(ids=doomed.ids[1::2], erase=True).forgotten == 0
    assert_erased(memory, doomed, before)
    assert answers(memory) == answers(untold([*MIXED, *SECRET]))


# Parts of memories that the story does not tell of


def grown(memory: VisualMemory, images: Sequence[Item]) -> Doomed:
    """A small memory of which some images are to be erased."""
    remember(memory, [*items("kept", 12), *images], "source")
    return Doomed.of(memory, images)


def test_what_only_versions_hold_that_were_rolled_back(memory: VisualMemory) -> None:
    remember(memory, items("kept", 12), "first")
    remember(memory, MIXED[:3], "second")
    teach(memory, MIXED[3:5])
    fold_singles(memory.log, memory.log.latest())
    teach(memory, [MIXED[5], item("/kept/single.png", "cat")])
    memory.index(IndexOptions(key="Flat"))
    memory.rollback(1)
    teach(memory, items("kept too", 2))
    doomed, before = Doomed.of(memory, MIXED[:6]), every_version(memory)
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert (report.forgotten, report.erased) == (0, 6)
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert_erased(memory, doomed, before)
    memory.rollback(7)
    assert [uri for uri, _ in by_uri(memory) if "single" in uri] == ["/kept/single.png"]
    assert_sound(memory)


def test_older_versions_that_were_dropped(told: VisualMemory, tmp_path: Path) -> None:
    memory = copied(told, tmp_path / "memory")
    memory.expire(5)
    doomed, before = Doomed.of(memory, [*MIXED[1:], *SECRET]), every_version(memory)
    memory.forget(ids=doomed.ids, erase=True)
    assert memory.log.retained()[0] > 100
    assert doomed.audit(memory.uri) == []
    assert set(every_version(memory)) >= set(before)


SLOW_KEYS = [pytest.param(key, marks=pytest.mark.slow) for key in ("IVF8,SQfp16", "OPQ4_16,IVF4,PQ4x4")]


@pytest.mark.parametrize("key", ["Flat", "IVF8,Flat", "IVF4,PQ4x4", "HNSW8", *SLOW_KEYS])
def test_shards_of_every_kind(memory: VisualMemory, key: str) -> None:
    lost = items("lost", 130)
    remember(memory, [*items("kept", 380), *MIXED[:2]], "first")
    remember(memory, lost, "second")
    remember(memory, [*items("too", 130), MIXED[2]], "third")
    memory.index(IndexOptions(key=key, shard_rows=150, target_recall=0.5))
    memory.forget(ids=ids_of(memory, MIXED[1:2]))
    remember(memory, [*items("more", 40), MIXED[3]], "fourth")
    memory.index(IndexOptions(shard_rows=150, target_recall=0.5))
    doomed, before = Doomed.of(memory, [*MIXED[:4], *lost]), every_version(memory)
    shards = len(memory.log.latest().index.shards)  # type: ignore[union-attr]
    if key in ("IVF8,Flat", "HNSW8"):
        assert any("as float32" in hit for hit in doomed.audit(memory.uri) if "index.faiss" in hit)
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert_erased(memory, doomed, before)
    index = memory.log.latest().index
    assert index is not None
    assert len(index.shards) == shards - 1  # the second source was one by itself
    assert memory.status()["fresh"] == 0
    found = memory.search(embeddings=np.stack([image.vector for image in doomed.images[:20]]), k=50)
    assert not {n.id for neighbors in found for n in neighbors} & set(doomed.ids)
    if "PQ" not in key:
        own = memory.search(embeddings=np.stack([image.vector for image in items("kept", 380)[::37]]), k=1)
        assert [n[0].uri for n in own] == [image.uri for image in items("kept", 380)[::37]]


SLOW_KEYS = [pytest.param(key, marks=pytest.mark.slow) for key in ("OPQ4_16,IVF200,Flat", "IVF200_HNSW8,Flat")]


@pytest.mark.parametrize("key", ["IVF200,Flat", *SLOW_KEYS])
@pytest.mark.parametrize("rebuilt", [False, True], ids=["in use", "of the past"])
def test_a_centroid_that_is_an_erased_vector_takes_its_index_along(
    memory: VisualMemory, key: str, rebuilt: bool
) -> None:
    # With so many cells some hold a single vector, and its centroid is that vector, scaled to unit length.
    images = items("image", 300)
    remember(memory, images, "source")
    memory.index(IndexOptions(key=key, target_recall=0.1))
    trained = memory.log.latest().index.trained  # type: ignore[union-attr]
    assert trained is not None
    held = [image for image in images if quantizer_holds(memory.log.storage, trained, image.vector[None])]
    if "OPQ" not in key:
        index = faiss.read_index(str(Path(memory.uri) / trained.path))
        centroids_CD = faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, 200)
        vectors_ND = np.stack([image.vector for image in images]).astype(np.float64)
        units_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        assert [images[row] for row in np.flatnonzero((units_ND @ centroids_CD.T).max(axis=1) > 0.99999)] == held
    if rebuilt:
        memory.index(IndexOptions(key="Flat", rebuild=True))
    averaged = Doomed.of(memory, [image for image in images if image not in held][:1])
    assert not memory.forget(ids=averaged.ids, erase=True).index_dropped
    assert Path(memory.uri, trained.path).exists() is not rebuilt  # it goes with a shard of the past that held it
    doomed, before = Doomed.of(memory, held[:1]), every_version(memory)
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert report.index_dropped is not rebuilt
    assert (memory.log.latest().index is None) is not rebuilt
    assert not Path(memory.uri, trained.path).exists()
    assert report.receipt is not None
    assert report.receipt.proven
    assert_erased(memory, doomed, before)


def test_labels_that_only_erased_entries_had_leave_the_shards(memory: VisualMemory) -> None:
    doomed = grown(memory, [item("/doomed/a.png", "name of a person")])
    memory.index(IndexOptions(key="Flat"))
    memory.forget(ids=doomed.ids, erase=True)
    assert [path for path in Path(memory.uri).rglob("*") if path.is_file() and b"a person" in path.read_bytes()] == []


def test_a_source_that_is_the_image_itself(memory: VisualMemory) -> None:
    image = item("/doomed/only.png")
    remember(memory, items("kept", 3), "kept")
    remember(memory, [image], "doomed/only.png", dataset="photos", thumbnails=True)
    remember(memory, [image], "doomed/only.png", dataset="photos", finished=False)
    doomed, before = Doomed.of(memory, [image]), every_version(memory)
    assert any("thumbnail" in hit for hit in doomed.audit(memory.uri))
    assert memory.forget(uris=[image.uri], erase=True, verify=True).receipt.proven  # type: ignore[union-attr]
    assert_erased(memory, doomed, before)
    assert [segment.source for segment in memory.log.latest().segments] == ["/kept", REDACTED]


def test_adds_of_the_same_source_that_were_interrupted(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED)
    remember(memory, [*MIXED[:2], *items("kept", 3)], "begun", finished=False)
    remember(memory, items("other", 3), "other", finished=False)
    folder = Path(memory.uri) / "segments/00000004/plan"
    folder.mkdir(parents=True)
    shutil.copy(next((Path(memory.uri) / "segments/00000001/plan").iterdir()), folder)  # died before describing it
    report = memory.forget(uris=[image.uri for image in MIXED], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert doomed.audit(memory.uri) == []
    assert VisualMemory(memory.uri).verify().sound
    assert (Path(memory.uri) / "segments/00000002/given_up.json").exists()
    assert list((Path(memory.uri) / "segments/00000003/entries").iterdir())  # it goes on where it was
    assert not folder.exists()


def test_an_add_of_it_that_is_under_way_is_named(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:1])
    row = {"uri": MIXED[0].uri, "label": "a", "num_bytes": 1, "modified": None}
    with Lease(memory.log.storage, "add /doomed") as lease:
        images = pa.Table.from_pylist([row], schema=pa.schema(list(PLAN)[1:]))
        spec = SegmentSpec(fingerprint="x", source="/doomed", dataset="x", identity=IDENTITY)
        reserve(memory.log.storage, spec, images, lease=lease)
        report = memory.forget(ids=doomed.ids, erase=True, verify=True)
        assert report.receipt is not None
        assert not report.receipt.proven
        assert report.receipt.work_under_way[0].startswith("add /doomed (process")
        assert "when that is done, `verify --clean` removes" in report.receipt.to_text()
        assert {found.what for found in report.receipt.found} == {"uri"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("forget --uri /doomed/a.png --json", "forget --uri … --json"),
        ("forget --uri=/doomed/a.png", "forget …"),
        ("forget --uri file:///doomed/a.png", "forget --uri …"),
        ("forget --uri a.png", "forget --uri …"),
        ("forget --uri ./a.png", "forget --uri …"),
        ("forget --uri ../x/../doomed/a.png", "forget --uri …"),
        ("forget --uri ~/doomed/a.png", "forget --uri …"),
        ("forget --uri '/doomed/it is.png'", "forget --uri …"),
        ("forget --uri 'it is.png' --uri b.png", "forget --uri … --uri b.png"),
        ("forget --uri /doomed/it is.png", "forget --uri …"),
        ("forget --uri '/doomed/it'\"'\"'s.png'", "forget --uri …"),
        ("forget --uri /doomed/50%25.png --uri /doomed/50%.png", "forget --uri … --uri …"),
        ("add /doomed/ --dataset a.p", "add /doomed/ --dataset a.p"),
        ("add /other/a.png", "add /other/a.png"),
        ("forget --uri s3://b/c.png --uri s3://b/d.png", "forget --uri … --uri s3://b/d.png"),
        ("relabel --id 549755813890 --label 7", "relabel --id … --label 7"),
        ("relabel --id=549755813890 --id 5497558138901", "relabel --id=… --id 5497558138901"),
        ("relabel --id 549_755_813_890 --id 0549755813890", "relabel --id … --id …"),
        ("say it's 'open", "say it's 'open"),
        ("", ""),
    ],
)
def test_commands_are_redacted(command: str, expected: str) -> None:
    uris = {"/doomed/a.png", "/doomed/it is.png", "/doomed/it's.png", "/doomed/50%25.png", "s3://b/c.png"}
    plan = ErasurePlan(nonce="0", ids=frozenset({549755813890}), uris=frozenset(uris))
    assert plan.command(command) == expected
    assert REDACTED == "…"


def test_a_label_set_made_for_erased_entries_alone_stays(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:2])
    memory.relabel(ids=doomed.ids, label="x", label_set="own")
    memory.relabel(ids=ids_of(memory, items("kept", 2)), label="y", label_set="own")
    before = every_version(memory)
    memory.forget(ids=doomed.ids, erase=True)
    assert_erased(memory, doomed, before)
    assert VisualMemory(memory.uri, at=2).status()["label_sets"] == {"own": 0}
    assert memory.status()["label_sets"] == {"own": 1}


def test_what_history_tells_of_redacted_versions(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:3])
    kept = ids_of(memory, items("kept", 3))
    memory.forget(ids=[*doomed.ids, *kept[:2]])
    memory.relabel(ids=[kept[2]], label="z")
    memory.forget(ids=doomed.ids, erase=True)
    told = memory.history()[::-1]
    assert [(s.rows_before, s.rows_after) for s in told] == [(0, 12), (12, 10), (10, 10), (10, 10)]
    assert [s.actions[-1] for s in told] == ["add segment 1 (12 entries)", "forget 2", "relabel 1", "erase"]


def test_a_reader_of_an_older_version_loses_it_too(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:2])
    remember(memory, items("later", 2), "later")
    reader = VisualMemory(memory.uri, at=1)
    assert len(reader.live()) == 14
    memory.forget(ids=doomed.ids, erase=True)
    assert len(reader.live()) == 12


def test_what_was_erased_is_unknown(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:2])
    memory.forget(ids=doomed.ids, erase=True)
    for selection in ({"ids": doomed.ids}, {"uris": [MIXED[0].uri]}, {"labels": ["a"]}):
        with pytest.raises(UnknownName, match="has no entry with"):
            memory.forget(**selection, erase=True)  # type: ignore[arg-type]
    assert memory.log.latest().version == 2


# Duplicates and receipts


def test_duplicates_that_stay_are_told_and_kept(memory: VisualMemory) -> None:
    a, b, c, single = MIXED[:4]
    remember(memory, [*items("kept", 5), *MIXED[:4]], "first")
    remember(memory, [Item(a.uri, "z", item("/x").vector_D, item("/x").sha256), *items("too", 3)], "second")
    teach(memory, [Item("/same bytes.png", "z", item("/y").vector_D, b.sha256)])
    teach(memory, [Item("/same vector.png", "z", c.vector_D, item("/z").sha256)])
    [first] = [ids for (_, dataset), ids in by_uri(memory).items() if dataset == "first" and ids][:1]
    doomed_ids = [i for (uri, d), ids in by_uri(memory).items() if d == "first" and "doomed" in uri for i in ids]
    before = every_version(memory)
    report = memory.forget(ids=doomed_ids, erase=True, verify=True)
    assert {(d.uri, d.same) for d in report.duplicates} == {(a.uri, "uri"), ("/same bytes.png", "hash")}
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert {(d.uri, d.same) for d in report.receipt.live_duplicates} == {
        (a.uri, "uri"),
        ("/same bytes.png", "hash"),
        ("/same vector.png", "vector"),
    }
    assert "has the same vector, and stays" in report.receipt.to_text()
    nothing = item("/nothing like it")
    own = [
        Item(nothing.uri, None, a.vector_D, a.sha256),
        Item(b.uri, None, b.vector_D, nothing.sha256),
        Item(c.uri, None, nothing.vector_D, c.sha256),
        single,
    ]
    assert_erased(memory, Doomed(own, doomed_ids), before)
    assert {"/same bytes.png", "/same vector.png", a.uri} <= {uri for uri, _ in by_uri(memory)}
    assert first


def test_a_uri_added_meanwhile_is_no_longer_the_erased_entrys_alone(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:2])
    with Between(memory, lambda other: remember(other, [*MIXED[:1], *items("new", 2)], "again")) as between:
        erase(between, np.array(doomed.ids), "forget --erase")
    assert [segment.planned for segment in memory.log.latest().segments] == [12, 3]
    assert_sound(memory)
    assert [i for i in ids_of(memory, MIXED[:2]) if i not in doomed.ids]


def test_forgetting_alone_is_proven_for_answers_only(memory: VisualMemory) -> None:
    doomed = grown(memory, MIXED[:2])
    report = memory.forget(ids=doomed.ids, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert not report.receipt.erased
    assert {found.what for found in report.receipt.found} == {"id", "uri", "sha256", "vector"}
    assert "the bytes stay until `forget --erase`" in report.receipt.to_text()
    assert json.dumps(report.receipt.to_json())


def test_a_receipt_says_what_is_left(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = grown(memory, MIXED[:1])
    folder = Path(memory.uri) / "forgotten notes"
    folder.mkdir()
    (folder / "vectors.raw").write_bytes(b"abc" + MIXED[0].vector.astype(np.float32).tobytes())
    (folder / "list.txt").write_text(f"{MIXED[0].sha256} {doomed.ids[0]}")
    (folder / "single.json").write_text(json.dumps({"embedding": in_base64(MIXED[0])}))
    shutil.copy(next(Path(memory.uri).rglob("entries/*.parquet")), folder / ".hidden")
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert report.receipt is not None
    assert not report.receipt.proven
    assert sorted((found.path.rpartition("/")[2], found.what) for found in report.receipt.found) == [
        (".hidden", "id"),
        (".hidden", "sha256"),
        (".hidden", "uri"),
        (".hidden", "vector"),
        ("list.txt", "id"),
        ("list.txt", "sha256"),
        ("single.json", "vector"),
        ("vectors.raw", "vector"),
    ]
    assert "proven      NO" in report.receipt.to_text()


def test_files_of_any_size_are_erased_and_proven_and_read_once(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shards and trained indexes are larger than what is ever read at once.
    monkeypatch.setattr("pipeline.store.storage.interface.MOST_BYTES_ELSEWHERE", 8_000)
    doomed = grown(memory, [*MIXED[:2], *items("more", 300)])
    memory.index(IndexOptions(key="IVF8,Flat", target_recall=0.5))
    assert max(memory.log.storage.walk().values()) > 8_000
    erasure = memory.forget(ids=doomed.ids[:2], erase=True)
    reads: list[str] = []
    of_files = LocalStorage.local_path
    monkeypatch.setattr(LocalStorage, "local_path", lambda self, path: (reads.append(path), of_files(self, path))[1])
    receipt = memory.forget(ids=doomed.ids[2:3], verify=True).receipt
    assert receipt is not None
    assert {trace.what for trace in receipt.found} >= {"id", "uri", "vector"}
    assert erasure.erased == 2
    proven = reads[-receipt.files_scanned - 1 :]  # the last one is the quantizer
    assert len(set(proven[:-1])) == receipt.files_scanned - 1  # the encoder's weights are not read
    assert memory.forget(ids=doomed.ids[2:9], erase=True, verify=True).receipt.proven  # type: ignore[union-attr]
    assert doomed.audit(memory.uri) != []
    memory.forget(ids=doomed.ids[9:], erase=True)
    assert doomed.audit(memory.uri) == []


def test_searching_bytes_for_vectors(tmp_path: Path) -> None:
    vectors = np.stack([image.vector for image in BASE])
    search = VectorSearch(vectors[:9])
    assert search.rows_in(vectors.tobytes()) == list(range(9))
    for dtype in (np.float16, np.float32, np.float64):
        for offset in range(9):
            data = b"x" * offset + vectors[4].astype(dtype).tobytes() + b"y"
            assert search.rows_in(data) == [4]
            assert search.rows_in(data[:-2]) == []
    assert search.rows_in(b"") == search.rows_in(b"1234567") == search.rows_in(vectors[9:].tobytes()) == []
    same = VectorSearch(np.full((2, DIMENSION), 0.25, np.float16))
    assert same.rows_in(np.full(4_000_000, 0.25, np.float32).tobytes()) == [0, 1]
    assert VectorSearch(vectors[:2, :3]).rows_in(vectors[:1, :3].tobytes()) == [0]
    for offset in (0, 3, BYTES_AT_ONCE - 40, BYTES_AT_ONCE - 8, BYTES_AT_ONCE - 1, BYTES_AT_ONCE + 5):
        (tmp_path / "data").write_bytes(b"\1" * offset + vectors[7].tobytes() + b"\2" * 9)
        assert search.rows_in_file(tmp_path / "data") == [7]
    (tmp_path / "data").write_bytes(b"")
    assert search.rows_in_file(tmp_path / "data") == []
    assert VectorSearch(vectors[:0]).rows_in(vectors.tobytes()) == []


# Other writers


class Between(VersionLog):
    """A log whose first commit (of a kind of action) finds that another writer was faster, when it was prepared."""

    def __init__(self, memory: VisualMemory, act: Callable[[VisualMemory], object], kind: type = object) -> None:
        super().__init__(memory.log.storage)
        self._kind = kind
        self._other, self._act = VisualMemory(memory.uri), act
        self._acted = False

    def __enter__(self) -> "Between":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._acted

    def commit(
        self, base: State, command: str, prepare: Callable, lease: Lease | None = None, *more: Callable
    ) -> State:
        def prepared(number: int, state: State) -> object:
            actions = prepare(number, state)
            if not self._acted and isinstance(actions[0], self._kind):
                self._acted = True
                self._act(self._other)
            return actions

        return super().commit(base, command, prepared, lease, *more)


@pytest.mark.parametrize(
    "act",
    [
        lambda other: remember(other, items("new", 4), "new"),
        lambda other: other.forget(ids=ids_of(other, [*MIXED[:1], *items("kept", 1)])),
        lambda other: teach(other, items("new", 2)),
        lambda other: fold_singles(other.log, other.log.latest()),
        lambda other: relabel(other, [*MIXED, *items("kept", 2)], "other"),
        lambda other: compact(other.log),
        lambda other: other.index(IndexOptions(key="Flat", rebuild=True)),
        lambda other: other.index(),
    ],
    ids=["add", "forget", "single add", "fold", "relabel", "compact", "rebuild", "index"],
)
def test_a_writer_that_came_first_is_built_upon(memory: VisualMemory, act: Callable[[VisualMemory], object]) -> None:
    remember(memory, [*items("kept", 12), *MIXED[:3]], "source")
    memory.index(IndexOptions(key="Flat"))
    remember(memory, [*items("kept too", 3), MIXED[3]], "another")
    teach(memory, [MIXED[4], item("/kept/single.png", "cat")])
    doomed, before = Doomed.of(memory, MIXED[:5]), every_version(memory)
    with Between(memory, act) as between:
        facts, _ = erase(between, np.array(doomed.ids), "forget --erase")
    assert facts.ids_N.tolist() == doomed.ids
    assert_erased(memory, doomed, before)


@pytest.mark.parametrize(
    "act",
    [
        lambda other: other.rollback(1),
        lambda other: other.forget(ids=ids_of(other, MIXED[1:2]), erase=True),
        lambda other: other.forget(ids=ids_of(other, items("kept", 1)), erase=True),
    ],
    ids=["rollback", "erase the same", "erase another"],
)
def test_a_writer_that_changed_the_past_comes_first(memory: VisualMemory, act: Callable, tmp_path: Path) -> None:
    doomed = grown(memory, MIXED[:3])
    teach(memory, items("single", 2))
    with pytest.raises(CommitConflict), Between(memory, act) as between:
        erase(between, np.array(doomed.ids), "forget --erase")
    assert memory.log.storage.list("erasures") == []
    again = Doomed.of(memory, MIXED[:3])
    assert memory.forget(ids=again.ids, erase=True, verify=True).receipt.proven  # type: ignore[union-attr]
    assert doomed.audit(memory.uri) == []
    assert_sound(memory)


@pytest.mark.parametrize("kind", [SetState, FoldSingles, SetIndex, Relabel, Forget])
def test_an_erasure_that_came_first_is_not_undone(memory: VisualMemory, kind: type) -> None:
    remember(memory, [*items("kept", 12), *MIXED[:3]], "source")
    remember(memory, [*items("kept too", 3), MIXED[3]], "another")
    teach(memory, [MIXED[4], item("/kept/single.png", "cat")])
    doomed, before = Doomed.of(memory, MIXED[:5]), every_version(memory)
    act = {
        SetState: compact,
        FoldSingles: lambda log: fold_singles(log, log.latest()),
        SetIndex: lambda log: index_through(log, memory),
        Relabel: lambda log: relabel_through(log, memory),
        Forget: lambda log: forget_through(log, memory),
    }[kind]
    with (
        pytest.raises(CommitConflict, match="meanwhile"),
        Between(memory, lambda other: other.forget(ids=doomed.ids, erase=True), kind) as between,
    ):
        act(between)
    assert_erased(memory, doomed, {version: before[version] for version in range(1, 5)})


def index_through(log: VersionLog, memory: VisualMemory) -> None:
    writer = VisualMemory(memory.uri)
    writer.log = log
    writer.index(IndexOptions(key="Flat"))


def relabel_through(log: VersionLog, memory: VisualMemory) -> None:
    from pipeline.edits.relabel import correct

    correct(log, log.latest(), Correction(ids_of(memory, MIXED[:2]), "b", None, None, None), "relabel")


def forget_through(log: VersionLog, memory: VisualMemory) -> None:
    from pipeline.edits.forget import forget

    forget(log, log.latest(), np.array(ids_of(memory, MIXED[:2])), "forget")


def test_versions_dropped_while_an_erasure_redacts_them(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = grown(memory, MIXED[:3])
    for image in items("single", 6):
        teach(memory, [image])
    rewrite, dropped = VersionLog.rewrite, []

    def rewrite_beside_expire(log: VersionLog, commit: Commit) -> None:
        if not dropped:
            dropped.append(commit.version)
            state = log.at(5)
            log.rewrite_checkpoint(state)
            log.storage.delete([f"versions/{number:020d}.json" for number in range(1, 5)])
        rewrite(log, commit)

    monkeypatch.setattr(VersionLog, "rewrite", rewrite_beside_expire)
    memory.forget(ids=doomed.ids, erase=True)
    assert doomed.audit(memory.uri) == []
    assert memory.log.retained()[0] == 5
    assert VisualMemory(memory.uri).verify().sound


# Kills


def peopled(memory: VisualMemory) -> Doomed:
    """A small memory with files of every kind."""
    remember(memory, [*items("kept", 12), *MIXED[:3], Item("/kept/x.png", DAMAGED)], "source", thumbnails=True)
    memory.forget(ids=ids_of(memory, MIXED[:1]))
    memory.index(IndexOptions(key="IVF2,Flat", target_recall=0.5))
    relabel(memory, MIXED[1:2], "other")
    teach(memory, [MIXED[3], item("/kept/single.png", "cat")])
    remember(memory, MIXED[4:5], "begun", finished=False)
    return Doomed.of(memory, MIXED[:4])


def kills(memory: VisualMemory, doomed: Doomed, tmp_path: Path, step: int) -> Iterator[VisualMemory]:
    """The memory after an erasure that was killed at a change, each n-th in turn."""
    changes = 0
    while True:
        target = tmp_path / f"killed-{changes}"
        shutil.copytree(memory.uri, target)
        storage = DyingStorage(target, changes)
        try:
            VisualMemory(target).log.storage = storage
            erase(VersionLog(storage), np.array(doomed.ids), "forget --erase")
        except Died:
            alive = VisualMemory(target)
            bury(alive.log.storage)  # type: ignore[arg-type]
            yield alive
        else:
            return
        shutil.rmtree(target)
        changes += step


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_a_kill_at_any_change(memory: VisualMemory, tmp_path: Path, step: int) -> None:
    doomed = peopled(memory)
    history = every_version(memory)
    before, gone = by_uri(memory), set(doomed.ids)
    without = {v: {k: ids for k, ids in entries.items() if not gone & {*ids}} for v, entries in history.items()}
    after = without[max(without)]
    states, finished_by = set(), set()
    for turn, killed in enumerate(kills(memory, doomed, tmp_path, step)):
        now = by_uri(killed)
        assert now in (before, after)
        states.add(now == after)
        for version in killed.log.retained():
            assert VisualMemory(killed.uri, at=version).live().live_ids() is not None
        if turn % 2:
            assert killed.verify(clean=True).sound
            finished_by.add(True)
        else:
            finish_erasures(killed.log)
        try:
            assert killed.forget(ids=doomed.ids, erase=True, verify=True).receipt.proven  # type: ignore[union-attr]
        except UnknownName:
            finished_by.add(False)
        assert doomed.audit(killed.uri) == []
        assert by_uri(killed) == after
        assert {v: entries for v, entries in every_version(killed).items() if v in history} == without
        assert killed.verify(clean=True).findings == ()
    assert states == {False, True}
    assert finished_by == {False, True}


def test_while_an_erasure_is_unfinished_others_wait_or_finish_it(memory: VisualMemory, tmp_path: Path) -> None:
    doomed = peopled(memory)
    storage = DyingStorage(Path(memory.uri), 1_000)
    log = VersionLog(storage)
    committing = log.commit

    def commit_and_die(*arguments: object, **named: object) -> State:
        state = committing(*arguments, **named)  # type: ignore[arg-type]
        storage.changes = 0
        return state

    log.commit = commit_and_die  # type: ignore[method-assign, assignment]
    with pytest.raises(Died):
        erase(log, np.array(doomed.ids), "forget --erase")
    with pytest.raises(CommitConflict, match="is erasing right now"):
        memory.forget(labels=["cat"], erase=True)
    with pytest.raises(CommitConflict, match="was begun and not finished"):
        memory.expire(1)
    bury(memory.log.storage)  # type: ignore[arg-type]
    memory.forget(uris=["/kept/0.png"], erase=True)
    assert doomed.audit(memory.uri) == []
    assert memory.verify(clean=True).findings == ()


def test_a_failure_before_the_commit_leaves_nothing(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = peopled(memory)
    before = sorted(Path(memory.uri).rglob("*.*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.edits.erasure.rewriting.without_entries", full)
    with pytest.raises(OSError, match="No space"):
        memory.forget(ids=doomed.ids, erase=True)
    assert sorted(Path(memory.uri).rglob("*.*")) == before


def test_in_steps_that_other_processes_do(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = peopled(memory)
    other = VisualMemory(shutil.copytree(memory.uri, tmp_path / "other"))
    monkeypatch.setattr("pipeline.edits.erasure.rewriting.FILES_A_STEP", 1)
    monkeypatch.setattr("pipeline.runner.run_steps_here", run_pickled)
    report = other.forget(ids=doomed.ids, erase=True)
    monkeypatch.undo()
    assert report.erased == memory.forget(ids=doomed.ids, erase=True).erased
    assert doomed.audit(other.uri) == []
    assert other.verify().sound
    hashes = [[file.sha256 for file in one.state().entries_files()] for one in (memory, other)]
    assert hashes[0] == hashes[1]


def test_files_that_a_worker_does_not_see_are_looked_into_here(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of a cluster may lack the folder of a memory. Their bytes are still there: they were only forgotten."""
    doomed = peopled(memory)
    other = VisualMemory(shutil.copytree(memory.uri, tmp_path / "other"))
    ids = np.intersect1d(doomed.ids, memory.live().live_ids()).tolist()
    here = memory.forget(ids=ids, verify=True).receipt
    monkeypatch.setattr(Traces, "look_into_all", lambda _, paths: [InFile(path, gone=True) for path in paths])
    monkeypatch.setattr("pipeline.visual_memory.runner_of", lambda _: Here())
    blind = other.forget(ids=ids, verify=True, runner="ray").receipt
    assert here is not None
    assert blind is not None
    both_have = [
        {(t.path, t.what, t.count) for t in found if "segments/" in t.path} for found in (here.found, blind.found)
    ]
    assert len(both_have[0]) > 5
    assert both_have[0] == both_have[1]


# In an object store


@pytest.mark.parametrize("versioned", [False, True], ids=["plain", "versioned"])
def test_in_a_bucket(s3: SeaweedFS, tmp_path: Path, versioned: bool) -> None:
    memory = VisualMemory(s3.uri(versioned=versioned))
    doomed = peopled(memory)
    remember(memory, items("later", 3), "later")
    before = every_version(memory)
    report = memory.forget(ids=doomed.ids, erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven, report.receipt.to_text()
    assert report.receipt.noncurrent_versions == ()
    bucket, _, prefix = memory.uri.removeprefix("s3://").partition("/")
    for number, key in enumerate(everything_in(s3, bucket, prefix)):
        data = s3.client.get_object(Bucket=bucket, **key)["Body"].read()
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / f"{number} {key['Key'].replace('/', ' ')}").write_bytes(data)
    assert len(list((tmp_path / "all").iterdir())) > 10
    assert doomed.audit(tmp_path / "all") == []
    assert every_version(memory)[1] == {k: v for k, v in before[1].items() if not set(v) & set(doomed.ids)}


def everything_in(s3: SeaweedFS, bucket: str, prefix: str) -> list[dict]:
    """Every version of every key; there must be no delete marker."""
    page = s3.client.list_object_versions(Bucket=bucket, Prefix=prefix)
    assert not page["IsTruncated"]
    assert not page.get("DeleteMarkers")
    return [
        {"Key": each["Key"]} | ({"VersionId": each["VersionId"]} if each["VersionId"] != "null" else {})
        for each in page["Versions"]
    ]


# The audit


def test_the_audit_finds_every_kind_before_and_nothing_after(
    told: VisualMemory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    memory = copied(told, tmp_path / "memory")
    doomed = Doomed.of(memory, MIXED)
    code, out = audited(memory, doomed, tmp_path)
    assert code == 1
    kinds = ["segments/", "versions/", "index/", "tombstones/", "labels/", "checkpoint", "ids.npy", "vectors.f16"]
    kinds += ["entries.arrow", "plan/", "rejected/", "thumbnails/", "statistics of uri", "statistics of id", "uri /"]
    kinds += ["sha256 ", "as float16", "as float16 in base64", "in decimal", "column embedding", "json: "]
    assert [kind for kind in kinds if kind not in out] == []
    memory.forget(ids=doomed.ids, erase=True)
    code, out = audited(memory, doomed, tmp_path)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith("0 hits in ")


@pytest.mark.parametrize(
    "kind", ["uri", "escaped", "decoded", "hash", "raw hash", "float32", "float64", "base64", "id"]
)
def test_the_audit_finds_what_is_planted(tmp_path: Path, kind: str) -> None:
    image, entry_id = MIXED[1], 549755813890
    umlaut = item("/doomed/straße 50%25.png")
    planted = {
        "uri": image.uri.encode(),
        "escaped": json.dumps({"uri": umlaut.uri}).encode(),
        "decoded": b"x /doomed/50% off.png",
        "hash": image.sha256.encode(),
        "raw hash": bytes.fromhex(image.sha256),
        "float32": b"odd" + image.vector.astype(np.float32).tobytes(),
        "float64": image.vector.astype(np.float64).tobytes(),
        "base64": in_base64(image).encode(),
        "id": b"\x00id-000549755813890.",
    }
    (tmp_path / "memory/.deep").mkdir(parents=True)
    (tmp_path / "memory/.deep/.file.aside").write_bytes(b"before " + planted[kind] + b" after")
    (tmp_path / "memory/innocent").write_bytes(b"nothing")
    assert len(Doomed([image, umlaut], [entry_id]).audit(tmp_path / "memory")) >= 1


def test_the_audit_shares_nothing_with_the_project() -> None:
    import ast

    script = Path(__file__).parents[1] / "end_to_end/erasure_audit.py"
    names = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names - set(sys.stdlib_module_names) == {"numpy", "pyarrow"}


def audited(memory: VisualMemory, doomed: Doomed, tmp_path: Path) -> tuple[int, str]:
    """What the script says when it is run by itself."""
    np.save(tmp_path / "vectors.npy", np.stack([image.vector for image in doomed.images]))
    texts = {"ids": doomed.ids, "uris": [i.uri for i in doomed.images], "hashes": [i.sha256 for i in doomed.images]}
    for name, values in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, values)))
    script = Path(__file__).parents[1] / "end_to_end/erasure_audit.py"
    given = [tmp_path / name for name in ("vectors.npy", "ids.txt", "uris.txt", "hashes.txt")]
    done = subprocess.run(
        [sys.executable, "-I", str(script), memory.uri, *map(str, given)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_real_images(digits_memory: VisualMemory, tmp_path: Path) -> None:
    memory = copied(digits_memory, tmp_path / "memory")
    memory.index(IndexOptions(key="Flat"))
    files = memory.log.latest().entries_files()
    rows = [row for file in files for row in read_table(memory.log.storage, file).to_pylist() if row["label"] == "3"]
    images = [Item(row["uri"], "3", np.array(row["embedding"], np.float16).tobytes(), row["sha256"]) for row in rows]
    doomed, before = Doomed.of(memory, images), every_version(memory)
    assert len(doomed.ids) == 20
    report = memory.forget(labels=["3"], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert report.receipt.answers == {
        "queries": 20,
        "k": 50,
        "votings": [*report.receipt.answers["votings"]],
        "returned": 0,
    }
    assert_erased(memory, doomed, before)
