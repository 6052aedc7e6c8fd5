"""What asks about few entries, at a billion: seconds, bytes, and memory."""

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.store.log.state import Forget
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import MAX_PART_ROWS, first_id
from pipeline.store.tables.tombstones import Tombstones, write_tombstones
from tests.store import billion
from tests.store.counting import Counts, counted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PARTS, SHARDS = 61_035, 954
SECONDS = 2.0  # of CPU, for a verb
BYTES = 1_000_000  # beside the version files
WRITTEN = (7, 30_000, 61_034)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("billion") / "memory")
    billion.make(VersionLog(open_storage(uri)), PARTS, SHARDS, WRITTEN)
    return uri


def test_it_opens_in_two_seconds_and_half_a_gigabyte(uri: str) -> None:
    code = """
import re, sys, time
from pathlib import Path
from pipeline import VisualMemory
began = time.process_time()
entries = VisualMemory(sys.argv[1]).state().num_live
seconds = time.process_time() - began
print(entries, seconds, re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    told = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True).stdout.split()
    assert int(told[0]) == PARTS * MAX_PART_ROWS
    print(f"opened in {float(told[1]):.2f} s of CPU, {int(told[2]) >> 10} MiB")
    assert float(told[1]) < SECONDS
    assert int(told[2]) < 500 << 10, "KiB, all of the process"


def entry(part: int, row: int) -> int:
    return first_id(billion.NUMBER, part) + row


VERBS: dict[str, Callable[[VisualMemory], object]] = {
    "status": lambda memory: memory.status(),
    "history": lambda memory: memory.history(limit=5),
    "forget by id": lambda memory: memory.forget(ids=[entry(30_000, 5)]),
    "forget by uri": lambda memory: memory.forget(uris=["/images/000007/00011.jpg"]),
    "forget by another uri": lambda memory: memory.forget(uris=["/images/061034/16000.jpg"]),
    "relabel by id": lambda memory: memory.relabel(ids=[entry(61_034, 3)], label="new"),
    "plan to forget by id": lambda memory: memory.plan_forget(ids=[entry(7, 9)]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_costs_what_it_is_about(uri: str, verb: str) -> None:
    memory = VisualMemory(uri)
    counts: Counts = counted(memory)
    began = time.process_time()
    VERBS[verb](memory)
    seconds = time.process_time() - began
    beside = counts.bytes_fetched - counts.fetched_of("versions/")
    print(f"{verb}: {seconds:.2f} s of CPU, {counts.num_requests} requests, {counts.bytes_fetched:,} bytes fetched")
    assert seconds < SECONDS
    assert counts.num_requests <= 40, counts
    assert beside <= 3 * BYTES, "a folder is counted by whole files"


def test_ten_million_tombstones_cost_a_commit_and_a_shard_little(uri: str) -> None:
    rows = list(range(100, 100 + MAX_PART_ROWS // 100))
    without = min(seconds_to_forget(uri, row) for row in range(3))
    log = VersionLog(open_storage(uri))
    parts_P1 = np.array([first_id(billion.NUMBER, part) for part in range(PARTS)])[:, None]
    forget_all(log, log.latest(), (parts_P1 + np.array(rows)).reshape(-1)[:10_000_000])
    with_them = min(seconds_to_forget(uri, row) for row in range(3, 6))
    tombstones = Tombstones(log.storage, VersionLog(log.storage).latest().tombstones)
    tombstones.all()  # as whoever opens shards has read them
    seconds = []
    for shard in range(100):
        began = time.process_time()
        parts = shard * 64, shard * 64 + 63
        found_N = tombstones.between(first_id(1, parts[0]), first_id(1, parts[1]) + MAX_PART_ROWS)
        assert len(found_N) >= 64 * len(rows)
        seconds.append(time.process_time() - began)
    told = f"{1e3 * with_them:.1f} ms, {1e3 * without:.1f} ms without; a shard: {1e3 * np.median(seconds):.2f} ms"
    print(f"a commit with 10,000,000 tombstones: {told}")
    assert with_them - without < 0.010 + 0.1 * without, "the state alone takes some hundred milliseconds"
    assert np.median(seconds) < 0.005


def seconds_to_forget(uri: str, row: int) -> float:
    """Of CPU, for one entry of a part, by a process that has read the version."""
    memory = VisualMemory(uri)
    memory.state()
    began = time.process_time()
    memory.forget(ids=[entry(7, row)])
    return time.process_time() - began


def forget_all(log: VersionLog, state, ids_N: np.ndarray):
    with Lease(log.storage, "test") as lease:
        return log.commit(
            state,
            "forget",
            lambda version, _: [
                Forget(tombstones=write_tombstones(log.storage, lease, version, ids_N), forgotten=len(ids_N))
            ],
            lease,
        )
