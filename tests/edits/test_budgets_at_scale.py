"""What a verb about one entry asks of an object store, at 300,000 and at 3,000,000 entries.

Each verb is a process of its own. The versions and the files that are read are as an add and an index leave them; the
other files are named only.
"""

import json
import subprocess
import sys

import pytest

from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import MAX_PART_ROWS, first_id
from tests.store import billion
from tests.store.counting import Counts, traffic
from tests.store.seaweed import SeaweedFS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PARTS = 19, 184  # 311,296 and 3,014,656 entries
REQUESTS, MB = 20, 1_000_000
SLACK = 4_096  # bytes: footers and row groups of the same rows differ in length by their numbers
TURNS = 3


@pytest.fixture(scope="module")
def memories(s3: SeaweedFS) -> list[str]:
    uris = [s3.uri() for _ in PARTS]
    for uri, parts in zip(uris, PARTS, strict=True):
        billion.make(VersionLog(open_storage(uri)), parts, shards=1, written=(parts // 2,))
    return uris


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [("forget", (), "forgotten"), ("relabel", ("--label", "new"), "relabelled")],
    ids=["forget", "relabel"],
)
def test_a_verb_about_an_id_costs_the_same_at_ten_times_the_entries(
    s3: SeaweedFS,
    memories: list[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    options: tuple[str, ...],
    told: str,
) -> None:
    for turn in range(TURNS):
        seen: list[Counts] = []
        for uri, parts in zip(memories, PARTS, strict=True):
            entry = first_id(billion.NUMBER, parts // 2) + MAX_PART_ROWS // 2 + turn + 10 * len(options)
            command = [sys.executable, "-m", "jobs.cli", verb, uri, "--id", str(entry), *options, "--json"]
            with traffic(s3, monkeypatch) as counts:
                answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert json.loads(answer)[told] == 1
            print(f"{verb} of {parts * MAX_PART_ROWS:,}: {counts}; {counts.fetched_of('/versions/'):,} of the log")
            assert counts.num_requests <= REQUESTS, counts
            assert counts.bytes_fetched <= MB, counts
            assert counts.fetched_of("/index/") == 0
            seen.append(counts)
        small, large = seen
        beside = [counts.bytes_fetched - counts.fetched_of("/versions/") for counts in seen]
        assert large.num_requests <= small.num_requests + 1, f"a checkpoint may be read\n{small}\n{large}"
        assert abs(beside[1] - beside[0]) <= SLACK, f"{small}\n{large}"
