"""What only an object store can do: refuse credentials, keep versions, page, break off, and be fork-unsafe."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import DamagedFile, StorageError
from pipeline.store.storage import file_systems, object_store
from pipeline.store.storage.interface import AlreadyExists, Storage
from pipeline.store.storage.object_store import ObjectStorage
from pipeline.store.storage.open_storage import open_storage
from tests.store.proxy import Judge, behind_proxy
from tests.store.seaweed import SeaweedFS, free_ports


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are made, for this test alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_another_file_system_serves_as_well(monkeypatch: pytest.MonkeyPatch, copies: Path) -> None:
    """What is not S3's own goes through fsspec alone, as for gs://: here through its files in memory."""
    monkeypatch.setitem(object_store.SCHEMES, "memory", "memory")
    storage = open_storage("memory://bucket/memory")
    for path in ("a/one", "a/b/two", "three"):
        storage.create(path, path.encode())
    with pytest.raises(AlreadyExists):
        storage.create("three", b"x")
    assert (storage.list(""), storage.list("a"), storage.list("nowhere")) == (["a", "three"], ["b", "one"], [])
    assert storage.walk() == {"a/one": 5, "a/b/two": 7, "three": 5}
    with storage.publishing("three") as local:
        local.write_bytes(b"3")
    storage.replace("four", b"4")
    assert (storage.read("three"), storage.local_path("four").read_bytes()) == (b"3", b"4")
    with pytest.raises(DamagedFile, match="gone is missing"):
        storage.local_path("gone")
    storage.remove_folder("a")
    storage.delete(["gone", "four"])
    assert storage.walk() == {"three": 1}
    assert storage.noncurrent() == []
    storage.delete(["three"])


def test_the_uri_is_normalised(s3: SeaweedFS) -> None:
    uri = s3.uri()
    storage = open_storage(f"S3A://{uri.removeprefix('s3://').replace('/', '//')}/")
    assert storage.uri == uri
    storage.create("file", b"x")
    assert open_storage(uri).walk() == {"file": 1}


def test_a_probe_is_no_part_of_the_memory(s3: SeaweedFS) -> None:
    uri = s3.uri()
    storage = open_storage(uri)
    storage.create("file", b"x")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    keys = [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    assert keys == [f"{prefix}/file"]
    s3.client.put_object(Bucket=bucket, Key=f"{prefix}/.probe/left-by-a-crash", Body=b"first")
    s3.client.put_object(Bucket=bucket, Key=f"{prefix}/a-folder-in-a-console/", Body=b"")
    assert ".probe" not in storage.list("")
    assert storage.walk() == {"file": 1}


@pytest.mark.parametrize("num_files", [30, pytest.param(1_050, marks=pytest.mark.slow)])
@pytest.mark.parametrize("versioned", [False, True])
def test_listing_goes_on_beyond_a_page(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, versioned: bool, num_files: int
) -> None:
    if num_files < 1_000:  # what the server puts on a page if it is not asked for less
        monkeypatch.setitem(file_systems.S3_OPTIONS, "s3_additional_kwargs", {"MaxKeys": 7})
    uri = s3.uri(versioned=versioned)
    storage = open_storage(uri)
    names = [f"{number:05d}.json" for number in range(num_files)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.create(f"versions/{name}", b"x"), names))
    assert storage.list("versions") == names
    assert len(storage.walk()) == num_files
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for name in names[:20] if versioned else []:
        s3.client.delete_object(Bucket=bucket, Key=f"{prefix}/versions/{name}")
    assert storage.noncurrent() == [f"versions/{name}" for name in names[:20] if versioned]
    storage.remove_folder("versions")
    assert _versions(s3, uri) == []


