"""Many entries with uris of 100 bytes through the command line: listed, added, indexed, one erased, and verified.

Each verb is a process of its own, so that its peak memory and CPU time are its own. ENTRIES in the environment is the
size of the nightly run (30,000,000 if not set: 3 GB of uris, more than one Arrow column of texts holds).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.store.tables.schemas import embedding_column
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.edits.given import vectors

DIMENSION, ROWS_PER_FILE, CLASSES = 8, 100_000, 100
URI_BYTES = 100
# A prime: row * STRIDE modulo the number of entries visits each once, far from the order of the uris.
STRIDE = 7_368_787
SMALL = 300_000
LARGE = int(os.environ.get("ENTRIES", "30_000_000"))
BASE_BYTES, BYTES_PER_ENTRY = 1_500 << 20, 60  # the most memory of a verb, besides mapped files


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds, seconds of CPU, the most resident bytes, and the most of them in no mapped file."""

    seconds: float
    cpu: float
    peak: int
    own: int


# The peak of a process begins with what its parent had when it was started, so a small process starts the verb.
LAUNCHER = """
import json, re, resource, subprocess, sys, time
start, own = time.monotonic(), 0
process = subprocess.Popen(sys.argv[2:])
while process.poll() is None:
    with open(f"/proc/{process.pid}/status") as status:
        own = max(own, *(int(kib) << 10 for kib in re.findall(r"RssAnon:\\s*(\\d+)", status.read())), 0)
    time.sleep(0.05)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
cost = time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss << 10, own
open(sys.argv[1], "w").write(json.dumps(cost))
sys.exit(process.returncode)
"""


def run(folder: Path, verb: str, *arguments: str | Path) -> tuple[dict, Cost]:
    """One verb in a process of its own: its JSON and its costs. What it says goes to stderr."""
    measured = folder / f"{verb}.cost"
    command = [sys.executable, "-c", LAUNCHER, measured, sys.executable, "-m", "jobs.cli", verb, *arguments, "--json"]
    process = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=False)
    cost = Cost(*json.loads(measured.read_text()))
    print(
        f"{verb}: {cost.seconds:.1f} s, {cost.cpu:.1f} s of CPU, {cost.peak >> 20:,} MiB at most, "
        f"{cost.own >> 20:,} MiB besides mapped files",
        flush=True,
    )
    assert process.returncode == 0, process.stdout
    return json.loads(process.stdout), cost


def uris_of(numbers_N: np.ndarray) -> pa.Array:
    """A uri of URI_BYTES bytes for each number, in the order of the numbers."""
    names = pa.array(np.char.zfill(numbers_N.astype(str), 12))
    prefix = "s3://a-bucket/" + "folder/" * 10
    return pc.binary_join_element_wise(prefix.ljust(URI_BYTES - 16, "x"), names, ".png", "")


def write_sources(folder: Path, entries: int) -> tuple[Path, Path]:
    """A list of uris, and the same uris beside vectors. Neither is in the order of the uris."""
    listed, given = folder / "list", folder / "given"
    listed.mkdir()
    given.mkdir()
    for start in range(0, entries, ROWS_PER_FILE):
        rows_N = np.arange(start, min(start + ROWS_PER_FILE, entries))
        uris = uris_of(rows_N * STRIDE % entries)
        assert len(uris[0].as_py()) == URI_BYTES
        pq.write_table(pa.table({"uri": uris}), listed / f"{start:012d}.parquet", compression="zstd")
        columns = {
            "embedding": embedding_column(vectors(len(rows_N), DIMENSION, seed=start)),
            "uri": uris,
            "label": pa.array([f"label {row % CLASSES}" for row in rows_N]),
        }
        path = given / f"{start:012d}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=16_384, compression="zstd")
    return listed, given


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "entries",
    [pytest.param(SMALL, marks=pytest.mark.slow), pytest.param(LARGE, marks=pytest.mark.nightly)],
    ids=["small", "large"],
)
def test_listed_added_indexed_erased_and_verified_in_bounded_memory(tmp_path: Path, weights: str, entries: int) -> None:
    listed, given = write_sources(tmp_path, entries)
    memory, receipt = tmp_path / "memory", tmp_path / "receipt.json"
    most = BASE_BYTES + BYTES_PER_ENTRY * entries
    costs = {}
    encoder = (
        "--encoder",
        ENCODER,
        "--weights",
        weights,
        "--weights-order",
        "positional",
        "--image-size",
        str(IMAGE_SIZE),
    )
    planned, costs["list"] = run(tmp_path, "add", tmp_path / "never", listed, "--dry-run", *encoder)
    assert planned["planned"] == entries, planned
    report, costs["add"] = run(tmp_path, "add", memory, given, "--labels", "column:label", "--runner", "here")
    assert (report["entries"], report["rejected"]) == (entries, 0)
    _, costs["index"] = run(tmp_path, "index", memory, "--rebuild", "--runner", "here")
    erased = uris_of(np.array([entries // 2]))[0].as_py()
    gone, costs["erase"] = run(
        tmp_path, "forget", memory, "--uri", erased, "--erase", "--verify", "--receipt", receipt, "--yes"
    )
    assert json.loads(receipt.read_text())["proven"], gone
    checked, costs["verify"] = run(tmp_path, "verify", memory)
    assert checked["sound"], checked
    status, costs["status"] = run(tmp_path, "status", memory)
    assert status["entries"] == entries - 1
    assert {verb: cost.own for verb, cost in costs.items() if cost.own > most} == {}, f"more than {most:,} bytes"
