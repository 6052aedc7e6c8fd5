"""A server that is told to stop answers what is under way, ends with status 0, and says nothing in others' words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from cluster.seaweed import free_ports
from pipeline import VisualMemory
from tests.serving.ray_server import ray_server

CLIENTS = 8
OTHERS_WORDS = ("raylet", "Traceback", "ERROR", "Error", "WARNING", "serve.shutdown", "\x1b")
FIRST_LINE_SECONDS = 20.0  # a second on a machine that does nothing else


def assert_says_nothing_in_others_words(said: str) -> None:
    assert [word for word in OTHERS_WORDS if word in said] == [], said


class Asking:
    """Clients that ask without pause, each over a connection of its own, and note what comes back."""

    def __init__(self, url: str, image: bytes) -> None:
        self.answers: Counter[int] = Counter()
        self.cut_off: list[str] = []
        self.refused = 0
        self._url, self._image = url, image
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while True:
                try:
                    if number % 2:
                        status = client.post("/v1/classify", files={"image": self._image}).status_code
                    else:
                        body = {"embedding": np.ones(1280).tolist(), "k": 20}
                        status = client.post("/v1/classify", json=body).status_code
                    with self._lock:
                        self.answers[status] += 1
                except httpx.ConnectError:  # nobody listens any more
                    with self._lock:
                        self.refused += 1
                    return
                except httpx.TransportError as error:
                    with self._lock:
                        self.cut_off.append(repr(error))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_is_under_way_is_answered(
    digits_memory: VisualMemory, digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    image = sorted((digits / "ask" / "3").iterdir())[0].read_bytes()
    with ray_server(digits_memory.uri, tmp_path) as server:
        asking = Asking(server.url, image)
        asking.start()
        while sum(asking.answers.values()) < 40:
            time.sleep(0.05)
        server.process.send_signal(number)
        status = server.process.wait(60)
        asking.join()
    assert status == 0
    assert set(asking.answers) == {200}
    assert asking.refused == CLIENTS
    # A request that was sent over a connection just as this was closed was never taken; no answer broke off.
    assert all("disconnected without sending" in said or "ReadError" in said for said in asking.cut_off)
    assert len(asking.cut_off) <= CLIENTS
    said = (tmp_path / "serve.log").read_text()
    assert_says_nothing_in_others_words(said)
    assert "stopping: answering what is under way" in said
    lines = re.findall(r"POST /v1/classify (\d+) [\d.]+ ms [0-9a-f]{16}\n", said)
    assert Counter(map(int, lines)) == asking.answers, "every answer is a line of the log, and the other way round"
    assert server.replicas("group-0") == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_long_request_is_waited_for(digits_memory: VisualMemory, tmp_path: Path) -> None:
    """The second half of its image is sent after the signal."""
    shutil.copytree(digits_memory.uri, tmp_path / "memory")
    environment = {"VISUAL_MEMORY_TOKEN": "t"}
    with ray_server(str(tmp_path / "memory"), tmp_path, environment=environment) as server:
        image = next((Path(digits_memory.uri).parent.parent).rglob("remember/3/*.png")).read_bytes()
        request = httpx.Request("POST", f"{server.url}/v1/entries", files={"image": image})
        body = request.read()
        half = len(body) // 2

        def halves() -> Iterator[bytes]:
            yield body[:half]
            time.sleep(0.5)
            server.process.terminate()
            time.sleep(0.5)
            yield body[half:]

        headers = {
            "Authorization": "Bearer t",
            "Content-Type": request.headers["Content-Type"],
            "Content-Length": str(len(body)),
        }
        answer = httpx.post(request.url, content=halves(), headers=headers, timeout=60)
        assert server.process.wait(60) == 0
    assert answer.status_code == 200
    assert VisualMemory(tmp_path / "memory").status()["entries"] == 101
    assert_says_nothing_in_others_words((tmp_path / "serve.log").read_text())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [0.0, pytest.param(4.0, marks=pytest.mark.slow)])
def test_a_server_that_starts_says_so_and_can_be_stopped(
    digits_memory: VisualMemory, tmp_path: Path, seconds: float
) -> None:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "jobs.cli", "serve", digits_memory.uri, "--port", str(port)]
    began = time.monotonic()
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ, start_new_session=True)
    try:
        while "starting Ray" not in (tmp_path / "said").read_text():
            assert time.monotonic() - began < FIRST_LINE_SECONDS
            assert process.poll() is None
            time.sleep(0.05)
        assert re.match(r"(opening .*\nnote: .*\n|note: .*\n)starting Ray\n", (tmp_path / "said").read_text())
        time.sleep(seconds)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert_says_nothing_in_others_words((tmp_path / "said").read_text())
