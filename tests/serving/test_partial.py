"""What a server says when a part of it is missing, slow, or asked too much."""

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pytest

from pipeline import Client, VisualMemory
from pipeline.errors import Overloaded, SourceError, Unavailable, UnknownName, UsageError, VisualMemoryError
from pipeline.index.build.plan import IndexOptions
from pipeline.serving.service.group import Answer, Asked
from pipeline.serving.service.service import Limits
from tests.conftest import unit
from tests.serving.serving import Served, add_labelled, served

DIMENSION = 16


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    """Two shards of 300 vectors."""
    memory = VisualMemory(tmp_path / "memory")
    for name, seed in (("a", 1), ("b", 2)):
        vectors = np.random.default_rng(seed).normal(size=(300, DIMENSION))
        add_labelled(memory, tmp_path / name, unit(vectors), [f"label {row % 3}" for row in range(300)])
    memory.index(IndexOptions(key="Flat", shard_rows=300))
    return memory


class Tap:
    """Between a service and one of its groups: lets calls pass, holds them up, or breaks them off."""

    def __init__(self, server: Served, number: int) -> None:
        member = server.service._members.all[number]
        self._answer = member.queue._call
        member.queue._call = self.answer
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    async def answer(self, asked: Sequence[Asked]) -> Sequence[Answer | Exception]:
        if self.broken:
            raise ConnectionResetError("the process is gone")
        while not self.open.is_set():
            await asyncio.sleep(0.01)
        answers: Sequence[Answer | Exception] = await self._answer(asked)
        return answers


@pytest.fixture
def server(memory: VisualMemory) -> Iterator[Served]:
    with served(memory.uri, 2, limits=Limits(timeout_seconds=2.0, grace_seconds=0.05)) as server:
        yield server


def body(**more: object) -> dict:
    return {"embedding": np.random.default_rng(5).normal(size=DIMENSION).tolist(), "k": 10, **more}


@pytest.mark.parametrize("how", ["slow", "broken"])
def test_a_missing_group_makes_a_partial_answer(server: Served, memory: VisualMemory, how: str) -> None:
    whole = server.post("/v1/classify", body()).json()
    assert (whole["partial"], whole["shards_answered"], whole["shards_total"]) == (False, 2, 2)
    tap = Tap(server, 1)
    if how == "slow":
        tap.open.clear()
    tap.broken = how == "broken"
    answer = server.post("/v1/classify", body(timeout_ms=200)).json()
    assert (answer["partial"], answer["shards_answered"], answer["shards_total"]) == (True, 1, 2)
    left = [n["id"] for n in answer["neighbors"]]
    first = memory.state().index.shards[0].covers[0]  # type: ignore[union-attr]
    assert all(first[0] <= entry_id <= first[1] for entry_id in left)
    assert len(left) == 10
    refused = server.post("/v1/classify", body(require_all=True, timeout_ms=200))
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert "1 of 2 groups" in refused.json()["detail"]
    assert server.http.get("/healthz").status_code == 200
    tap.broken = False
    tap.open.set()
    for _ in range(50):
        answer = server.post("/v1/classify", body()).json()
        if not answer["partial"]:
            break
    assert answer == whole


def test_without_any_group_there_is_no_answer(server: Served) -> None:
    taps = [Tap(server, number) for number in range(2)]
    for tap in taps:
        tap.broken = True
    for _ in range(2):
        refused = server.post("/v1/search", body(timeout_ms=200))
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
    assert server.http.get("/healthz").status_code == 503
    for tap in taps:
        tap.broken = False
    assert server.post("/v1/search", body()).json()["partial"] is False
    assert server.http.get("/healthz").status_code == 200


def test_too_much_at_once_is_refused_and_not_queued(memory: VisualMemory) -> None:
    with served(memory.uri, 2, limits=Limits(queries=4, timeout_seconds=5.0)) as server:
        taps = [Tap(server, number) for number in range(2)]
        for tap in taps:
            tap.open.clear()
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(server.post, "/v1/search", body()) for _ in range(12)]
            refused = itertools.islice(as_completed(asked, timeout=60), 8)
            assert [future.result().status_code for future in refused] == [429] * 8
            for tap in taps:
                tap.open.set()
            answers = [future.result() for future in asked]
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 8
        assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)
        assert server.post("/v1/search", body()).status_code == 200
        batch = {"embedding": np.ones((5, DIMENSION)).tolist()}
        assert server.post("/v1/search", batch).status_code == 200  # alone it may be as large as it is


def test_the_client_asks_again_while_it_may_help(server: Served, memory: VisualMemory) -> None:
    tap = Tap(server, 0), Tap(server, 1)
    vectors = np.random.default_rng(5).normal(size=(70, DIMENSION))
    with Client(server.url) as client:
        for each in tap:
            each.broken = True
        timer = threading.Timer(1.0, lambda: [setattr(each, "broken", False) for each in tap])
        timer.start()
        decisions = client.classify(embeddings=vectors, k=10)
        timer.join()
        assert decisions == memory.classify(embeddings=vectors, k=10)
        assert client.search(embeddings=vectors[:3], k=4) == memory.search(embeddings=vectors[:3], k=4)


def test_refusals_reach_the_caller_as_the_librarys_errors(server: Served) -> None:
    vectors = np.ones((1, DIMENSION))
    with Client(server.url) as client:
        cases: list[tuple[type[VisualMemoryError], dict]] = [
            (UsageError, {"embeddings": vectors, "k": 0}),
            (UsageError, {"embeddings": vectors, "label_set": "colours"}),
            (UsageError, {"embeddings": vectors[:, :3]}),
            (UsageError, {"images": "one.png"}),
            (UsageError, {}),
            (SourceError, {"images": ["/nowhere.png"]}),
        ]
        for kind, options in cases:
            with pytest.raises(kind):
                client.classify(**options)
        with pytest.raises(UsageError) as refused:
            client.classify(embeddings=vectors, k=0)
        assert refused.value.field == "k"
        with pytest.raises(UnknownName):
            client.entry(7)
        with pytest.raises(UsageError, match="only reads"):
            client.forget(ids=[1])
    with Client("http://127.0.0.1:9", attempts=2) as nobody, pytest.raises(Unavailable, match="is the server up"):
        nobody.status()
    assert issubclass(Overloaded, Unavailable)