def test_an_earlier_key_goes_before_a_later_one(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three requests is done and denied, so the third is not sent: what is left is the end."""
    monkeypatch.setattr(object_store, "BULK", 3)
    asked: list[str] = []

    def judge(method: str, path: str, status: int) -> int | None:
        if method == "POST":
            asked.append(path)
            return 403 if len(asked) > 1 else status
        return status

    uri = s3.uri()
    order = [f"versions/{number}.json" for number in range(8)]
    storage = open_storage(uri)
    for path in order:
        storage.replace(path, b"x")
    with behind_proxy(s3, monkeypatch, judge), pytest.raises(StorageError, match="may not delete from"):
        open_storage(uri).delete(order)
    assert sorted(storage.walk()) == order[6:]
    storage.delete(order)
    assert storage.walk() == {}


@pytest.mark.slow
def test_five_thousand_keys_are_listed_soon(s3: SeaweedFS) -> None:
    storage = open_storage(s3.uri())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: storage.replace(f"done/{number:05d}.json", b"x"), range(5_000)))
    start = time.monotonic()
    assert len(storage.list("done")) == 5_000
    assert len(storage.walk()) == 5_000
    assert time.monotonic() - start < 10


def test_every_request_names_the_bucket_that_is_not_there(s3: SeaweedFS) -> None:
    storage = open_storage("s3://no-such-bucket/memory")
    for ask in (storage.exists, storage.read, storage.list, storage.walk, storage.local_path, _published(storage)):
        with pytest.raises(StorageError, match="there is no bucket for s3://no-such-bucket/memory: create it"):
            ask("file")
    for change in (storage.create, storage.replace):
        with pytest.raises(StorageError, match="there is no bucket"):
            change("file", b"x")
    with pytest.raises(StorageError, match="there is no bucket"):
        storage.delete(["file"])


def _published(storage: Storage) -> Callable[[str], None]:
    def publish(path: str) -> None:
        with storage.publishing(path) as local:
            local.write_bytes(b"x")

    return publish


def test_a_bucket_with_an_impossible_name(s3: SeaweedFS) -> None:
    with pytest.raises(StorageError, match="Invalid bucket name"):
        open_storage("s3://No_Bucket!/memory").list("")


def test_large_files_go_in_parts(s3: SeaweedFS, copies: Path) -> None:
    storage = open_storage(s3.uri())
    data = os.urandom(1 << 20) * 101  # s3fs sends more than 100 MiB in parts of 50
    with storage.publishing("index/large") as local:
        local.write_bytes(data)
    assert storage.walk() == {"index/large": len(data)}
    assert storage.local_path("index/large").read_bytes() == data
    assert len(list(copies.rglob("*"))) == 3  # the folder of copies, its owner and the one copy


def test_in_a_versioned_bucket_nothing_stays(s3: SeaweedFS) -> None:
    uri = s3.uri(versioned=True)
    storage, bystander = open_storage(uri), open_storage(s3.uri(versioned=True))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    bystander.create("file", b"theirs")
    storage.create("a", b"x")
    for data in (b"1", b"2", b"3"):  # not through us: an earlier release, or a tool of the bucket's owner
        s3.client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=data)
        s3.client.put_object(Bucket=bucket, Key=f"{prefix}/b", Body=data)
    s3.client.delete_object(Bucket=bucket, Key=f"{prefix}/b")
    storage.create("a-longer", b"x")
    assert storage.noncurrent() == ["a", "b"]
    storage.replace("a", b"4")
    assert storage.noncurrent() == ["b"]
    assert storage.read("a") == b"4"
    storage.delete(["a", "b"])
    assert storage.noncurrent() == []
    assert _versions(s3, uri) == [f"{prefix}/a-longer"]
    s3.client.put_object(Bucket=bucket, Key=f"{prefix}/c/one", Body=b"old")
    s3.client.delete_object(Bucket=bucket, Key=f"{prefix}/c/one")
    storage.create("c/two", b"x")
    storage.remove_folder("c")
    assert _versions(s3, uri) == [f"{prefix}/a-longer"]
    assert bystander.read("file") == b"theirs"


def _versions(s3: SeaweedFS, uri: str) -> list[str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    page = s3.client.list_object_versions(Bucket=bucket, Prefix=f"{prefix}/")
    return [entry["Key"] for kind in ("Versions", "DeleteMarkers") for entry in page.get(kind, [])]


def test_who_may_only_read_reads(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri()
    open_storage(uri).create("a/file", b"x")
    for name, value in s3.reader.items():
        monkeypatch.setenv(name, value)
    storage = open_storage(uri)
    assert storage.read("a/file") == b"x"
    assert storage.local_path("a/file").read_bytes() == b"x"
    assert storage.list("a") == ["file"]
    assert storage.walk() == {"a/file": 1}
    assert storage.exists("a/file")

    for write in (storage.create, storage.replace):
        with pytest.raises(StorageError, match=f"these credentials may not write to {uri}"):
            write("b", b"x")
    with pytest.raises(StorageError, match=f"these credentials may not write to {uri}/b"):
        _published(storage)("b")
    with pytest.raises(StorageError, match="these credentials may not"):
        storage.delete(["a/file"])
    assert storage.walk() == {"a/file": 1}


@pytest.mark.parametrize(("name", "value"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
def test_wrong_credentials_are_told_at_once(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    start = time.monotonic()
    for attempt in (lambda: open_storage(s3.uri()).list(""), lambda: open_storage(s3.uri()).create("file", b"x")):
        with pytest.raises(StorageError, match="refuses these credentials .*: correct or renew them"):
            attempt()
    assert time.monotonic() - start < 5


def test_no_credentials(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="there are no credentials for s3://.*: set AWS_PROFILE"):
        open_storage(s3.uri()).list("")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"nobody.*: set AWS_PROFILE"):
        open_storage(s3.uri()).list("")


def test_nobody_listens_at_the_endpoint(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    start = time.monotonic()
    with pytest.raises(StorageError, match="cannot be reached .*: look at the network and at AWS_ENDPOINT_URL"):
        open_storage(s3.uri()).list("")
    assert time.monotonic() - start < 8


@contextlib.contextmanager
def unanswered_port() -> Iterator[int]:
    """A port that takes no connection and refuses none, like a host behind a firewall."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # fill the queue that nobody takes from
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("connect_timeout", [0.3, pytest.param(None, marks=pytest.mark.slow)])
def test_the_endpoint_does_not_answer(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, connect_timeout: float | None
) -> None:
    if connect_timeout:
        monkeypatch.setitem(file_systems.S3_OPTIONS["config_kwargs"], "connect_timeout", connect_timeout)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    start = time.monotonic()
    with unanswered_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StorageError, match="cannot be reached"):
            open_storage(s3.uri()).read("file")
    assert time.monotonic() - start < (20 if connect_timeout is None else 4)


