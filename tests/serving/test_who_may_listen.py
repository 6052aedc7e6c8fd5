"""What a server of one machine opens to others: no port but one kind that Ray leaves no choice of, and no folder."""

import contextlib
import os
import stat
from pathlib import Path

import httpx
import pytest

from jobs.ray_cluster.on_ray import own_folder
from pipeline import VisualMemory
from tests.serving.ray_server import RayServer, ray_server

LISTENS = "0A"  # the state of a socket in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listening(server: RayServer) -> dict[str, set[str]]:
    """The addresses that the processes of a server listen on, in hexadecimal, with the processes' titles."""
    inodes: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if server._descends(int(process.name)):
                title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                inodes |= {os.readlink(fd): title for fd in (process / "fd").iterdir()}
    found: dict[str, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            title = inodes.get(f"socket:[{fields[9]}]")
            if fields[3] == LISTENS and title is not None:
                found.setdefault(fields[1].partition(":")[0], set()).add(title)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_of_one_machine_is_open_to_nobody_else(digits_memory: VisualMemory, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "disabled"}  # which is not to hold here
    with ray_server(digits_memory.uri, tmp_path, environment=environment) as server:
        assert httpx.get(f"{server.url}/healthz", timeout=30).status_code == 200
        found = listening(server)
        beyond = {title for address, titles in found.items() if address not in LOOPBACK for title in titles}
        # Serve's gRPC between replicas, which asks for Ray's token: it has no option for where it listens.
        assert all(title.startswith("ray::ServeReplica:") for title in beyond), beyond
        assert any(title.startswith("ray::ServeReplica:") for address in LOOPBACK for title in found.get(address, ()))
        tokens = {
            line
            for process in server.replicas("ingress")
            for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            if line.startswith(b"RAY_AUTH_")
        }
        assert b"RAY_AUTH_MODE=token" in tokens
        folder = own_folder()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / "ray" / "session_latest").exists()
    assert not (home / ".ray").exists()  # Ray's token is in no file
