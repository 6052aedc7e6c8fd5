"""Another writer comes first: the client raises what the library raises."""

from pathlib import Path

import pytest

from pipeline import Client, CommitConflict
from pipeline.store.layout import erasure_path
from pipeline.store.storage.leases import Lease
from tests.serving.serving import memory_in_shards, served

TOKEN = "a token of the tests"


def test_a_conflict_is_a_conflict_for_a_client_too(tmp_path: Path) -> None:
    memory = memory_in_shards(tmp_path, 8)
    [entry_id] = memory.live().live_ids()[:1].tolist()
    with served(memory.uri, token=TOKEN) as server, Client(server.url, TOKEN) as client:
        with Lease(memory.log.storage, "erase") as erasing:
            path = erasure_path(erasing.nonce)
            erasing.hold(path)
            memory.log.storage.create(path, b"{}")
            with pytest.raises(CommitConflict, match="is erasing right now") as in_place:
                memory.forget(ids=[entry_id], erase=True)
            with pytest.raises(CommitConflict, match="is erasing right now") as over_http:
                client.forget(ids=[entry_id], erase=True)
        assert over_http.value.reason == in_place.value.reason == "at work"
        refused = server.post("/v1/forget", {"ids": [entry_id + (1 << 45)]}, TOKEN)
        assert (refused.status_code, "reason" in refused.json()) == (422, False)
        assert client.forget(ids=[entry_id])["forgotten"] == 1
