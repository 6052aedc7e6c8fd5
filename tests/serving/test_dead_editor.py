"""The process that changes a memory is killed over an add: the answer says that it may or may not have been done."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pipeline import VisualMemory
from tests.serving.ray_server import ray_server
from tests.serving.test_on_ray import noise

TOKEN = "a token of the tests"
NUM_IMAGES = 48
AT_WORK_SECONDS = 0.2  # of a CPU, by which an editor is at work that opens its encoder and then embeds


def seconds_of_work(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_add_whose_editor_is_killed_is_no_500(digits_memory: VisualMemory, tmp_path: Path) -> None:
    digits_memory.copy(tmp_path / "memory")
    files = [("image", (f"{seed}.png", noise(seed))) for seed in range(NUM_IMAGES)]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with ray_server(str(tmp_path / "memory"), tmp_path, environment={"VISUAL_MEMORY_TOKEN": TOKEN}) as server:
        [editor] = server.replicas("editor")
        idle = seconds_of_work(editor)

        def add() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/entries", files=files, headers=headers, timeout=120)

        with ThreadPoolExecutor(1) as pool:
            adding = pool.submit(add)
            until = time.monotonic() + 60
            while seconds_of_work(editor) < idle + AT_WORK_SECONDS:
                assert time.monotonic() < until
                time.sleep(0.005)
            os.kill(editor, signal.SIGKILL)
            answer = adding.result()
        assert answer.status_code == 503, answer.text
        assert "may or may not have been done" in answer.json()["detail"]
        until = time.monotonic() + 60
        while True:  # another takes its place
            again = httpx.post(f"{server.url}/v1/entries", files=files[:1], headers=headers, timeout=120)
            assert again.status_code in {200, 503}, again.text
            if again.status_code == 200:
                break
            assert time.monotonic() < until
        # The process that listens is the one with limits.
        long = httpx.get(f"{server.url}/healthz", headers={"X": "a" * 100_000})
        assert long.status_code == 431
        assert httpx.get(f"{server.url}/healthz", headers={"Host": "evil.example"}).status_code == 421
