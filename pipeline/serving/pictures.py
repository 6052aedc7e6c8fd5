"""The picture of an entry, as a server may give it out: made small, and of nothing but what was remembered."""

import hashlib

from pipeline.errors import SourceError, StorageError
from pipeline.images.containers import read_image
from pipeline.images.decode import Rejected, decode
from pipeline.images.thumbnails import thumbnail
from pipeline.serving.group import Entry

PICTURE_PIXELS = 512  # a side
FETCHED_FROM = ("s3://", "s3a://", "gs://", "gcs://", "file://", "/")  # stores and files; no address of the network


def picture_of(entry: Entry) -> bytes | None:
    """A JPEG of an entry: from its source while that has the bytes it was remembered by, else its thumbnail.

    None where there is neither. A uri comes from whoever added the entry: what it names is shown only if its hash is
    the entry's, and it is asked of no other place than where memories and sources lie.
    """
    if entry.uri.startswith(FETCHED_FROM):
        try:
            data = read_image(entry.uri)
            if hashlib.sha256(data).hexdigest() == entry.sha256:
                return thumbnail(decode(data).image, PICTURE_PIXELS)
        except (Rejected, SourceError, StorageError):
            pass
    return entry.thumbnail
