"""Uris of images: a path with "%" and "#" percent-encoded, so that "#" is free to point inside a container.

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


def printable(name: str) -> str:
    """A file name as a label or a dataset's name: as it is, but for undecodable bytes, which are percent-encoded."""
    return _UNDECODABLE.sub(lambda found: f"%{os.fsencode(found[0])[0]:02X}", name)


def path_of_uri(uri: str) -> str:
    """The local path of an image's uri: the inverse of `uri_of_path`."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(uri))
