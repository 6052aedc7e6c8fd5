"""Version files: JSON as it was while they are short, compressed when they are long, and altered ones are found."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from pipeline import VisualMemory
from pipeline.errors import DamagedFile, FormatError
from pipeline.store.layout import checkpoint_path, commit_path
from pipeline.store.log import documents, sealed
from tests.conftest import add_vectors
from tests.edits.given import add_given, vectors


def memory_of(path: Path) -> VisualMemory:
    """A memory of nine versions, with a checkpoint and single adds."""
    memory = VisualMemory(path)
    add_vectors(memory.log, vectors(300), [f"l{row % 3}" for row in range(300)])
    for number in range(4):
        add_given(memory.log, vectors(2, seed=number), ["single", None], name=f"single {number}")
    ids = memory.live().live_ids()
    memory.forget(ids=ids[:9].tolist())
    memory.relabel(ids=ids[20:30].tolist(), label="new")
    memory.rollback(6)
    memory.compact()
    memory.log.rewrite_checkpoint(memory.state())
    return memory


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisualMemory:
    monkeypatch.setattr(sealed, "PACKED_FROM", 0)
    return memory_of(tmp_path / "packed")


def files_of(memory: VisualMemory) -> list[Path]:
    return sorted((Path(memory.uri) / "versions").glob("*.json"))


def test_short_ones_are_plain(tmp_path: Path) -> None:
    memory = memory_of(tmp_path / "plain")
    for path in files_of(memory):
        document = json.loads(path.read_bytes())
        assert "zstd" not in document
        assert "num_bytes" not in document
        assert {"actions", "state", "commits"} & document.keys()
        assert sealed.plain_text(path.read_bytes()) == path.read_bytes()


def test_long_ones_say_the_same_in_less(packed: VisualMemory, tmp_path: Path) -> None:
    for path in files_of(packed):
        data = path.read_bytes()
        document = json.loads(data)
        assert document.keys() - {"nonce"} == {"format", "num_bytes", "zstd", "sha256"}
        assert document["format"] == documents.FORMAT
        written = json.loads(sealed.plain_text(data))
        assert written.get("nonce") == document.get("nonce")
    again = VisualMemory(packed.uri)
    assert again.state() == packed.state()
    assert [commit.command for commit in again.history()] == [commit.command for commit in packed.history()]
    assert len(VisualMemory(packed.uri, at=6).live()) == 299
    assert again.verify().findings == ()
    packed.copy(tmp_path / "copy")
    assert VisualMemory(tmp_path / "copy").state() == packed.state()
    assert VisualMemory(tmp_path / "copy").verify().findings == ()
    again.expire(1)
    assert VisualMemory(packed.uri).state() == packed.state()


def test_a_real_state_takes_a_third() -> None:
    """A memory's own records, with hashes that cannot be compressed."""
    from pipeline.store.log.records import Segment
    from pipeline.store.log.state import State
    from pipeline.store.storage.file_refs import RowsFile
    from pipeline.store.tables.ids import part_ids

    def file(part: int) -> RowsFile:
        name = hashlib.sha256(b"%d" % part).hexdigest()
        ids = part_ids(1, part, 16_384)
        path = f"segments/00000001/entries/{part:06d}-{name[:12]}.parquet"
        ends = {"first_id": int(ids[0]), "last_id": int(ids[-1])}
        return RowsFile(path=path, rows=16_384, num_bytes=14_000_000 + part * 7_919 % 99_991, sha256=name, **ends)

    said = {"source": "s", "dataset": "d", "identity": "i", "fingerprint": "f", "plan": None, "rejected": ()}
    counts = {"planned": 10**9, "num_entries": 10**9, "num_rejected": 0}
    segment = Segment(number=1, entries=tuple(map(file, range(2_000))), **said, **counts)
    state = State(version=1, segments=(segment,))
    checkpoint = documents.Checkpoint(state=state)
    data = documents.sealed_checkpoint(state)
    assert len(data) < 80 * 2_000
    assert len(data) < 0.36 * len(checkpoint.model_dump_json())
    assert documents.Checkpoint.model_validate_json(sealed.plain_text(data)) == checkpoint


def test_what_was_altered_is_found(packed: VisualMemory) -> None:
    path = Path(packed.uri) / commit_path(3)
    whole = path.read_bytes()
    document = json.loads(whole)
    packed_text = document["zstd"]

    def with_fields(**fields: object) -> bytes:
        body = json.dumps({**document, **fields}).encode()
        body = json.dumps({k: v for k, v in json.loads(body).items() if k != "sha256"}).encode()[:-1]
        return body + sealed.seal(body)

    assert sealed.unsealed(with_fields(), sealed.Written(**document))  # sealed as it is, it is whole
    damaged = [
        whole.replace(packed_text[40:50].encode(), b"AAAAAAAAAA"),
        whole[: len(whole) // 2],
        with_fields(zstd=packed_text[: len(packed_text) // 2 // 4 * 4]),
        with_fields(zstd="not base64"),
        with_fields(zstd=base64.b64encode(b"no frame").decode()),
        with_fields(num_bytes=document["num_bytes"] - 1),
        with_fields(num_bytes=document["num_bytes"] + 1),
        with_fields(num_bytes=sealed.MOST_BYTES + 1),
    ]
    for data in damaged:
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match="is not a whole version file"):
            VisualMemory(packed.uri, at=4).status()
    path.write_bytes(with_fields(format=9))
    with pytest.raises(FormatError, match="is in format 9"):
        VisualMemory(packed.uri, at=4).status()


def test_an_erasure_reaches_long_ones(packed: VisualMemory) -> None:
    [doomed] = packed.live().live_ids()[-1:].tolist()
    uri = "/single 3/1.png"
    holds = [path for path in files_of(packed) if uri.encode() in sealed.plain_text(path.read_bytes())]
    assert holds
    assert not [path for path in holds if uri.encode() in path.read_bytes()]
    report = packed.forget(ids=[doomed], erase=True, verify=True)
    assert report.receipt is not None
    assert report.receipt.proven
    assert not [path for path in files_of(packed) if uri.encode() in sealed.plain_text(path.read_bytes())]
    assert VisualMemory(packed.uri).verify().findings == ()


def test_a_proof_reads_long_ones(packed: VisualMemory) -> None:
    """What an older version still has of an entry is found, in a commit that is compressed."""
    assert packed.log.storage.exists(checkpoint_path(packed.state().version))
    report = packed.forget(ids=packed.live().live_ids()[-1:].tolist(), verify=True)
    assert report.receipt is not None
    found = {trace.path for trace in report.receipt.found}
    assert commit_path(5) in found
