"""An interrupted add goes on: it lists nothing again, and fetches next to nothing of what was finished."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.edits import plan_changes
from pipeline.edits.add import AddOptions, run
from pipeline.edits.plan_changes import differences
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import CommitConflict, SourceError
from pipeline.images.sources.gathering import IMAGES
from pipeline.images.sources.listing import Listing
from pipeline.runner import Here
from pipeline.store.segments.part_marks import PartMark
from pipeline.store.segments.reservations import Reservation, SegmentSpec, give_up, reserve
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.local import LocalStorage
from pipeline.store.tables.schemas import CONTAINERS, embedding_column
from tests.conftest import identity_of, sha256_of, unit
from tests.store.counting import counted
from tests.store.seaweed import SeaweedFS

PARTS, ROWS, DIMENSION = 10, 1_500, 1_024


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files of vectors, each of which is a part."""
    folder = tmp_path_factory.mktemp("source") / "vectors"
    folder.mkdir()
    for part in range(PARTS):
        vectors_ND = unit(np.random.default_rng(part).normal(size=(ROWS, DIMENSION)))
        table = pa.table(
            {
                "embedding": embedding_column(vectors_ND),
                "label": [f"label {row % 7}" for row in range(ROWS)],
                "sha256": [sha256_of(vector_D) for vector_D in vectors_ND],
            }
        )
        pq.write_table(table, folder / f"{part}.parquet")
    return folder


@pytest.fixture
def source(vectors: Path, tmp_path: Path) -> Path:
    """A copy of the vectors, which a test may change."""
    return Path(shutil.copytree(vectors, tmp_path / "vectors"))


