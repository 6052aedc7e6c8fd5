"""Uris of images: a path with "%" and "#" percent-encoded, so that "#" can point inside a container.

A file name that is not UTF-8 keeps its bytes: each undecodable byte is percent-encoded too.
"""

import os
import re
import urllib.parse

_RESERVED = re.compile("[%#\udc80-\udcff]")  # the last range: bytes os.fsdecode could not decode
_UNDECODABLE = re.compile("[\udc80-\udcff]")


def uri_of_path(path: str) -> str:
    """The uri under which the image at an absolute local path is remembered."""
    return _RESERVED.sub(lambda found: f"%{os.fsencode(found[0])[0]:02X}", path)


def uri_of(place: str) -> str:
    """The uri of a place that a user names by a path (absolute or relative) or by an unencoded URI of fsspec."""
    scheme, found, key = place.partition("://")
    if found and scheme != "file":
        return f"{scheme}://{uri_of_path(key)}"
    return uri_of_path(os.path.abspath(os.path.expanduser(place.removeprefix("file://"))))


def printable(name: str) -> str:
    """A file name as a label or a dataset's name: unchanged, except that undecodable bytes are percent-encoded."""
    return _UNDECODABLE.sub(lambda found: f"%{os.fsencode(found[0])[0]:02X}", name)


def member_uri(container: str, member: str) -> str:
    """The uri of an image inside a container: "a.tar#folder/one.jpg", "a.parquet#row=17"."""
    return f"{container}#{uri_of_path(member)}"


def split_member(uri: str) -> tuple[str, str | None]:
    """The container's uri and the member's name in an image's uri. The name is None if the image is a file."""
    container, found, member = uri.partition("#")
    return container, path_of_uri(member) if found else None


def path_of_uri(uri: str) -> str:
    """The local path of an image's uri: the inverse of `uri_of_path`."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(uri))
