"""Pictures are made of what an add has read, or of what lies below a named folder, and of nothing else: not slowly."""

import hashlib
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.images import entry_pictures
from pipeline.images.containers import tar_links
from pipeline.images.containers.tars import read_tar
from pipeline.images.decoding.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.entry_pictures import picture_of, read_image, roots_of
from pipeline.images.names.uris import uri_of_path
from pipeline.images.reading import bounded, files
from pipeline.images.reading.bounded import Bound, BoundedFile
from pipeline.images.reading.files import open_file, read_file
from pipeline.store.lookup.originals import Original, is_below
from tests.images.archives import tar_of
from tests.images.pictures import bomb, encoded, gradient
from tests.store.seaweed import SeaweedFS

PIXELS = 100
SECONDS = 20  # far more than anything here takes that ends, and what hangs takes more


def original(place: Path | str, data: bytes, **options: object) -> Original:
    return Original(str(place), hashlib.sha256(data).hexdigest(), **{"read_from": "file", **options})


def refused(of: Original, **options: object) -> str:
    """Why there is no picture, which is found out soon."""
    began = time.monotonic()
    with pytest.raises(Rejected) as error:
        picture_of(of, PIXELS, bound=Bound(1 << 20, SECONDS), **options)
    assert time.monotonic() - began < SECONDS
    return error.value.reason


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, bytes]:
    path, data = tmp_path / "photos" / "a.png", encoded(gradient(300, 200), "PNG")
    path.parent.mkdir()
    path.write_bytes(data)
    return path, data


def test_a_file_that_an_add_read_is_shown_small(photo: tuple[Path, bytes]) -> None:
    path, data = photo
    shown = Image.open(io.BytesIO(picture_of(original(path, data), PIXELS)))
    assert (shown.format, shown.size) == ("JPEG", (100, 67))


def test_a_large_jpeg_is_decoded_as_small_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(2_000, 1_600), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    sizes = []

    def decoded(data: bytes, shortest: int | None = None) -> object:
        sizes.append(decode(data, shortest).image.size)
        return decode(data, shortest)

    decode = entry_pictures.decode
    monkeypatch.setattr(entry_pictures, "decode", decoded)
    picture_of(original(tmp_path / "a.jpg", data), PIXELS)
    assert sizes == [(250, 200)]


# What is no file, or not one any more


def special(kind: str, place: Path) -> Iterator[None]:
    """Something at a path that is no regular file, or none that ends."""
    listener = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        listener.bind(str(place)[-90:] if len(str(place)) < 100 else str(place))
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(kind)
    yield
    listener.close()


@pytest.mark.parametrize(
    "kind",
    ["pipe", "folder", "socket", "/dev/zero", "/dev/ptmx", "/dev/random", "/dev/stdin", "/dev/tty", "/proc/self/mem",
     "/proc/self/environ", "/proc/self/pagemap", "/proc/self/root/dev/zero",
     "/proc/self/fd/0", "/nowhere", "a.png"],
)  # fmt: skip
def test_a_file_that_became_something_else_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    place = Path(tmp_path) / "a.png"
    if kind == "socket":
        place = Path("/tmp") / f"visual-memory-{os.getpid()}.png"  # a socket's path is short
    made = special(kind, place)
    next(made)
    try:
        told = refused(original(place, b"whatever it was"))
        assert told
        with pytest.raises(Rejected):
            read_image(f"{place}#row=1", Bound(1 << 20, SECONDS))
        if not kind.startswith("/proc/self"):  # nor does an add wait for what it planned
            with pytest.raises(Rejected):
                read_file(str(place))
            with pytest.raises(Rejected):
                open_file(str(place)).close()
    finally:
        list(made)
        if kind == "socket":
            place.unlink()


