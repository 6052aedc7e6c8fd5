"""A memory in an object store, through fsspec: S3, stores with its protocol, or Google Cloud Storage.

A put is atomic and the last one wins. So `create` asks the store to put only if the name is free (If-None-Match on S3).
A probe first checks that the store supports this; else nothing is created. botocore finds credentials, region and
endpoint itself (environment, profile, instance); this module does not handle them.
"""

import contextlib
import itertools
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from botocore.exceptions import ClientError
from s3fs.core import S3_RETRYABLE_ERRORS

from pipeline.errors import StorageError, UsageError, VisualMemoryError
from pipeline.extras import needed_for
from pipeline.store.layout import LEASES, folder_at_the_top
from pipeline.store.storage.beneath import is_inside
from pipeline.store.storage.file_systems import SCHEMES, file_system_of
from pipeline.store.storage.interface import (
    AlreadyExists,
    Storage,
    check_inside,
    check_length,
    missing_file,
    most_bytes,
)
from pipeline.store.storage.local_copies import Copies
from pipeline.store.storage.store_errors import DENIED, UNSUPPORTED, code_of, is_denied, refusal

Answer = TypeVar("Answer")

PROBE = ".probe"

BULK = 1_000  # the most keys in one DeleteObjects request
BEYOND = {"InvalidRange", "416"}  # the error codes for a range that begins at the end of the file or beyond
MAX_RACES = 6  # attempts of a conditional put that S3 answers with a conflict
MAX_FETCHES = 3  # attempts of a download that broke off midway; neither botocore nor s3fs retries it


class _Here:
    """The state of one process: a fork must not use its parent's connections or local copies."""

    def __init__(self, scheme: str) -> None:
        self.files = file_system_of(scheme)
        self.copies = Copies()
        self.probing = threading.Lock()