def test_a_store_that_overwrites_is_refused(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri()
    with behind_proxy(s3, monkeypatch, lambda _method, _path, status: 200 if status == 412 else status):
        storage = open_storage(uri)
        assert storage.list("") == []
        for _ in range(2):
            with pytest.raises(StorageError, match="does not hold exclusive creation"):
                storage.create("versions/1.json", b"x")
        assert storage.walk() == {}
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    assert "Contents" not in s3.client.list_objects_v2(Bucket=bucket, Prefix=prefix)


@pytest.mark.parametrize("cut", ["versions/1.json", ".probe/"])
def test_a_lost_answer_is_asked_for_again(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    lost: list[str] = []

    def judge(method: str, path: str, status: int) -> int | None:
        if method == "PUT" and cut in path and not lost:
            lost.append(path)
            return None
        return status

    with behind_proxy(s3, monkeypatch, judge):
        storage = open_storage(s3.uri())
        with contextlib.suppress(AlreadyExists):  # by ourselves: whoever asked knows its own nonce
            storage.create("versions/1.json", b"mine")
        assert storage.read("versions/1.json") == b"mine"
    assert len(lost) == 1


@pytest.mark.parametrize(("status", "said"), [(409, "write to"), (507, "has room left")])
def test_what_a_store_answers_in_trouble(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    """The proxy lets the put through, so a race that stays undecided (409) is the worst case: it ends, and is told."""
    monkeypatch.setattr(object_store, "MAX_RACES", 2)
    judge: Judge = lambda method, _path, real: status if method == "PUT" else real  # noqa: E731
    with behind_proxy(s3, monkeypatch, judge), pytest.raises(StorageError, match=said):
        open_storage(s3.uri()).create("file", b"x")


def test_an_undecided_race_is_run_again(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 may answer 409 to one of two racers and leave it open who wins: asked again, it says."""
    seen: list[str] = []

    def judge(method: str, path: str, status: int) -> int | None:
        if method == "PUT" and "file" in path and status == 412:
            seen.append(path)
            return 409 if len(seen) == 1 else status
        return status

    uri = s3.uri()
    open_storage(uri).create("file", b"theirs")
    with behind_proxy(s3, monkeypatch, judge), pytest.raises(AlreadyExists):
        open_storage(uri).create("file", b"mine")
    assert len(seen) == 2


def test_copies_are_made_once_and_dropped(s3: SeaweedFS, copies: Path) -> None:
    storage = open_storage(s3.uri())
    for path in ("a/one", "a/two", "b", "c"):
        storage.create(path, path.encode())
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(storage.local_path, ["a/one"] * 8))) == 1
    found = {path: storage.local_path(path) for path in ("a/one", "a/two", "b", "c")}
    assert all(local.read_bytes() == path.encode() for path, local in found.items())
    assert all(copies in local.parents for local in found.values())
    storage.delete(["a/one"])
    assert not found["a/one"].exists()
    with pytest.raises(DamagedFile):
        storage.local_path("a/one")
    storage.remove_folder("a")
    assert not found["a/two"].exists()
    storage.replace("b", b"new")
    assert storage.local_path("b").read_bytes() == b"new"
    with storage.publishing("c") as local:
        local.write_bytes(b"newer")
    assert storage.local_path("c").read_bytes() == b"newer"
    storage.local_path("c").unlink()  # a clean-up of temporary files
    assert storage.local_path("c").read_bytes() == b"newer"
    folder = storage.local_path("c").parent
    del storage
    gc.collect()  # what was raised above may still hold it
    assert not folder.exists()


def test_a_path_leads_out_of_nothing(s3: SeaweedFS, copies: Path) -> None:
    storage = open_storage(s3.uri())
    with pytest.raises((StorageError, DamagedFile)):  # SeaweedFS takes no such key, AWS does
        storage.local_path("a/../../../outside")
    assert [path.name for path in copies.rglob("outside*")] == []


def _child_reads(storage: ObjectStorage, parents_copy: Path, answers: "multiprocessing.Queue[object]") -> None:
    copy = storage.local_path("file")
    answers.put((storage.read("file"), copy.read_bytes(), str(copy), copy != parents_copy))


def test_a_fork_reads_for_itself(s3: SeaweedFS, copies: Path) -> None:
    storage = open_storage(s3.uri())
    storage.create("file", b"x")
    copy = storage.local_path("file")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child_reads, args=(storage, copy, answers))
    child.start()
    data, copied, childs_copy, is_another = answers.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert (data, copied, is_another) == (b"x", b"x", True)
    assert not Path(childs_copy).exists()  # gone with the child
    assert copy.read_bytes() == b"x"  # and it did not take its parent's along
    assert storage.read("file") == b"x"


def test_a_storage_can_be_sent(s3: SeaweedFS) -> None:
    storage = open_storage(s3.uri())
    storage.create("file", b"x")
    assert pickle.loads(pickle.dumps(storage)).read("file") == b"x"


def test_copies_of_a_killed_process_are_removed(s3: SeaweedFS, copies: Path) -> None:
    storage = open_storage(s3.uri())
    storage.create("file", b"x")
    code = (
        "import sys, time; from pipeline.store.storage.open_storage import open_storage;"
        "storage = open_storage(sys.argv[1]);"
        "print(storage.local_path('file'), flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "TMPDIR": str(copies)}
    with subprocess.Popen(
        [sys.executable, "-c", code, storage.uri], env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        assert storage.local_path("file").exists()
        assert left.exists()  # its owner lives
        other.send_signal(signal.SIGKILL)
    assert left.exists()
    assert open_storage(storage.uri).local_path("file").read_bytes() == b"x"
    assert not left.parent.exists()
