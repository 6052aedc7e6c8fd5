"""A real S3 server for the tests of one run."""

import os
from collections.abc import Iterator

import pytest

from cluster.seaweed import SeaweedFS, free_ports

__all__ = ["SeaweedFS", "free_ports", "s3"]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The server, and its admin's credentials in the environment from the first test that asks for it."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        for name, value in server.admin.items():
            environment.setenv(name, value)
        yield server
    server.stop()
