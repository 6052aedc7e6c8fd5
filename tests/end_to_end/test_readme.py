"""The commands README shows for one's own photos, run as they stand there."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline import VisualMemory
from tests.serving.ray_server import ray_server

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def photos(tmp_path: Path, digits: Path) -> Path:
    """A folder in which README's file names exist: digits play the photos, the 1 plays the cat."""
    shutil.copytree(digits / "remember", tmp_path / "photos")
    (tmp_path / "photos/1").rename(tmp_path / "photos/cat")
    shutil.copytree(digits / "ask", tmp_path / "more")
    shutil.copy(next((digits / "ask/0").iterdir()), tmp_path / "new.jpg")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], str]:
    """Run a command in a folder; return what it prints. It runs in this process, which has torch imported already."""

    def run_command(command: str, folder: Path) -> str:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            main(command.split()[1:])
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return run_command


@pytest.mark.timeout(300)
def test_the_commands_for_ones_own_photos(photos: Path, weights: str, run: Callable[[str, Path], str]) -> None:
    [_, block, _] = blocks("sh")
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("visual-memory")]
    assert [command.split()[1] for command in commands] == ["add", "classify", "explain", "add", "forget"]
    # The hub is not reached from everywhere: the first add is given weights that come as a package.
    commands[0] += f" --encoder tf_efficientnet_lite0 --weights {weights} --weights-order positional --image-size 64"
    outputs = [run(command, photos) for command in commands]
    assert "remembered 100 of 100 images" in outputs[0]
    assert outputs[1].startswith("new.jpg: ")
    assert "written as a page: why.html" in outputs[2]
    assert "remembered 50 of 50 images" in outputs[3]
    assert "forgot 20 entries:" in outputs[4]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_for_other_programs(digits_memory: VisualMemory, photos: Path) -> None:
    [*_, block] = blocks("sh")
    [serve, curl] = [line.split("#")[0].strip() for line in block.splitlines()]
    assert serve == "visual-memory serve my.memory"
    with ray_server(digits_memory.uri, photos) as server:
        asked = curl.replace("http://127.0.0.1:8000", server.url).split()
        answer = json.loads(subprocess.run([*asked, "-s"], cwd=photos, capture_output=True, check=True).stdout)
    [decision] = digits_memory.classify([photos / "new.jpg"])
    assert (answer["label"], answer["confidence"]) == (decision.label, decision.confidence)


@pytest.mark.timeout(300)
def test_the_python_lines(photos: Path, weights: str) -> None:
    [code] = blocks("python")
    given = f'encoder="tf_efficientnet_lite0", weights={weights!r}, weights_order="positional", image_size=64'
    assert 'memory.add("photos/")' in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace('memory.add("photos/")', f'memory.add("photos/", {given})')],
        cwd=photos,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    label, confidence, uri = done.stdout.split()
    assert label in {"0", "cat", "2", "3", "4"}
    assert 0 < float(confidence) <= 1
    assert uri.startswith(str(photos))


def test_the_tree_in_readme_is_the_tree() -> None:
    """It names every file and folder of the first floor, every folder below, and nothing that is not there."""
    [tree] = re.findall(r"```\n(pipeline/.*?)```", README, re.DOTALL)
    root, named, above = Path(__file__).parents[2], set(), [Path()]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth + 1 :] = [above[depth] / line.split()[0]]
        named.add(above[depth + 1])
    assert [str(path) for path in named if not (root / path).exists()] == []
    library = root / "pipeline"
    folders = {path for path in library.rglob("*") if path.is_dir()}
    files = {path for path in library.iterdir() if path.is_file() and path.name not in ("__init__.py", "py.typed")}
    there = {path.relative_to(root) for path in folders | files if "__pycache__" not in path.parts}
    assert there <= named
