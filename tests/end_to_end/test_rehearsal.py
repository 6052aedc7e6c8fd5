"""The rehearsal of a cluster: a job that is left, attached to again, and loses an actor and a node."""

import io
import shutil
import tempfile
from pathlib import Path

import pytest

from cluster.rehearse import Account, rehearse, running_cluster


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_add_outlives_its_follower_an_actor_and_a_node() -> None:
    account = Account(io.StringIO())
    folder = Path(tempfile.mkdtemp(prefix="vm-"))  # pytest's own are too long for the sockets that Ray puts there
    try:
        with running_cluster(folder) as cluster:
            rehearse(cluster, account)
            nodes = (cluster.head, cluster.second)
        assert [node.processes() for node in nodes] == [set(), set()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told = account.out.getvalue()  # type: ignore[attr-defined]
    assert account.failed == [], told
    assert told.count("holds: ") == 8, told