def test_a_pipe_that_comes_between_the_look_and_the_opening_is_not_waited_for(
    photo: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = photo
    looked = os.stat

    def exchanged(place: str) -> os.stat_result:
        found = looked(place)
        path.unlink()
        os.mkfifo(path)
        monkeypatch.setattr(files.os, "stat", looked)
        return found

    monkeypatch.setattr(files.os, "stat", exchanged)
    assert "no file" in refused(original(path, data))


def test_a_pipe_that_a_user_names_is_read_and_no_further_than_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `classify MEMORY <(curl …)`."""
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1 << 20)
    for size, taken in ((1_000_000, True), (3 << 20, False)):
        place = tmp_path / f"{size}"
        os.mkfifo(place)

        def fill(place: Path = place, size: int = size) -> None:
            with open(place, "wb") as stream:
                try:
                    stream.write(bytes(size))
                except BrokenPipeError:
                    return

        writing = threading.Thread(target=fill)
        writing.start()
        if taken:
            assert read_file(str(place), pipes=True) == bytes(size)
        else:
            with pytest.raises(Rejected, match="larger than"):
                read_file(str(place), pipes=True)
        writing.join(SECONDS)


def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a.png"
    with open(place, "wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(Rejected, match="larger than 512 MiB"):
        read_file(str(place))
    of = original(place, b"")
    with pytest.raises(Rejected, match="larger than 64 MiB.*--thumbnails"):
        picture_of(of, PIXELS)
    with pytest.raises(Rejected, match="larger than 64 MiB"):
        picture_of(
            replace(of, uri=f"{place}#a", read_from="tar", offset=0, num_bytes=bounded.PICTURE_BYTES + 1), PIXELS
        )


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_not_shown(
    photo: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = photo
    monkeypatch.setattr(bounded, "LOCAL_CHUNK", 64)
    pread = os.pread

    def shrinking(descriptor: int, size: int, at: int) -> bytes:
        os.truncate(path, 100)
        return pread(descriptor, size, at)

    monkeypatch.setattr(bounded.os, "pread", shrinking)
    assert "shorter" in refused(original(path, data))


def test_the_hash_is_compared_before_anything_is_decoded(
    photo: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = photo
    for name in ("decode", "dimensions"):
        monkeypatch.setattr(entry_pictures, name, lambda *_: pytest.fail("it was decoded"))
    path.write_bytes(encoded(gradient(300, 201), "PNG"))
    assert refused(original(path, data)) == "its file is not the one that was remembered"
    assert "not the one" in refused(original(path, data, offset=0, num_bytes=path.stat().st_size + 1))
    assert "not the one" in refused(original(path, data, offset=-1, num_bytes=10))
    assert "not the one" in refused(original(path, data, offset=0, num_bytes=0))


def test_more_pixels_than_a_question_may_have_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_pictures, "decode", lambda *_: pytest.fail("it was decoded"))
    for side in (7_072, 13_000):
        data = bomb(side)
        (tmp_path / "a.png").write_bytes(data)
        assert "too many to be shown" in refused(original(tmp_path / "a.png", data))


def test_reading_ends_when_nobody_waits_or_the_time_is_over(photo: tuple[Path, bytes]) -> None:
    path, data = photo
    bound = Bound(1 << 20, 60)
    bound.give_up()
    with pytest.raises(Rejected, match="nobody waits"):
        picture_of(original(path, data), PIXELS, bound=bound)
    with pytest.raises(Rejected, match="not read within"):
        picture_of(original(path, data), PIXELS, bound=Bound(1 << 20, 0))


# Where a uri leads that no add has read


NAMED = "named"


@pytest.mark.parametrize(
    "uri",
    ["http://127.0.0.1:1/a.png", "https://127.0.0.1:1/a.png", "HTTP://127.0.0.1:1/a.png", "ftp://127.0.0.1/a.png",
     "gs://bucket/a.png", "s3://bucket/a.png", "S3://bucket/a.png", "memory://a.png", "zip://a.png::/tmp/b.zip",
     "simplecache::s3://bucket/a.png", "filecache::http://127.0.0.1:1/a.png", "a.png", "", "#", "/", "//", "file://",
     "s3://bucket/a.tar::http://127.0.0.1:1/x#a.png", "blockcache::file:///etc/passwd", "reference://", "local://x",
     "data:image/png;base64,AAAA", "\0", "/\0", "/%00", "/" + "x" * 5_000, "github://a:b@/c", "jar:file:///x!/y"],
)  # fmt: skip
def test_a_uri_that_is_only_named_is_asked_of_nobody(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: pytest.fail("a file system was made"))
    assert refused(Original(uri, "0" * 64))
    assert refused(Original(uri, "0" * 64), roots=("/tmp", "s3://other/folder"))
    if not uri.lower().startswith(("s3://", "gs://")):  # nor where the memory says that an add read it there
        assert refused(Original(uri, "0" * 64, "file"))


def named(path: Path | str, data: bytes) -> Original:
    return original(path, data, read_from=NAMED)


def test_a_file_that_is_only_named_is_read_below_a_root_alone(photo: tuple[Path, bytes], tmp_path: Path) -> None:
    path, data = photo
    assert "was not read from its uri" in refused(named(path, data))
    outside = tmp_path / "outside.png"
    outside.write_bytes(data)
    beside = tmp_path / "photos-of-others"
    beside.mkdir()
    (beside / "a.png").write_bytes(data)
    (path.parent / "link.png").symlink_to(outside)
    (path.parent / "up").symlink_to(tmp_path)
    (path.parent / "inside.png").symlink_to(path)
    roots = roots_of([str(path.parent)])
    for shown in (path, path.parent / "inside.png"):
        assert picture_of(named(shown, data), PIXELS, roots=roots)
    place = str(path.parent)
    for uri in (
        outside, beside / "a.png", f"{place}/../outside.png", f"{place}/%2e%2e/outside.png",
        f"{place}/x/../../outside.png", f"{place}/..%2foutside.png", f"{place}%2F..%2Foutside.png", f"{place}/link.png",
        f"{place}/up/outside.png",
        f"file://{outside}", f"file://{path}", f"{place}/a.png/", f"//{outside}", place,
    ):  # fmt: skip
        assert refused(named(str(uri), data), roots=roots)


def test_a_member_below_a_root_is_no_way_out_of_it(photo: tuple[Path, bytes]) -> None:
    path, data = photo
    archive = path.parent / "x.tar"
    secret = b"root:x:0:0"
    archive.write_bytes(tar_of([("../../etc/passwd", secret), ("a.png", data)]))
    roots = roots_of([str(path.parent)])
    assert picture_of(named(f"{archive}#a.png", data), PIXELS, roots=roots)
    passwd = Path("/etc/passwd").read_bytes()
    for member in ("../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "/etc/passwd"):
        assert refused(named(f"{archive}#{member}", passwd), roots=roots)
        assert refused(named(f"{archive}#{member}", secret), roots=roots)  # it is what it is: no picture


@pytest.mark.parametrize("root", ["http://x/y", "memory://x", "/nowhere", "a::b"])
def test_a_root_is_a_folder_or_a_place_in_a_store(root: str) -> None:
    with pytest.raises(UsageError, match="`pictures`"):
        roots_of([root])


def test_below_is_below(tmp_path: Path) -> None:
    assert is_below("/a/b.png", "/a")
    assert is_below("/a/b.png", "/a/")
    assert is_below("/b.png", "/")
    assert is_below("/a.png", "/a.png")
    assert is_below("/a.tar#b", "/a.tar")
    assert is_below("s3://a/b/c", "s3://a/b")
    for uri in ("/ab/c", "/a/../b", "/a/%2E%2e/b", "/a/x%2F..%2F../b", "s3://ab/c", "/a#b", "a/b"):
        assert not is_below(uri, "/a/x" if uri == "/a#b" else "/a")


# Archives


def members(count: int = 200) -> dict[str, bytes]:
    found = {}
    for number in range(count):
        found[f"x/{number:04}.png"] = encoded(gradient(20 + number % 7, 20), "PNG")
        found[f"x/{number:04}.cls"] = b"cat"
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_spans_are_where_the_bytes_of_members_lie(tmp_path: Path, form: int) -> None:
    found = members(20) | {f"{'long/' * 30}{'y' * 90}.png": b"long", "ü.png": b"u"}
    if form == tarfile.USTAR_FORMAT:
        del found[f"{'long/' * 30}{'y' * 90}.png"]
    data = tar_of(found, format=form)
    for whole in (data, tar_of(found, "w:gz", format=form), tar_of(found, "w:xz", format=form)):
        items = list(read_tar(io.BytesIO(whole), "/a.tar"))
        assert len(items) > 20
        for item in items:
            assert isinstance(item.content, bytes)
            if whole is data:
                offset, size = item.span or (0, 0)
                assert whole[offset : offset + size] == item.content
            else:
                assert item.span is None


def test_a_hard_link_has_the_span_of_what_it_links_to() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, target in (("early.png", "a.png"), ("a.png", None), ("late.png", "early.png")):
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = tarfile.LNKTYPE, target
                archive.addfile(info)
            else:
                info.size = 4
                archive.addfile(info, io.BytesIO(b"data"))
    items = {item.uri: item for item in read_tar(io.BytesIO(stream.getvalue()), "/a.tar")}
    assert {item.content for item in items.values()} == {b"data"}
    assert len({item.span for item in items.values()}) == 1
    assert items["/a.tar#late.png"].span is not None


def test_an_archive_without_offsets_is_searched_by_its_headers_alone(tmp_path: Path) -> None:
    found = {f"{number}.png": bytes([number % 256]) * 200_000 for number in range(200)}
    (tmp_path / "a.tar").write_bytes(tar_of(found))
    bound = Bound(10 << 20, SECONDS)
    assert read_image(f"{tmp_path}/a.tar#150.png", bound) == found["150.png"]
    assert bound.read < 400_000
    with pytest.raises(Rejected, match="no such member"):
        read_image(f"{tmp_path}/a.tar#no.png")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_without_offsets_is_searched_whatever_its_compression(tmp_path: Path, mode: str) -> None:
    found = members(30) | {"a%23#b.png": b"odd"}
    place = tmp_path / "a.tar"
    place.write_bytes(tar_of(found, mode))
    for name in ("x/0000.png", "x/0029.png", "a%23#b.png"):
        assert read_image(f"{place}#{uri_of_path(name)}") == found[name]


def test_an_archive_without_offsets_that_is_long_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.tar"
    place.write_bytes(tar_of(members()))
    monkeypatch.setattr(tar_links, "MEMBERS_PASSED", 100)
    assert read_image(f"{place}#x/0049.png")
    with pytest.raises(Rejected, match="without offsets.*--thumbnails"):
        read_image(f"{place}#x/0051.png")
    place.write_bytes(tar_of({"a.png": bytes(5_000_000), "b.png": b"b"}, "w:gz"))
    monkeypatch.setattr(tar_links, "UNPACKED_BYTES", 4_000_000)
    with pytest.raises(Rejected, match="without offsets"):
        read_image(f"{place}#c.png")


def test_links_that_lead_round_come_to_an_end(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, target in (("a.png", "b.png"), ("b.png", "a.png"), ("c.png", "c.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    for name in ("a.png", "c.png"):
        with pytest.raises(Rejected, match="no such member"):
            read_image(f"{tmp_path}/a.tar#{name}")


def test_an_archive_that_is_altered_ends_in_a_reject_or_in_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    for mode in ("w", "w:gz"):
        whole = tar_of(members(5), mode)
        for _ in range(200):
            data = bytearray(whole)
            for _ in range(int(generator.integers(1, 8))):
                data[int(generator.integers(len(data)))] = int(generator.integers(256))
            (tmp_path / "a.tar").write_bytes(data)
            try:
                assert isinstance(read_image(f"{tmp_path}/a.tar#x/0004.png", Bound(1 << 20, SECONDS)), bytes)
            except Rejected:
                continue


# Stores


@pytest.fixture
def bucket(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3.admin.items():
        monkeypatch.setenv(name, value)
    files._file_system.cache_clear()
    yield s3.uri()
    files._file_system.cache_clear()


def test_of_a_store_the_ranges_that_are_needed_are_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = fsspec.filesystem("s3", skip_instance_cache=True)
    data = encoded(gradient(300, 200), "PNG")
    noise = np.random.default_rng(0).bytes(3_000_000)
    archive = tar_of({"a.png": noise, "b.png": data, "c.png": noise})
    there.pipe_file(f"{bucket}/a.tar", archive)
    there.pipe_file(f"{bucket}/a.png", data)
    there.pipe_file(f"{bucket}/large.png", noise)
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [noise, data]}), table, write_batch_size=1, data_page_size=100_000)
    there.pipe_file(f"{bucket}/a.parquet", table.getvalue())
    for of in (
        original(f"{bucket}/a.tar#b.png", data, read_from="tar", offset=archive.index(data), num_bytes=len(data)),
        original(f"{bucket}/a.png", data),
        original(f"{bucket}/a.parquet#row=1", data, read_from="parquet"),
    ):
        bound = Bound(1 << 20, SECONDS)
        assert picture_of(of, PIXELS, bound=bound)
        assert bound.read < 200_000
    assert "fetched whole" in refused(original(f"{bucket}/a.tar#b.png", data, read_from="tar"))
    assert "no such file" in refused(original(f"{bucket}/gone.png", data))
    assert "MiB would have to be read" in refused(original(f"{bucket}/large.png", noise))
    assert "was not read" in refused(named(f"{bucket}/a.png", data))
    assert picture_of(named(f"{bucket}/a.png", data), PIXELS, roots=roots_of([bucket]))
    assert "was not read" in refused(named(f"{bucket}/a.png", data), roots=roots_of([f"{bucket}/a"]))


def test_a_store_that_does_not_answer_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}"),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
        ):
            monkeypatch.setenv(name, value)
        files._file_system.cache_clear()
        began = time.monotonic()
        with pytest.raises(Rejected, match="not read within 2 s"):
            picture_of(original("s3://bucket/a.png", b"x"), PIXELS, bound=Bound(1 << 20, 2))
        bound = Bound(1 << 20, 60)
        threading.Timer(1, bound.give_up).start()
        with pytest.raises(Rejected, match="nobody waits"):
            picture_of(original("s3://bucket/a.png", b"x"), PIXELS, bound=bound)
        assert time.monotonic() - began < SECONDS
    files._file_system.cache_clear()


def test_a_bounded_file_is_a_stream_like_any_other(photo: tuple[Path, bytes]) -> None:
    path, data = photo
    with BoundedFile(str(path), Bound(1 << 20, SECONDS)) as file:
        stream = io.BufferedReader(file, 512)
        assert stream.read(100) == data[:100]
        assert stream.seek(-10, io.SEEK_END) == len(data) - 10
        assert stream.read() == data[-10:]
        assert stream.read() == b""
        stream.seek(len(data) + 100)
        assert stream.read(5) == b""
        stream.detach()
    with pytest.raises(Rejected, match="empty"), BoundedFile("/proc/self/status", Bound(1 << 20, 1)) as file:
        file.span()
