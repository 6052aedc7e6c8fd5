"""How fast a source is listed and planned, and in how much memory.

    python -m tests.benchmarks.listing [--keys 10000000] [--files 100000] [--s3-keys 20000]


`keys` of a file system that makes up names as it is asked for them are listed and frozen into a plan in a memory: what
it takes is the pipeline's own. `files` are empty ones in a folder; `s3-keys` lie in a SeaweedFS on this machine, in
pages of 1,000. Peak memory is the resident set of the process that lists, its mapped temporary file included, less what
it had with everything imported. Prints one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import list_source
from pipeline.store.segments.reservations import SegmentSpec, reserve
from pipeline.store.storage.leases import Lease
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.identity import Identity, Preprocessing
from tests.store.seaweed import SeaweedFS

CLASSES = 1_000
PIXELS = Preprocessing(resize=8, crop=8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
IDENTITY = Identity(encoder="none", weights_sha256="0" * 64, preprocessing=PIXELS, dimension=8)


class MadeUp(AbstractFileSystem):
    """As many keys as its path says, in folders of classes, each known by name when it is asked for."""

    protocol = "madeup"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        number, _, label = path.strip("/").partition("/")
        if not label:
            return [{"name": f"{number}/class-{n:04d}", "size": 0, "type": "directory"} for n in range(CLASSES)]
        names = (f"{number}/{label}/{image:08d}-photograph.jpg" for image in range(int(number) // CLASSES))
        return [{"name": name, "size": 110_000, "type": "file"} for name in names]


def planned(source: str, folder: str) -> dict:
    """List a source and freeze it into a plan."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    listing = list_source(source, Labels())
    listed = time.perf_counter() - began
    storage = open_storage(folder)
    with Lease(storage, "benchmark") as lease:
        spec = SegmentSpec(fingerprint="f", source=source, dataset="d", identity=IDENTITY)
        reservation = reserve(storage, spec, listing.images, lease=lease)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reservation.plan is not None
    return {
        "keys": reservation.planned,
        "parts": reservation.num_parts,
        "keys_per_second_listed": round(reservation.planned / listed),
        "keys_per_second_planned": round(reservation.planned / seconds),
        "plan_megabytes": round(reservation.plan.num_bytes / 1e6),
        "peak_megabytes": round((peak - before) / 1e3),
        "peak_megabytes_in_all": round(peak / 1e3),
    }


def in_a_process(work: Callable[[str, str], dict], source: str) -> dict:
    """The same in a process of its own, whose peak is nobody else's."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, initialize) as pool:
        return pool.apply(work, (source, f"{folder}/memory"))


def initialize() -> None:
    fsspec.register_implementation("madeup", MadeUp, clobber=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--s3-keys", type=int, default=20_000)
    arguments = parser.parse_args()
    result = {"made up": in_a_process(planned, f"madeup://{arguments.keys}")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.files):
            path = Path(folder) / f"class-{number % CLASSES:04d}" / f"{number:08d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        result["folder"] = in_a_process(planned, folder)
    with tempfile.TemporaryDirectory() as folder:
        server = SeaweedFS(Path(folder))
        try:
            os.environ.update(server.admin)
            uri, files = server.uri(), fsspec.filesystem("s3")
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda n: files.pipe_file(f"{uri}/{n:08d}.jpg", b"x"), range(arguments.s3_keys)))
            result["s3"] = in_a_process(planned, uri)
        finally:
            server.stop()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
