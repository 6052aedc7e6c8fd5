"""Single adds: usable at once, nothing lost between writers, few files, and whoever follows sees what others open."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import VisualMemory
from pipeline.edits import compact, fold, index_growth, singles
from pipeline.edits.add import AddOptions
from pipeline.edits.forget import forget
from pipeline.edits.rollback import roll_back
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import CommitConflict, DamagedFile, IdentityMismatch, MemoryMissing, SourceError, UsageError
from pipeline.index.build.builder import build_index
from pipeline.index.build.plan import IndexOptions, plan_index
from pipeline.index.search import open_blocks as live_blocks
from pipeline.index.search.live_entries import LiveEntries
from pipeline.store.log import single_adds as stored_singles
from pipeline.store.log.records import LabelSet
from pipeline.store.log.state import Relabel, SetLabelSet, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.reservations import SINGLES, is_given_up, reserved_numbers
from pipeline.store.storage import local
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import split_id
from pipeline.store.tables.labels import label_rows, write_labels
from tests.benchmarks.single_adds import measure
from tests.conftest import ENCODER, IMAGE_SIZE, add_vectors
from tests.edits.given import add_given, vectors


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> VisualMemory:
    """A copy of the digits' memory that a test may change."""
    return VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


@pytest.fixture
def first(weights: str) -> dict:
    """What a first add has to say."""
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}


@pytest.fixture
def asked(digits: Path) -> list[Path]:
    return sorted((digits / "ask").rglob("*.png"))


@pytest.fixture
def small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens at thousands of entries happens at a few."""
    monkeypatch.setattr(singles, "FOLD_EVERY", 3)
    monkeypatch.setattr(stored_singles, "TIER_ROWS", (9, 27))
    monkeypatch.setattr(stored_singles, "FILES_A_TIER", (2, 2))
    monkeypatch.setattr(live_blocks, "GROUP_ROWS", 8)
    monkeypatch.setattr(compact, "SMALL_ROWS", 20)
    monkeypatch.setattr(compact, "PACK_ROWS", 60)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of commits, without waiting for the disk."""
    monkeypatch.setattr(local, "_sync", lambda path: None)


def log_at(place: object) -> VersionLog:
    return VersionLog(open_storage(str(place)))


def assert_sound(memory: VisualMemory) -> None:
    assert [finding for finding in memory.verify().findings if finding.severity == "damage"] == []


# One image, as a user adds it


def test_one_image_costs_one_file_and_decides(
    memory: VisualMemory, asked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "new.png"
    Image.effect_noise((40, 40), 90).save(strange)
    memory.classify([asked[0]])
    memory.add(asked[0])  # what is loaded once is loaded now
    before = set(memory.log.storage.walk())
    read: list[str] = []
    own_read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, path: read.append(path) or own_read(self, path))
    [entry_id] = memory.add_images([strange], labels=["noise"])
    assert len(set(memory.log.storage.walk()) - before) == 1, "the version"
    [decision] = memory.classify([strange], k=1)
    assert {path.partition("/")[0] for path in read} <= {"versions"}
    assert len(read) <= 4
    assert decision.neighbors[0].id == entry_id
    assert (decision.label, decision.neighbors[0].label) == ("noise", "noise")
    assert decision.neighbors[0].similarity == pytest.approx(1.0, abs=1e-3)


def test_a_memory_may_begin_with_one_image(tmp_path: Path, first: dict, asked: list[Path]) -> None:
    memory = VisualMemory(tmp_path / "memory")
    report = memory.add(asked[0], **first)
    assert (report.planned, report.entries, report.rejected, report.segment, report.version) == (1, 1, 0, 1, 1)
    assert VisualMemory(memory.uri).search([asked[0]], k=5)[0][0].uri == str(asked[0])
    assert memory.status()["entries_by_label"] == {"0": 1}
    assert_sound(memory)
    memory.add(asked[0].parent)
    assert memory.status()["entries"] == 11


