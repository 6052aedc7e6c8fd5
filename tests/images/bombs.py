"""Small files that ask for much: what an attacker writes. Shapes and counts are the caller's."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg_of_scans(side: int, more: int, *, progressive: bool = True, mode: str = "L") -> bytes:
    """A JPEG whose last scan is repeated, over all of its pixels each time."""
    data = saved(Image.new(mode, (side, side)), "JPEG", progressive=progressive, quality=10)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more + data[-2:]


def jpeg_in_several_scans(side: int, more: int) -> bytes:
    """A sequential JPEG of three components, the first of which comes alone, and over and over again."""
    data = bytearray(saved(Image.new("RGB", (side, side)), "JPEG", subsampling=0, quality=10))
    at = data.index(b"\xff\xda")
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, data[at + 5], data[at + 6], 0, 63, 0)
    return bytes(data[:at]) + (scan + b"\x00" * 8) * (more + 1) + b"\xff\xd9"


def with_segments(data: bytes, segments: list[tuple[int, bytes]]) -> bytes:
    """A JPEG with segments before all others."""
    before = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return data[:2] + before + data[2:]


def with_junk(data: bytes, junk: bytes) -> bytes:
    """A JPEG with junk behind its first segment."""
    at = 4 + int.from_bytes(data[4:6], "big")
    return data[:at] + junk + data[at:]


def directory(tags: list[tuple[int, int, int, int]], length: int = 0) -> bytes:
    """A TIFF of nothing but tags, filled up to a length: each is (tag, type, count, value or place)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + b"\0\0\0\0"
    return data + bytes(max(0, length - len(data)))


def overlapping_tags(num_tags: int, length: int) -> bytes:
    """Tags that all claim the whole file as theirs."""
    return directory([(1_000 + tag, 7, length - 16, 8) for tag in range(num_tags)], length)


def float_tiff(width: int, height: int, rows: int) -> bytes:
    """Zeros as 32-bit floats, in strips of so many rows."""
    strip = zlib.compress(bytes(4 * width * rows), 9)
    num, last = -(-height // rows), height % rows or rows
    tail = zlib.compress(bytes(4 * width * last), 9)
    body = strip * (num - 1) + tail
    offsets = [8 + len(strip) * at for at in range(num)]
    counts = [len(strip)] * (num - 1) + [len(tail)]
    places = struct.pack(f"<{2 * num}I", *offsets, *counts)
    at = 8 + len(body)
    tags = [(256, 1, width), (257, 1, height), (258, 1, 32), (259, 1, 8), (262, 1, 1), (273, num, at), (277, 1, 1)]
    tags += [(278, 1, rows), (279, num, at + 4 * num), (339, 1, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in tags)
    head = struct.pack("<2sHI", b"II", 42, at + len(places))
    return head + body + places + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def tiff_of_jpeg(side: int, more: int) -> bytes:
    """A TIFF of one strip, which is a JPEG whose last scan is repeated."""
    body = jpeg_of_scans(side, more)
    tags = [(256, side), (257, side), (258, 8), (259, 7), (262, 1), (273, 8), (277, 1), (278, side), (279, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def rle_bmp(width: int, height: int, num_rows: int) -> bytes:
    """A run-length encoded BMP of ends of lines, each of which Pillow fills up pixel by pixel."""
    codes = b"\x01\x00\x00\x00" * num_rows + b"\x00\x01"
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(codes), 0, 0, 54 + 1024) + head + bytes(1024) + codes


def gif_with(before: bytes) -> bytes:
    """A GIF of one pixel with something before its picture."""
    data = saved(Image.new("P", (1, 1)), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + before + data[at:]


def gif_comment(num_bytes: int) -> bytes:
    return b"!\xfe" + (b"\xff" + b"x" * 255) * (num_bytes // 255) + b"\0"


def png_of_chunks(num_chunks: int) -> bytes:
    """A PNG with empty chunks before its pixels."""
    data = saved(Image.new("RGB", (4, 4)), "PNG")
    chunk = b"\0\0\0\0abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    return data[:33] + chunk * num_chunks + data[33:]


def with_exif_chunk(exif: bytes) -> bytes:
    """A PNG with EXIF."""
    data = saved(Image.new("RGB", (4, 4), "red"), "PNG")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return data[:33] + chunk + data[33:]


def lossless_webp(side: int) -> bytes:
    return saved(Image.new("RGB", (side, side)), "WEBP", lossless=True)


def ramp(width: int, height: int) -> np.ndarray:
    """float32 [H, W] from 0 to 1."""
    return np.linspace(0, 1, width * height, dtype=np.float32).reshape(height, width)
