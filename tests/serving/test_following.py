"""A server that follows its memory: what is added, corrected and forgotten counts at once, and no answer mixes two."""

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.decisions.decision import Decision
from pipeline.index.search.open_blocks import Share
from pipeline.serving.service.group import Asked, Group, Subject
from pipeline.serving.service.service import Limits
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import unit
from tests.serving.serving import Served, add_labelled, memory_in_shards, served

TOKEN = "a token of the tests"
SOON = 5.0  # seconds in which what another process commits must count
DIMENSION = 16


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    return memory_in_shards(tmp_path, DIMENSION)


@pytest.fixture
def server(memory: VisualMemory) -> Iterator[Served]:
    with served(memory.uri, 2, token=TOKEN, limits=Limits(poll_seconds=0.2)) as server:
        yield server


def query(seed: int = 9) -> list[float]:
    vector: list[float] = np.random.default_rng(seed).normal(size=DIMENSION).tolist()
    return vector


def ids_found(server: Served, k: int = 20) -> list[int]:
    answer = server.post("/v1/search", {"embedding": query(), "k": k}).json()
    return [neighbor["id"] for neighbor in answer["neighbors"]]


def test_what_is_forgotten_here_is_gone_from_the_next_answer_on(server: Served, memory: VisualMemory) -> None:
    gone = ids_found(server)[:7]
    report = server.post("/v1/forget", {"ids": gone}, TOKEN).json()
    assert report["forgotten"] == 7
    assert not set(gone) & set(ids_found(server, 50))
    for entry_id in gone[:1]:
        assert server.http.get(f"/v1/entries/{entry_id}").status_code == 404
    erased = ids_found(server)[0]
    assert server.post("/v1/forget", {"ids": [erased], "erase": True}, TOKEN).status_code == 200
    assert erased not in ids_found(server, 50)
    assert ids_found(server) == [n.id for n in memory.search(embeddings=np.array([query()]), k=20)[0]]


def test_a_corrected_label_votes_from_the_next_answer_on(server: Served) -> None:
    ids = ids_found(server, 5)
    assert server.post("/v1/relabel", {"ids": ids, "label": "new"}, TOKEN).status_code == 200
    answer = server.post("/v1/classify", {"embedding": query(), "k": 5}).json()
    assert (answer["label"], answer["confidence"]) == ("new", 1.0)


def test_what_others_commit_counts_soon(server: Served, memory: VisualMemory, tmp_path: Path) -> None:
    gone = ids_found(server)[:3]
    memory.forget(ids=gone)
    began = time.monotonic()
    while set(gone) & set(ids_found(server)):
        assert time.monotonic() - began < SOON
        time.sleep(0.02)
    near = unit(np.array([query()]))
    add_labelled(memory, tmp_path / "near", near, ["near"])
    assert server.post("/v1/reload", None, TOKEN).json()["version"] == memory.log.latest().version
    assert server.post("/v1/classify", {"embedding": query(), "k": 1}).json()["label"] == "near"


def test_an_image_that_is_added_counts_at_once(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    digits_memory.copy(tmp_path / "memory")
    image = base64.b64encode(sorted((digits / "ask" / "1").iterdir())[0].read_bytes()).decode()
    with served(str(tmp_path / "memory"), token=TOKEN) as server:
        added = server.post("/v1/entries", {"image_base64": image, "label": "one"}, TOKEN).json()
        answer = server.post("/v1/classify", {"image_base64": image, "k": 1}).json()
        assert (answer["label"], answer["neighbors"][0]["id"]) == ("one", added["id"])
        assert answer["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-3)
        assert answer["version"] == added["version"]


def test_versions_that_differ_in_overlays_share_their_shards(memory: VisualMemory) -> None:
    group = Group(open_storage(memory.uri), Share(0, 1))
    first = group.prepare()
    memory.forget(ids=[int(memory.live().live_ids()[0])])
    second = group.prepare()
    assert second == first + 1
    before, after = (group._opened[version].live for version in (first, second))
    assert [b.ids_N is a.ids_N for b, a in zip(before.blocks, after.blocks, strict=True)] == [True] * 3
    assert len(after) == len(before) - 1
    for _ in range(3):
        memory.forget(ids=[int(memory.live().live_ids()[0])])
        group.prepare()
    assert len(group._opened) == 2


def test_a_version_is_answered_while_a_newer_one_is_open(memory: VisualMemory) -> None:
    group = Group(open_storage(memory.uri), Share(0, 1))
    first = group.prepare()
    vectors = np.array([query()], np.float32)
    vectors /= np.linalg.norm(vectors)
    [before] = group.answer([Asked(Subject(first), vectors, 5, "live")])
    memory.forget(ids=[int(before.found.ids_QK[0, 0])])  # type: ignore[union-attr]
    group.prepare()
    [again] = group.answer([Asked(Subject(first), vectors, 5, "live")])
    assert again.found.ids_QK.tolist() == before.found.ids_QK.tolist()  # type: ignore[union-attr]


def test_no_answer_mixes_two_versions(server: Served, memory: VisualMemory) -> None:
    """Questions without pause while labels change in every version: each answer is the library's at its version."""
    answers: list[dict] = []
    failures: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = server.post("/v1/classify", {"embedding": query(), "k": 30, "balance": 1.0})
            if answer.status_code == 200:
                answers.append(answer.json())
            else:
                failures.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(12):
            ids = memory.live().live_ids()
            memory.relabel(ids=ids[number::3].tolist(), label=f"label {number % 4}")
            memory.forget(ids=[int(ids[number])])
            time.sleep(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    versions = sorted({answer["version"] for answer in answers})
    assert len(versions) > 5
    expected = {
        version: VisualMemory(memory.uri, at=version).classify(embeddings=np.array([query()]), k=30, balance=1.0)[0]
        for version in versions
    }
    for answer in answers:
        assert not answer.pop("partial")
        assert Decision.from_json(answer) == expected[answer["version"]]
