"""The passes over its pixels that decoding an image file takes, known from its headers before anything is decoded.

A few bytes can cause hours of work: a progressive JPEG takes a pass over all pixels for each of its scans, even an
empty one, and headers of many small pieces are read piece by piece. Each limit here is far beyond what programs write.
"""

import re
import struct
from collections.abc import Iterator

from pipeline.images.decoding import tag_directories
from pipeline.images.decoding.png_chunks import SIGNATURE

MAX_SCANS = 500  # of a JPEG: what libjpeg-turbo's own programs take for an attack (`djpeg -maxscans 500`)
# Pixels times passes of one image: Pillow's limit of pixels in 16 scans. Programs write 6 to 14 scans.
MAX_PIXELS_PASSED = 16 * 178_956_970
MAX_SEGMENTS = 16_384  # of a JPEG before its pixels: 1 GiB of full segments
MAX_CHUNKS = 1 << 17  # of a PNG: 1 GiB of chunks of the size that libpng writes
MAX_BESIDE_BYTES = 4 << 20  # of data read piece by piece: EXIF in several segments, junk, comments of a GIF
RLE_PASSES = 64  # Pillow unpacks a run-length encoded BMP in Python, some 60 times as slowly as others

_END_OF_IMAGE, _START_OF_SCAN, _APPLICATION_1, _APPLICATION_2 = 0xD9, 0xDA, 0xE1, 0xE2
_SCAN = b"\xff\xda"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed 0xFF nor a restart
_GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, a picture, or the end
_RUN_LENGTHS = (1, 2)  # of a BMP's compressions


def passes_over(data: bytes) -> int:
    """The passes of decoding over the pixels of the file's first picture: 1 for most files.

    Raises ValueError with the reason if reading the headers alone would take long, or if the scans are too many. A
    damaged file, or one that is no image, counts as 1: its decoder reports that.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _scans_of_jpeg(data)
    if data.startswith(SIGNATURE):
        _refuse_png_of_crumbs(data)
    elif data.startswith(b"GIF8"):
        _refuse_gif_of_crumbs(data)
    elif data.startswith(b"BM"):
        return _passes_of_bmp(data)
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        tag_directories.refuse_bomb(data, "TIFF")
    return 1


def refuse_work(width: int, height: int, passes: int) -> None:
    """Raise ValueError if pixels times passes are more than MAX_PIXELS_PASSED."""
    if passes * width * height > MAX_PIXELS_PASSED:
        raise ValueError(
            f"{passes:,} passes over {width} x {height} pixels are more than {MAX_PIXELS_PASSED:,} pixels in all"
        )


def _scans_of_jpeg(data: bytes) -> int:
    num_components, junk, end = 0, 0, 2
    is_progressive = False
    first_scan = None
    exif: list[bytes] = []
    for number, (marker, start, stop) in enumerate(segments(data)):
        junk += start - 4 - end
        end = stop
        if number > MAX_SEGMENTS or junk > MAX_BESIDE_BYTES:
            raise ValueError(f"the JPEG has more than {MAX_SEGMENTS:,} segments, or junk between them")
        if marker == _START_OF_SCAN:
            first_scan = start
            break
        if marker in _FRAMES and stop - start >= 6:
            num_components, is_progressive = data[start + 5], marker & 3 == 2
        elif marker == _APPLICATION_1 and data.startswith(b"Exif\0\0", start):
            exif.append(data[start + 6 : stop])
        elif marker == _APPLICATION_2 and data.startswith(b"MPF\0", start):
            tag_directories.refuse_bomb(data[start + 4 : stop], "JPEG's list of pictures")
    _refuse_exif(exif)
    if first_scan is None or (not is_progressive and data[first_scan : first_scan + 1] == bytes([num_components])):
        return 1  # libjpeg reads no further
    scans = data.count(_SCAN, first_scan) + 1
    if scans > MAX_SCANS:  # some may be bytes within segments, or scans of other pictures after this one
        scans = _counted(data)
    return scans


def _refuse_exif(parts: list[bytes]) -> None:
    if sum(map(len, parts)) > MAX_BESIDE_BYTES:
        raise ValueError(f"the JPEG has more than {MAX_BESIDE_BYTES >> 20} MiB of EXIF")
    if parts:
        tag_directories.refuse_bomb(b"".join(parts), "JPEG's EXIF")


def _counted(data: bytes) -> int:
    """The number of scans of the first picture. Raises ValueError if it is beyond the limits."""
    scans = 0
    for number, (marker, _, _) in enumerate(segments(data)):
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS or number > MAX_SEGMENTS:
            raise ValueError(f"the JPEG has more than {MAX_SCANS} scans, each of them a pass over its pixels")
    return scans


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment of a JPEG's first picture, and where its contents begin and end."""
    at = 2
    while (found := _NEXT_MARKER.search(data, at)) is not None:
        at = found.start() + 2
        marker = data[at - 1]
        if marker == _END_OF_IMAGE:
            return
        if marker not in _ALONE:
            length = max(int.from_bytes(data[at : at + 2], "big"), 2)
            yield marker, at + 2, at + length
            at += length


def _refuse_png_of_crumbs(data: bytes) -> None:
    if len(data) < 12 * MAX_CHUNKS:
        return
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise ValueError(f"the PNG has more than {MAX_CHUNKS:,} chunks")


def _refuse_gif_of_crumbs(data: bytes) -> None:
    """Raise ValueError for long comments or junk: Pillow copies a comment for each block, and skips junk bytewise."""
    if len(data) < MAX_BESIDE_BYTES:
        return
    at = first = 13 + _colour_table_bytes(data[10:11])
    while at - first <= MAX_BESIDE_BYTES:
        found = _GIF_BLOCK.search(data, at, first + MAX_BESIDE_BYTES + 1)
        if found is None:
            at = first + MAX_BESIDE_BYTES + 1
        elif found[0] != b"!":
            return
        else:
            at = found.end() + 1
            while at - first <= MAX_BESIDE_BYTES and (size := int.from_bytes(data[at : at + 1], "big")):
                at += 1 + size
            at += 1
    raise ValueError(f"the GIF has more than {MAX_BESIDE_BYTES >> 20} MiB of comments or junk before its picture")


def _colour_table_bytes(flags: bytes) -> int:
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 128 else 0


def _passes_of_bmp(data: bytes) -> int:
    if len(data) < 34 or struct.unpack_from("<I", data, 14)[0] < 40:
        return 1
    width, height = struct.unpack_from("<ii", data, 18)
    if struct.unpack_from("<I", data, 30)[0] not in _RUN_LENGTHS:
        return 1
    if len(data) > MAX_BESIDE_BYTES + 4 * abs(width * height):
        raise ValueError("the run-length encoded BMP has many times the codes that its pixels need")
    return RLE_PASSES
