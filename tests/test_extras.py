"""What each extra of the package brings is enough for its part, and where it is missing the message names it.

An environment is a folder with links to the distributions that the core and some extras ask for, directly and in turn,
out of those that are installed here: what nobody asked for cannot be imported.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.seaweed import SeaweedFS
from pipeline import VisualMemory
from tests.conftest import ENCODER, IMAGE_SIZE, unit
from tests.serving.ray_server import ray_server

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Said = Callable[..., str]
FIRST_ID = 1 << 39


def distributions(*extras: str) -> set[str]:
    """The names of all distributions that the package needs with some extras."""
    todo = [(Requirement(line), "") for line in PROJECT["dependencies"]]
    todo += [(Requirement(line), "") for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name, asked = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name == "visual-memory":
            todo += [(Requirement(line), "") for each in asked for line in PROJECT["optional-dependencies"][each]]
        elif (name, asked) not in seen:
            seen.add((name, asked))
            for line in importlib.metadata.requires(name) or []:
                todo += [(Requirement(line), each) for each in ("", *asked)]
    return {name for name, _ in seen}


def link(names: set[str], folder: Path) -> None:
    """Link what distributions installed into one folder, which several may share."""
    for name in sorted(names):
        for file in importlib.metadata.files(name) or []:
            if ".." in file.parts or file.is_absolute():
                continue
            place = Path(str(file.locate())).parents[len(file.parts) - 1]
            for depth in range(1, len(file.parts) + 1):
                here, there = folder.joinpath(*file.parts[:depth]), place.joinpath(*file.parts[:depth])
                if here.is_symlink():
                    break
                if depth == len(file.parts) or (there / "__init__.py").exists() or there.suffix == ".dist-info":
                    here.symlink_to(there)
                    break
                here.mkdir(exist_ok=True)  # a folder that is no package may be shared


@pytest.fixture
def in_environment(tmp_path: Path) -> Callable[..., Said]:
    """Makes an environment of some extras; a call runs the command line there."""

    def make(*extras: str) -> Said:
        folder = tmp_path / "-".join(("site", *extras))
        folder.mkdir()
        link(distributions(*extras), folder)

        def run(*arguments: object, status: int = 0) -> str:
            code = (
                f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; from jobs.cli import main; "
                "main(sys.argv[1:])"
            )
            command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
            variables = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONNOUSERSITE": "1"}
            done = subprocess.run(
                command, capture_output=True, text=True, env=variables, timeout=240, cwd=tmp_path, check=False
            )
            assert done.returncode == status, done.stderr
            return done.stdout if status == 0 else done.stderr

        return run

    return make


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    path = tmp_path / "vectors" / "vectors.npy"
    path.parent.mkdir()
    np.save(path, unit(np.random.default_rng(0).normal(size=(400, 16))))
    return path


def test_all_is_every_extra_for_users() -> None:
    [everything] = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(PROJECT["optional-dependencies"]) - {"all", "demo", "dev"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_core_is_a_memory_of_vectors(
    in_environment: Callable[..., Said], vectors: Path, tmp_path: Path, digits: Path
) -> None:
    assert not distributions() & {"torch", "ray", "fastapi", "botocore"}
    said, memory = in_environment(), tmp_path / "memory"
    assert json.loads(said("add", memory, vectors.parent, "--label", "a", "--json"))["entries"] == 400
    assert json.loads(said("index", memory, "--key", "Flat", "--json"))["key"] == "Flat"
    said("relabel", memory, "--id", FIRST_ID, "--label", "b")
    said("forget", memory, "--label", "b", "--erase", "--yes")
    found = json.loads(said("classify", memory, vectors, "--out", tmp_path / "decisions", "--json"))
    assert found["decided"] == 400
    assert said("verify", memory, "--json")
    for arguments, extra in (
        (("add", memory, digits / "remember"), ""),  # a memory of vectors takes no images
        (("add", tmp_path / "photos", digits / "remember"), "embed"),
        (("add", tmp_path / "other", vectors.parent, "--runner", "ray"), "ray"),
        (("serve", memory), "serve"),
        (("submit", "status", memory, "--address", "http://127.0.0.1:1"), "ray"),
        (("status", "s3://bucket/memory"), "s3"),
    ):
        error = said(*arguments, status=1).splitlines()[-1]
        assert error.startswith("error: ")
        if extra:
            assert error.endswith(f"is not installed: pip install 'visual-memory[{extra}]'")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_embed_is_enough_for_images(
    in_environment: Callable[..., Said], digits: Path, weights: str, tmp_path: Path
) -> None:
    said, memory = in_environment("embed"), tmp_path / "memory"
    own = ("--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", IMAGE_SIZE)
    assert json.loads(said("add", memory, digits / "remember", *own, "--json"))["entries"] > 0
    image = next((digits / "ask").rglob("*.png"))
    assert json.loads(said("classify", memory, image, "--json"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_is_enough_for_work_on_a_cluster(
    in_environment: Callable[..., Said], vectors: Path, tmp_path: Path
) -> None:
    said, memory = in_environment("ray"), tmp_path / "memory"
    assert json.loads(said("add", memory, vectors.parent, "--runner", "ray", "--json"))["entries"] == 400
    assert json.loads(said("index", memory, "--key", "Flat", "--runner", "ray", "--json"))["key"] == "Flat"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_serve_is_enough_to_answer(
    in_environment: Callable[..., Said], vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, memory = in_environment("serve"), tmp_path / "memory"
    said("add", memory, vectors.parent, "--label", "a")
    starter = tmp_path / "starter" / "sitecustomize.py"
    starter.parent.mkdir()
    # What the environment lacks is hidden from the server's processes, for Ray starts them with this interpreter.
    starter.write_text(
        "import sys\n"
        "sys.path[:] = [place for place in sys.path if not place.endswith('site-packages')]\n"
        f"sys.path += [{str(tmp_path / 'site-serve')!r}, {str(ROOT)!r}]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(starter.parent))
    with ray_server(str(memory), tmp_path) as server:
        embedding = np.load(vectors)[7].tolist()
        answer = httpx.post(f"{server.url}/v1/classify", json={"embedding": embedding, "k": 3})
        assert answer.json()["label"] == "a"
        assert httpx.post(f"{server.url}/v1/classify", files={"image": b"BM"}).status_code == 422


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_s3_is_enough_for_a_memory_there(in_environment: Callable[..., Said], vectors: Path, s3: SeaweedFS) -> None:
    said, memory = in_environment("s3"), s3.uri()
    assert json.loads(said("add", memory, vectors.parent, "--json"))["entries"] == 400
    assert VisualMemory(memory).status()["entries"] == 400
