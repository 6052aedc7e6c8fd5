"""A large add to an object store, killed at 90% and run again: what the second run fetches, counted at the server."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import VisualMemory
from pipeline.store.tables.schemas import embedding_column
from tests.edits.given import vectors
from tests.store.counting import traffic
from tests.store.seaweed import SeaweedFS

DIMENSION, ROWS_PER_FILE, CLASSES = 64, 100_000, 100
KILLED_AT = 0.9
TRIES = 5


def write_vectors(folder: Path, rows: int) -> Path:
    """Files of given vectors, with uris and labels."""
    folder.mkdir()
    for start in range(0, rows, ROWS_PER_FILE):
        number = min(ROWS_PER_FILE, rows - start)
        columns = {
            "embedding": embedding_column(vectors(number, DIMENSION, seed=start)),
            "uri": pa.array([f"s3://a-bucket/folder/{row:012d}.png" for row in range(start, start + number)]),
            "label": pa.array([f"label {row % CLASSES}" for row in range(number)]),
        }
        pq.write_table(pa.table(columns), folder / f"{start:012d}.parquet", row_group_size=16_384)
    return folder


def add(memory: str, source: Path) -> subprocess.Popen[str]:
    """`add` as a user calls it, in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "add", memory, str(source), "--labels", "column:label", "--json"]
    return subprocess.Popen([*command, "--runner", "here"], stdout=subprocess.PIPE, text=True)


def finished_parts(memory: VisualMemory) -> dict[str, int]:
    """The files of entries of the parts that have a mark, with their bytes."""
    walked = memory.log.storage.walk("segments")
    marked = {found[1] for path in walked if (found := re.search(r"/done/(\d+)\.json$", path))}
    entries = {path: found[1] for path in walked if (found := re.search(r"/entries/(\d+)-", path))}
    return {path: walked[path] for path, part in entries.items() if part in marked}


def is_of(files: Iterable[str], key: str) -> bool:
    """Whether a key of the bucket is one of the memory's files."""
    return any(key.endswith(path) for path in files)


def killed_at(s3: SeaweedFS, source: Path) -> str:
    """The uri of a memory whose add was killed at 90%. The last parts take a second, so it may end before that."""
    for _ in range(TRIES):
        uri = s3.uri()
        memory = VisualMemory(uri)
        parts = memory.plan_add(source).num_parts
        with add(uri, source) as process:
            while process.poll() is None and len(finished_parts(memory)) < KILLED_AT * parts:
                time.sleep(0.05)
            process.kill()
        if process.returncode == -signal.SIGKILL and len(finished_parts(memory)) < parts:
            return uri
    pytest.fail(f"the add ended {TRIES} times before it was killed")


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "rows",
    [pytest.param(200_000, marks=pytest.mark.slow), pytest.param(2_000_000, marks=pytest.mark.nightly)],
    ids=["small", "large"],
)
def test_an_add_killed_at_ninety_percent_fetches_less_than_a_hundredth_again(
    tmp_path: Path, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    source = write_vectors(tmp_path / "vectors", rows)
    uri = killed_at(s3, source)
    finished, parts = finished_parts(VisualMemory(uri)), VisualMemory(s3.uri()).plan_add(source).num_parts
    assert KILLED_AT * parts <= len(finished) < parts
    with traffic(s3, monkeypatch) as counts:
        began = time.monotonic()
        with add(uri, source) as again:
            assert again.stdout is not None
            report = json.loads(again.stdout.read())
    num_bytes = sum(finished.values())
    # The rows of the last parts are this run's own: it compares their hashes.
    of_this_run = sum(n for path, n in counts.fetched.items() if "/entries/" in path and not is_of(finished, path))
    fetched = counts.bytes_fetched - of_this_run
    print(
        f"{len(finished)} of {parts} parts were finished, {num_bytes:,} bytes of entries; the second run took "
        f"{time.monotonic() - began:.1f} s and fetched {fetched:,} bytes ({fetched / num_bytes:.3%}) besides "
        f"{of_this_run:,} of its own parts, with {counts.requests['GET']:,} GET and {counts.requests['HEAD']:,} HEAD"
    )
    assert (report["entries"], report["rejected"], report["continued"]) == (rows, 0, True)
    assert report["resumed"] > 0.8 * rows
    assert "that an earlier run finished" in report["index_due"]
    assert fetched < 0.01 * num_bytes, counts.fetched.most_common(5)
    assert VisualMemory(uri).state().num_live == rows
