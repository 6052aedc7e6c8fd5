"""A PNG reduced to the chunks that make its pixels, for files whose other chunks are damaged or huge.

Browsers and ImageMagick read PNGs with libpng, which passes over a damaged ancillary chunk. Pillow refuses the file.
Pixel data are not mended: a file with a damaged or truncated IDAT is still rejected.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3
_DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT")
_END = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
# Pillow stores these in the same dictionary as the texts of a file: a text of this name changes how pixels are read.
_TAKEN_NAMES = frozenset({"transparency", "interlace", "bbox", "default_image", "disposal", "blend"})


class Chunk(NamedTuple):
    """The place of a chunk in the file: `start` is the offset of its length, `body` the offset of its contents."""

    kind: bytes
    start: int
    body: int
    stop: int
    is_sound: bool  # its CRC is right


def is_png(data: bytes) -> bool:
    """Whether the first bytes are those of a PNG."""
    return data.startswith(SIGNATURE)


def texts_hide_pixels(names: Iterable[str]) -> bool:
    """Whether one of a file's texts has a name that changes how pixels are read."""
    return not _TAKEN_NAMES.isdisjoint(names)


def without_ancillary(data: bytes) -> bytes:
    """The same picture with only the chunks IHDR, PLTE, IDAT, IEND, and tRNS and eXIf if they are sound.

    An animation becomes its default image. Raises ValueError with the reason if the pixels cannot be reached.
    """
    kept = [SIGNATURE]
    seen: dict[bytes, bytes] = {}  # the contents of the first chunk of each kind
    for chunk in _chunks(data):
        if chunk.kind == b"IEND":
            break
        if not seen and chunk.kind != b"IHDR":
            raise ValueError("the PNG does not begin with its header (IHDR)")
        body = data[chunk.body : chunk.stop - 4]
        if chunk.kind in (b"IHDR", b"PLTE"):
            _refuse_damaged(chunk, body)
        if chunk.kind in _CRITICAL or (
            chunk.is_sound and chunk.kind not in seen and _is_of_use(chunk.kind, body, seen)
        ):
            seen.setdefault(chunk.kind, b"" if chunk.kind == b"IDAT" else body)
            kept.append(data[chunk.start : chunk.stop])
    if b"IDAT" not in seen:
        raise ValueError("the PNG has no pixel data (no IDAT chunk)")
    is_cut = kept[-1][4:8] == b"IDAT" and len(kept[-1]) < 12 + int.from_bytes(kept[-1][:4], "big")
    return b"".join(kept if is_cut else [*kept, _END])


def _chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks in their order; the last IDAT may be cut short. Raises ValueError if one before it is broken."""
    start, any_pixels = len(SIGNATURE), False
    while start < len(data):
        header = data[start : start + 8]
        kind = header[4:]
        if len(header) < 8 or not kind.isalpha():
            if any_pixels:
                return  # what follows the pixels is not needed
            raise ValueError(f"the PNG is broken at byte {start}, before its pixel data: no chunk begins there")
        body = start + 8
        stop = body + int.from_bytes(header[:4], "big") + 4
        if stop > len(data) and kind != b"IDAT":
            if any_pixels:
                return
            raise ValueError(f"the PNG ends inside its {kind.decode('latin-1')} chunk, before its pixel data")
        crc = zlib.crc32(memoryview(data)[start + 4 : stop - 4]).to_bytes(4, "big")
        yield Chunk(kind, start, body, stop, data[stop - 4 : stop] == crc)
        any_pixels = any_pixels or kind == b"IDAT"
        start = stop


def _refuse_damaged(chunk: Chunk, body: bytes) -> None:
    if not chunk.is_sound:
        raise ValueError(f"the checksum (CRC) of the PNG's {chunk.kind.decode()} chunk is wrong")
    if chunk.kind == b"IHDR":
        if len(body) != 13:
            raise ValueError(f"the PNG's header has {len(body)} bytes in place of 13")
        depth, colour_type = body[8], body[9]
        if depth not in _DEPTHS.get(colour_type, ()):
            raise ValueError(f"there is no PNG of colour type {colour_type} and {depth} bits")


def _is_of_use(kind: bytes, body: bytes, seen: dict[bytes, bytes]) -> bool:
    """Whether a chunk gives the orientation, or transparent colours that libpng accepts: before the pixels."""
    if kind != b"tRNS":
        return kind == b"eXIf"
    colour_type = seen[b"IHDR"][9]
    if colour_type == PALETTE:
        fits = 0 < len(body) <= len(seen.get(b"PLTE", b"")) // 3
    else:
        fits = len(body) == {GREY: 2, RGB: 6}.get(colour_type)
    return fits and b"IDAT" not in seen