def test_what_is_stored_is_what_an_image_asked_about_is(memory: VisualMemory, asked: list[Path], digits: Path) -> None:
    ids = memory.add_images(asked[:7])
    loaded = [singles._loaded(memory.encoder(), image)[0] for image in asked[:7]]
    queries = np.stack([memory.encoder().embed_queries(one.pixels_SS3[None])[0] for one in loaded])
    assert (memory.live().vectors_of(np.array(ids)) == queries.astype(np.float16)).all()


@pytest.mark.parametrize("fold_every", [1, 100])
def test_a_file_added_again_adds_nothing(
    memory: VisualMemory, asked: list[Path], monkeypatch: pytest.MonkeyPatch, fold_every: int
) -> None:
    monkeypatch.setattr(singles, "FOLD_EVERY", fold_every)
    report = memory.add(asked[3])
    memory.add(asked[4])
    before = memory.state()
    assert bool(before.pending) == (fold_every > 1)
    again = memory.add(asked[3])
    assert (again.entries, again.segment, again.already) == (0, None, report.segment)
    assert VisualMemory(memory.uri).plan_add(asked[3]).already.number == report.segment
    memory.relabel(ids=[memory.live().matching(uri=str(asked[3]))[0]], label="corrected")
    assert memory.add(asked[3]).already == report.segment  # and the correction stands
    assert memory.state().segments == before.segments
    assert memory.add(asked[3], dataset="other").entries == 1
    assert memory.add(asked[3], labels="none").entries == 1
    memory.forget(uris=[asked[3]])
    assert memory.add(asked[3]).entries == 1


def test_an_image_of_a_folder_that_was_added_is_added_once_more(memory: VisualMemory, digits: Path) -> None:
    image = next((digits / "remember/2").iterdir())
    report = memory.add(image)
    assert report.entries == 1, "the dataset is another"
    assert memory.add(image, dataset="remember").already == 1


def test_the_past_cannot_be_added_to(memory: VisualMemory, asked: list[Path]) -> None:
    memory.add(asked[0])
    past = VisualMemory(memory.uri, at=1)
    for change in (lambda: past.add(asked[1]), lambda: past.add_images([asked[1]]), past.compact):
        with pytest.raises(UsageError, match="can only be read"):
            change()
    assert past.status()["entries"] == 100
    assert memory.status()["entries"] == 101


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_no_image_adds_nothing(
    memory: VisualMemory, first: dict, tmp_path: Path, asked: list[Path], data: bytes
) -> None:
    (tmp_path / "broken.png").write_bytes(data)
    before = memory.state()
    for images in ([asked[0], tmp_path / "broken.png"], [data]):
        with pytest.raises(SourceError, match="cannot be used"):
            memory.add_images(images)
    with pytest.raises(SourceError, match="broken.png cannot be used"):
        memory.add(tmp_path / "broken.png")
    assert memory.state() == before
    with pytest.raises(SourceError, match="broken.png cannot be used"):
        VisualMemory(tmp_path / "new").add(tmp_path / "broken.png", **first)
    with pytest.raises(MemoryMissing):
        VisualMemory(tmp_path / "new").status()


def test_images_may_come_in_many_ways(memory: VisualMemory, asked: list[Path]) -> None:
    image = asked[12]
    ways = [image, str(image), f"file://{image}", image.read_bytes()]
    ids = memory.add_images(ways, labels=["a", None, 7, "d"], dataset="ways")
    assert ids == list(range(ids[0], ids[0] + 4))
    [neighbors] = memory.search([image], k=4)
    assert [n.id for n in neighbors] == ids  # equal similarities, by id
    assert [n.label for n in neighbors] == ["a", None, "7", "d"]
    assert [n.uri for n in neighbors[:3]] == [str(image)] * 3
    assert neighbors[3].uri.startswith("sha256:")
    assert {n.dataset for n in neighbors} == {"ways"}
    [named] = memory.add_images([image.read_bytes()], uris=["camera/7"])
    assert memory.live().matching(uri="camera/7").tolist() == [named]
    assert memory.forget(uris=["camera/7"]).forgotten == 1


