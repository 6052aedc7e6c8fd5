"""Pictures over HTTP: of what adds have read, soon or not at all, and in nobody's way."""

import contextlib
import hashlib
import io
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.images import entry_pictures as made
from pipeline.images.decoding.thumbnails import thumbnail
from pipeline.serving.http import pictures
from pipeline.serving.service.service import Limits
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.pictures import encoded, gradient
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
NAMES = [f"{number}.png" for number in range(6)]


def photo(number: int) -> bytes:
    return encoded(gradient(120 + number, 80), "PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(photo(number))
    return folder


@pytest.fixture
def memory(folder: Path, tmp_path: Path, weights: str) -> VisualMemory:
    memory = VisualMemory(tmp_path / "memory")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    memory.add(folder, label="a", **options)
    return memory


def ids_of(memory: VisualMemory) -> dict[str, int]:
    live = memory.live()
    return {
        uri.rpartition("/")[2]: int(entry_id)
        for block in live.blocks
        for entry_id, uri in zip(block.ids_N.tolist(), block.uris.to_pylist(), strict=True)
    }


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_what_became_a_pipe_a_device_or_another_file_is_told_at_once_and_alike(
    memory: VisualMemory, folder: Path
) -> None:
    ids = ids_of(memory)
    become_pipe(folder / NAMES[0])
    for name, target in ((NAMES[1], "/dev/zero"), (NAMES[2], "/dev/ptmx"), (NAMES[3], "/proc/self/environ")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    (folder / NAMES[4]).unlink()
    (folder / NAMES[5]).write_bytes(photo(7))
    with served(memory.uri, token=TOKEN) as server:
        told = set()
        for name in NAMES:
            began = time.monotonic()
            answer = server.http.get(f"/v1/entries/{ids[name]}/image")
            assert (answer.status_code, answer.json()["field"]) == (404, "id")
            assert time.monotonic() - began < 5
            told.add(answer.json()["detail"].replace(str(ids[name]), "ID"))
        assert len(told) == 1, "nobody learns which files there are"
        assert str(folder) not in told.pop()
        forgotten = server.post("/v1/forget", {"ids": [ids[NAMES[0]]]}, TOKEN)
        assert forgotten.status_code == 200
        assert server.http.get(f"/v1/entries/{ids[NAMES[0]]}").status_code in (404, 422)


def test_too_many_pixels_are_not_decoded_for_a_picture(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ids_of(memory)[NAMES[0]]
    monkeypatch.setattr(made, "decode", lambda *_: pytest.fail("it was decoded"))
    with served(memory.uri, limits=Limits(image_pixels=120 * 80 - 1)) as server:
        assert server.http.get(f"/v1/entries/{entry}/image").status_code == 404


@pytest.mark.parametrize("kept", [True, False])
def test_a_uri_given_over_http_is_shown_below_a_root_alone(
    memory: VisualMemory, tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, secret = tmp_path / "shown", tmp_path / "secret"
    for place in (shown, secret):
        place.mkdir()
        (place / "a.png").write_bytes(photo(9))
    (shown / "link.png").symlink_to(secret / "a.png")
    small = thumbnail(Image.open(io.BytesIO(photo(9))))
    uris = [
        str(shown / "a.png"), str(secret / "a.png"), f"{shown}/../secret/a.png", f"{shown}/%2e%2e/secret/a.png",
        str(shown / "link.png"), f"file://{secret}/a.png", f"file://{shown}/a.png", "/dev/ptmx", "/proc/self/environ",
        "http://127.0.0.1:1/a.png", "s3://bucket-of-nobody/internal/a.png", "gs://bucket/a.png", "memory://a",
        "simplecache::http://127.0.0.1:1/a", "/x.tar#../../etc/passwd", "/t.parquet#row=-1",
        f"/t.parquet#row={10**30}", "zip://a.png::s3://b/c.zip",
    ]  # fmt: skip
    with served(memory.uri, token=TOKEN, thumbnails=kept, pictures=[str(shown)]) as server:
        asked: list[object] = []
        ids = []
        for uri in uris:
            fields = {"label": "x", "uri": uri}
            added = server.http.post(
                "/v1/entries", files={"image": photo(9)}, data=fields, headers={"Authorization": f"Bearer {TOKEN}"}
            )
            ids.append(added.json()["id"])
        connect = socket.socket.connect

        def noted(self: socket.socket, place: object) -> None:
            if place[1] != server.http.base_url.port:  # type: ignore[index]
                asked.append(place)
            connect(self, place)  # type: ignore[arg-type]

        monkeypatch.setattr(socket.socket, "connect", noted)
        answers = [server.http.get(f"/v1/entries/{entry_id}/image") for entry_id in ids]
        assert (answers[0].status_code, max(Image.open(io.BytesIO(answers[0].content)).size)) == (200, 3 * 129)
        for answer in answers[1:]:
            if kept:
                assert (answer.status_code, answer.content) == (200, small)
            else:
                assert answer.status_code == 404
        assert asked == []


def test_what_vectors_name_is_not_shown_nor_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(0))
    digest = hashlib.sha256(photo(0)).hexdigest()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uris = [str(tmp_path / "a.png"), f"http://127.0.0.1:{listener.getsockname()[1]}/track?victim=1"]
        folder = tmp_path / "vectors"
        folder.mkdir()
        table = {"embedding": list(np.eye(2, 8, dtype=np.float32)), "url": uris, "sha256": [digest] * 2, "label": uris}
        pq.write_table(pa.table(table), folder / "v.parquet")
        memory = VisualMemory(tmp_path / "memory")
        memory.add(folder, labels="column:label")
        with served(memory.uri) as server:
            for entry_id in memory.live().live_ids():
                assert server.http.get(f"/v1/entries/{entry_id}/image").status_code == 404
        decision = memory.classify(embeddings=np.ones((1, 8), np.float32), k=2)[0]
        page = memory.explanation_page(decision)
        assert "data:image" not in page
        assert page.count("no picture: it was given as a vector") == 1
        assert page.count("no picture: it is of no file or store") == 1
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_browser_asks_again_and_is_told_that_it_was_forgotten(memory: VisualMemory) -> None:
    entry = ids_of(memory)[NAMES[0]]
    with served(memory.uri, token=TOKEN) as server:
        first = server.http.get(f"/v1/entries/{entry}/image")
        assert "no-cache" in first.headers["cache-control"]
        again = {"If-None-Match": first.headers["etag"]}
        assert server.http.get(f"/v1/entries/{entry}/image", headers=again).status_code == 304
        server.post("/v1/forget", {"ids": [entry]}, TOKEN)
        assert server.http.get(f"/v1/entries/{entry}/image", headers=again).status_code == 404


def test_a_picture_that_is_under_way_when_its_entry_is_forgotten_is_not_given(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ids_of(memory)[NAMES[0]]
    begun, go_on = threading.Event(), threading.Event()

    def waiting(*arguments: object, **options: object) -> bytes:
        begun.set()
        assert go_on.wait(30)
        return made.picture_of(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "picture_of", waiting)
    with served(memory.uri, token=TOKEN) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(httpx.get(f"{server.url}/v1/entries/{entry}/image")))
        asking.start()
        assert begun.wait(30)
        server.post("/v1/forget", {"ids": [entry]}, TOKEN)
        go_on.set()
        asking.join(30)
        assert answers[0].status_code == 404


@dataclass
class Readings:
    """Readings that give nothing until they are given up, or until they are let go."""

    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: list[str] = field(default_factory=list)
    let_go: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, count: int) -> None:
        """Wait until so many more readings have begun."""
        for _ in range(count):
            assert self.begun.acquire(timeout=30)


@contextlib.contextmanager
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Readings]:
    """Sources that give nothing until their reading is given up or let go."""
    readings = Readings()

    def reading(*_: object, bound: made.Bound, **__: object) -> bytes:
        readings.begun.release()
        try:
            while not readings.let_go.wait(0.02):
                bound.check()
        except made.Rejected as rejected:
            readings.ended.append(rejected.reason)
            raise
        raise made.Rejected("it was let go")

    monkeypatch.setattr(pictures, "picture_of", reading)
    yield readings
    readings.let_go.set()


def ask_and_leave(server: Served, entry: int, seconds: float) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        httpx.get(f"{server.url}/v1/entries/{entry}/image", timeout=seconds)


def test_pictures_that_are_slow_hold_up_nothing_else(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(memory)
    limits = Limits(timeout_seconds=90)
    with slow(monkeypatch) as readings, served(memory.uri, token=TOKEN, limits=limits) as server:
        clients = [threading.Thread(target=ask_and_leave, args=(server, ids[NAMES[1]], 90)) for _ in range(12)]
        for client in clients:
            client.start()
        readings.wait_for(pictures.THREADS)
        for name in NAMES[2:4]:
            assert server.post("/v1/forget", {"ids": [ids[name]]}, TOKEN).status_code == 200
            assert server.http.get(f"/v1/entries/{ids[name]}/image").status_code == 404
            assert server.http.get("/healthz").json()["version"] == memory.log.latest().version
        assert readings.ended == [], "all of this was answered while the pictures were read"
        readings.let_go.set()
        for client in clients:
            client.join(60)


def test_what_nobody_waits_for_ends_and_what_takes_too_long_is_told(
    memory: VisualMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ids_of(memory)[NAMES[1]]
    with slow(monkeypatch) as readings, served(memory.uri, limits=Limits(timeout_seconds=60)) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as client:
            client.sendall(f"GET /v1/entries/{entry}/image HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            readings.wait_for(1)
        until = time.monotonic() + 30
        while not readings.ended and time.monotonic() < until:
            time.sleep(0.05)
        assert readings.ended == ["nobody waits for it any more"]
    with slow(monkeypatch), served(memory.uri, limits=Limits(timeout_seconds=0.5)) as server:
        answer = server.http.get(f"/v1/entries/{entry}/image")
        assert (answer.status_code, "within 0.5 s" in answer.json()["detail"]) == (503, True)
        assert "retry-after" in answer.headers


@pytest.mark.parametrize("seconds", [0.1, 60.0], ids=["the thread's clock", "the request's clock"])
def test_a_late_picture_is_told_alike_by_either_clock_and_a_thumbnail_takes_its_place(
    memory: VisualMemory, folder: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(pictures, "Bound", lambda num_bytes, _: made.Bound(num_bytes, seconds))
    limits = Limits(timeout_seconds=0.5)
    with slow(monkeypatch), served(memory.uri, limits=limits) as server:
        answer = server.http.get(f"/v1/entries/{ids_of(memory)[NAMES[1]]}/image")
        assert (answer.status_code, "within 0.5 s" in answer.json()["detail"]) == (503, True)
    kept = VisualMemory(tmp_path / "kept")
    options = {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": IMAGE_SIZE}
    kept.add(folder, label="a", thumbnails=True, **options)
    with slow(monkeypatch), served(kept.uri, limits=limits) as server:
        answer = server.http.get(f"/v1/entries/{ids_of(kept)[NAMES[1]]}/image")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")


def test_more_pictures_than_can_be_made_are_refused(memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ids_of(memory)[NAMES[1]]
    monkeypatch.setattr(pictures, "UNDER_WAY", pictures.THREADS)
    with slow(monkeypatch) as readings, served(memory.uri, limits=Limits(timeout_seconds=60)) as server:
        clients = [threading.Thread(target=ask_and_leave, args=(server, entry, 60)) for _ in range(pictures.THREADS)]
        for client in clients:
            client.start()
        readings.wait_for(pictures.THREADS)
        answer = server.http.get(f"/v1/entries/{entry}/image")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        readings.let_go.set()
        for client in clients:
            client.join(60)
        monkeypatch.undo()
        until = time.monotonic() + 30
        while (answer := server.http.get(f"/v1/entries/{entry}/image")).status_code == 429:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert answer.status_code == 200


def test_a_memory_that_was_moved_shows_what_its_sources_give(
    memory: VisualMemory, folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(memory.uri, tmp_path / "moved")
    with served(str(moved)) as server:
        for name, entry in ids_of(memory).items():
            assert server.http.get(f"/v1/entries/{entry}/image").status_code == 200, name
