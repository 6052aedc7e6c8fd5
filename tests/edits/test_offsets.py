"""Where images lie in archives is kept with their entries and goes with them; memories without it open all the same."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.images.entry_pictures import picture_of
from pipeline.images.reading.bounded import Bound
from pipeline.store.log.state import State
from pipeline.store.lookup.originals import Original, read_originals
from pipeline.store.tables.schemas import read_table
from tests.edits.erasing import Doomed, assert_erased, assert_sound, every_version, item, remember
from tests.edits.test_sources import options, picture, write_parquet, write_tar  # noqa: F401, a fixture

NAMES = [f"x/{number}.png" for number in range(12)]


@pytest.fixture
def memory(tmp_path: Path, options: dict) -> VisualMemory:  # noqa: F811
    """An archive, a compressed one, a table, a folder and two single adds, one of them by its bytes."""
    images = {name: picture(number) for number, name in enumerate(NAMES)}
    write_tar(tmp_path / "source/a.tar", images)
    write_parquet(tmp_path / "source/t.parquet", [picture(20), picture(21)], ["cat", "dog"])
    (tmp_path / "source/loose.png").write_bytes(picture(30))
    memory = VisualMemory(tmp_path / "memory")
    memory.add(tmp_path / "source", **options)
    alone = tmp_path / "alone.png"
    alone.write_bytes(picture(40))
    memory.add(alone)
    memory.add_images([picture(41), alone], uris=[str(alone), None], labels=["a", "b"])
    return memory


def originals(memory: VisualMemory) -> dict[str, list[Original]]:
    found: dict[str, list[Original]] = {}
    ids = [int(entry_id) for entry_id in memory.live().live_ids()]
    for each in read_originals(memory.log.storage, memory.state(), ids).values():
        found.setdefault(each.uri.rpartition("/source/")[2], []).append(each)
    return found


def offsets_in(memory: VisualMemory, state: State | None = None) -> set[int]:
    files = [file for segment in (state or memory.state()).segments for file in segment.offsets]
    return {entry_id for file in files for entry_id in read_table(memory.log.storage, file)["id"].to_pylist()}


def test_an_original_is_where_an_add_read_it(memory: VisualMemory, tmp_path: Path) -> None:
    found = originals(memory)
    archive = (tmp_path / "source/a.tar").read_bytes()
    for number, name in enumerate(NAMES):
        [each] = found[f"a.tar#{name}"]
        assert each.read_from == "tar"
        assert archive[each.offset : (each.offset or 0) + (each.num_bytes or 0)] == picture(number)
        bound = Bound(len(picture(number)), 60)  # not a byte more is read
        assert picture_of(each, 50, bound=bound)
    assert [each.read_from for each in found["t.parquet#row=1"]] == ["parquet"]
    assert [(each.read_from, each.offset) for each in found["loose.png"]] == [("file", None)]
    alone = found[f"{tmp_path}/alone.png"]
    assert sorted(each.read_from for each in alone) == ["file", "file", "named"]
    [given] = [each for each in alone if each.read_from == "named"]
    assert given.sha256 == hashlib.sha256(picture(41)).hexdigest()
    assert all(picture_of(each, 50) for name in ("t.parquet#row=1", "loose.png") for each in found[name])
    assert memory.verify().findings == ()


def test_folding_and_packing_lose_no_original(memory: VisualMemory, tmp_path: Path) -> None:
    before = originals(memory)
    memory.compact()
    assert originals(memory) == before
    memory.add_images([tmp_path / "alone.png"] * 3)
    memory.compact()
    after = originals(memory)
    assert [len(after.pop(f"{tmp_path}/alone.png")), len(before.pop(f"{tmp_path}/alone.png"))] == [6, 3]
    assert after == before
    assert_sound(memory)


def test_what_is_erased_leaves_no_offset(memory: VisualMemory, tmp_path: Path) -> None:
    memory.compact()
    before = every_version(memory)
    uris = {f"{tmp_path}/source/a.tar#x/3.png", f"{tmp_path}/alone.png"}
    gone = [i for (uri, _), ids in before[memory.state().version].items() for i in ids if uri in uris]
    assert (len(gone), len(set(gone) & offsets_in(memory))) == (4, 3)
    memory.forget(ids=gone, erase=True)
    for summary in memory.history():
        assert not set(gone) & offsets_in(memory, memory.log.at(summary.version))
    for path in Path(memory.uri).rglob("offsets/*.parquet"):
        assert not set(gone) & set(pq.read_table(path)["id"].to_pylist())
    assert len(offsets_in(memory)) == len(NAMES) - 1
    found = originals(memory)
    assert picture_of(found["a.tar#x/4.png"][0], 50)
    assert memory.verify().findings == ()


def test_a_memory_without_offsets_opens_and_its_pictures_are_searched_for(memory: VisualMemory) -> None:
    state = memory.state()
    without = tuple(segment.model_copy(update={"offsets": ()}) for segment in state.segments)
    dumped = state.model_copy(update={"segments": without}).model_dump()
    for segment in dumped["segments"]:
        del segment["offsets"]  # as an older release wrote it
    for single in dumped["pending"]:
        del single["num_bytes"]
    old = State.model_validate(dumped)
    ids = [int(entry_id) for entry_id in memory.live().live_ids()]
    found = {each.uri.rpartition("/")[2]: each for each in read_originals(memory.log.storage, old, ids).values()}
    assert (found["5.png"].read_from, found["5.png"].offset) == ("tar", None)
    assert picture_of(found["5.png"], 50)
    assert found["alone.png"].read_from == "named"


@pytest.mark.parametrize("column", ["url", "image_path"])
def test_what_a_data_set_of_vectors_names_was_read_by_no_add(memory: VisualMemory, tmp_path: Path, column: str) -> None:
    """Not even where it lies below the source, and the data set gives its hash."""
    data = (tmp_path / "source/loose.png").read_bytes()
    folder = tmp_path / "vectors"
    folder.mkdir()
    (folder / "own.png").write_bytes(data)
    uris = [str(folder / "own.png"), str(tmp_path / "source/loose.png"), "http://127.0.0.1:1/x.png"]
    vectors = np.eye(3, memory.live().dimension, dtype=np.float32)
    table = {"embedding": pa.array(list(vectors)), column: uris, "sha256": [hashlib.sha256(data).hexdigest()] * 3}
    pq.write_table(pa.table(table), folder / "v.parquet")
    given = VisualMemory(tmp_path / "given")
    given.add(folder / "v.parquet")
    found = read_originals(given.log.storage, given.state(), [int(i) for i in given.live().live_ids()])
    assert {each.uri for each in found.values()} == set(uris)
    assert {each.read_from for each in found.values()} == {"named"}


def test_what_erasing_finds_is_nothing(tmp_path: Path) -> None:
    """The audit of other tests, over a memory whose parts have offsets too."""
    memory = VisualMemory(tmp_path / "memory")
    images = [item(f"/a/{number}.png", "cat") for number in range(20)]
    remember(memory, images, "a")
    before, doomed = every_version(memory), Doomed.of(memory, images[3:6])
    memory.forget(ids=doomed.ids, erase=True)
    assert_erased(memory, doomed, before)
