"""Memories that somebody altered, used in processes of their own: nothing outside is touched, no answer is wrong."""

import json
import subprocess
import sys

import pytest


def altered(count: int, seed: int, timeout: float) -> dict:
    """What `altered_memories` counted; what went wrong is in the message of the assertion."""
    command = [sys.executable, "-m", "tests.end_to_end.altered_memories", "--count", str(count), "--seed", str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert ended.returncode == 0, (ended.stdout[-4_000:], ended.stderr[-2_000:])
    counted: dict = json.loads(ended.stdout.splitlines()[-1])
    return counted


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_a_few_altered_memories() -> None:
    assert altered(60, 13, 280) == {"altered": 60, "failed": 0}


@pytest.mark.nightly
@pytest.mark.timeout(8 * 3_600)
def test_ten_thousand_altered_memories() -> None:
    assert altered(10_000, 1, 8 * 3_600) == {"altered": 10_000, "failed": 0}
