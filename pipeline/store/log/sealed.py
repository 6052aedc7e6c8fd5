"""The bytes of a version file: JSON, sealed by the sha256 of all bytes before it, and compressed if it is long.

A version of a billion entries names 61,035 files of entries, with 222 bytes for each as JSON, of which the hash takes
64. Compressed and in base64 it takes 74. The document stays JSON with the format in front, so that an earlier release
says which format it is.
"""

import base64
import hashlib

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.store.values import Count, Hexadecimal

PACKED_FROM = 256 << 10  # bytes: below, a version file can be read with the naked eye
MOST_BYTES = 1 << 30  # of a document: more than `read` accepts of a version file that is not compressed


class Written(BaseModel):
    """The format of a version file; other fields are ignored.

    A compressed one has the document in `zstd` (base64), whose length was `num_bytes`, and the nonce of a commit.
    """

    model_config = ConfigDict(extra="ignore")

    format: int
    nonce: Hexadecimal | None = None
    num_bytes: Count = 0
    zstd: str | None = None


def sealed(document: bytes, written_as: int, nonce: str | None = None) -> bytes:
    """A version file: JSON whose last field is the sha256 of all bytes before it, so that any change is detected.

    `written_as` is the format of the document, a JSON object. CPU: 30 ms for 13.6 MB of JSON to be compressed, beside
    the 70 ms that it takes to write it.
    """
    body = document[:-1].rstrip()
    if len(body) >= PACKED_FROM:
        packed = base64.b64encode(pa.compress(document, codec="zstd", asbytes=True)).decode()
        written = Written(format=written_as, nonce=nonce, num_bytes=len(document), zstd=packed)
        body = written.model_dump_json(exclude_none=True).encode()[:-1]
    return body + seal(body)


def unsealed(data: bytes, written: Written) -> bytes:
    """The document in a version file. Raises ValueError if the file was altered."""
    body = data[: -len(seal(b""))]
    if seal(body) != data[len(body) :]:
        raise ValueError("the seal does not fit")
    return body + b"\n}" if written.zstd is None else _unpacked(written)


def plain_text(data: bytes) -> bytes:
    """The text of a version file, whether or not it is compressed or whole; for a search."""
    try:
        written = Written.model_validate_json(data)
        return data if written.zstd is None else _unpacked(written)
    except ValueError:
        return data


def _unpacked(written: Written) -> bytes:
    if not 0 < written.num_bytes <= MOST_BYTES:
        raise ValueError(f"a document of {written.num_bytes} bytes is too long")
    try:
        packed = base64.b64decode(written.zstd or "", validate=True)
        return bytes(pa.decompress(packed, decompressed_size=written.num_bytes, codec="zstd", asbytes=True))
    except (OSError, pa.ArrowException) as error:
        raise ValueError("it is not compressed as told") from error


def seal(body: bytes) -> bytes:
    """The end of a version file that begins with `body`."""
    return b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}'
