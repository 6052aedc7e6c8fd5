"""JPEG files that lack their end marker: whole files get one, truncated files are refused.

A file is whole if it has every coefficient of every component, to full precision, before its last byte. The scan
headers list the coefficients. The last scan is tested: the file is decoded with two different continuations, bit by bit
the opposite of each other. The scan is complete if no pixel differs. libjpeg itself cannot tell, because it silently
fills in missing data.
"""

import hashlib
import io
import re
import struct
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.images.decoding.passes import MAX_SCANS, MAX_SEGMENTS

START = b"\xff\xd8\xff"
END = b"\xff\xd9"
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_ARITHMETIC = (0xC9, 0xCA)
_START_OF_SCAN = 0xDA
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed 0xFF nor a restart
_RANDOM = np.random.default_rng(0).integers(1, 255, 256, dtype=np.uint8)  # no byte is 0xFF, and no opposite of one is
_FILLS = (_RANDOM.tobytes(), (255 - _RANDOM).tobytes())
DECODED = 8  # times a file may be decoded before its end is known
_PIXELS_AT_ONCE = 1 << 20
_KEPT_APPLICATIONS = {0xE0: 16, 0xE1: 8, 0xEE: 14}  # JFIF, Exif and Adobe's, with their least number of bytes


@dataclass
class _Headers:
    """The headers of a file; `missing` has the bits of precision that each coefficient lacks, by component."""

    is_arithmetic: bool = False
    is_progressive: bool = False
    has_scan: bool = False
    has_end: bool = False
    missing: dict[int, list[int]] = field(default_factory=dict)


def lost_its_end(data: bytes) -> bool:
    """Whether a JPEG ends in zeros and has no end marker after its pixels. Reads few bytes of other files.

    libjpeg takes the zeros for pixels, so that a file seems whole if it was cut and filled with zeros to its length.
    """
    return data.endswith(b"\0") and data.startswith(START) and not _headers(data).has_end


def with_end(data: bytes) -> bytes:
    """The file up to its last coefficient, and an end marker. Raises ValueError if coefficients are missing."""
    headers = _headers(data)
    if headers.is_arithmetic:
        raise ValueError("image file is truncated: its end marker is missing, and it is arithmetic-coded")
    if not headers.has_scan:
        raise ValueError("image file is truncated: it ends before its pixels")
    if any(map(any, headers.missing.values())):
        raise ValueError("image file is truncated: scans are missing")
    body = data.rstrip(b"\0\xff")
    tail = data[len(body) :]
    candidates = [body]
    if b"\0" in tail:  # the last byte of pixels may be 0; 0xFF is pixels if a zero follows, else half a marker
        candidates.append(body + (b"\xff\0" if tail.startswith(b"\xff") else b"\0"))
    for candidate in candidates:
        if _is_complete(candidate):
            return candidate + END
    # More zeros may be pixels, because even colours often have the code 0. Then the picture ends with the file.
    body = data.rstrip(b"\xff")
    if body.endswith(b"\0\0") and _is_complete(body) and not _is_complete(body[:-1]):
        return body + END
    raise ValueError("image file is truncated: its last scan is not complete")


def without_applications(data: bytes) -> bytes:
    """The same picture without comments and application segments, except for JFIF, Exif and Adobe."""
    kept, at = [START[:2]], 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:  # junk between segments, which libjpeg passes over
            at += 1
            continue
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == _START_OF_SCAN:
            break
        stop = at + 2 if marker in _ALONE else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        is_application = 0xE0 <= marker <= 0xEF and stop - at < 2 + _KEPT_APPLICATIONS.get(marker, 1 << 16)
        if not is_application and marker != 0xFE:
            kept.append(data[at:stop])
        at = stop
    return b"".join([*kept, data[at:]])


def _is_complete(body: bytes) -> bool:
    one, other = (_hash_of_pixels(body + _continuation(body, fill) + END) for fill in _FILLS)
    return one == other


def _continuation(body: bytes, fill: bytes) -> bytes:
    """Bytes that would be pixels if any were missing, in this restart interval or in later ones."""
    newest = max(range(8), key=lambda number: body.rfind(bytes([0xFF, 0xD0 + number])))
    first = newest + 1 if bytes([0xFF, 0xD0 + newest]) in body else 0
    return fill + b"".join(bytes([0xFF, 0xD0 + number % 8]) + fill for number in range(first, first + 8))


def _hash_of_pixels(data: bytes) -> bytes:
    """The sha256 of the pixels as stored. A few rows at a time are copied."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        width, height = image.size
        found, step = hashlib.sha256(), max(1, _PIXELS_AT_ONCE // width)
        for top in range(0, height, step):
            found.update(image.crop((0, top, width, min(top + step, height))).tobytes())
        return found.digest()


def _headers(data: bytes) -> _Headers:
    found, at = _Headers(), 2
    for _ in range(MAX_SEGMENTS + MAX_SCANS):
        next_marker = _NEXT_MARKER.search(data, at)
        if next_marker is None:
            break
        at = next_marker.start()
        marker = data[at + 1]
        if marker == END[1]:
            found.has_end = found.has_scan
            break
        at += 2
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        segment = data[at + 2 : at + length]
        try:
            _note(found, marker, segment)
        except (IndexError, struct.error):
            break  # the file ends inside a header
        at += max(length, 2)
    return found


def _note(found: _Headers, marker: int, segment: bytes) -> None:
    if marker in (*_SEQUENTIAL, _PROGRESSIVE, *_ARITHMETIC):
        found.is_arithmetic = marker in _ARITHMETIC
        found.is_progressive = marker == _PROGRESSIVE
        found.missing = {segment[6 + 3 * i]: [8] * 64 for i in range(segment[5])}
    elif marker == _START_OF_SCAN:
        num_components = segment[0]
        first, last, precision = struct.unpack_from("3B", segment, 1 + 2 * num_components)
        if not found.is_progressive:  # one scan has all coefficients of its components, whatever its header says
            first, last, precision = 0, 63, 0
        for component in segment[1 : 1 + 2 * num_components : 2]:
            if component in found.missing:
                levels = found.missing[component]
                levels[first : min(last, 63) + 1] = [precision & 15] * (min(last, 63) + 1 - first)
        found.has_scan = True
