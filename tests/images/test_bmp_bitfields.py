"""BMPs whose colours lie where masks say."""

import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding.decode import Rejected, decode, dimensions
from tests.images.pictures import gradient

LAYOUTS = {  # bits of a pixel; masks of red, green, blue, alpha
    "5-6-5": (16, (0xF800, 0x7E0, 0x1F, 0)),
    "5-5-5": (16, (0x7C00, 0x3E0, 0x1F, 0)),
    "1-5-5-5": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "4-4-4": (16, (0xF00, 0xF0, 0xF, 0)),
    "4-4-4-4": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "8-8-8": (32, (0xFF0000, 0xFF00, 0xFF, 0)),
    "8-8-8-8": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "10-10-10": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0)),
    "2-10-10-10": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
    "11-11-10": (32, (0x7FF, 0x3FF800, 0xFFC00000, 0)),
}


def rgba(width: int = 37, height: int = 23) -> Image.Image:
    picture = gradient(width, height).convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)))
    return picture


def bitfields(image: Image.Image, bits: int, masks: tuple[int, ...], *, top_down: bool) -> bytes:
    shares = np.asarray(image) / 255.0
    pixels = np.zeros(shares.shape[:2], np.uint64)
    for channel, mask in enumerate(masks):
        if mask:
            low = mask & -mask
            pixels |= np.floor(shares[:, :, channel] * (mask // low) + 0.5).astype(np.uint64) * np.uint64(low)
    rows = [row.astype(f"<u{bits // 8}").tobytes() for row in (pixels if top_down else pixels[::-1])]
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    height = -image.height if top_down else image.height
    header = struct.pack("<IiiHHIIiiII", 108, image.width, height, 1, bits, 3, len(body), 0, 0, 0, 0)
    header += struct.pack("<4I", *masks) + bytes(108 - 56)
    return b"BM" + struct.pack("<IHHI", 122 + len(body), 0, 0, 122) + header + body


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_colours_and_alpha_lie_where_masks_say(layout: str, top_down: bool) -> None:
    bits, masks = LAYOUTS[layout]
    data = bitfields(rgba(), bits, masks, top_down=top_down)
    values = np.asarray(rgba()) / 255.0
    tops = [mask // (mask & -mask) if mask else 1 for mask in masks]
    stored = np.floor(values * tops + 0.5) / tops
    alpha = stored[:, :, 3:] if masks[3] else 1.0
    expected = (stored[:, :, :3] * alpha + 1 - alpha) * 255
    most = 9 if layout in ("5-6-5", "5-5-5") else 1  # Pillow reads these, and does not round
    assert np.abs(np.asarray(decode(data).image) - expected).max() <= most
    assert dimensions(data) == (37, 23)


def test_what_cannot_be_read_says_why() -> None:
    data = bitfields(rgba(), 16, LAYOUTS["4-4-4"][1], top_down=False)
    with pytest.raises(Rejected, match="the BMP is truncated"):
        decode(data[:-50])
    with pytest.raises(Rejected, match="masks 0x0, 0x0, 0x0, 0x0 is not known"):
        decode(bitfields(rgba(), 16, (0, 0, 0, 0), top_down=False))
    with pytest.raises(Rejected, match="pixels"):
        decode(data[:18] + struct.pack("<ii", 100_000, 100_000) + data[26:])
