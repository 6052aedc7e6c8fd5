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


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes that claims to be side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
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
