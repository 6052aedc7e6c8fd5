"""An ingest killed at random moments and continued: are its rows those of an undisturbed one, and what was done twice?

    python -m tests.end_to_end.killed_ingest [--images 20000] [--kills 20] [--seed 0] [--by-work]

Real handwritten digits as PNG files, embedded on a Ray cluster of two nodes on loopback, one core each. In turn the
process that adds is killed with SIGKILL, an embedding actor, or every process of one node, each time in an ingest of
its own and at a moment drawn uniformly from the time that an undisturbed ingest takes once its plan is frozen; or, with
--by-work, from the images to embed, so that every kill meets work under way however fast the machine is just then. What
was killed with the adding process is continued by the same call, what Ray can survive it has to survive. A batch counts
as embedded as soon as it was, whether or not it was ever published. Prints one JSON document; exit status 1 if a row
differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from cluster.ray_nodes import RayHead, RayNode
from cluster.rehearse import ADDRESSES, encoder_options, write_source
from pipeline import VisualMemory
from pipeline.embeddings import stream
from pipeline.store.segments.part_marks import marks_of
from pipeline.store.segments.reservations import read_reservation
from pipeline.store.tables.schemas import read_table

ROOT = Path(__file__).parents[2]
VICTIMS = ("driver", "actor", "node")
IMAGE_SIZE = 64  # small, so that many ingests are soon done; what is tested is what is around the model
COUNTED = "KILLED_INGEST_COUNTED"  # names the file to which each process appends how many images it has embedded
LONGEST_SECONDS = 600


@dataclass(frozen=True)
class Killed:
    """One ingest: who was killed, when, how many images were embedded and published then, and how many embedded twice.

    `seconds` are since the plan was frozen.
    """

    victim: str
    seconds: float
    embedded: int
    done: int
    embedded_twice: int
    same_rows: bool
    runs: int


def count_embedded() -> None:
    """Let this process note every image it embeds; Ray calls this in each worker."""
    embedded = stream._embedded

    def counting(*arguments):
        batch = embedded(*arguments)
        with open(os.environ[COUNTED], "ab") as file:  # one write each: they do not mix
            file.write(b"%d\n" % len(batch.images))
        return batch

    stream._embedded = counting


def ingest(memory: str, source: str, gcs: str) -> None:
    """What the process that adds does."""
    import ray

    variables = {COUNTED: os.environ[COUNTED], "PYTHONPATH": str(ROOT)}
    hook = "tests.end_to_end.killed_ingest.count_embedded"
    ray.init(address=gcs, runtime_env={"worker_process_setup_hook": hook, "env_vars": variables}, log_to_driver=False)
    said = dict(zip(encoder_options()[::2], encoder_options()[1::2], strict=True))
    VisualMemory(memory).add(
        source,
        encoder=said["--encoder"],
        weights=said["--weights"],
        weights_order="positional",
        image_size=IMAGE_SIZE,
        runner="ray",
    )


class Rehearsal:
    """Two nodes, a source, and ingests of it."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self._folder = folder
        self._token = "t" * 64
        self.source = write_source(folder / "digits", num_images)
        self._head = RayHead(ADDRESSES[0], folder / "head", self._token, num_cpus=1)
        self._head.wait_until_ready()
        self._nodes = 0
        self._second = self._joined()
        self._ingests = 0

    def stop(self) -> None:
        self._second.kill()
        self._head.kill()

    def undisturbed(self) -> tuple[pa.Table, float, int]:
        """Its rows, the seconds that it took, and the images embedded."""
        for _ in range(2):  # the first of a cluster takes longer to start
            memory, counted = self._new()
            process = self._start(memory, counted)
            self._wait_for_plan(memory, process)
            began = time.monotonic()
            if process.wait(LONGEST_SECONDS):
                raise RuntimeError((self._folder / "said").read_text()[-3_000:])
        return rows_of(memory), time.monotonic() - began, _total(counted)

    def killed(self, victim: str, seconds: float, images: int, expected: pa.Table) -> Killed:
        """An ingest in which somebody is killed after so many seconds and images, continued until it ends well."""
        memory, counted = self._new()
        process = self._start(memory, counted)
        self._wait_for_plan(memory, process)
        began = time.monotonic()
        time.sleep(seconds)
        while process.poll() is None and _total(counted) < images:
            time.sleep(0.02)
        seconds, embedded, done = time.monotonic() - began, _total(counted), images_done(memory)
        if victim == "driver":
            process.kill()
        elif victim == "node":
            self._second.kill()
        else:
            actors = sorted(self._head.actors("EmbedParts") | self._second.actors("EmbedParts"))
            for pid in actors[:1]:  # before there is one, nobody is killed
                os.kill(pid, signal.SIGKILL)
        runs = 1
        while process.wait(LONGEST_SECONDS) and runs < 3:
            runs += 1
            process = self._start(memory, counted)
        if victim == "node":
            self._second = self._joined()
        rows = rows_of(memory)
        twice = _total(counted) - planned(memory)
        found = Killed(victim, round(seconds, 1), embedded, done, twice, rows.equals(expected), runs)
        shutil.rmtree(memory)
        return found

    def _new(self) -> tuple[str, Path]:
        self._ingests += 1
        return str(self._folder / f"memory-{self._ingests}"), self._folder / f"counted-{self._ingests}"

    def _start(self, memory: str, counted: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            COUNTED: str(counted),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        call = f"ingest({memory!r}, {str(self.source)!r}, {self._head.gcs!r})"
        call = f"from tests.end_to_end.killed_ingest import ingest; {call}"
        with open(self._folder / "said", "ab") as said:
            return subprocess.Popen([sys.executable, "-c", call], env=environment, stdout=said, stderr=said)

    def _wait_for_plan(self, memory: str, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < end and process.poll() is None:
            if Path(memory, "segments/00000001/segment.json").exists():
                return
            time.sleep(0.05)

    def _joined(self) -> RayNode:
        self._nodes += 1
        node = RayNode(ADDRESSES[1], self._folder / f"node-{self._nodes}", self._token, num_cpus=1, head=self._head)
        self._head.wait_until_ready(node)
        return node


def rows_of(memory: str) -> pa.Table:
    """Every entry and every rejected image, by id."""
    log = VisualMemory(memory).log
    [segment] = log.latest().segments
    entries = pa.concat_tables([read_table(log.storage, file) for file in segment.entries]).sort_by("id")
    rejected = pa.concat_tables([read_table(log.storage, file) for file in segment.rejected]).sort_by("id")
    return pa.concat_tables([entries.replace_schema_metadata(), rejected], promote_options="default")


def planned(memory: str) -> int:
    return sum(segment.planned for segment in VisualMemory(memory).log.latest().segments)


def images_done(memory: str) -> int:
    """Images in parts that are published."""
    storage = VisualMemory(memory).log.storage
    if not storage.exists("segments/00000001/segment.json"):
        return 0
    reservation = read_reservation(storage, 1)
    assert reservation is not None
    return min(len(marks_of(storage, reservation)) * reservation.rows_per_part, reservation.planned)


def _total(counted: Path) -> int:
    return sum(int(line) for line in counted.read_bytes().split()) if counted.exists() else 0


def rehearse(num_images: int, num_kills: int, seed: int, by_work: bool = False) -> dict:
    """Kill as many ingests; what came of each, and of all."""
    generator = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="vm-"))  # short: Ray puts sockets there
    try:
        rehearsal = Rehearsal(folder, num_images)
        try:
            rows, seconds, embedded = rehearsal.undisturbed()
            kills = []
            for number in range(num_kills):
                moment = generator.random()
                after = (0.0, int(moment * num_images)) if by_work else (moment * seconds, 0)
                kills.append(rehearsal.killed(VICTIMS[number % len(VICTIMS)], *after, rows))
                print(kills[-1], file=sys.stderr, flush=True)
        finally:
            rehearsal.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    twice = [kill.embedded_twice / kill.done for kill in kills if kill.done]
    return {
        "images": num_images,
        "undisturbed_seconds": round(seconds, 1),
        "undisturbed_embedded": embedded,
        "same_rows": all(kill.same_rows for kill in kills),
        "embedded_twice": sum(kill.embedded_twice for kill in kills) / max(sum(kill.done for kill in kills), 1),
        "embedded_twice_of_all": sum(kill.embedded_twice for kill in kills) / (num_images * num_kills),
        "worst_share_twice": max(twice, default=0.0),
        "kills": [asdict(kill) for kill in kills],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-work", action="store_true")
    arguments = parser.parse_args()
    result = rehearse(arguments.images, arguments.kills, arguments.seed, arguments.by_work)
    print(json.dumps(result, indent=1))
    return 0 if result["same_rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
