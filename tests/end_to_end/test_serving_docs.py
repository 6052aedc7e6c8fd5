"""The requests that docs/serving.md shows with curl, run as they stand there against a real server."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import VisualMemory
from pipeline.store.log.history import history
from tests.serving.ray_server import ray_server

DOC = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
TOKEN = "a token of the tests"


def block_of(title: str) -> str:
    [block] = re.findall(rf"## {title}\n\n```sh\n(.*?)```", DOC, re.DOTALL)
    return str(block)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_requests_with_curl(digits_memory: VisualMemory, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_memory.uri, tmp_path / "my.memory")
    asked = sorted((digits / "ask").rglob("*.png"))
    for name, image in zip(("new", "other", "wolf1", "wolf2"), asked[::7], strict=False):
        shutil.copy(image, tmp_path / f"{name}.jpg")
    block = block_of("Ten requests with curl")
    commands = [line for line in block.splitlines() if line.startswith("curl")]
    assert len(commands) == 10
    memory = VisualMemory(tmp_path / "my.memory")
    environment = {"VISUAL_MEMORY_TOKEN": TOKEN}
    with ray_server(memory.uri, tmp_path, environment=environment) as server:
        script = block.replace("http://127.0.0.1:8000", server.url)
        script = re.sub(r"^(curl.*?)(\s+#.*)?$", r"\1; echo", script, flags=re.MULTILINE)
        done = subprocess.run(
            ["bash", "-eu", "-c", script],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        said = [json.loads(line) for line in done.stdout.splitlines() if line]
    one, softmax, many, in_json, near, status, taught, relabelled, forgotten = said
    [expected] = memory.classify([(tmp_path / "new.jpg").read_bytes()])
    assert (one["label"], one["confidence"]) == (expected.label, expected.confidence)
    assert (softmax["voting"], softmax["k"]) == ("softmax", 10)
    assert many[0] == one
    assert len(many) == 2
    assert (in_json["label"], in_json["k"]) == (one["label"], 10)
    assert len(near["neighbors"]) == 3
    assert status["entries"] == 100
    assert len(taught["ids"]) == 2
    assert relabelled["relabelled"] == 1
    assert forgotten["forgotten"] == 2
    assert (tmp_path / "picture.jpg").read_bytes().startswith(b"\xff\xd8")
    commands = [summary.command for summary in history(memory.log, limit=3)]
    assert [command.split()[:2] for command in commands] == [
        ["POST", "/v1/forget"],
        ["POST", "/v1/relabel"],
        ["POST", "/v1/entries"],
    ]
    assert all("from 127.0.0.1, request " in command for command in commands)


def test_the_operations_it_names_are_there() -> None:
    from tests.serving.test_documentation import OPERATIONS

    [named] = re.findall(r"the operations are (.*?) \|", DOC)
    assert set(re.findall(r"`(\w+)`", named)) == set(OPERATIONS.values())
