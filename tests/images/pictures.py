"""Image files of every kind the tests need, made on the spot."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards, blue is constant."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 90)], axis=2).astype(np.uint8))


def png_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG, with the right CRC unless another is given."""
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(rows: list[bytes], width: int, depth: int, colour_type: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of unfiltered rows, packed at the depth of the file, with whole chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", pixels) + after + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def packed(values_HW: np.ndarray, bits: int) -> list[bytes]:
    """The rows of whole numbers as PNG and TIFF pack them, each from a new byte."""
    places = np.arange(bits)[::-1]
    return [np.packbits((row[:, None] >> places) & 1).tobytes() for row in values_HW.astype(np.int64)]


def tiff(strips: list[bytes], tags: dict[int, int | tuple[int, ...]], byte_order: str = "<") -> bytes:
    """A TIFF of strips one after another; all tags but those of the strips are given, as numbers of 32 bits."""
    places = np.cumsum([8, *map(len, strips)])
    tags = {**tags, 273: tuple(places[:-1].tolist()), 279: tuple(map(len, strips))}
    directory, far, behind = b"", b"", int(places[-1]) + 2 + 12 * len(tags) + 4
    for tag, given in sorted(tags.items()):
        values = given if isinstance(given, tuple) else (given,)
        body = struct.pack(f"{byte_order}{len(values)}I", *values)
        if len(values) > 1:
            far, body = far + body, struct.pack(f"{byte_order}I", behind + len(far))
        directory += struct.pack(f"{byte_order}HHI", tag, 4, len(values)) + body
    header = struct.pack(f"{byte_order}2sHI", b"II" if byte_order == "<" else b"MM", 42, int(places[-1]))
    count = struct.pack(f"{byte_order}H", len(tags))
    return header + b"".join(strips) + count + directory + b"\0\0\0\0" + far


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes that claims to be side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + png_chunk(b"IEND", b"")
    )


def write_assortment(folder: Path) -> dict[str, bool]:
    """Good and bad files as a camera roll has them; whether each can become an entry, by name."""
    picture = gradient()
    grey16 = Image.fromarray(np.linspace(0, 65_535, 40 * 60).astype(np.uint16).reshape(40, 60))
    frames = [picture, Image.new("RGB", picture.size, "black")]
    jpeg = encoded(picture, "JPEG")
    files = {
        "plain.jpg": (jpeg, True),
        "UPPER.JPEG": (jpeg, True),
        "picture.png": (encoded(picture, "PNG"), True),
        "picture.webp": (encoded(picture, "WEBP"), True),
        "picture.bmp": (encoded(picture, "BMP"), True),
        "picture.tiff": (encoded(picture, "TIFF"), True),
        "cmyk.jpg": (encoded(picture.convert("CMYK"), "JPEG"), True),
        "grey16.png": (encoded(grey16, "PNG"), True),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], False),
        "zero.jpg": (b"", False),
        "text.jpg": (b"this is not an image\n", False),
        "bomb.png": (bomb(), False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: good for name, (_, good) in files.items()}
