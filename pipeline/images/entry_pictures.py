"""The picture of an entry: its image made small, for everybody who may read the memory.

Only a file is read that an add read for the entry, or that lies below a folder that was named for pictures. The sha256
of its bytes must be that of the entry before anything is decoded. The bytes read, the time and the size of a picture
are limited, because anybody may ask.
"""

import hashlib
import os
from collections.abc import Sequence

from pipeline.errors import UsageError
from pipeline.images.containers.parquet_rows import read_row
from pipeline.images.containers.tar_links import find_member
from pipeline.images.decoding.decode import Rejected, decode, dimensions
from pipeline.images.decoding.thumbnails import thumbnail
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import path_of_uri, split_member, uri_of
from pipeline.images.reading.bounded import KEEP, STORES, Bound, BoundedFile
from pipeline.store.lookup.originals import Original, is_below

READ_BYTES = 160 << 20  # for one picture: a page of a Parquet file, and what is read to find it
SECONDS = 10.0
MAX_PIXELS = 50_000_000  # the same limit as for an image in a question

Roots = tuple[str, ...]


def roots_of(places: Sequence[str]) -> Roots:
    """The uris of folders, or prefixes of a store, whose images may be shown. Raises UsageError for other places."""
    roots = []
    for place in places:
        uri = uri_of(place)
        if not uri.startswith(("/", *STORES)):
            raise UsageError(f"`pictures` {place} cannot be read from: give a folder, s3://BUCKET/FOLDER or gs://…")
        if uri.startswith("/"):
            path = os.path.realpath(path_of_uri(uri))
            if not os.path.isdir(path):
                raise UsageError(f"`pictures` {place} is no folder: give one that holds images")
            uri = uri_of(path)
        roots.append(uri.rstrip("/") or "/")
    return tuple(dict.fromkeys(roots))


def picture_of(
    original: Original, pixels: int, *, roots: Roots = (), bound: Bound | None = None, max_pixels: int = MAX_PIXELS
) -> bytes:
    """A JPEG of an entry's image, at most `pixels` a side, from where an add read it or from below `roots`.

    Raises Rejected with the reason. The reason may name files of this machine, so it is for its owners only.
    """
    bound = bound or Bound(READ_BYTES, SECONDS)
    data = _bytes_of(original, roots, bound)
    if hashlib.sha256(data).hexdigest() != original.sha256:
        raise Rejected("read", "its file is not the one that was remembered")
    return small_picture(data, pixels, max_pixels)


def small_picture(data: bytes, pixels: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image file as a JPEG at most `pixels` a side. Raises Rejected."""
    width, height = dimensions(data)
    if width * height > max_pixels:
        raise Rejected("decode", f"{width:,} x {height:,} pixels are too many to be shown: {KEEP}")
    return thumbnail(decode(data, pixels).image, pixels)


def picture_at(uri: str, pixels: int) -> bytes:
    """A JPEG of the image at a uri that the user named, of this machine or a store. Raises Rejected."""
    return small_picture(read_image(uri), pixels)


def read_image(uri: str, bound: Bound | None = None) -> bytes:
    """The bytes of the image at a uri, a file or a member of a container. Raises Rejected."""
    container, member = split_member(uri)
    kind = "file" if member is None else kind_of(container) or "tar"
    if kind == "npy":
        raise Rejected("read", "it was given as a vector, without an image")
    return _read(Original(uri, "", "parquet" if kind == "parquet" else "file"), bound or Bound(READ_BYTES, SECONDS))


def _bytes_of(original: Original, roots: Roots, bound: Bound) -> bytes:
    if original.uri.startswith("sha256:"):
        raise Rejected("read", "it was taught as bytes, and no thumbnail was kept")
    if not original.uri.startswith(("/", "file://", *STORES)):
        remote = "://" in original.uri
        raise Rejected("read", "it is of no file or store" if remote else "its uri is not that of a file")
    if original.read_from == "named":
        if not _is_below(original.uri, roots):
            given = "it was given as a vector" if original.vector else "it was not read from its uri"
            raise Rejected("read", f"{given}, and no thumbnail was kept")
        return read_image(original.uri, bound)
    return _read(original, bound)


def _is_below(uri: str, roots: Roots) -> bool:
    """Whether the file at a uri lies below one of the roots, after links are resolved."""
    if not uri.startswith("/"):
        return any(is_below(uri, root) for root in roots if not root.startswith("/"))
    container, _ = split_member(uri)
    try:
        path = os.path.realpath(path_of_uri(container))
    except (OSError, ValueError):  # a NUL in it, or too long
        return False
    return any(is_below(uri_of(path), root) for root in roots)


def _read(original: Original, bound: Bound) -> bytes:
    container, member = split_member(original.uri)
    with BoundedFile(container, bound) as file:
        if original.offset is not None and original.num_bytes is not None:
            return file.image(original.offset, original.num_bytes)
        if member is None:
            return file.image()
        if original.read_from == "parquet":
            return read_row(file, container, member)
        return find_member(file, member)
