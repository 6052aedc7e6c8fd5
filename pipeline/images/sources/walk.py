"""Every file of a source: on this machine, in an object store, or anywhere fsspec reaches.

On this machine they come in the order of their uris. A folder that cannot be listed is noted, and the walk goes on;
only for the source itself it ends. Leftovers, hidden files and what the user excludes are noted and passed over.
"""

import datetime
import os
import re
from collections.abc import Iterator

from pipeline.errors import SourceError
from pipeline.images.decoding.decode import Rejected
from pipeline.images.names.leftovers import Exclusion, PassedOver, leftover_of
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import path_of_uri, uri_of_path
from pipeline.images.reading.files import file_system, is_remote, retrying
from pipeline.images.sources.listing_record import ListingRecord
from pipeline.images.sources.source_files import SourceFile, Walk
from pipeline.images.sources.stores import file_of_key, walk_store
from pipeline.store.storage.open_storage import refuse_secrets


def walk_source(source: str, exclusion: Exclusion, passed: PassedOver, record: ListingRecord | None = None) -> Walk:
    """The files of a source, listed lazily. What is passed over is noted in `passed`, pages of S3 in `record`.

    Raises SourceError for a source that is missing or unreadable, UsageError for one with a secret in its uri, and
    StorageError if its store cannot be reached.
    """
    refuse_secrets(source)
    if re.match(r"https?://", source, re.IGNORECASE):
        raise SourceError(f"{source} is on the web, where nothing can be listed: fetch it, and add the folder or file")
    if is_remote(source):
        return walk_store(source, exclusion, passed, record)
    return _local(source, exclusion, passed)


def one_file(uri: str) -> SourceFile | None:
    """A file that lies outside of the source; None if it does not exist."""
    if not is_remote(uri):
        path = path_of_uri(uri)
        return _source_file(path, path) if os.path.isfile(path) else None
    files, path = file_system(uri)
    try:
        return file_of_key(uri.partition("://")[0], path, path, retrying(lambda: files.info(path), uri))
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
