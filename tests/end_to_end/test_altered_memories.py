"""Altered memories harm nothing outside, end no process, and answer as before or say that something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NIGHTLY = 10_000
NIGHTLY_SECONDS = 4 * 3_600


def altered(count: int, seconds: int) -> None:
    command = [sys.executable, "-m", "tests.end_to_end.altered_memories", "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds)  # noqa: PLW1510
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-2_000:]
    assert json.loads(lines[-1]) == {"altered": count, "failed": 0}, "\n".join(lines[:20])
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_altered_memories() -> None:
    altered(100, 590)


@pytest.mark.nightly
@pytest.mark.timeout(NIGHTLY_SECONDS)
def test_ten_thousand_altered_memories() -> None:
    altered(NIGHTLY, NIGHTLY_SECONDS - 60)
