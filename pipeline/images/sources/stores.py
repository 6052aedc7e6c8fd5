"""Every file of a source in an object store, or wherever fsspec leads.

S3 is asked for pages of a thousand keys, so that memory does not grow with a folder. Other file systems of fsspec give
a folder at a time, and hold it in memory.
"""

import datetime
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SourceError, StorageError
from pipeline.images.names.leftovers import Exclusion, PassedOver, leftover_of
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import uri_of, uri_of_path
from pipeline.images.reading.files import file_system
from pipeline.images.sources.keys import REQUESTS_AT_ONCE, Key, KeyWalk, Page, Pages, Stretch
from pipeline.images.sources.listing_record import ListingRecord
from pipeline.images.sources.recorded_pages import RecordedPages
from pipeline.images.sources.source_files import SourceFile, Walk
from pipeline.store.storage.store_errors import code_of, explanation


def walk_store(source: str, exclusion: Exclusion, passed: PassedOver, record: ListingRecord | None = None) -> Walk:
    """The files at a URI of fsspec, listed lazily, nearly in the order of their uris. Pages of S3 are recorded.

    Raises SourceError if there is nothing, StorageError if the store cannot be reached.
    """
    files, root = file_system(uri_of(source))  # a user's URI is not percent-encoded
    scheme = source.partition("://")[0].lower()
    root = root.rstrip("/")
    pages: Pages = _FolderPages(files, root, passed)
    if "s3" in files.protocol:
        pages = _S3Pages(files) if record is None else RecordedPages(_S3Pages(files), record)
    choice = _KeyChoice(scheme, len(root) + 1, exclusion, passed)
    stretches = _saying_why(iter(KeyWalk(pages, f"{root}/" if root else "", choice.enters)), source)
    first = next(stretches, None)
    if first is None:
        return _one_key(files, source, scheme, root)
    found = itertools.chain([first], stretches)
    return Walk(f"{scheme}://{uri_of_path(root)}", root.rpartition("/")[2], False, choice.taken(found))


def _one_key(files: Any, source: str, scheme: str, root: str) -> Walk:
    """The source if there are no keys below it: one file, or an empty folder."""
    uri, name = f"{scheme}://{uri_of_path(root)}", root.rpartition("/")[2]
    try:
        about = files.info(root)
    except FileNotFoundError as error:
        raise SourceError(f"there is nothing at {source}: check the URI") from error
    except Exception as error:  # every file system of fsspec has an error tree of its own
        raise StorageError(explanation(error, source, "read", source)) from error
    if about.get("type") != "file":
        return Walk(uri, name, False, iter(()))
    folder = root.rpartition("/")[0].rpartition("/")[2]
    return Walk(uri, folder, True, iter([file_of_key(scheme, root, f"{folder}/{name}", about)]))


@dataclass(frozen=True)
class _KeyChoice:
    """Which keys are files of the source. `start` is where the path below the source begins in a key."""

    scheme: str
    start: int
    exclusion: Exclusion
    passed: PassedOver

    def enters(self, folder: str) -> bool:
        """Whether to list a folder; a leftover is noted."""
        leftover = leftover_of(folder[self.start :].rstrip("/").split("/"))
        if leftover is not None:
            self.passed.note_leftover(leftover)
        return leftover is None

    def taken(self, stretches: Iterator[Stretch]) -> Iterator[SourceFile]:
        """The files; what is passed over is noted."""
        last: dict[int, str] = {}  # the last leftover of a place: the keys below it are adjacent, and counted once
        for place, keys in stretches:
            for key, about in keys:
                below = key[self.start :]
                steps = below.split("/")
                leftover = leftover_of(steps)
                if leftover is not None:
                    there = "/".join(steps[: steps.index(leftover) + 1])
                    is_folder = len(steps) > steps.index(leftover) + 1
                    if there != last.get(place) and (is_folder or kind_of(key) is not None):
                        self.passed.note_leftover(leftover)
                    last[place] = there
                elif self.exclusion.covers(below):
                    self.passed.excluded += 1
                else:
                    yield file_of_key(self.scheme, key, below, about)