Add = Callable[[VisualMemory, Path], object]


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (lambda m, i: m.add_images(i), UsageError, "images is .*: give a list"),
        (lambda m, i: m.add_images(str(i)), UsageError, "give a list"),
        (lambda m, i: m.add_images(i.read_bytes()), UsageError, "images is one bytes"),
        (lambda m, i: m.add_images([]), UsageError, "give at least one image"),
        (lambda m, i: m.add_images([i], labels=["a", "b"]), UsageError, "1 images and 2 labels: give one for each"),
        (lambda m, i: m.add_images([i], labels="a"), UsageError, "labels is 'a': give a list"),
        (lambda m, i: m.add_images([i], labels=[" "]), UsageError, "a label is empty"),
        (lambda m, i: m.add_images([i], uris=[]), UsageError, "1 images and 0 uris"),
        (lambda m, i: m.add_images([i], dataset=" "), UsageError, "the dataset is empty"),
        (lambda m, i: m.add_images([i] * 257), UsageError, "257 images are many for one call: give at most 256"),
        (lambda m, i: m.add_images([Image.open(i)]), SourceError, "an image to add is a PngImageFile: give a path"),
        (lambda m, i: m.add_images([None]), SourceError, "an image to add is a NoneType"),
        (lambda m, i: m.add_images(["what://bucket/a.png"]), SourceError, "a URI that fsspec knows"),
        (lambda m, i: m.add_images([i.parent]), SourceError, "cannot be used"),
        (lambda m, i: m.add_images(["nowhere.png"]), SourceError, "there is no such file"),
        (lambda m, i: VisualMemory(m.uri + "2").add_images([i]), MemoryMissing, "make one with `add`"),
    ],
)
def test_mistakes_add_nothing(
    digits_memory: VisualMemory, asked: list[Path], add: Add, error: type, message: str
) -> None:
    before = digits_memory.state()
    with pytest.raises(error, match=message):
        add(digits_memory, asked[0])
    assert digits_memory.log.latest() == before


def test_names_that_are_no_text_are_stored_as_others_are(memory: VisualMemory, asked: list[Path]) -> None:
    memory.add_images([asked[0]], labels=["caf\udce9"], uris=["a\udce9"], dataset="d\udce9")
    [[neighbor]] = VisualMemory(memory.uri).search([asked[0]], k=1)
    assert all("\udce9" not in text for text in (neighbor.uri, neighbor.label, neighbor.dataset))


def test_another_encoder_is_refused(memory: VisualMemory, asked: list[Path]) -> None:
    with pytest.raises(IdentityMismatch):
        memory.add(asked[0], encoder="resnet18")
    with pytest.raises(CommitConflict, match="made this a memory of"):
        add_given(memory.log, vectors(1))


# What holds beside a folder that was added


def test_one_by_one_is_as_good_as_a_folder(tmp_path: Path, first: dict, digits: Path, asked: list[Path]) -> None:
    """Bytes, hashes and sizes are equal. Vectors are but for their last bits: a folder is embedded in batches."""
    folder, one_by_one = VisualMemory(tmp_path / "folder"), VisualMemory(tmp_path / "one by one")
    folder.add(digits / "ask", **first)
    one_by_one.add(asked[0], dataset="ask", **first)
    for image in asked[1:]:
        one_by_one.add_images([image], labels=[image.parent.name], dataset="ask")
    ours, theirs = one_by_one.live(), folder.live()
    pairs = [(ours.matching(uri=str(image)), theirs.matching(uri=str(image))) for image in asked]
    vectors_ND, theirs_ND = (
        side.vectors_of(np.concatenate(ids)) for side, ids in zip((ours, theirs), zip(*pairs, strict=True), strict=True)
    )
    np.testing.assert_allclose(vectors_ND, theirs_ND, rtol=2**-9, atol=1e-5)  # a float16 has 11 bits
    for found, expected in zip(one_by_one.classify(asked, k=10), folder.classify(asked, k=10), strict=True):
        assert found.label == expected.label
        assert found.confidence == pytest.approx(expected.confidence, abs=0.02)
        near = {n.uri: n.similarity for n in expected.neighbors}
        for neighbor in found.neighbors[:9]:  # the last may change places with the next
            assert near[neighbor.uri] == pytest.approx(neighbor.similarity, abs=1e-3)


