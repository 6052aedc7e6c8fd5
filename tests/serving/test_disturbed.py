"""A server under constant load while things go wrong, one after another: no wrong answer, no 5xx.

The memory lies on S3, so that the groups search local copies. Every answer is compared afterwards with what the library
says of the version that the answer names; of a partial one, with what is left of it.
"""

import base64
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline import Client, VisualMemory
from pipeline.index.build.plan import IndexOptions
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.serving.ray_server import RayServer, ray_server
from tests.store.seaweed import SeaweedFS

CLIENTS = 16
ASKING_IMAGES = 4  # of them
TOKEN = "a token of the tests"
K = 15
SOON = 5.0  # seconds in which what is forgotten must be gone
LONGEST_SECONDS = 60.0  # until all answer again


@dataclass
class Asked:
    """One request: when it was sent and answered, what it asked, and what came back."""

    sent: float
    took: float
    query: int
    is_image: bool
    status: int
    answer: dict = field(default_factory=dict)


class Load:
    """Clients that ask without pause."""

    def __init__(self, url: str, vectors_QD: np.ndarray, images: list[bytes]) -> None:
        self.asked: list[Asked] = []
        self._url, self._vectors_QD, self._images = url, vectors_QD, images
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        choice = random.Random(number)
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._stop.is_set():
                is_image = number < ASKING_IMAGES
                query = choice.randrange(len(self._images if is_image else self._vectors_QD))
                body: dict = {"k": K}
                if is_image:
                    body["image_base64"] = base64.b64encode(self._images[query]).decode()
                else:
                    body["embedding"] = self._vectors_QD[query].tolist()
                sent = time.monotonic()
                try:
                    response = client.post("/v1/classify", json=body)
                    answer = response.json() if response.status_code == 200 else {"detail": response.text}
                    status = response.status_code
                except httpx.TransportError as error:
                    status, answer = 0, {"detail": repr(error)}
                self.asked.append(Asked(sent, time.monotonic() - sent, query, is_image, status, answer))

    def until(self, holds: Callable[[], bool]) -> float:
        """Wait for something; the seconds it took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < LONGEST_SECONDS
            time.sleep(0.05)
        return time.monotonic() - began

    def all_whole_since(self, moment: float) -> bool:
        """Whether enough was answered since, and the last of it by every shard."""
        last = [asked for asked in self.asked if asked.sent > moment][-2 * CLIENTS :]
        return len(last) == 2 * CLIENTS and all(a.status == 200 and not a.answer["partial"] for a in last)


@pytest.fixture
def memory(s3: SeaweedFS, digits: Path, weights: str, tmp_path: Path) -> VisualMemory:
    """Digits in two exact shards and some fresh entries, on S3."""
    memory = VisualMemory(s3.uri())
    for number, folders in enumerate((("0", "1"), ("2", "3"), ("4",))):
        source = tmp_path / f"source {number}"
        source.mkdir()
        for folder in folders:
            (source / folder).symlink_to(digits / "remember" / folder)
        if number == 2:
            memory.index(IndexOptions(key="Flat", shard_rows=40))
        memory.add(source, encoder=ENCODER, weights=weights, weights_order="positional", image_size=IMAGE_SIZE)
    assert memory.status()["shards"] == 2
    return memory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_disturbances_one_after_another(
    memory: VisualMemory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = [path.read_bytes() for path in sorted((digits / "ask").rglob("*.png"))[::5]]
    dimension = memory.live().dimension
    vectors_QD = np.random.default_rng(3).normal(size=(40, dimension)).astype(np.float32)
    vectors_QD += 3 * memory.live().vectors_of(memory.live().live_ids())[:40] * dimension**0.5
    cache = tmp_path / "cache"
    options = ("--groups", "2", "--embedders", "2", "--cache", str(cache), "--cache-size", "1G")
    figures: dict[str, float] = {}
    with (
        ray_server(memory.uri, tmp_path, *options, environment={"VISUAL_MEMORY_TOKEN": TOKEN}) as server,
        Client(server.url, TOKEN) as client,
        Load(server.url, vectors_QD, images) as load,
    ):
        load.until(lambda: load.all_whole_since(0))
        time.sleep(3)
        figures |= {"seconds until a killed group answers": killed(server, load, "group-1")}
        figures |= {"seconds until a killed embedder is replaced": killed(server, load, "embedder")}
        version = memory.log.latest().version
        ids = memory.live().live_ids()
        memory.relabel(ids=[int(ids[0])], label="another")
        figures["seconds until a new version answers"] = load.until(
            lambda: load.asked[-1].answer.get("version", 0) > version
        )
        gone = int(most_returned(load))
        client.forget(ids=[gone])
        forgotten = time.monotonic()
        time.sleep(SOON + 1)
        with (
            Client(server.url, "another token") as stranger,
            pytest.raises(Exception, match="token is missing or wrong"),
        ):
            stranger.forget(labels=["1"])
        began = time.monotonic()
        damage(cache)
        load.until(lambda: load.all_whole_since(began))
        figures["seconds until all answer after the copies were damaged"] = time.monotonic() - began
        time.sleep(3)
    assert {asked.status for asked in load.asked} == {200}, Counter(
        (asked.status, json.dumps(asked.answer)[:200]) for asked in load.asked if asked.status != 200
    )
    returned_late = [
        asked.took
        for asked in load.asked
        if asked.sent > forgotten + SOON and gone in {n["id"] for n in asked.answer["neighbors"]}
    ]
    assert not returned_late
    figures["seconds until the forgotten was gone"] = max(
        (a.sent - forgotten for a in load.asked if gone in {n["id"] for n in a.answer["neighbors"]}), default=0.0
    )
    assert wrong_answers(memory, load, vectors_QD, images) == []
    partial = sum(asked.answer["partial"] for asked in load.asked)
    took = np.array([asked.took for asked in load.asked]) * 1e3
    figures |= {"answers": len(load.asked), "of them partial": partial, "slowest ms": float(took.max())}
    figures |= {"p50 ms": float(np.percentile(took, 50)), "p99 ms": float(np.percentile(took, 99))}
    with capsys.disabled():
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def killed(server: RayServer, load: Load, deployment: str) -> float:
    """Kill one replica of a deployment; seconds until there is another and all is answered whole."""
    before = server.replicas(deployment)
    assert before
    began = time.monotonic()
    os.kill(before[0], signal.SIGKILL)
    load.until(lambda: len(set(server.replicas(deployment)) - {before[0]}) >= len(before))
    replaced = time.monotonic()
    load.until(lambda: load.all_whole_since(replaced))
    return time.monotonic() - began


def most_returned(load: Load) -> int:
    """The entry that most answers name."""
    counts = Counter(n["id"] for asked in load.asked[-500:] for n in asked.answer.get("neighbors", []))
    return counts.most_common(1)[0][0]


def damage(cache: Path) -> None:
    """Overwrite bytes of every local copy, cut one short and remove one."""
    copies = sorted((path for path in cache.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_size)
    assert len(copies) >= 6
    for copy in copies:
        with copy.open("r+b") as stream:
            stream.seek(copy.stat().st_size // 2)
            stream.write(b"\xff" * 64)
    with copies[-1].open("r+b") as stream:
        stream.truncate(1_000)
    copies[-2].unlink()


def wrong_answers(memory: VisualMemory, load: Load, vectors_QD: np.ndarray, images: list[bytes]) -> list[dict]:
    """Answers that are not the library's at their version; partial ones may lack neighbours, and have no others."""
    wrong: list[dict] = []
    versions = sorted({asked.answer["version"] for asked in load.asked})
    for version in versions:
        past = VisualMemory(memory.uri, at=version)
        past._encoder = memory._encoder
        expected = {
            True: [decision.to_json() for decision in past.classify(images, k=K)],
            False: [decision.to_json() for decision in past.classify(embeddings=vectors_QD, k=K)],
        }
        everything = {
            True: past.search(images, k=len(past.live())),
            False: past.search(embeddings=vectors_QD, k=len(past.live())),
        }
        for asked in (asked for asked in load.asked if asked.answer["version"] == version):
            answer = {name: value for name, value in asked.answer.items() if name != "partial"}
            if not asked.answer["partial"]:
                if answer != json.loads(json.dumps(expected[asked.is_image][asked.query])):
                    wrong.append(asked.answer)
                continue
            order = {n.id: (n.similarity, n.label) for n in everything[asked.is_image][asked.query]}
            found = [(n["id"], (n["similarity"], n["label"])) for n in answer["neighbors"]]
            places = [list(order).index(entry_id) for entry_id, _ in found if entry_id in order]
            if any(order.get(entry_id) != said for entry_id, said in found) or places != sorted(places):
                wrong.append(asked.answer)
    return wrong
