"""What each verb asks of an object store: requests and bytes, at two sizes ten times apart."""

import tempfile
from collections.abc import Callable

import numpy as np
import pytest

from pipeline import UnknownName, VisualMemory
from pipeline.index.build.plan import IndexOptions
from pipeline.store.log.state import BreakLeases
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables import counts, labels, parquet_ranges, tombstones
from pipeline.store.tables.parquet_columns import WHOLE_FOR_ROWS
from tests.conftest import add_vectors, unit
from tests.store.counting import Counts, traffic
from tests.store.seaweed import SeaweedFS

pytestmark = pytest.mark.slow

SIZES = 3_000, 30_000
DIMENSION = 32
ROWS_A_VERB = 10
MB = 1_000_000


def rows_after(entry: int) -> list[int]:
    """Entries for verbs about several, up to those of the next verb."""
    return [entry + row for row in range(1, ROWS_A_VERB)]


def refused(memory: VisualMemory) -> None:
    with pytest.raises(UnknownName, match="no entry with label 'none such'"):
        memory.plan_forget(labels=["none such"])


def relabel_by_uri(memory: VisualMemory, entry: int) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("uri,label\n" + "".join(f"/a/{i & 0xFF}.png,new\n" for i in rows_after(entry)))
        file.flush()
        memory.relabel(file=file.name)


# A verb, by its name: what it does to a memory and one of its ids, its most requests and its most bytes fetched. One
# request in each is for a probe of the store, and three or more are for a lease.
VERBS: dict[str, tuple[Callable[[VisualMemory, int], object], int, int]] = {
    "status": (lambda memory, _: memory.status(), 16, MB),
    "history": (lambda memory, _: memory.history(limit=5), 14, MB),
    "forget by id": (lambda memory, entry: memory.forget(ids=[entry]), 20, MB),
    "forget by uri": (lambda memory, entry: memory.forget(uris=[f"/a/{entry & 0xFF}.png"]), 28, MB),
    "relabel by id": (lambda memory, entry: memory.relabel(ids=[entry], label="new"), 20, MB),
    "forget many by id": (lambda memory, entry: memory.forget(ids=rows_after(entry)), 22, MB),
    "look for a label there is not": (lambda memory, _: refused(memory), 12, MB),
    "relabel in a set": (lambda memory, entry: memory.relabel(ids=[entry], label="new", label_set="view"), 32, MB),
}


@pytest.fixture(scope="module")
def memories(s3: SeaweedFS) -> list[str]:
    """Memories of each size, with an index."""
    uris = []
    for size in SIZES:
        uri = s3.uri()
        vectors_ND = unit(np.random.default_rng(0).normal(size=(size, DIMENSION)))
        add_vectors(VersionLog(open_storage(uri)), vectors_ND, [f"class {row % 20}" for row in range(size)])
        VisualMemory(uri).index(IndexOptions(key="IVF16,Flat", target_recall=0.1))
        uris.append(uri)
    return uris


def asked(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, uri: str, verb: str, row: int) -> Counts:
    """What a new process would ask of the store for a verb about the entry in a row."""
    do, _, _ = VERBS[verb]
    for read_before in (counts._read, labels._read, tombstones._read, parquet_ranges._footers):
        read_before.clear()
    entry = int(VisualMemory(uri).state().entries_files()[0].first_id) + row
    with traffic(s3, monkeypatch) as seen:
        do(VisualMemory(uri), entry)
    return seen


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_stays_within_its_budget_at_any_size(
    s3: SeaweedFS, memories: list[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    row = ROWS_A_VERB * ([*VERBS].index(verb) + 1)
    at_sizes = [asked(s3, monkeypatch, uri, verb, row) for uri in memories]
    _, requests, num_bytes = VERBS[verb]
    for seen in at_sizes:
        assert seen.num_requests <= requests, seen
        assert seen.bytes_fetched <= num_bytes, seen
        assert seen.fetched_of("/index/") == 0, "no shard is opened"
    small, large = at_sizes
    assert large.num_requests <= small.num_requests + 2, f"{small}\n{large}"
    beside_the_log = [seen.bytes_fetched - seen.fetched_of("/versions/") for seen in at_sizes]
    assert beside_the_log[1] <= beside_the_log[0] + WHOLE_FOR_ROWS, "of a larger file a row group"


def test_a_file_of_uris_costs_a_row_group_each(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, memories: list[str]
) -> None:
    for uri in memories:
        first = int(VisualMemory(uri).state().entries_files()[0].first_id)
        with traffic(s3, monkeypatch) as seen:
            relabel_by_uri(VisualMemory(uri), first + 100)
        assert seen.num_requests <= 40, seen
        assert seen.bytes_fetched - seen.fetched_of("/versions/") <= ROWS_A_VERB * WHOLE_FOR_ROWS, seen


@pytest.mark.parametrize("commits", [89, 98, 99, 100, 109])
def test_a_forget_costs_the_same_wherever_the_last_checkpoint_is(
    s3: SeaweedFS, memories: list[str], monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    for uri in memories:
        log = VersionLog(open_storage(uri))
        state = log.latest()
        until = state.version - state.version % 100 + 100 + commits
        while state.version < until:
            if state.version == until - 1:
                log = VersionLog(open_storage(uri))  # the last commit is of another process
                state = log.latest()
            state = log.commit(state, "verify --clean", lambda *_: [BreakLeases(leases=())])
        seen = asked(s3, monkeypatch, uri, "forget by id", 100 + commits % 17)
        merged = sum("/tombstones/" in path for path in seen.fetched)  # one on average
        assert seen.num_requests - merged <= 20, str(seen)
        assert seen.bytes_fetched <= MB, str(seen)


def test_a_forget_after_commits_of_a_process_at_work_reads_at_most_nine_of_them(
    s3: SeaweedFS, memories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = memories[0]
    log = VersionLog(open_storage(uri))
    state = log.latest()
    for _ in range(12 + 9 - state.version % 10):
        state = log.commit(state, "verify --clean", lambda *_: [BreakLeases(leases=())])
    seen = asked(s3, monkeypatch, uri, "forget by id", 95)
    assert seen.num_requests <= 20 + 9, str(seen)


def test_an_image_that_is_added_or_forgotten_opens_nothing(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, memories: list[str]
) -> None:
    before = [VisualMemory(uri).status()["entries"] for uri in memories]
    for uri in memories:
        with traffic(s3, monkeypatch) as seen:
            VisualMemory(uri).forget(labels=["class 7"])
        assert seen.fetched_of("/index/") == 0
    after = [VisualMemory(uri).status()["entries"] for uri in memories]
    assert [a - b for a, b in zip(before, after, strict=True)] == pytest.approx([size / 20 for size in SIZES], abs=3)
