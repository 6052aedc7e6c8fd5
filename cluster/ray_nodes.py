"""Ray nodes on loopback addresses of this host, each with its own processes, ports and folder.

Apart from the hardware, they behave like the nodes of a real cluster: they speak TCP, share no object store, and one
can be killed without the other. Everything whose address Ray lets one choose listens within 127.0.0.0/8.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from cluster.seaweed import free_ports

READY_SECONDS = 90
STOP_SECONDS = 20
OBJECT_STORE_BYTES = 200_000_000
MARK = "VISUAL_MEMORY_NODE"  # in the environment of all processes of a node; it identifies those that are left


class RayNode:
    """One node: `ray start --block` and its children. GPUs that it only claims are scheduled like real ones."""

    def __init__(
        self,
        address: str,
        folder: Path,
        token: str,
        num_cpus: int,
        head: "RayHead | None" = None,
        num_gpus: int = 0,
    ) -> None:
        folder.mkdir(parents=True)
        self.address = address
        self.folder = folder
        self._mark = f"{address}-{token[:12]}"
        agent, metrics = free_ports(2)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        environment |= {
            "RAY_AUTH_MODE": "token",  # a head with a token turns this on by itself, a joining node does not
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A job's `python` is looked up there.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            MARK: self._mark,
        }
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"),
                    *(self._role() if head is None else (f"--address={head.gcs}",)),
                    *(f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"),
                    *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}", "--disable-usage-stats"),
                    *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
                    *("--min-worker-port=0", "--max-worker-port=0"),  # any free port
                ],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt of the rehearsal must not stop it half way
            )

    def processes(self) -> set[int]:
        """The pids of the node's running processes: all descendants, and all that carry its mark."""
        parents = _parents()
        found = {self._process.pid}
        grown = True
        while grown:
            children = {pid for pid, parent in parents.items() if parent in found}
            grown = not children <= found
            found |= children
        return {pid for pid in found if pid in parents} | {pid for pid in parents if self._bears_mark(pid)}

    def actors(self, name: str) -> set[int]:
        """The pids of the node's worker processes whose title (set by Ray) contains this name."""
        return {pid for pid in self.processes() if name in _title(pid)}

    def kill(self) -> int:
        """Kill every process of the node at once, like a power cut. Returns how many there were."""
        killed: set[int] = set()
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end and (left := self.processes() - {os.getpid()}):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= left
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
        return len(killed)

    def log(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text(errors="replace")[-2_000:]

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _role(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _bears_mark(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return f"{MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False


class RayHead(RayNode):
    """The node that others join; the job server is at `url`."""

    def __init__(self, address: str, folder: Path, token: str, num_cpus: int, num_gpus: int = 0) -> None:
        port, dashboard, client = free_ports(3)
        self.gcs = f"{address}:{port}"
        self.url = f"http://{address}:{dashboard}"
        self._client_port = client
        self._token = token
        super().__init__(address, folder, token, num_cpus, num_gpus=num_gpus)

    def wait_until_ready(self, *others: RayNode) -> None:
        """Wait until the job server answers and the other nodes have joined."""
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            for node in (self, *others):
                if node.has_ended():
                    raise RuntimeError(f"the Ray node {node.address} did not start:\n{node.log()}")
            if self._answers(f"{self.url}/api/jobs/") and self._alive() >= 1 + len(others):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the Ray cluster was not ready in {READY_SECONDS} s:\n{self.log()}")

    def _role(self) -> tuple[str, ...]:
        host, _, port = self.gcs.partition(":")
        dashboard = self.url.rpartition(":")[2]
        return (
            *("--head", f"--port={port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard}"),
            f"--ray-client-server-port={self._client_port}",
        )

    def _alive(self) -> int:
        return self._answers(f"{self.url}/nodes?view=summary").count('"state": "ALIVE"')

    def _answers(self, url: str) -> str:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""


def _parents() -> dict[int, int]:
    """The pid of the parent of every running process, by pid; without zombies."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(name)] = int(parent)
    return found


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""