class ObjectStorage:
    """Storage under a prefix of a bucket. The copies of `local_path` exist as long as this object."""

    def __init__(self, scheme: str, root: str) -> None:
        self.uri = f"{scheme}://{root}"
        self._scheme, self._root = scheme, root
        self._processes: dict[int, _Here] = {}
        self._is_exclusive = False
        self._versioning: bool | None = None
        self._has_bucket = False  # known from any answer about a file in it
        self._lease: tuple[str, bytes] | None = None  # the last lease written: nobody else writes to its key

    @classmethod
    def open(cls, uri: str) -> "ObjectStorage":
        """The storage at a URI, without any request yet. Raises UsageError for a URI that cannot hold a memory."""
        given, _, rest = uri.partition("://")
        scheme = SCHEMES.get(given.lower())
        if scheme is None:
            raise UsageError(f"{uri} cannot hold a memory: give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
        root = "/".join(part for part in rest.split("/") if part)
        if not root or rest.startswith("/"):
            raise UsageError(f"{uri} names no bucket: give {scheme}://BUCKET/FOLDER")
        try:
            with needed_for(f"a memory at {uri}"):
                fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UsageError(f"{uri} needs a package that is not installed: {error}") from error
        return cls(scheme, root)

    def __reduce__(self) -> tuple[type["ObjectStorage"], tuple[str, str]]:
        return ObjectStorage, (self._scheme, self._root)  # another process opens the store again

    def read(self, path: str) -> bytes:
        # One stream is one request. With more, s3fs first requests the size, which doubles the time for small files.
        one_request = {"max_concurrency": 1} if self._scheme == "s3" else {}
        bounds = {"start": 0, "end": most_bytes(path) + 1}
        with self._asking("read", path):
            key = self._key(path)
            try:
                data = self._asked_again(lambda: bytes(self._files.cat_file(key, **bounds, **one_request)))
            except Exception as error:
                if not _is_beyond(error):
                    raise
                return self._asked_again(lambda: bytes(self._files.cat_file(key, **one_request)))  # an empty file
            self._has_bucket = True
            check_length(self.uri, path, len(data))
            return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        one_request = {"max_concurrency": 1} if self._scheme == "s3" else {}
        with self._asking("read", path):
            key = self._key(path)
            try:
                data = self._asked_again(lambda: bytes(self._files.cat_file(key, start=start, end=stop, **one_request)))
            except Exception as error:
                if _is_beyond(error):
                    return b""
                raise
            self._has_bucket = True
            return data

    def create(self, path: str, data: bytes) -> None:
        self._require_exclusive_creation()
        self._create(path, data)
        self._here.copies.drop(path)

    def replace(self, path: str, data: bytes) -> None:
        with self._asking("write to", path):
            self._files.pipe_file(self._key(path), data)
            self._has_bucket = True
            if folder_at_the_top(path) == LEASES:
                self._lease = path, data
            self._replaced(path)

    @contextlib.contextmanager
    def publishing(self, path: str) -> Iterator[Path]:
        with self._asking("write to", path):
            key = self._key(path)
            local = self._here.copies.aside()
            local.touch()
        try:
            yield local
            with self._asking("write to", path):
                self._files.put_file(str(local), key)
                self._replaced(path)
        finally:
            local.unlink(missing_ok=True)

    def copy_from(self, source: Storage, path: str) -> bool:
        if not isinstance(source, ObjectStorage) or source._scheme != self._scheme:
            return False
        ours, theirs = self._key(path), source._key(path)
        with self._asking("write to", path):
            try:
                self._files.cp_file(theirs, ours)  # in pieces if it has more than 5 GB, which S3 copies at once
            except Exception as error:
                if isinstance(error, FileNotFoundError) or is_denied(error) or code_of(error) in UNSUPPORTED:
                    return False
                raise
            self._replaced(path)
        return True

    def local_path(self, path: str) -> Path:
        with self._asking("read", path):
            self._key(path)  # refuses a path that leads out, before any use of it
            return self._here.copies.get(path, lambda local: self._fetch(path, local))

    def release(self, path: str) -> None:
        self._here.copies.drop(path)

    def list(self, folder: str) -> list[str]:
        with self._asking("list", folder):
            try:
                found = self._files.ls(self._key(folder), detail=True)
            except FileNotFoundError as error:
                if code_of(error):  # there is no bucket; an empty folder has no code
                    raise
                return []
        names = {entry["name"].strip("/") for entry in found} - {self._key(folder)}
        names = {name.rpartition("/")[2] for name in names} - (set() if folder else {PROBE})
        return sorted(name for name in names if is_inside(name))

    def walk(self, folder: str = "") -> dict[str, int]:
        with self._asking("list", folder):
            found = self._files.find(self._key(folder), detail=True)
        sizes = {name.lstrip("/")[len(self._root) + 1 :]: int(entry["size"]) for name, entry in found.items()}
        return {path: size for path, size in sizes.items() if _is_file(path)}

    def strangers(self) -> Mapping[str, str]:
        return {}  # a store has only objects

    def exists(self, path: str) -> bool:
        with self._asking("read", path):
            try:
                if self._scheme == "s3":  # one request; s3fs would list the prefix too, to look for a folder
                    self._call("head_object", Key=self._s3_key(path))
                    return True
                return bool(self._files.info(self._key(path))["type"] == "file")
            except FileNotFoundError:
                self._require_bucket()
                return False

    def delete(self, paths: Iterable[str]) -> None:
        rest = iter(paths)
        while chunk := list(itertools.islice(rest, BULK)):
            with self._asking("delete from", chunk[0]):
                if self._scheme != "s3":
                    for path in chunk:
                        with contextlib.suppress(FileNotFoundError):
                            self._files.rm_file(self._key(path))
                elif self._keeps_versions():
                    with ThreadPoolExecutor(min(16, len(chunk))) as pool:  # one request each, mostly waiting
                        self._delete_objects(itertools.chain.from_iterable(pool.map(self._history, chunk)))
                else:
                    self._delete_objects({"Key": self._s3_key(path)} for path in chunk)
            for path in chunk:
                self._here.copies.drop(path)
                if self._lease is not None and self._lease[0] == path:
                    self._lease = None

    def remove_folder(self, folder: str) -> None:
        self.delete(sorted({*self.walk(folder), *self._noncurrent(folder)}))
        self._here.copies.drop(folder.rstrip("/"))

    def abandoned(self) -> Sequence[str]:
        return []  # a put is atomic; the parts of an unfinished upload have no name in the memory

    def noncurrent(self) -> Sequence[str]:
        return self._noncurrent("")

    @property
    def _here(self) -> _Here:
        here = self._processes.get(os.getpid())
        # No lock here: a fork might inherit it locked. If two threads come first, the object of one is dropped unused.
        return here or self._processes.setdefault(os.getpid(), _Here(self._scheme))

    @property
    def _files(self) -> Any:
        return self._here.files

    def _key(self, path: str) -> str:
        """The key of a file or folder. Paths with ".." are refused: a request would change them to another key."""
        path = path.rstrip("/")
        if path:
            check_inside(self.uri, path)
        return f"{self._root}/{path}".rstrip("/")

    def _require_exclusive_creation(self) -> None:
        """Check once for each object that the store refuses to create an existing key. Raises StorageError.

        One request if this object has written a lease, whose key is tried. Otherwise, and if that is not refused, three
        requests for a key of their own.
        """
        with self._here.probing:
            if self._is_exclusive:
                return
            if self._lease is not None:
                try:
                    self._create(*self._lease)
                except AlreadyExists:
                    self._is_exclusive = True
                    return
            path = f"{PROBE}/{secrets.token_hex(8)}"
            try:
                with contextlib.suppress(AlreadyExists):  # by this call, if the first answer was lost
                    self._create(path, b"first")
                try:
                    self._create(path, b"second")
                except AlreadyExists:
                    self._is_exclusive = True
            finally:
                with contextlib.suppress(StorageError):  # some may write but not delete; `walk` and `list` hide it
                    self.delete([path])
        if not self._is_exclusive:
            raise StorageError(
                f"the store at {self.uri} does not hold exclusive creation (If-None-Match), "
                "without which two writers could overwrite each other: keep the memory on another"
            )

    def _create(self, path: str, data: bytes) -> None:
        with self._asking("write to", path):
            for attempt in range(1, MAX_RACES + 1):
                try:
                    self._files.pipe_file(self._key(path), data, mode="create")
                except Exception as error:  # all other errors are raised again
                    if isinstance(error, FileExistsError) or code_of(error) in {"PreconditionFailed", "412"}:
                        raise AlreadyExists(path) from error
                    if code_of(error) not in {"ConditionalRequestConflict", "409"} or attempt == MAX_RACES:
                        raise
                    time.sleep(random.uniform(0, 0.1) * 2**attempt)  # noqa: S311, it only spreads the retries
                else:
                    return

    def _fetch(self, path: str, local: Path) -> None:
        self._asked_again(lambda: self._files.get_file(self._key(path), str(local)))

    @staticmethod
    def _asked_again(ask: Callable[[], Answer]) -> Answer:
        """The result of `ask`, retried if the connection broke off in the middle of an answer.

        aiobotocore (3.10) raises an AttributeError for an error response that arrives as a stream.
        """
        for _ in range(1, MAX_FETCHES):
            with contextlib.suppress(*S3_RETRYABLE_ERRORS, AttributeError):
                return ask()
        return ask()

    def _replaced(self, path: str) -> None:
        """Remove the local copy, and older versions of the key if the bucket has versioning: redaction needs this."""
        self._here.copies.drop(path)
        if self._keeps_versions():
            self._delete_objects(self._history(path, older=True))

    # The following methods are for S3 only: fsspec does not support delete markers, and its bulk deletion does not
    # report failed keys.

    def _s3_key(self, path: str) -> str:
        return str(self._files.split_path(self._key(path))[1])

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return dict(self._files.call_s3(method, Bucket=self._files.split_path(self._root)[0], **arguments))

    def _require_bucket(self) -> None:
        """Check once for each object that there is a bucket: an answer to HEAD has no body that tells its absence."""
        if self._scheme == "s3" and not self._has_bucket:
            try:
                self._call("head_bucket")
            except FileNotFoundError as error:
                absent = {"Error": {"Code": "NoSuchBucket", "Message": str(error)}}
                raise ClientError(absent, "HeadBucket") from error
            except PermissionError:  # to read objects is allowed without a permission for the bucket
                pass
            self._has_bucket = True

    def _keeps_versions(self) -> bool:
        """Whether the bucket may hold older versions of a key; requested once."""
        if self._versioning is None:
            self._versioning = self._scheme == "s3" and self._ask_for_versioning()
        return self._versioning

    def _ask_for_versioning(self) -> bool:
        try:
            return self._call("get_bucket_versioning").get("Status") in {"Enabled", "Suspended"}
        except Exception as error:
            if code_of(error) not in DENIED | UNSUPPORTED:
                raise
            codes = {code_of(error)}
        try:  # a user who may list versions need not know the status: without versioning only current ones are listed
            self._call("list_object_versions", Prefix=self._s3_key(""), MaxKeys=1)
        except Exception as error:
            codes.add(code_of(error))
            if codes <= UNSUPPORTED:
                return False
            if codes <= DENIED | UNSUPPORTED:
                raise StorageError(
                    f"these credentials may not see whether the bucket of {self.uri} keeps older versions, which must "
                    "go with what is erased or replaced: allow them s3:GetBucketVersioning"
                ) from error
            raise
        return True

    def _versions(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Every version and delete marker below a prefix; delete markers have no `Size`."""
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            names = {"KeyMarker": "NextKeyMarker", "VersionIdMarker": "NextVersionIdMarker"}
            start = {marker: page[following] for marker, following in names.items() if page.get(following)}
            page = self._call("list_object_versions", Prefix=prefix, **start)
            yield from page.get("Versions", [])
            yield from page.get("DeleteMarkers", [])

    def _history(self, path: str, *, older: bool = False) -> Sequence[dict[str, str]]:
        """The versions of one key for DeleteObjects, the current one last: so an older one never becomes current."""
        key = self._s3_key(path)
        found = [version for version in self._versions(key) if version["Key"] == key]
        found.sort(key=lambda version: bool(version["IsLatest"]))
        return [{"Key": key, "VersionId": each["VersionId"]} for each in found if not (older and each["IsLatest"])]

    def _delete_objects(self, objects: Iterable[dict[str, str]]) -> None:
        rest = iter(objects)
        while chunk := list(itertools.islice(rest, BULK)):
            answer = self._call("delete_objects", Delete={"Objects": chunk, "Quiet": True})
            for left in answer.get("Errors", []):
                if left.get("Code") not in {"NoSuchKey", "NoSuchVersion"}:
                    raise ClientError({"Error": left}, "DeleteObjects")

    def _noncurrent(self, folder: str) -> Sequence[str]:
        with self._asking("list", folder):
            if not self._keeps_versions():
                return []
            start, prefix = len(f"{self._s3_key('')}/".lstrip("/")), f"{self._s3_key(folder)}/".lstrip("/")
            old = {each["Key"][start:] for each in self._versions(prefix) if not each["IsLatest"] or "Size" not in each}
        return sorted(path for path in old if _is_file(path))

    @contextlib.contextmanager
    def _asking(self, doing: str, path: str) -> Iterator[None]:
        """Turn errors of the store or the network into errors of this library."""
        try:
            yield
        except (VisualMemoryError, AlreadyExists):
            raise
        except Exception as error:  # every file system of fsspec has its own error types
            if isinstance(error, FileNotFoundError) and code_of(error) != "NoSuchBucket" and doing == "read":
                raise missing_file(self.uri, path) from error
            raise refusal(error, self.uri, doing, path) from error


def _is_beyond(error: Exception) -> bool:
    """Whether the store answered that a file ends before the range asked for."""
    return code_of(error) in BEYOND or getattr(error, "code", None) == 416


def _is_file(path: str) -> bool:
    """Whether a key is a file of the memory. Consoles create keys that end in a slash, as folders: these are not files.

    A memory has no keys with an empty name or ".."; such keys are left alone.
    """
    return is_inside(path) and not path.startswith(f"{PROBE}/")
