"""Where a replica cannot start, the server says why in the replica's own words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.seaweed import free_ports
from pipeline import VisualMemory


@pytest.mark.slow  # Serve tries a replica three times
@pytest.mark.timeout(280)
def test_a_replica_that_cannot_start_is_told(digits_memory: VisualMemory, tmp_path: Path) -> None:
    digits_memory.copy(tmp_path / "memory")
    [file] = (tmp_path / "memory" / "segments" / "00000001" / "entries").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    [port] = free_ports(1)
    command = [sys.executable, "-m", "jobs.cli", "serve", str(tmp_path / "memory"), "--port", str(port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=dict(os.environ), check=False)
    assert ended.returncode == 1
    [error] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert f"entries/{file.name}" in error
    assert "has 100 bytes where" in error
    assert "Traceback" not in ended.stderr