class Stopping(Here):
    """A runner that is killed after some parts."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def do_parts(self, work: object, parts: Sequence[int], encoder: object) -> Iterable[PartMark]:
        yield from super().do_parts(work, parts[: self.parts], encoder)  # type: ignore[arg-type]
        if len(parts) > self.parts:
            raise KeyboardInterrupt


def stopped(memory: VisualMemory, source: Path, parts: int, options: AddOptions = AddOptions()) -> None:
    """Add a source until some parts are done."""
    plan = memory.plan_add(source, options)
    with pytest.raises(KeyboardInterrupt):
        run(memory.log, memory.log.newest(), plan, Stopping(parts), "add")


def test_a_resumed_add_fetches_less_than_a_hundredth_of_what_was_finished(
    s3: SeaweedFS, source: Path, tmp_path: Path
) -> None:
    memory, whole = VisualMemory(s3.uri()), VisualMemory(tmp_path / "whole")
    stopped(memory, source, PARTS - 1)
    finished = sum(size for path, size in memory.log.storage.walk("segments").items() if "/entries/" in path)
    assert finished > 0.9 * (PARTS - 1) * ROWS * 2 * DIMENSION
    again = VisualMemory(memory.uri)
    counts = counted(again)
    report = again.add(source)
    assert (report.resumed, report.entries, report.continued) == ((PARTS - 1) * ROWS, PARTS * ROWS, True)
    assert (report.compared, report.duplicates, report.duplicates_within) == (ROWS, 0, 0)
    assert counts.bytes_fetched < 0.01 * finished, counts.fetched.most_common(5)
    assert counts.requests["local_path"] <= 2  # the list of containers, and the counts of the version
    there = whole.add(source)
    assert (there.census, there.small_classes) == (report.census, report.small_classes)
    one, other = (VisualMemory(each.uri).live().live_ids() for each in (again, whole))
    assert one.tolist() == other.tolist()


def test_nothing_is_listed_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.edits.add.list_source", lambda *_: pytest.fail("it was listed"))
        plan = memory.plan_add(source)
        assert plan.frozen is not None
        assert (plan.planned, plan.num_parts, plan.listing.holds_images) == (PARTS * ROWS, PARTS, False)
        assert plan.listing.num_bytes == sum(path.stat().st_size for path in source.iterdir())
        assert memory.add(source).entries == PARTS * ROWS
    assert memory.plan_add(source).already is not None


@pytest.mark.parametrize(
    "other",
    [
        AddOptions(dataset="other"),
        AddOptions(labels="none"),
        AddOptions(exclude=("9.parquet",)),
        AddOptions(duplicates="skip"),
        AddOptions(encoder=EncoderChoice("given:other")),
        AddOptions(refresh=True),
    ],
)
def test_other_options_list_again(source: Path, tmp_path: Path, other: AddOptions) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    assert memory.plan_add(source, other).frozen is None


def test_a_source_that_is_gone_is_told(source: Path, tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    shutil.rmtree(source)
    with pytest.raises(SourceError, match="there is no source at"):
        memory.add(source)


def test_an_archive_that_is_gone_is_rejected_with_its_reason(source: Path, tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, PARTS - 1)
    (source / f"{PARTS - 1}.parquet").unlink()
    with pytest.raises(SourceError, match=r"9.parquet: there is no such file.*`refresh` lists it again"):
        memory.add(source)
    report = memory.add(source, max_rejected=0.2)
    assert (report.entries, report.entries + report.rejected) == ((PARTS - 1) * ROWS, PARTS * ROWS)
    assert {reject.reason for reject in report.rejects} == {"there is no such file"}


def test_a_plan_of_an_earlier_release_goes_on(source: Path, tmp_path: Path) -> None:
    """The description of a segment had no time of its plan."""
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    path = Path(memory.uri) / "segments/00000001/segment.json"
    path.write_text(Reservation.model_validate_json(path.read_text()).model_dump_json(exclude={"planned_at"}))
    report = memory.add(source)
    assert (report.segment, report.continued, report.planned_at) == (1, True, None)
    assert report.to_json()["planned_at"] is None


def test_a_plan_that_is_given_up_meanwhile_is_a_conflict(source: Path, tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    plan = memory.plan_add(source)
    give_up(memory.log.storage, 1)
    with pytest.raises(CommitConflict, match="given up by another process just now: run the command again"):
        memory.carry_out(plan)
    assert memory.add(source).segment == 2


def test_a_plan_that_is_finished_meanwhile_is_not_added_again(source: Path, tmp_path: Path) -> None:
    memory = VisualMemory(tmp_path / "memory")
    stopped(memory, source, 3)
    plan = memory.plan_add(source)
    assert VisualMemory(memory.uri).add(source).segment == 1
    report = memory.carry_out(plan)
    assert (report.already, report.segment, report.unplanned) == (1, None, None)


def table_of(files: Sequence[tuple[str, int | None, int | None]], schema: pa.Schema) -> pa.Table:
    """Files by uri, size and time (seconds)."""
    rows = [
        {"uri": uri, "num_bytes": size, "modified": at and at * 1_000_000, "kind": "tar"} for uri, size, at in files
    ]
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def slowly(listed: Sequence[tuple], planned: Sequence[tuple]) -> tuple[int, int]:
    """What `differences` counts, from dictionaries."""
    now, before = {file[0]: file for file in listed}, {file[0]: file for file in planned}
    return len(now.keys() - before.keys()), sum(now.get(uri) != file for uri, file in before.items())


@pytest.mark.parametrize("seed", range(12))
def test_listing_and_plan_are_compared_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(plan_changes, "COMPARED_AT_ONCE", int(random.integers(1, 90)))
    names = [f"/{'ä' if number % 11 == 0 else ''}{number:05d}.png" for number in range(int(random.integers(1, 900)))]

    def some(chance: float) -> list[tuple[str, int | None, int | None]]:
        found = [name for name in names if random.random() < chance]
        return sorted((name, None if name.endswith("7.png") else 5, int(random.random() < 0.9)) for name in found)

    listed, planned = some(random.random()), some(0.9) or [(names[0], 1, 1)]
    twice = [file for file in listed for _ in range(3)]  # a container is several parts
    storage = LocalStorage(tmp_path)
    spec = SegmentSpec(fingerprint="f", source="/", dataset="d", identity=identity_of(4))
    with Lease(storage, "test") as lease:
        reservation = reserve(
            storage,
            spec,
            table_of(planned, IMAGES),
            table_of([file for file in planned for _ in range(2)], CONTAINERS),
            lease=lease,
        )
    listing = Listing("/", "d", table_of(listed, IMAGES), table_of(twice, CONTAINERS))
    new, gone = slowly(listed, planned)
    assert differences(storage, listing, reservation) == (2 * new, 2 * gone)
