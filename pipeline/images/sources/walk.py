"""Every file of a source, in the order of the uris: on this machine, in an object store, or anywhere fsspec reaches.

A folder that cannot be listed is noted, and the walk goes on; only for the source itself it ends. Leftovers, hidden
files and what the user excludes are noted and passed over.
"""

import datetime
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import SourceError, StorageError
from pipeline.images.decoding.decode import Rejected
from pipeline.images.names.leftovers import Exclusion, PassedOver, leftover_of
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import path_of_uri, uri_of, uri_of_path
from pipeline.images.reading.files import file_system, is_remote, retrying
from pipeline.store.storage.open_storage import refuse_secrets
from pipeline.store.storage.store_errors import code_of, explanation


class SourceFile(NamedTuple):
    """A file of a source; `below` is its uri relative to the source."""

    uri: str
    below: str
    num_bytes: int | None
    modified: datetime.datetime | None


@dataclass(frozen=True)
class Walk:
    """The files of a source at a uri. `name` is the name of its folder, `is_file` whether it is a single file."""

    uri: str
    name: str
    is_file: bool
    files: Iterator[SourceFile]


def walk_source(source: str, exclusion: Exclusion, passed: PassedOver) -> Walk:
    """The files of a source, listed lazily. What is passed over is noted in `passed`.

    Raises SourceError for a source that is missing or unreadable, UsageError for one with a secret in its uri, and
    StorageError if its store cannot be reached.
    """
    refuse_secrets(source)
    if re.match(r"https?://", source, re.IGNORECASE):
        raise SourceError(f"{source} is on the web, where nothing can be listed: fetch it, and add the folder or file")
    return _remote(source, exclusion, passed) if is_remote(source) else _local(source, exclusion, passed)


def one_file(uri: str) -> SourceFile | None:
    """A file that lies outside of the source; None if it does not exist."""
    if not is_remote(uri):
        path = path_of_uri(uri)
        return _source_file(path, path) if os.path.isfile(path) else None
    files, path = file_system(uri)
    try:
        return _key(uri.partition("://")[0], path, path, retrying(lambda: files.info(path), uri))
    except Rejected:
        return None


# On this machine


def _local(source: str, exclusion: Exclusion, passed: PassedOver) -> Walk:
    root = os.path.abspath(os.path.expanduser(source.removeprefix("file://")))
    try:
        is_file = os.path.isfile(root)
        os.stat(root)
    except FileNotFoundError as error:
        raise SourceError(f"there is no source at {root}: check the path") from error
    except OSError as error:
        raise SourceError(f"{root} cannot be read ({error.strerror}): check the path, and the rights to it") from error
    if is_file:
        folder = os.path.basename(os.path.dirname(root))
        file = _source_file(root, f"{folder}/{os.path.basename(root)}" if folder else os.path.basename(root))
        return Walk(uri_of_path(root), folder, True, iter([file]))
    return Walk(uri_of_path(root), os.path.basename(root), False, _walk(root, exclusion, passed))


def _source_file(path: str, below: str) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError:  # a broken link is listed, and rejected with its reason
        return SourceFile(uri_of_path(path), uri_of_path(below), None, None)
    modified = datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC)
    return SourceFile(uri_of_path(path), uri_of_path(below), status.st_size, modified)


def _walk(root: str, exclusion: Exclusion, passed: PassedOver) -> Iterator[SourceFile]:
    """Every file under a folder by uri; a folder reached again through a link is not walked twice."""
    seen: set[tuple[int, int]] = set()

    def walked(folder: str, below: str) -> Iterator[SourceFile]:
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                names = sorted(filter(None, (_listed(entry, below, exclusion, passed) for entry in found)))
        except OSError as error:
            if not below:
                raise SourceError(
                    f"{folder} cannot be listed ({error.strerror}): give this user the right to read it"
                ) from error
            passed.note_unreadable(uri_of_path(folder), error)
            return
        for name in names:
            there = path_of_uri(name.rstrip("/"))
            path, inside = os.path.join(folder, there), f"{below}{there}"
            if name.endswith("/"):
                yield from walked(path, f"{inside}/")
            else:
                yield _source_file(path, inside)

    return walked(root, "")


