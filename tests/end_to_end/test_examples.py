"""Every script of docs/examples runs, as its first lines say, and prints what it promises."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import VisualMemory
from tests.conftest import ENCODER
from tests.serving.serving import served

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "my.memory"))


def run(name: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_example_is_tried_here() -> None:
    tried = set(re.findall(r'run\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    assert tried == {path.name for path in EXAMPLES.glob("*.py")}


def test_vectors(tmp_path: Path) -> None:
    said = run("vectors.py", tmp_path / "vectors.memory").splitlines()
    assert said[0].endswith("class 0 1.000")
    assert said[3].startswith("Decision(label=")


def test_teach_and_unlearn(memory: VisualMemory, digits: Path) -> None:
    images = sorted((digits / "ask" / "3").iterdir())[:3]
    said = run("teach_and_unlearn.py", memory.uri, "three again", *images)
    assert said.startswith(f"{images[0]} is a three again")
    assert "proven" in said
    assert memory.status()["entries"] == 100


def test_own_encoder(digits: Path, weights: str, tmp_path: Path) -> None:
    said = run("own_encoder.py", tmp_path / "my.memory", digits / "remember", ENCODER, weights, digits / "ask")
    assert said.startswith("AddReport(")
    assert re.search(r"rank +10 +[\d.]+ +[\d.]+", said)


def test_what_if(memory: VisualMemory, digits: Path) -> None:
    before = memory.state()
    said = run("what_if.py", memory.uri, next((digits / "ask" / "2").iterdir())).splitlines()
    assert [line.partition(" Decision(")[0] for line in said] == [
        "as it is",
        "without the nearest",
        "with the nearest at a tenth of its weight",
        "if the nearest were an owl",
    ]
    assert memory.state() == before


def test_ask_a_server(memory: VisualMemory, digits: Path) -> None:
    image = next((digits / "ask" / "1").iterdir())
    with served(memory.uri, token="secret") as server:
        said = run("ask_a_server.py", server.url, image, "penguin", VISUAL_MEMORY_TOKEN="secret")
    assert said == "1 before, penguin after\n"
    assert memory.status()["entries"] == 100
