"""The tour, whole: it ends well, and what it prints is what it measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_runs_to_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "demo", "--out", str(tmp_path / "tour")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "2,250 entries" in printed
    found = re.findall(r"digits 0 to 8 (\d+\.\d)%, nines (\d+\.\d)%", printed)
    [before, taught, balanced] = [(float(known), float(new)) for known, new in found]
    assert before[0] > 80
    assert before[1] == 0.0
    assert balanced[1] > taught[1] + 10
    assert balanced[0] > before[0] - 5
    assert float(re.search(r"recall@10 (\d\.\d+)", printed)[1]) >= 0.95  # type: ignore[index]
    assert "5 entries forgotten" in printed
    assert "0 of them came back" in printed
    assert "20 of 20 decisions are in every figure those from before the lesson" in printed
    assert str(tmp_path / "tour") in printed
    page = (tmp_path / "tour/pages/nine.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 51
    assert "Traceback" not in done.stderr
    noise = [
        line
        for line in done.stderr.splitlines()
        if not re.match(
            r"(starting|loading|listing) |"
            r"(embedding|noting .*|looking for .*|gathering|choosing|training|populating|tuning): ",
            line,
        )
    ]
    assert not noise, noise
