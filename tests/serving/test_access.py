"""Each request has an id and a line; what a client sends cannot break a log; versions say who asked for them."""

import base64
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from pipeline import VisualMemory
from pipeline.serving.access import MAX_PATH, Access, Failures, Pipe
from pipeline.store.log.history import history
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00 127\.0\.0\.1 ([A-Z]+) (\S+) (\d{3}|unanswered) (\d+\.\d) ms (\S+)"
)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("access") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN, access=lines.append) as server:
        yield server


@pytest.fixture
def image() -> str:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(4).integers(0, 255, (30, 30, 3), np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def memory_of(server: Served) -> VisualMemory:
    return VisualMemory(server.service._following._log.storage.uri)


@pytest.mark.parametrize("given", ["3f2a-17", "a", "x" * 64, "01J9Z3:trace.4_b", "550e8400-e29b-41d4-a716-446655440"])
def test_a_sane_id_is_kept(server: Served, lines: list[str], given: str) -> None:
    answer = server.http.get("/healthz", headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given
    assert lines[-1].endswith(f" ms {given}")


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"b', "ü", "<script>", "a/../b", "a,b", "%0a"])
def test_another_id_is_exchanged(server: Served, lines: list[str], given: str) -> None:
    answer = server.http.get("/healthz", headers={"X-Request-ID": given.encode()})
    made = answer.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{16}", made)
    assert lines[-1].endswith(f" ms {made}")
    assert LINE.fullmatch(lines[-1])


def test_two_ids_are_none(server: Served) -> None:
    answer = server.http.get("/healthz", headers=[("X-Request-ID", "one"), ("X-Request-ID", "two")])
    assert answer.headers["x-request-id"] not in {"one", "two"}


def test_refusals_name_their_request(server: Served, lines: list[str]) -> None:
    for method, path, status in (
        ("POST", "/v1/classify", 400),
        ("POST", "/v1/forget", 401),
        ("GET", "/v1/entries/5", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/status", 405),
        ("GET", "/v1/entries/x", 422),
    ):
        answer = server.http.request(method, path, headers={"X-Request-ID": "mine"})
        assert (answer.status_code, answer.json()["request_id"], answer.headers["x-request-id"]) == (
            status,
            "mine",
            "mine",
        )
        found = LINE.fullmatch(lines[-1])
        assert found is not None
        assert found.groups()[:3] == (method, path, str(status))


def test_nothing_of_a_path_breaks_a_line(server: Served, lines: list[str]) -> None:
    parts = urlsplit(server.url)
    for raw in (
        b"/a%0a%0dfake%1b[31m?token=secret",
        b"/\xff\xfe\x1b[2J\x07",
        b"/" + b"x" * 5_000,
        b"/a\"b'c<d>",
        "/ü".encode(),
    ):
        before = len(lines)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(b"GET " + raw + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            while connection.recv(65_536):
                pass
        for line in lines[before:]:
            assert line.isprintable()
            assert line.isascii() or "…" in line
            assert len(line) < MAX_PATH * 4 + 200
            assert "secret" not in line, "query strings may hold secrets"


def test_a_version_names_the_client_and_the_request(server: Served, image: str) -> None:
    memory = memory_of(server)
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-ID": "teach-1"}
    added = server.http.post("/v1/entries", json={"image_base64": image, "label": "a cat"}, headers=headers).json()
    [last] = history(memory.log, limit=1)
    assert last.command == "POST /v1/entries images=1 label='a cat' dataset=http from 127.0.0.1, request teach-1"
    headers["X-Request-ID"] = "relabel-1"
    server.http.post("/v1/relabel", json={"ids": [added["id"]], "label": "dog"}, headers=headers)
    assert history(memory.log, limit=1)[0].command == (
        f"POST /v1/relabel ids={added['id']} label=dog from 127.0.0.1, request relabel-1"
    )
    headers["X-Request-ID"] = "forget-1"
    uris = [server.http.get(f"/v1/entries/{added['id']}").json()["uri"]]
    server.http.post("/v1/forget", json={"ids": [added["id"]], "uris": uris}, headers=headers)
    [last] = history(memory.log, limit=1)
    assert last.command == f"POST /v1/forget ids={added['id']} uris=1 from 127.0.0.1, request forget-1"
    assert TOKEN not in json.dumps([summary.to_json() for summary in history(memory.log)])


def test_what_a_version_says_is_bounded(server: Served, image: str) -> None:
    memory = memory_of(server)
    labels = [f"{'long ' * 100}{number}\x1b[31m\n" for number in range(40)]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"image_base64": [image] * 40, "label": labels, "uri": [f"s3://key:secret@b/{n}?sig=1" for n in range(40)]}
    assert server.http.post("/v1/entries", json=body, headers=headers).status_code == 200
    [last] = history(memory.log, limit=1)
    assert len(last.command) < 1_000
    assert "and 35 more" in last.command
    assert "secret" not in last.command
    assert last.command.isprintable()


def test_erasing_takes_ids_out_of_what_versions_say(server: Served, image: str) -> None:
    memory = memory_of(server)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    added = server.http.post("/v1/entries", json={"image_base64": image, "label": "x"}, headers=headers).json()
    headers["X-Request-ID"] = added["id_text"]  # as it should not be, and can
    server.http.post("/v1/relabel", json={"ids": [added["id"]], "label": "y"}, headers=headers)
    erased = server.http.post("/v1/forget", json={"ids": [added["id_text"]], "erase": True}, headers=headers)
    assert erased.json()["erased"] == 1
    report = memory.verify()
    assert [finding for finding in report.findings if finding.severity == "damage"] == []
    # The erasing version itself came after: it says what it was asked for, as `forget --id` does.
    said = [summary.command for summary in history(memory.log)][1:]
    assert not [command for command in said if added["id_text"] in command]


def failing_app(lines: list[str]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Failures)
    app.add_middleware(Access, write=lines.append)

    @app.get("/fails")
    async def fails() -> None:
        raise ZeroDivisionError("a secret of the server")

    return app


def test_what_nobody_foresaw_is_a_500_that_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    client = TestClient(failing_app(lines), raise_server_exceptions=False)
    answer = client.get("/fails", headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.json()["request_id"], answer.headers["x-request-id"]) == (500, "mine", "mine")
    assert "secret" not in answer.text
    assert "request mine failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert " GET /fails 500 " in lines[0]


def test_a_slow_reader_of_the_log_holds_up_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    write = Pipe(path)
    for number in range(5_000):
        write(f"line {number} {'x' * 100}")
    first = os.read(reader, 1 << 20)
    assert first.startswith(b"line 0 ")
    write("last")
    assert re.fullmatch(rb"\d+ lines of the access log were left out\nlast\n", os.read(reader, 1 << 20))
    os.close(reader)
    write("nobody reads this")  # and it is no fault
