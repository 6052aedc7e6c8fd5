"""Questions that cost much, fail, or have no time: they hold up nobody else, and no group counts as missing by them."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.index.search import live_entries
from pipeline.serving.service.group import Group
from pipeline.serving.service.service import Limits
from tests.conftest import unit
from tests.serving.serving import Served, add_labelled, served

DIMENSION = 16
ROWS = 20_000


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> VisualMemory:
    folder = tmp_path_factory.mktemp("costly")
    memory = VisualMemory(folder / "memory")
    vectors = unit(np.random.default_rng(1).normal(size=(ROWS, DIMENSION)))
    add_labelled(memory, folder / "given", vectors, [f"label {row}" for row in range(ROWS)])
    return memory


@pytest.fixture
def server(memory: VisualMemory) -> Iterator[Served]:
    with served(memory.uri, limits=Limits(timeout_seconds=2.0, where_seconds=0.2)) as server:
        yield server


def vector() -> list[float]:
    found: list[float] = np.random.default_rng(9).normal(size=DIMENSION).tolist()
    return found


def status_of(server: Served, path: str = "/v1/search", **body: object) -> int:
    return server.post(path, {"embedding": vector(), "k": 3, **body}).status_code


def longest_answer_beside(clients: list[threading.Thread], server: Served) -> float:
    """The seconds of the slowest single question, asked one after another while the clients are at work."""
    longest = 0.0
    while any(client.is_alive() for client in clients):
        asked = time.monotonic()
        assert status_of(server) == 200
        longest = max(longest, time.monotonic() - asked)
    return longest


def likes(number: int) -> str:
    return " or ".join(f"uri like '%{number}x{term}%y%z%'" for term in range(320))[:9_900].rpartition(" or ")[0]


def test_an_expression_that_costs_too_much_is_refused_before_it_is_asked(server: Served) -> None:
    began = time.monotonic()
    answer = server.post("/v1/classify", {"embedding": vector(), "where": likes(1)})
    assert time.monotonic() - began < 1
    assert answer.status_code == 422
    assert answer.json()["field"] == "where"
    assert "give fewer terms" in answer.json()["detail"]
    for where in ("label like 'label 1%'", "label in ('label 1', 'label 2')", "id > 7 and label != 'x'"):
        assert status_of(server, where=where) == 200


@pytest.mark.parametrize(
    "where",
    [
        "id in (9223372036854775807, 1.5)",
        "id > 1.5",
        "id = 9223372036854775808",
        "id < -1e300",
        "id in (1e400)",
        "uri > 7",
    ],
)
def test_what_is_compared_with_what_never_makes_a_group_missing(server: Served, where: str) -> None:
    assert status_of(server, where=where) in {200, 422}
    assert server.http.get("/healthz").status_code == 200


def test_a_question_that_fails_is_told_and_others_are_answered(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    search_whole = Group._search

    def failing(self: Group, asked):  # type: ignore[no-untyped-def]
        if asked[0].k == 7:
            raise ZeroDivisionError("nobody foresaw this")
        return search_whole(self, asked)

    monkeypatch.setattr(Group, "_search", failing)
    failed = server.post("/v1/search", {"embedding": vector(), "k": 7})
    assert failed.status_code == 503
    assert "ZeroDivisionError" in failed.json()["detail"]
    assert server.http.get("/healthz").status_code == 200
    assert status_of(server) == 200


def test_a_limit_of_ones_own_makes_no_group_missing(server: Served) -> None:
    for _ in range(20):
        assert status_of(server, timeout_ms=1) in {200, 503}
    assert server.http.get("/healthz").status_code == 200
    assert server.http.get("/v1/status").json()["groups"] == [{"group": 0, "answers": True}]


def test_work_ends_with_its_deadline_and_holds_up_no_others(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that take for ever, step by step: the group looks at the deadline between the steps."""
    ended = threading.Semaphore(0)

    def slow_masks(*_: object) -> Iterator[np.ndarray]:
        try:
            while True:
                time.sleep(0.02)
                live_entries.look()
                if time.monotonic() - began > 20:
                    yield np.ones(ROWS, bool)
        finally:
            ended.release()

    began = time.monotonic()
    monkeypatch.setattr(live_entries, "masks", slow_masks)
    answers: list[int] = []
    clients = [
        threading.Thread(target=lambda number=number: answers.append(status_of(server, where=f"id > {number}")))
        for number in range(4)
    ]
    for client in clients:
        client.start()
    assert longest_answer_beside(clients, server) < 1
    assert answers == [503] * 4
    assert ended.acquire(timeout=3)
    assert server.http.get("/healthz").status_code == 200
    assert time.monotonic() - began < 10