# Ids


def test_ids_ascend_and_are_never_used_again(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    given_out: list[int] = []
    for number in range(6):
        state, ids = add_given(log, vectors(3, seed=number), name=str(number))
        given_out += ids
        if number == 1:
            forget(log, state, np.array(given_out), "forget")
        if number == 2:
            roll_back(log, 1, "rollback")
        if number == 3:
            fold.fold_singles(log, log.latest())
        if number == 4:
            VisualMemory(tmp_path).forget(ids=ids, erase=True)
    assert given_out == sorted(set(given_out))
    assert {split_id(entry_id)[0] for entry_id in given_out} == {1}
    assert_sound(VisualMemory(tmp_path))


def test_racing_writers_lose_nothing(tmp_path: Path) -> None:
    given_out: list[list[int]] = []
    ready = threading.Barrier(8)

    def write(number: int) -> None:
        log = log_at(tmp_path / "memory")
        ready.wait()
        for row in range(15):
            _, ids = add_given(log, vectors(1, seed=100 * number + row), name=f"{number}-{row}")
            given_out.append(ids)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    memory = VisualMemory(tmp_path / "memory")
    state, live = memory.state(), memory.live()
    ids = sorted(entry_id for some in given_out for entry_id in some)
    assert sorted(live.live_ids().tolist()) == ids == list(range(ids[0], ids[0] + 120))
    assert len({uri for block in live.blocks for uri in block.uris.to_pylist()}) == 120
    [segment] = state.segments
    assert (segment.fingerprint, segment.num_entries) == (SINGLES, 120)
    for number in reserved_numbers(memory.log.storage):  # each of those that came second had taken one
        assert number == segment.number or is_given_up(memory.log.storage, number)
    assert list(memory.log.retained()) == list(range(1, state.version + 1))
    assert_sound(memory)


def test_racing_first_adds_of_one_image(tmp_path: Path, first: dict, asked: list[Path]) -> None:
    choice = EncoderChoice(ENCODER, first["weights"], "positional", IMAGE_SIZE)
    writers = [VisualMemory(tmp_path / "memory") for _ in range(3)]
    plans = [w.plan_add(i, AddOptions(encoder=choice)) for w, i in zip(writers, asked[::20], strict=False)]
    threads = [threading.Thread(target=w.carry_out, args=(plan,)) for w, plan in zip(writers, plans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory = VisualMemory(tmp_path / "memory")
    assert memory.status()["entries"] == 3
    for image in asked[::20]:
        assert memory.search([image], k=1)[0][0].uri == str(image)
    assert_sound(memory)


# Files


def rows_by_file(state: State) -> list[int]:
    return [file.rows for file in state.entries_files()]


def test_thousands_of_single_adds_lie_in_few_files(tmp_path: Path, unsynced: None) -> None:
    log, state = log_at(tmp_path), None
    vectors_ND = vectors(5_000)
    for row in range(5_000):
        state, _ = add_given(log, vectors_ND[row : row + 1], [str(row % 7)], name=str(row), state=state)
    assert state is not None
    assert rows_by_file(state) == [4_096, *[64] * 14]
    assert len(state.pending) == 8
    live = LiveEntries.open(log_at(tmp_path).storage, log_at(tmp_path).latest())
    ids = live.live_ids()
    assert (np.diff(ids) == 1).all()
    assert (live.vectors_of(ids).astype(np.float16) == vectors_ND).all()
    assert [live.labels[code] for code in live.codes_of(ids)] == [str(row % 7) for row in range(5_000)]


def test_tiers_above_tiers(tmp_path: Path, small_tiers: None, unsynced: None) -> None:
    log = log_at(tmp_path)
    sizes = []
    for row in range(90):
        state, _ = add_given(log, vectors(1, seed=row), name=str(row))
        sizes.append((*rows_by_file(state), len(state.pending)))
        assert sum(sizes[-1]) == row + 1
    assert sizes[8] == (9, 0)  # three commits a file, three files one of the next tier, three of these one above
    assert sizes[26] == (27, 0)
    assert sizes[89] == (27, 27, 27, 9, 0)
    assert_sound(VisualMemory(tmp_path))


def test_a_fold_that_meets_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = log_at(tmp_path), log_at(tmp_path)
    state, _ = add_given(ours, vectors(5))
    written = []

    def fold_and_lose(*arguments: object, **options: object) -> object:
        written.append(stored_singles.fold(*arguments, **options))  # type: ignore[arg-type]
        add_given(theirs, vectors(2, seed=1), name="later")
        return written[-1]

    monkeypatch.setattr(fold, "fold", fold_and_lose)
    folded = fold.fold_singles(ours, state)
    assert len(written) == 1, "what was written before the race was lost fits after it"
    assert (rows_by_file(folded), len(folded.pending)) == ([5], 2), "the later ones stay in their commit"
    with pytest.raises(CommitConflict, match="another writer has folded"):
        fold.fold_singles(theirs, state)
    memory = VisualMemory(tmp_path)
    assert len(memory.live()) == 7
    assert memory.verify().garbage_bytes == 0
    assert_sound(memory)


# The index


def test_index_takes_what_lies_in_commits(tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path)
    add_given(memory.log, vectors(40))
    assert memory.state().entries_files() == []
    plan = memory.plan_index(IndexOptions(key="Flat"))
    assert (plan.rows, len(plan.shards)) == (40, 1)
    before = memory.search(embeddings=vectors(3, seed=7), k=40)
    state = memory.index(IndexOptions(key="Flat"))
    status = memory.status()
    assert (status["fresh"], status["shards"], status["entries"]) == (0, 1, 40)
    assert memory.search(embeddings=vectors(3, seed=7), k=40) == before
    assert memory.index() == state
    assert_sound(memory)


def test_what_a_shard_covers_is_not_folded_with_what_it_does_not(tmp_path: Path, small_tiers: None) -> None:
    memory = VisualMemory(tmp_path)
    for row in range(40):
        add_given(memory.log, vectors(1, seed=row), name=str(row))
        if row in (7, 20, 21):
            memory.index(IndexOptions(key="Flat"))
        found = memory.search(embeddings=vectors(1, seed=row), k=100)[0]
        assert len(found) == row + 1
        assert found[0].uri == "/0/0.png" if row == 0 else found[0].similarity > 0.999
    assert_sound(memory)


def test_beyond_many_fresh_entries_an_index_is_built(
    tmp_path: Path, first: dict, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_growth, "MAX_FRESH", 60)
    monkeypatch.setattr(index_growth, "GROWS_FROM", 12)
    images = sorted(digits.rglob("*.png"))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(images[0], **first)
    shards, added = [], 1
    while added < 130:
        some = images[added : added + 5]
        memory.add_images(some, labels=[image.parent.name for image in some])
        added += 5
        state = memory.state()
        assert state.num_fresh <= (12 if state.index else 60)
        shards.append(len(state.index.shards) if state.index else 0)
    assert shards[10:13] == [0, 1, 1]
    assert 1 <= shards[-1] <= 3, "small shards become one"
    assert len(state.entries_files()) <= 8
    for image in images[:added]:
        assert memory.search([image], k=1)[0][0].uri == str(image)
    assert memory.add(images[-1]).entries == 1
    assert_sound(memory)


def test_an_index_that_cannot_be_built_is_not_tried_with_every_add(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: VisualMemory,
    asked: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(index_growth, "MAX_FRESH", 90)
    monkeypatch.setattr(index_growth, "GROWS_FROM", 10)
    monkeypatch.setattr(index_growth, "FIRST", IndexOptions(max_memory_bytes=1))
    report = memory.add(asked[0])
    assert "allow more with `max_memory_bytes`" in str(report.index_error)
    memory.add_images(asked[1:6])
    assert memory.add(asked[6]).index_error is None
    assert not caplog.records
    memory.add_images(asked[7:20])
    assert "no index was built after the add" in caplog.text
    assert memory.status()["entries"] == 120


def test_one_process_indexes_at_a_time(
    memory: VisualMemory, asked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_growth, "MAX_FRESH", 90)
    with Lease(memory.log.storage, "index"):
        assert memory.add(asked[0]).state.index is None
    assert memory.add(asked[1]).state.index is not None


def test_an_index_built_while_files_were_packed_is_refused(tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path)
    for number in range(3):
        add_given(memory.log, vectors(4, seed=number), name=str(number))
        fold.fold_singles(memory.log, memory.log.latest())
    base = memory.state()
    add_given(memory.log, vectors(4, seed=9), name="more")
    memory.compact()
    options = IndexOptions(key="Flat")
    with pytest.raises(CommitConflict, match="moved entries that were being indexed into one file with others"):
        build_index(memory.log, base, plan_index(base, options), options, "index")
    memory.index(options)
    assert memory.status()["fresh"] == 0
    assert_sound(memory)


# Readers that follow


FOLLOWER = """
import sys
import numpy as np
from pipeline import VisualMemory
memory = VisualMemory(sys.argv[1])
for line in sys.stdin:
    [[neighbor]] = memory.search(embeddings=np.array([eval(line)]), k=1)
    print(neighbor.uri, memory.state().version, flush=True)
"""


def test_another_process_sees_each_add(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    state, _ = add_given(log, vectors(2), name="before")
    command = [sys.executable, "-c", FOLLOWER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for number in range(5):
            vectors_ND = vectors(1, seed=50 + number)
            state, _ = add_given(log, vectors_ND, name=str(number))
            reader.stdin.write(json.dumps(vectors_ND[0].tolist()) + "\n")
            reader.stdin.flush()
            assert reader.stdout.readline().split() == [f"/{number}/0.png", str(state.version)]
        reader.stdin.close()


def test_a_reader_follows_files_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = VisualMemory(tmp_path / "memory"), VisualMemory(tmp_path / "memory")
    add_vectors(writer.log, vectors(30), ["a"] * 30)
    stale = reader.state()
    erased = writer.live().live_ids()[:3].tolist()
    writer.forget(ids=erased, erase=True)
    states = iter([stale])
    newest = reader.state
    monkeypatch.setattr(reader, "state", lambda: next(states, None) or newest())
    [found] = reader.search(embeddings=vectors(1), k=30)
    assert len(found) == 27
    assert not {neighbor.id for neighbor in found} & set(erased)


def test_damage_is_not_taken_for_what_others_did(tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    add_vectors(memory.log, vectors(30), ["a"] * 30)
    state = memory.state()
    memory.log.storage.delete([state.segments[0].entries[0].path])
    for reader in (memory, VisualMemory(memory.uri), VisualMemory(memory.uri, at=1)):
        with pytest.raises(DamagedFile, match="entries/.* is missing"):
            reader.search(embeddings=vectors(1), k=1)


def told(live: LiveEntries, queries_QD: np.ndarray) -> dict:
    """All that a version says, whatever order blocks and labels have."""
    ids = np.sort(live.live_ids())
    found = live.search(queries_QD, 12)
    names = np.array([*live.labels, None], object)
    counts = live.label_counts()
    return {
        "ids": ids.tolist(),
        "labels": names[live.codes_of(ids)].tolist(),
        "vectors": live.vectors_of(ids).tobytes(),
        "datasets": live.dataset_counts(),
        "counts": {name: int(n) for name, n in zip(live.labels, counts, strict=True) if n},
        "found": (found.similarities_QK.tobytes(), found.ids_QK.tobytes(), names[found.codes_QK].tolist()),
        "labelled": np.sort(live.live_ids(labelled=True)).tolist(),
    }


OPERATIONS = ("single", "singles", "unlabelled", "segment", "forget", "relabel", "in set", "fold", "compact", "index")
OPERATIONS += ("rebuild", "grow", "rollback", "erase", "look")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1_000)), min_size=4, max_size=22))
@pytest.mark.timeout(600)
def test_following_is_opening_anew(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: None, unsynced: None, operations: list[tuple[str, int]]
) -> None:
    memory = VisualMemory(tmp_path_factory.mktemp("followed") / "memory")
    log, queries_QD = memory.log, vectors(5, seed=77).astype(np.float32)
    add_given(log, vectors(2), ["a", None])
    followed = LiveEntries.open(log.storage, log.latest())
    for step, (operation, number) in enumerate(operations):
        change(memory, operation, number, step)
        state = log.latest()
        if operation == "look":
            continue  # several changes are followed at once
        followed = LiveEntries.open(log.storage, state, followed)
        anew = LiveEntries.open(log.storage, log_at(memory.uri).latest())
        assert told(followed, queries_QD) == told(anew, queries_QD)
        assert len(followed) == state.num_live
        for label_set in state.label_sets:
            views = [live.in_label_set(log.storage, state, label_set.name) for live in (followed, anew)]
            assert told(views[0], queries_QD) == told(views[1], queries_QD)
            views = [live.satisfying(log.storage, state, "label != 'r1' or id < 7") for live in views]
            assert told(views[0], queries_QD) == told(views[1], queries_QD)
        for where in ("label in ('l1', 'r2', 'a')", "uri like '%1.png'"):
            views = [live.satisfying(log.storage, state, where) for live in (followed, anew)]
            assert told(views[0], queries_QD) == told(views[1], queries_QD)
    assert_sound(memory)


def change(memory: VisualMemory, operation: str, number: int, step: int) -> None:  # noqa: C901  # one case a change
    log, state = memory.log, memory.log.latest()
    ids = LiveEntries.open(log.storage, state).live_ids()
    some = ids[number % 5 :: 3 + number % 7] if len(ids) else ids
    match operation:
        case "single" | "unlabelled":
            add_given(
                log, vectors(1, seed=number), [None if operation == "unlabelled" else f"l{number % 4}"], str(step)
            )
        case "singles":
            add_given(log, vectors(1 + number % 6, seed=number), name=str(step))
        case "segment":
            rows = 1 + number % 30
            add_vectors(log, vectors(rows, seed=number), [f"l{row % 5}" for row in range(rows)], name=f"s{step}")
        case "forget" if len(some):
            forget(log, state, some, "forget")
        case "relabel" | "in set" if len(some):
            name = None if operation == "relabel" else f"set {number % 2}"
            with Lease(log.storage, "relabel") as lease:
                rows = label_rows(some, [f"r{number % 3}" if entry % 4 else None for entry in some], name)
                file = write_labels(log.storage, lease, state.version + 1, rows)
                actions = [Relabel(labels=file, relabelled=len(some), label_set=name)]
                if name and name not in {label_set.name for label_set in state.label_sets}:
                    actions.insert(0, SetLabelSet(label_set=LabelSet(name=name)))
                log.commit(state, "relabel", lambda *_: actions, lease)
        case "fold":
            fold.fold_singles(log, state, wholly=number % 2 == 0)
        case "compact":
            memory.compact()
        case "index" | "rebuild" if state.num_live and (operation == "rebuild" or state.index is None):
            memory.index(IndexOptions(key="Flat", rebuild=True, shard_rows=1 + number % 40))
        case "grow" | "index" if state.index is not None:
            index_growth.grow_index(log, state, "add")
        case "rollback" if state.version > 1:
            roll_back(log, 1 + number % (state.version - 1), "rollback")
        case "erase" if len(some) and number % 3 == 0:
            memory.forget(ids=some[:2].tolist(), erase=True)


# What it costs


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_the_last_of_a_hundred_thousand_cost_little_more_than_the_first(tmp_path: Path) -> None:
    figures = measure(str(tmp_path / "memory"), adds=100_000, dimension=384, sizes=())
    assert figures["write_ratio"] <= 2, figures
    assert figures["read_ratio"] <= 2, figures
    assert figures["windows"][-1]["entries_files"] < 100
