"""Following versions cannot be held up, goes over only to what can be answered by, and keeps nothing of an erasure."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.decisions.question import Question
from pipeline.errors import StorageError, Superseded
from pipeline.index.build.plan import IndexOptions
from pipeline.index.search.open_blocks import Share
from pipeline.serving.service.group import Asked, Edition, Group, Subject
from pipeline.serving.service.service import How, Limits, Service
from pipeline.store.log.state import file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_cache import CachedStorage, FileCache
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import unit
from tests.serving.serving import Served, add_labelled, memory_in_shards, served

TOKEN = "a token of the tests"
DIMENSION = 16
NEVER = 3_600.0  # seconds between two looks for a newer version


@pytest.fixture
def memory(tmp_path: Path) -> VisualMemory:
    return memory_in_shards(tmp_path, DIMENSION)


@pytest.fixture
def server(memory: VisualMemory) -> Iterator[Served]:
    with served(memory.uri, 2, token=TOKEN, limits=Limits(poll_seconds=0.1)) as server:
        yield server


def query() -> np.ndarray:
    return unit(np.random.default_rng(9).normal(size=(1, DIMENSION))).astype(np.float32)


def ids_found(server: Served) -> list[int]:
    answer = server.post("/v1/search", {"embedding": query()[0].tolist(), "k": 20})
    assert answer.status_code == 200, answer.text
    return [neighbor["id"] for neighbor in answer.json()["neighbors"]]


def test_threads_that_others_take_up_do_not_hold_up_a_forget(server: Served) -> None:
    loop = server.service._following._task.get_loop()  # type: ignore[union-attr]
    let_go = threading.Event()

    async def take_up() -> None:
        for _ in range(64):  # more threads than the default executor of asyncio has
            asyncio.get_running_loop().run_in_executor(None, let_go.wait, 20.0)

    asyncio.run_coroutine_threadsafe(take_up(), loop).result(10)
    try:
        gone = ids_found(server)[0]
        began = time.monotonic()
        assert server.post("/v1/forget", {"ids": [gone]}, TOKEN).status_code == 200
        assert server.http.get("/v1/status").status_code == 200
        assert time.monotonic() - began < 5
        assert gone not in ids_found(server)
    finally:
        let_go.set()


def test_a_server_says_when_it_cannot_follow(memory: VisualMemory, tmp_path: Path) -> None:
    with served(memory.uri, 1, token=TOKEN, limits=Limits(poll_seconds=NEVER)) as server:
        server.service._following._poll_seconds = 0.5
        expected, version = ids_found(server), memory.log.latest().version
        known = set(memory.log.latest().fresh_files())
        add_labelled(memory, tmp_path / "d", query(), ["near"])
        [path] = [Path(memory.uri) / f.path for f in memory.log.latest().fresh_files() if f not in known]
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused = server.post("/v1/reload", None, TOKEN)
        assert refused.status_code == 503
        assert f"version {version} goes on answering" in refused.json()["detail"]
        assert ids_found(server) == expected
        status = server.http.get("/v1/status").json()
        assert (status["version"], status["newest_version"]) == (version, version + 1)
        assert server.http.get("/healthz").status_code == 200  # for a while
        until = time.monotonic() + 30
        while (unhealthy := server.http.get("/healthz")).status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert unhealthy.status_code == 503
        assert f"version {version + 1} is known" in unhealthy.json()["detail"]
        path.write_bytes(whole)
        assert server.post("/v1/reload", None, TOKEN).json()["version"] == version + 1
        assert server.http.get("/healthz").json() == {"healthy": True, "version": version + 1}


def test_a_version_that_the_groups_closed_is_not_asked_for_again(memory: VisualMemory, tmp_path: Path) -> None:
    """Another ingress found a restored memory of the same version, and had the groups open it."""
    place, version = Path(memory.uri), memory.log.latest().version
    restored = VisualMemory(tmp_path / "restored")
    for seed in range(version):
        add_labelled(
            restored,
            tmp_path / f"other {seed}",
            unit(np.random.default_rng(seed).normal(size=(50, DIMENSION))),
            ["x"] * 50,
        )
    with served(memory.uri, 2, limits=Limits(poll_seconds=NEVER)) as server:
        ids_found(server)
        place.rename(tmp_path / "gone")
        Path(restored.uri).rename(place)
        log = VersionLog(open_storage(memory.uri))
        for member in server.service._members.all:
            asyncio.run(member.client.prepare(Edition(version, log.nonce_of(version))))
        assert ids_found(server) == [n.id for n in VisualMemory(place).search(embeddings=query(), k=20)[0]]


def test_what_one_ingress_acknowledged_another_answers_by(memory: VisualMemory) -> None:
    with served(memory.uri, 2, token=TOKEN, limits=Limits(poll_seconds=NEVER)) as server:
        loop = server.service._following._task.get_loop()  # type: ignore[union-attr]
        groups = [member.client for member in server.service._members.all]

        async def another() -> Service:
            service = Service(open_storage(memory.uri), groups, None, limits=Limits(poll_seconds=NEVER))
            await service.start()
            return service

        def run(coroutine):  # type: ignore[no-untyped-def]
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

        other: Service = run(another())
        for _ in range(10):
            found = [n.id for n in run(other.search(query(), Question(k=10), How())).neighbors[0]]
            assert server.post("/v1/forget", {"ids": found[:1]}, TOKEN).status_code == 200
            again = run(other.search(query(), Question(k=10), How()))
            assert found[0] not in {n.id for n in again.neighbors[0]}
            assert again.version == server.service.state.version
            gone = found[1]
            assert server.post("/v1/forget", {"ids": [gone]}, TOKEN).status_code == 200
            with pytest.raises(Exception, match="no entry"):
                run(other.entry(gone))
            label = f"label of round {gone}"
            assert server.post("/v1/relabel", {"ids": [found[2]], "label": label}, TOKEN).status_code == 200
            assert run(other.entry(found[2])).label == label
        run(other.stop())


def test_an_erasure_closes_what_it_erased_at_once(memory: VisualMemory, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "copies", 1 << 30)
    storage = CachedStorage(open_storage(memory.uri), cache)
    group = Group(storage, Share(0, 1))
    first = group.prepare()
    [before] = group.answer([Asked(Subject(first), query(), 5, "live")])
    erased = int(before.found.ids_QK[0, 0])  # type: ignore[union-attr]
    copies = {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}
    memory.forget(ids=[erased], erase=True)
    group.prepare()
    gc.collect()
    assert len(group._opened) == 1
    named = {file.sha256 for file in file_refs(memory.log.latest())}
    there = {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}
    assert not (copies & there) - named  # none of the copies from before that are named no more
    mapped = Path("/proc/self/maps").read_text()
    assert not [line for line in mapped.splitlines() if str(tmp_path) in line and "(deleted)" in line]
    [late] = group.answer([Asked(Subject(first), query(), 5, "live")])
    assert isinstance(late, Superseded)


@pytest.mark.parametrize("change", ["older", "of the same number"])
def test_a_memory_restored_in_place_is_noticed(memory: VisualMemory, tmp_path: Path, change: str) -> None:
    place = Path(memory.uri)
    restored = tmp_path / "restored"
    if change == "older":
        memory.copy(restored)
        for _ in range(5):
            memory.forget(ids=[memory.search(embeddings=query(), k=1)[0][0].id])
    else:
        other = VisualMemory(restored)
        for name, seed in (("e", 5), ("f", 6)):
            add_labelled(
                other, tmp_path / name, unit(np.random.default_rng(seed).normal(size=(50, DIMENSION))), ["x"] * 50
            )
        while other.log.latest().version < memory.log.latest().version:
            other.forget(ids=[int(other.live().live_ids()[0])])
    with served(memory.uri, 2, limits=Limits(poll_seconds=0.1)) as server:
        before = ids_found(server)
        place.rename(tmp_path / "gone")
        restored.rename(place)
        expected = [n.id for n in VisualMemory(place).search(embeddings=query(), k=20)[0]]
        assert expected != before
        until = time.monotonic() + 10
        while ids_found(server) != expected:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert server.http.get("/healthz").json()["version"] == VisualMemory(place).log.latest().version


def test_a_full_disk_of_local_copies_leaves_the_version_before(memory: VisualMemory, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "copies", 1 << 30)
    group = Group(CachedStorage(open_storage(memory.uri), cache), Share(0, 1))
    first = group.prepare()
    asked = [Asked(Subject(first), query(), 5, "live")]
    [before] = group.answer(asked)
    cache.max_bytes = 1_000
    memory.index(IndexOptions(key="Flat", shard_rows=100, rebuild=True))
    for _ in range(3):
        with pytest.raises(StorageError, match="allow more"):
            group.prepare()
        [again] = group.answer(asked)
        assert again.found.ids_QK.tolist() == before.found.ids_QK.tolist()  # type: ignore[union-attr]
    cache.max_bytes = 1 << 30
    assert group.prepare() == memory.log.latest().version