def test_batches_that_nothing_interrupts_take_no_thread_from_others(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one long call of FAISS: it goes on after the request was given up, and the next batch begins beside it."""
    search_all = Group._search

    def uninterrupted(self: Group, asked):  # type: ignore[no-untyped-def]
        if asked[0].is_heavy:
            time.sleep(1.5)
        return search_all(self, asked)

    monkeypatch.setattr(Group, "_search", uninterrupted)
    with served(memory.uri, limits=Limits(timeout_seconds=0.4)) as server:
        batch = {"embedding": [vector()] * 40, "k": 3}
        clients = [threading.Thread(target=lambda: server.post("/v1/search", batch)) for _ in range(6)]
        for client in clients:
            client.start()
        assert longest_answer_beside(clients, server) < 0.3


@pytest.mark.parametrize("path", ["/v1/search", "/v1/classify"])
def test_work_ends_when_the_client_leaves(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow_masks(*_: object) -> Iterator[np.ndarray]:
        begun.set()
        try:
            for _step in range(1_000):
                time.sleep(0.02)
                live_entries.look()
            yield np.ones(ROWS, bool)
        finally:
            ended.set()

    monkeypatch.setattr(live_entries, "masks", slow_masks)
    with served(memory.uri, limits=Limits(timeout_seconds=20.0)) as server:
        body = {"embedding": vector(), "k": 3, "where": "id > 7"}
        data, url = json.dumps(body).encode(), httpx.URL(server.url)
        lines = f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"
        with socket.create_connection((url.host, url.port)) as client:
            client.sendall("\r\n".join([*lines, "", ""]).encode() + data)
            assert begun.wait(15)
        assert ended.wait(5), "it goes on for 20 s if somebody waits"
        assert status_of(server) == 200


def test_what_is_kept_of_expressions_is_bounded(server: Served) -> None:
    [member] = server.service._members.all
    for number in range(60):
        assert status_of(server, "/v1/classify", where=f"uri != 'none {number}'") == 200
    group = member.client.group  # type: ignore[attr-defined]
    [opened] = group._opened.values()
    assert opened._renumbered.num_bytes <= 64 << 20
    assert member.standings.num_bytes <= 64 << 20
    assert len(member.standings) < 60


def test_a_balance_is_chosen_once_for_all_who_ask(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    sample = Group.sample

    def counted(self: Group, subject, each):  # type: ignore[no-untyped-def]
        chosen.append(each)
        return sample(self, subject, each)

    monkeypatch.setattr(Group, "sample", counted)
    statuses: list[int] = []
    clients = [
        threading.Thread(target=lambda: statuses.append(status_of(server, "/v1/classify", balance="auto")))
        for _ in range(8)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert set(statuses) <= {200, 503}  # 503: not chosen within two seconds
    assert len(chosen) == 1


def test_a_balance_is_not_chosen_by_millions_of_neighbours(server: Served) -> None:
    refused = server.post("/v1/classify", {"embedding": vector(), "k": 10_000, "balance": "auto"})
    assert (refused.status_code, refused.json()["field"]) == (422, "balance")
    assert status_of(server, "/v1/classify", k=10_000, balance=0.5) == 200


def test_batches_leave_room_for_single_questions(memory: VisualMemory) -> None:
    with served(memory.uri, limits=Limits(queries=512)) as server:
        batch = np.random.default_rng(3).normal(size=(256, DIMENSION)).tolist()
        stop, hogs = threading.Event(), []

        def hog() -> None:
            while not stop.is_set():
                hogs.append(server.post("/v1/search", {"embedding": batch, "k": 50}).status_code)

        threads = [threading.Thread(target=hog) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            single = [status_of(server) for _ in range(60)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert single == [200] * 60
        assert set(hogs) <= {200, 429}