def file_of_key(scheme: str, key: str, below: str, about: dict[str, Any]) -> SourceFile:
    """A key with what fsspec says of it, as a file of a source at `below` in it."""
    modified = about.get("LastModified") or about.get("mtime") or about.get("last_modified") or about.get("updated")
    if isinstance(modified, str):
        modified = datetime.datetime.fromisoformat(modified)
    elif isinstance(modified, int | float):
        modified = datetime.datetime.fromtimestamp(modified, datetime.UTC)
    if modified is not None and modified.tzinfo is None:
        modified = modified.replace(tzinfo=datetime.UTC)
    size = about.get("Size", about.get("size"))
    return SourceFile(f"{scheme}://{uri_of_path(key)}", uri_of_path(below), size, modified)


class _S3Pages:
    """Pages of S3, of a thousand keys and folders. s3fs's own `find` would hold every key in memory."""

    can_list_deep = True
    requests_at_once = REQUESTS_AT_ONCE

    def __init__(self, files: Any) -> None:
        self._files = files

    def list_folder(self, prefix: str, token: str | None) -> Page:
        return self._page(prefix, {"ContinuationToken": token} if token else {}, is_deep=False)

    def list_deep(self, prefix: str, token: str | None) -> Page:
        return self._page(prefix, {"ContinuationToken": token} if token else {}, is_deep=True)

    def list_after(self, prefix: str, key: str, *, is_deep: bool) -> Page:
        return self._page(prefix, {"StartAfter": key.partition("/")[2]}, is_deep=is_deep)

    def _page(self, prefix: str, options: dict[str, str], *, is_deep: bool) -> Page:
        bucket, _, below = prefix.partition("/")
        options = options if is_deep else {**options, "Delimiter": "/"}
        page = self._files.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, **options)
        keys: list[Key] = [
            (f"{bucket}/{one['Key']}", {"Size": one.get("Size"), "LastModified": one.get("LastModified")})
            for one in page.get("Contents", [])
            if not one["Key"].endswith("/")  # consoles make such keys for folders
        ]
        folders = [f"{bucket}/{one['Prefix']}" for one in page.get("CommonPrefixes", []) if one["Prefix"] != below]
        following = page.get("NextContinuationToken") if page.get("IsTruncated") else None
        if page.get("IsTruncated") and not following:  # the rest would be lost
            raise OSError(f"the store cuts its list of {prefix} off and does not say where it goes on")
        return Page(keys, folders, following)


class _FolderPages:
    """Whole folders of any file system. Several are listed at once if it is one of asynchronous requests."""

    can_list_deep = False

    def __init__(self, files: Any, root: str, passed: PassedOver) -> None:
        self._files = files
        self._root = root
        self._passed = passed
        self.requests_at_once = REQUESTS_AT_ONCE if getattr(files, "async_impl", False) else 1

    def list_folder(self, prefix: str, token: str | None) -> Page:  # noqa: ARG002, folders have one page
        def note(error: OSError) -> None:  # by default fsspec passes over such folders silently
            if not isinstance(error, FileNotFoundError):
                where = str(error.filename or prefix.rstrip("/") or self._root)
                self._passed.unreadable[where] = error.strerror or str(error)

        keys: list[Key] = []
        folders: list[str] = []
        folder = prefix.rstrip("/")
        for _, below, found in self._files.walk(folder, maxdepth=1, detail=True, on_error=note):
            folders += [f"{about['name'].rstrip('/')}/" for about in below.values()]
            names = [about["name"] for about in found.values()]  # of a file, the one name is its own
            keys += [(name, about) for name, about in zip(names, found.values(), strict=True) if name != folder]
        return Page([key for key in keys if not key[0].endswith("/")], folders, None)

    def list_deep(self, prefix: str, token: str | None) -> Page:
        raise NotImplementedError(f"{prefix} is listed a folder at a time")


def _saying_why(stretches: Iterator[Stretch], source: str) -> Iterator[Stretch]:
    try:
        yield from stretches
    except FileNotFoundError as error:
        if code_of(error) == "NoSuchBucket":
            raise StorageError(explanation(error, source, "list", source)) from error
        return  # there is nothing of this name
    except Exception as error:  # every file system of fsspec has an error tree of its own
        raise StorageError(explanation(error, source, "list", source)) from error
