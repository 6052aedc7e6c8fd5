"""A real S3 server on loopback, for tests and rehearsals: SeaweedFS, for as long as one of them runs."""

import functools
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import botocore.config
import botocore.session

READY_SECONDS = 60
STOP_SECONDS = 30
GRPC = 10_000  # SeaweedFS adds this to each port for its own traffic

ADMIN = ("admin", "the-admin-secret", ["Admin", "Read", "Write", "List", "Tagging"])
READER = ("reader", "the-reader-secret", ["Read", "List"])


class SeaweedFS:
    """One server with a versioned and an unversioned bucket; each `uri` is a new prefix in one of them."""

    def __init__(self, folder: Path) -> None:
        self._ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self.admin, self.reader = self._environment(*ADMIN[:2]), self._environment(*READER[:2])
        self._num_uris = 0
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
            for name, secret, actions in (ADMIN, READER)
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(_weed(), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                    *(f"-{name}.port={port}" for name, port in self._ports.items()),
                    *("-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}"),
                    "-s3.autoCreateBucket=false",  # as on AWS
                    *("-master.volumeSizeLimitMB=256", "-volume.max=50", "-volume.preStopSeconds=1"),
                    "-master.telemetry=false",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt of the tests must not stop it before they end
            )
        try:
            self._wait_until_ready(folder / "log")
            for bucket in ("plain", "versioned"):
                self.client.create_bucket(Bucket=bucket)
            self.client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
        except BaseException:
            self.stop()
            raise

    def uri(self, *, versioned: bool = False) -> str:
        """A URI below which nothing is stored yet."""
        self._num_uris += 1
        return f"s3://{'versioned' if versioned else 'plain'}/run/memory-{self._num_uris}"

    @functools.cached_property
    def client(self) -> Any:
        """The admin's botocore client: it shows what the server holds without the code under test."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ADMIN[0],
            aws_secret_access_key=ADMIN[1],
            config=botocore.config.Config(retries={"mode": "standard", "total_max_attempts": 5}),
        )

    def stop(self) -> None:
        # On SIGTERM it would wait 15 s for its own connections to end; its data is discarded anyway.
        self._process.kill()
        self._process.wait(STOP_SECONDS)
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC}.sock"):
                left.unlink()

    def _environment(self, name: str, secret: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": name,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _wait_until_ready(self, log: Path) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text(errors='replace')[-2_000:]}")


def free_ports(count: int) -> list[int]:
    """Free ports of loopback. Their gRPC ports (see GRPC) are free too."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(11_000, 22_000)  # below the ports that the system gives to outgoing connections
        try:
            for each in (port, port + GRPC):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")  # the package installs it there, whether or not that is on the PATH
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("there is no SeaweedFS here: pip install -e '.[dev]'")
    return found