def _listed(entry: os.DirEntry, below: str, exclusion: Exclusion, passed: PassedOver) -> str | None:
    """The name of a file or folder as a uri, with a slash for a folder; None if it is passed over.

    A link that leads nowhere, or to itself, is listed as a file. A pipe is passed over, because opening it hangs.
    """
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself, or a file in a folder that may only be listed
        is_folder, is_file = False, False
    if not (is_folder or is_file or not os.path.exists(entry.path)):
        return None
    leftover = leftover_of([entry.name])
    if leftover is not None:
        if is_folder and not os.access(entry.path, os.R_OK | os.X_OK):
            passed.note_unreadable(uri_of_path(entry.path), PermissionError(13, os.strerror(13)))
        elif is_folder or kind_of(entry.name) is not None:
            passed.note_leftover(leftover)
        return None
    name = f"{entry.name}/" if is_folder else entry.name
    if exclusion.covers(f"{below}{name}"):
        passed.excluded += 1
        return None
    return uri_of_path(name)


# In an object store, or wherever fsspec leads


def _remote(source: str, exclusion: Exclusion, passed: PassedOver) -> Walk:
    files, root = file_system(uri_of(source))  # a user's URI is not percent-encoded
    scheme = source.partition("://")[0].lower()
    root = root.rstrip("/")
    pages = _s3_keys(files, root) if "s3" in files.protocol else _walked_keys(files, root, passed)
    keys = _saying_why(pages, source)
    first = next(keys, None)
    name = root.rpartition("/")[2]
    uri = f"{scheme}://{uri_of_path(root)}"
    if first is None:
        try:
            about = files.info(root)
        except FileNotFoundError as error:
            raise SourceError(f"there is nothing at {source}: check the URI") from error
        except Exception as error:  # every file system of fsspec has an error tree of its own
            raise StorageError(explanation(error, source, "read", source)) from error
        if about.get("type") != "file":
            return Walk(uri, name, False, iter(()))
        folder = root.rpartition("/")[0].rpartition("/")[2]
        return Walk(uri, folder, True, iter([_key(scheme, root, f"{folder}/{name}", about)]))
    start = len(root) + 1
    last = ""  # the last leftover folder: its keys are adjacent, so it is counted once

    def taken() -> Iterator[SourceFile]:
        nonlocal last
        for key, about in itertools.chain([first], keys):
            below = key[start:]
            steps = below.split("/")
            leftover = leftover_of(steps)
            if leftover is not None:
                place = "/".join(steps[: steps.index(leftover) + 1])
                if place != last and (len(steps) > steps.index(leftover) + 1 or kind_of(key) is not None):
                    passed.note_leftover(leftover)
                last = place
            elif exclusion.covers(below):
                passed.excluded += 1
            else:
                yield _key(scheme, key, below, about)

    return Walk(uri, name, False, taken())


def _key(scheme: str, key: str, below: str, about: dict[str, Any]) -> SourceFile:
    modified = about.get("LastModified") or about.get("mtime") or about.get("last_modified") or about.get("updated")
    if isinstance(modified, str):
        modified = datetime.datetime.fromisoformat(modified)
    elif isinstance(modified, int | float):
        modified = datetime.datetime.fromtimestamp(modified, datetime.UTC)
    if modified is not None and modified.tzinfo is None:
        modified = modified.replace(tzinfo=datetime.UTC)
    size = about.get("Size", about.get("size"))
    return SourceFile(f"{scheme}://{uri_of_path(key)}", uri_of_path(below), size, modified)


def _s3_keys(files: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys, page by page. s3fs's own `find` would hold every key in memory."""
    bucket, _, prefix = root.partition("/")
    page: dict[str, Any] = {"IsTruncated": True}
    while page.get("IsTruncated"):
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else {}
        page = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", **more)
        for about in page.get("Contents", []):
            if not about["Key"].endswith("/"):  # consoles make such keys for folders
                yield f"{bucket}/{about['Key']}", about


def _walked_keys(files: Any, root: str, passed: PassedOver) -> Iterator[tuple[str, dict[str, Any]]]:
    def note(error: OSError) -> None:  # by default fsspec passes over such folders silently
        if not isinstance(error, FileNotFoundError):
            passed.unreadable[str(error.filename or root)] = error.strerror or str(error)

    for _, _, found in files.walk(root, detail=True, on_error=note):
        for about in sorted(found.values(), key=lambda about: str(about["name"])):
            if not about["name"].endswith("/"):
                yield about["name"], about


def _saying_why(keys: Iterator[tuple[str, dict[str, Any]]], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield from keys
    except FileNotFoundError as error:
        if code_of(error) == "NoSuchBucket":
            raise StorageError(explanation(error, source, "list", source)) from error
        return  # there is nothing of this name
    except Exception as error:  # every file system of fsspec has an error tree of its own
        raise StorageError(explanation(error, source, "list", source)) from error
