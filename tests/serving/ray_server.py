"""A server as a user starts it, `visual-memory serve`, in a process of its own with Ray on loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from cluster.seaweed import free_ports

SECONDS_TO_START = 120
SECONDS_TO_STOP = 60


@dataclass
class RayServer:
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]

    def replicas(self, deployment: str) -> list[int]:
        """The process ids of a deployment's replicas, of those that descend from this server only."""
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                title = status.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                pid = int(status.parent.name)
                if title.startswith(f"ray::ServeReplica:visual-memory:{deployment}") and self._descends(pid):
                    found.append(pid)
        return sorted(found)

    def _descends(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
        return False


def _of_a_user() -> dict[str, str]:
    """The environment without what these tests set for their own Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}


@contextlib.contextmanager
def ray_server(
    memory: str, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[RayServer]:
    """Serve a memory until the block ends. What the server says goes to a file in `folder`."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "jobs.cli", "serve", memory, "--port", str(port), *options]
    said = folder / "serve.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            text=True,
            env=_of_a_user() | {**(environment or {})},
            start_new_session=True,
        )
    server = RayServer(f"http://127.0.0.1:{port}", process)
    try:
        until = time.monotonic() + SECONDS_TO_START
        while True:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < until, said.read_text()
            with contextlib.suppress(httpx.TransportError):
                if "serving" in said.read_text() and httpx.get(f"{server.url}/healthz").status_code == 200:
                    break
            time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
