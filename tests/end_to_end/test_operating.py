"""The commands that docs/operating.md shows, run as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline import VisualMemory

ROOT = Path(__file__).parents[2]


def test_the_commands_about_versions(digits_memory: VisualMemory, tmp_path: Path) -> None:
    text = (ROOT / "docs/operating.md").read_text()
    [block] = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "visual-memory history" in block]
    memory = VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "my.memory"))
    memory.forget(labels=["3"])
    outputs = [_run(line.split("#")[0], tmp_path) for line in block.splitlines()]
    assert "forget -> forget 20" in outputs[0]
    assert "the memory is what it was at version 1: 100 entries" in outputs[1]
    assert outputs[2].startswith("would drop 0 versions")
    assert "kept: versions 1 to 3" in outputs[3]
    assert "holds versions 1 to 3" in outputs[4]


def test_the_command_that_erases(digits_memory: VisualMemory, tmp_path: Path) -> None:
    text = (ROOT / "docs/operating.md").read_text()
    [command] = re.findall(r"^visual-memory forget .*--erase[^#\n]*", text, re.MULTILINE)
    shutil.copytree(digits_memory.uri, tmp_path / "my.memory")
    assert "erased 20 entries from every file and every version" in _run(command, tmp_path)
    receipt = (tmp_path / "erased-3.txt").read_text()
    assert re.search("^proven +yes$", receipt, re.MULTILINE)
    assert (tmp_path / "erased-3.json").exists()


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *shlex.split(command)[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
